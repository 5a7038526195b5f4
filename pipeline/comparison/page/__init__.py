"""The HTML page of a comparison: templates, style, script and chart layout."""
