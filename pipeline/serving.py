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


def load_predictor(module: str, folder: Path) -> Callable[..., pd.DataFrame]:
    """Load the function `predict(input, raw=False)` from the folder that a task exported.

    module: full name of the task's module `predict`. In the code of a logged model, which is a package that holds
    copies of `pipeline` and of the task's package, the copy is loaded.

    Raises:
        ValueError: `module` is not the name of a module `predict`.
    """
    if not re.fullmatch(r"(?:[A-Za-z_]\w*\.)+predict", module):
        raise ValueError(f"predictor {module!r} is not the name of a module `predict` in a package")
    copies = __name__.removesuffix("pipeline.serving")  # "" in the project itself
    predict: Callable[..., pd.DataFrame] = importlib.import_module(copies + module).load(folder)
    return predict


def _load_pyfunc(path: str) -> Predictor:
    """Load the model; called by MLflow."""
    folder = Path(path)
    predictor = json.loads((folder / SERVING_FILE).read_text(encoding="utf-8"))["predictor"]
    return Predictor(load_predictor(predictor, folder))
