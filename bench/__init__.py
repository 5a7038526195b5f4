"""Performance figures, measured by `python -m bench`."""
