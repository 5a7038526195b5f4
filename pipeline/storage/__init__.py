"""A run's folder on disk; knows neither MLflow nor training."""
