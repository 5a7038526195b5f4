"""Logging a model: its files, its code, and proof that a process without the project can load it."""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from pipeline.errors import UserError
from pipeline.serving import RAW, SERVING_FILE
from pipeline.tracking.model_package import PROJECT, write_package

MODEL_NAME = "model"
PARAMS = ParamSchema([ParamSpec(RAW, DataType.boolean, False)])
CAUSE = re.compile(r"^\w[\w.]*(?:Error|Exception): .*$", re.MULTILINE)  # the last line of a traceback
NOT_HERE = "raise ImportError('a logged model is loaded without the project that trained it')\n"


def log_model(export: Mapping[str, Any], make: Callable[[], str]) -> str:
    """Log an exported folder (the fields of `pipeline.tasks.base.ModelExport`); returns the model's id.

    make: called once the model has been tried; makes it in the store, and returns its id.

    MLflow loads the model in a process of its own, which cannot import the project, asks it for its example, and
    notes as requirements what was imported.

    Raises:
        UserError: it cannot be loaded there, or does not answer.
    """
    folder = Path(export["folder"])
    (folder / SERVING_FILE).write_text(json.dumps({"task": export["task"]}) + "\n", encoding="utf-8")
    inputs, example = export["inputs"], export["example"]
    # Any: a column is an integer, a float or text, as pandas happened to read it. None: MLflow passes on what it is
    # given; of a frame, a schema of one column would let through the first one, whatever it is called
    columns = None if inputs is None else Schema([ColSpec(AnyType(), name) for name in inputs])  # type: ignore[no-untyped-call]
    outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType[kind], name) for name, kind in export["outputs"].items()]
    with tempfile.TemporaryDirectory() as work:
        package = write_package(export["task"], Path(work))
        model: dict[str, Any] = {
            "loader_module": f"{package}.serving",
            "data_path": str(folder),
            "code_paths": [str(Path(work) / package)],
            "signature": ModelSignature(columns, Schema(outputs), PARAMS),
            "input_example": example if inputs is None else pd.DataFrame(example),
        }
        with _project_hidden(Path(work)):
            model["pip_requirements"] = _check_model(model, Path(work) / "saved")
            model_id = make()
            mlflow.pyfunc.log_model(name=MODEL_NAME, model_id=model_id, **model)
    return model_id


def _check_model(model: Mapping[str, Any], saved: Path) -> list[str]:
    """Load the model in another process and ask it for its example; returns the requirements that it imported there."""
    mlflow.pyfunc.save_model(saved, pip_requirements=[], **model)
    (saved / "requirements.txt").unlink()  # MLflow would compare it with what is installed, for a second
    try:
        found = mlflow.models.infer_pip_requirements(str(saved), "python_function")  # type: ignore[no-untyped-call]
    except MlflowException as error:
        if reasons := CAUSE.findall(str(error)):
            raise UserError(f"the model cannot be loaded and used: {reasons[-1]}") from None
        raise
    finally:
        shutil.rmtree(saved)
    plain = {requirement.partition("+")[0] for requirement in found}  # PyPI has no torch==2.13.0+cpu
    return sorted(plain | {f"mlflow=={mlflow.__version__}"})


@contextlib.contextmanager
def _project_hidden(work: Path) -> Iterator[None]:
    """Let processes that MLflow starts import the model's code, and fail where it imports the project."""
    (work / "hidden").mkdir()
    (work / "hidden" / f"{PROJECT.name}.py").write_text(NOT_HERE, encoding="utf-8")
    path, before = list(sys.path), dict(os.environ)
    sys.path[:0] = [str(work), str(work / "hidden")]
    os.environ |= {"MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS": "true", "MLFLOW_UV_AUTO_DETECT": "false"}
    try:
        yield
    finally:
        sys.path[:] = path
        for name in ("MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS", "MLFLOW_UV_AUTO_DETECT"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
