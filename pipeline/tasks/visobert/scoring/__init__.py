"""What predictions are worth: scores, thresholds, baselines and reports."""
