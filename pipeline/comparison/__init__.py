"""Comparison of runs: loading, selection, verdicts, wording, tables and the page."""
