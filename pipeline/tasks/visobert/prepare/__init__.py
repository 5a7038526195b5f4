"""`data_prep`: what review files hold, as tables, pictures and metrics."""
