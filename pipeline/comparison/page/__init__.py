"""The page of a comparison: templates, style, script, and the shapes of its charts."""
