"""Performance figures, measured in one run each: `python -m bench`."""
