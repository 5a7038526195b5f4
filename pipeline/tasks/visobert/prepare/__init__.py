"""`data_prep`: analysis of review files, as tables, pictures and metrics."""
