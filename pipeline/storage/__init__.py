"""Files of a run's folder, independent of MLflow and of the training loop."""
