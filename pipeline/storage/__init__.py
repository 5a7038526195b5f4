"""A run's folder on disk. Nothing here knows MLflow or training."""
