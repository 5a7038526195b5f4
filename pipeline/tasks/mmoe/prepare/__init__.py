"""Convert raw files to a prepared folder: labels, splits, and the original Ali-CCP files."""
