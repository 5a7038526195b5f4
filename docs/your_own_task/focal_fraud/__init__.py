"""A task for focal-pipeline: which transactions are fraud. This module must not import torch."""

from pathlib import Path

from pipeline.tasks.registry import TaskEntry

ENTRY = TaskEntry(
    about="Fraud classification of transactions with a focal loss behind a warm-up gate.",
    config="focal_fraud.config:FraudConfig",
    make="focal_fraud.task:FraudTask",
    file=str(Path(__file__).parent / "fraud.yaml"),
)
