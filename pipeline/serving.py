"""Loader that MLflow calls for a logged model. A copy of this module is packaged with the model.

The model is a folder of safetensors, Parquet, YAML and JSON files; nothing is pickled.
"""

import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

SERVING_FILE = "serving.json"
RAW = "raw"


class Predictor:
    """The model that `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, predict: Callable[..., pd.DataFrame]) -> None:
        self._predict = predict

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Predict. With `raw` true in `params`, the probabilities are not calibrated."""
        return self._predict(model_input, raw=bool((params or {}).get(RAW, False)))


def load_predictor(task: str, folder: Path) -> Callable[..., pd.DataFrame]:
    """Load the function `predict(input, raw=False)` from the folder that a task exported.

    Raises:
        ValueError: `task` is not a valid task name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", task):
        raise ValueError(f"task {task!r} is not the name of a task; allowed: letters a-z, digits and _")
    module = importlib.import_module(f".tasks.{task}.predict", __package__)
    predict: Callable[..., pd.DataFrame] = module.load(folder)
    return predict


def _load_pyfunc(path: str) -> Predictor:
    """Load the model; called by MLflow."""
    folder = Path(path)
    task = json.loads((folder / SERVING_FILE).read_text(encoding="utf-8"))["task"]
    return Predictor(load_predictor(task, folder))
