"""Reading of review files: texts and labels, splits, alpha and batches."""
