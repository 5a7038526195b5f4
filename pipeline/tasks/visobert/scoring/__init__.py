"""Predictions and their scores, thresholds, baselines and reports."""
