"""focal-pipeline: tune focal losses, with every loss component of every run in MLflow."""

__version__ = "0.1.0"
