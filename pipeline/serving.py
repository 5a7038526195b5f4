"""MLflow's entry point to a logged model. A copy of this module is part of the model.

The model is a folder of plain files (safetensors, Parquet, YAML, JSON); nothing is pickled.
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
    """The model behind `mlflow.pyfunc.load_model`."""

    def __init__(self, predict: Callable[..., pd.DataFrame]) -> None:
        self._predict = predict

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Predict. params: `raw` is true for probabilities without calibration."""
        return self._predict(model_input, raw=bool((params or {}).get(RAW, False)))


def load_predictor(task: str, folder: Path) -> Callable[..., pd.DataFrame]:
    """The predict function of a task's exported folder: `predict(input, raw=False)`.

    Raises:
        ValueError: it is not the name of a task.
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
