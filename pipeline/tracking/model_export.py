"""Log a run's model with its files and code, after checking that it can be loaded without the project."""

import contextlib
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from pipeline.errors import UserError
from pipeline.serving import RAW, SERVING_FILE
from pipeline.storage.files import write_json
from pipeline.storage.journal import Record, read_records
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.client import BATCH_POINTS, DIGEST_LENGTH
from pipeline.tracking.model_package import find_roots, write_package

MODEL_NAME = "model"
ORIGIN_TAGS = ("mlflow.source.", "mlflow.user")  # prefixes of a run's tags that its model gets too
PARAMS = ParamSchema([ParamSpec(RAW, DataType.boolean, False)])
ERROR_LINE = re.compile(r"^\w[\w.]*(?:Error|Exception): .*$", re.MULTILINE)  # last line of a traceback
CHECK_SETTINGS = {"MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS": "true", "MLFLOW_UV_AUTO_DETECT": "false"}
HIDDEN_PROJECT = "raise ImportError('a logged model is loaded without the project that trained it')\n"


def log_run_model(client: Any, run_id: str, folder: RunFolder, record: Record) -> None:
    """Log the model of a journal record `model`, unless the run already has it; delete an incomplete one first.

    The model is created explicitly, because MLflow would otherwise read every point of the active run.
    """
    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status == "READY":
            _log_test_metrics(client, run, folder, model.model_id)
            return
        client.delete_logged_model(model.model_id)
    origin = {name: value for name, value in run.data.tags.items() if name.startswith(ORIGIN_TAGS)}

    def create() -> str:
        model = client.create_logged_model(experiment, MODEL_NAME, run_id, origin, run.data.params)
        return str(model.model_id)

    model_id = log_model(record | {"folder": str(folder.folder(record["folder"]))}, create)
    _log_test_metrics(client, run, folder, model_id)


def _log_test_metrics(client: Any, run: Any, folder: RunFolder, model_id: str) -> None:
    """Register the model as an output of the run, and log the test metrics for it, so that MLflow shows them together.

    The store keeps equal points (key, step, time and value) only once, so the run's own history does not change.
    """
    dataset: dict[str, str] = {}
    metrics = []
    for record in read_records(folder.journal):
        if record["op"] == "input":
            dataset = {"dataset_name": record["name"], "dataset_digest": record["digest"][:DIGEST_LENGTH]}
        elif record["op"] in ("metrics", "known"):
            metrics += [Metric(key, float(value), record["time"], record["step"], model_id, **dataset)
                        for key, value in record["values"].items()
                        if key.startswith("test/") and math.isfinite(value)]  # fmt: skip
    for start in range(0, len(metrics), BATCH_POINTS):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH_POINTS])
    outputs = run.outputs.model_outputs if run.outputs else []
    if model_id not in [output.model_id for output in outputs]:
        step = max((metric.step for metric in metrics), default=0)
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step)])


def log_model(export: Mapping[str, Any], create: Callable[[], str]) -> str:
    """Check an exported model and log it; returns the model's id.

    For the check, MLflow loads the model in another process, which cannot import the project, and predicts the input
    example. The packages imported there become the model's requirements.

    Args:
        export: the fields of `pipeline.tasks.base.ModelExport`, and `task` and `predictor`, which is the module of
            `pipeline.tasks.base.predictor_module`.
        create: creates the model in the store and returns its id; called after the check.

    Raises:
        UserError: its code cannot be packaged, or the model cannot be loaded there or fails to predict.
    """
    folder = Path(export["folder"])
    predictor = export["predictor"]
    write_json(folder / SERVING_FILE, {"task": export["task"], "predictor": predictor}, indent=None)
    inputs, example = export["inputs"], export["example"]
    # AnyType, since pandas may read a column as integer, float or text. Without named inputs there is no schema, and
    # MLflow passes the input unchanged: a one-column schema would accept a frame's first column under any name
    columns = None if inputs is None else Schema([ColSpec(AnyType(), name) for name in inputs])  # type: ignore[no-untyped-call]
    outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType[kind], name) for name, kind in export["outputs"].items()]
    with tempfile.TemporaryDirectory() as work:
        try:
            package = write_package(predictor, Path(work))
        except ImportError as error:
            raise UserError(f"the model's code cannot be packaged: {error}") from None
        model: dict[str, Any] = {
            "loader_module": f"{package}.pipeline.serving",
            "data_path": str(folder),
            "code_paths": [str(Path(work) / package)],
            "signature": ModelSignature(columns, Schema(outputs), PARAMS),
            "input_example": example if inputs is None else pd.DataFrame(example),
        }
        with _project_hidden(Path(work), find_roots(predictor)):
            model["pip_requirements"] = _check_model(model, Path(work) / "saved")
            model_id = create()
            mlflow.pyfunc.log_model(name=MODEL_NAME, model_id=model_id, **model)
    return model_id


def _check_model(model: Mapping[str, Any], saved: Path) -> list[str]:
    """Load the model in another process and predict its example; returns the imported packages as requirements."""
    mlflow.pyfunc.save_model(saved, pip_requirements=[], **model)
    (saved / "requirements.txt").unlink()  # saves a second: MLflow would compare it with the installed packages
    try:
        imported = mlflow.models.infer_pip_requirements(str(saved), "python_function")  # type: ignore[no-untyped-call]
    except MlflowException as error:
        if reasons := ERROR_LINE.findall(str(error)):
            raise UserError(f"the model cannot be loaded and used: {reasons[-1]}") from None
        raise
    finally:
        shutil.rmtree(saved)
    plain = {requirement.partition("+")[0] for requirement in imported}  # PyPI has no torch==2.13.0+cpu
    return sorted(plain | {f"mlflow=={mlflow.__version__}"})


@contextlib.contextmanager
def _project_hidden(work: Path, packages: Iterable[str]) -> Iterator[None]:
    """Within the block, processes that MLflow starts can import the model's code but not the packages it is from."""
    (work / "hidden").mkdir()
    for name in packages:
        (work / "hidden" / f"{name}.py").write_text(HIDDEN_PROJECT, encoding="utf-8", newline="\n")
    path, before = list(sys.path), {name: os.environ.get(name) for name in CHECK_SETTINGS}
    sys.path[:0] = [str(work), str(work / "hidden")]
    os.environ |= CHECK_SETTINGS
    try:
        yield
    finally:
        sys.path[:] = path
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
