"""Logged models: how one is written to MLflow, and the pyfunc wrapper that travels with it.

The model is a folder of plain files (safetensors, Parquet, YAML, JSON) and this package's source beside it. Nothing
is pickled.
"""

import importlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, Schema, TensorSpec

from pipeline.storage.files import copy_contents

MODEL_NAME = "model"
SERVING_FILE = "serving.json"
PACKAGE = Path(__file__).parent
SERVED_WITH = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors", "torch", "transformers")


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
    return Predictor(importlib.import_module(f"pipeline.tasks.{task}.predict").load(folder))


def log_model(export: Mapping[str, Any], model_id: str) -> None:
    """Log an exported folder (the fields of `pipeline.task.ModelExport`) as the files of the logged model."""
    folder = Path(export["folder"])
    (folder / SERVING_FILE).write_text(json.dumps({"task": export["task"]}) + "\n", encoding="utf-8")
    inputs, example = export["inputs"], export["example"]
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.string)]  # one unnamed column takes lists and Series too
    if inputs is not None:  # Any: a column is an integer, a float or text, as pandas happened to read it
        columns = [ColSpec(AnyType(), name) for name in inputs]  # type: ignore[no-untyped-call]
    outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType[kind], name) for name, kind in export["outputs"].items()]
    with tempfile.TemporaryDirectory() as work:
        code = Path(work) / PACKAGE.name
        copy_contents(PACKAGE, code, skip={"__pycache__"})  # MLflow keeps modes, and an installed package may be closed
        mlflow.pyfunc.log_model(
            name=MODEL_NAME,
            model_id=model_id,
            loader_module="pipeline.serving",
            data_path=str(folder),
            code_paths=[str(code)],
            signature=ModelSignature(inputs=Schema(columns), outputs=Schema(outputs)),
            input_example=example if inputs is None else pd.DataFrame(example),
            pip_requirements=_requirements(),
        )


def _requirements() -> list[str]:
    """The versions this process runs with, of what predicting needs."""
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in SERVED_WITH]
