"""The task `train_visobert`: multi-label aspect sentiment with a global-alpha focal loss."""
