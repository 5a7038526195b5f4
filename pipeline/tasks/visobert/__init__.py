"""Multi-label aspect sentiment with a global-alpha focal loss."""
