"""Arms side by side: results, their wording, tables and the page."""
