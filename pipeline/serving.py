"""How MLflow loads a logged model: this module travels with it, beside what the task's predictor imports.

The model is a folder of plain files (safetensors, Parquet, YAML, JSON). Nothing is pickled.
"""

import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

SERVING_FILE = "serving.json"


class Predictor:
    """What `mlflow.pyfunc.load_model` returns holds one of these."""

    def __init__(self, predict: Callable[[Any], pd.DataFrame]) -> None:
        self._predict = predict

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002
        return self._predict(model_input)


def _load_pyfunc(path: str) -> Predictor:
    """MLflow's entry to a logged model."""
    folder = Path(path)
    task = json.loads((folder / SERVING_FILE).read_text(encoding="utf-8"))["task"]
    if not re.fullmatch(r"[a-z_]+", task):
        raise ValueError(f"{SERVING_FILE}: task {task!r} is not the name of a task")
    return Predictor(importlib.import_module(f".tasks.{task}.predict", __package__).load(folder))
