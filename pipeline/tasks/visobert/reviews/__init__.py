"""Review files as labelled texts, their splits, alpha and batches."""
