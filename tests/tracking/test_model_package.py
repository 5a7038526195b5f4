"""The code that travels with a logged model, and the check that a process without the project can use it."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT, SHRUNK

from pipeline.config.strict_config import load
from pipeline.errors import UserError
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking import model_package
from pipeline.tracking.model_package import write_package

pytestmark = pytest.mark.xdist_group("model package")  # one process imports mlflow

LIBRARIES = {
    "numpy", "pandas", "pyarrow", "pydantic", "pydantic_core", "annotated_types", "yaml", "torch", "safetensors",
    "tokenizers", "transformers", "huggingface_hub",
}  # fmt: skip

SUMS = """
from pathlib import Path
import pandas as pd
from pipeline.sums import total

def load(folder: Path):
    weight = float((folder / "weight.txt").read_text())
    return lambda frame, raw: pd.DataFrame({"sum": total(frame) * weight})
"""


@pytest.mark.parametrize("task", ["mmoe", "visobert"])
def test_package_is_what_predicting_needs(task: str, tmp_path: Path) -> None:
    name = write_package(task, tmp_path)
    assert re.fullmatch(r"focal_model_[0-9a-f]{12}", name)
    files = {file.relative_to(tmp_path / name).as_posix(): file for file in (tmp_path / name).rglob("*.py")}
    assert len([file for file in files if not file.endswith("__init__.py")]) <= 25
    assert not {file.split("/")[0] for file in files} & {"tracking", "training", "runs", "compute"}
    others = {file.split("/")[1] for file in files if file.startswith("tasks/")} - {task, "__init__.py", "base.py"}
    assert not others
    imported = set()
    for file in files.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported |= {str(node.module).split(".")[0]}
    assert imported - set(sys.stdlib_module_names) <= LIBRARIES


def test_models_of_both_tasks_answer_as_the_project_does(
    impressions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, inside a checkout, whose modules they leave alone."""
    for module in [module for module in sys.modules if module.startswith("focal_model_")]:  # of tests that logged one
        monkeypatch.delitem(sys.modules, module)
    mmoe = MmoeTask(load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", SHRUNK | {"data.path": str(impressions)}))
    sizes = {"data.embedded.rows": "100", "data.cache": str(tmp_path / "cache"), "model.embedded.layers": "1"}
    reviews = VisobertTask(load(VisobertConfig, ROOT / "configs/config_multi_embedded.yaml", sizes))
    tasks: dict[str, Any] = {"mmoe": mmoe, "visobert": reviews}
    for name, task in tasks.items():
        torch.manual_seed(1)
        (tmp_path / name).mkdir()
        export = task.export(task.model().eval(), tmp_path / name)
        (export.folder / "serving.json").write_text(json.dumps({"task": export.task}))
        monkeypatch.syspath_prepend(tmp_path / "code")
        serving = importlib.import_module(f"{write_package(name, tmp_path / 'code')}.serving")
        example = export.example if export.inputs is None else pd.DataFrame(export.example)
        own = importlib.import_module(f"pipeline.tasks.{name}.predict").load(export.folder)
        pd.testing.assert_frame_equal(serving._load_pyfunc(str(export.folder)).predict(example), own(example))
        predict = sys.modules[f"{serving.__package__}.tasks.{name}.predict"]
        assert Path(str(predict.__file__)).is_relative_to(tmp_path / "code")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one task, which adds two columns and imports nothing that is slow."""
    project = tmp_path / "pipeline"
    (project / "tasks" / "sums").mkdir(parents=True)
    shutil.copyfile(ROOT / "pipeline" / "serving.py", project / "serving.py")
    (project / "sums.py").write_text("def total(frame):\n    return frame['a'] + frame['b']\n")
    (project / "tasks" / "sums" / "predict.py").write_text(SUMS)
    monkeypatch.setattr(model_package, "PROJECT", project)
    return project


def test_name_follows_the_content(toy: Path, tmp_path: Path) -> None:
    first = write_package("sums", tmp_path / "first")
    assert write_package("sums", tmp_path / "again") == first
    assert "from ...sums import total" in (tmp_path / "first" / first / "tasks" / "sums" / "predict.py").read_text()
    (toy / "sums.py").write_text("def total(frame):\n    return frame['a'] - frame['b']\n")
    assert write_package("sums", tmp_path / "second") != first


@pytest.mark.parametrize(
    ("line", "message"),
    [("from pipeline.nothing import a", r"pipeline\.nothing: no such module"), ("import pipeline.sums", "relative")],
)
def test_import_that_cannot_travel_is_refused(toy: Path, tmp_path: Path, line: str, message: str) -> None:
    (toy / "sums.py").write_text(f"def total(frame):\n    {line}\n")
    with pytest.raises(ImportError, match=message):
        write_package("sums", tmp_path / "package")


def export(toy: Path) -> dict[str, Any]:
    model = toy.parent / "model"
    model.mkdir()
    (model / "weight.txt").write_text("3")
    return {"folder": str(model), "task": "sums", "inputs": ["a", "b"], "outputs": {"sum": "double"},
            "example": {"a": [1.0, 2.0], "b": [10.0, 20.0]}}  # fmt: skip


@pytest.fixture
def log(workplace: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Logs a model to a run of a store of its own, in this process; returns the run's id and its models."""
    import mlflow
    from conftest import store_in

    store_in(workplace, empty_store)
    uri = f"sqlite:///{workplace / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri)

    def log(exported: dict[str, Any]) -> tuple[str, list[Any]]:
        from pipeline.tracking.model_export import MODEL_NAME, log_model

        run_id = client.create_run("0").info.run_id
        log_model(exported, lambda: str(client.create_logged_model("0", MODEL_NAME, run_id).model_id))
        return run_id, client.search_logged_models(["0"])

    return log


def test_model_of_a_package_answers_without_the_project_and_beside_another_version(
    toy: Path, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    path, shown = list(sys.path), export(toy)
    first, _ = log(shown)
    (toy / "sums.py").write_text("def total(frame):\n    return frame['a'] - frame['b']\n")
    second, _ = log(shown)
    assert sys.path == path
    assert "MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS" not in os.environ
    plus, minus = (mlflow.pyfunc.load_model(f"runs:/{run}/model") for run in (first, second))
    assert plus.predict(plus.input_example)["sum"].tolist() == [33.0, 66.0]
    assert minus.predict(minus.input_example)["sum"].tolist() == [-27.0, -54.0]
    folder = Path(mlflow.artifacts.download_artifacts(f"runs:/{first}/model"))
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {"mlflow", "pandas"}
    assert all("==" in line and "+" not in line for line in requirements)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("file", "No such file or directory: .*weight.txt"), ("module", "No module named 'nosuchlibrary'"),
     ("answer", "KeyError: 'c'")],
)  # fmt: skip
def test_model_that_cannot_answer_is_refused_with_the_reason(toy: Path, log: Any, fault: str, reason: str) -> None:
    shown = export(toy)
    if fault == "file":
        (toy.parent / "model" / "weight.txt").unlink()
    else:
        wrong = "import nosuchlibrary\n" if fault == "module" else ""
        (toy / "sums.py").write_text(f"{wrong}def total(frame):\n    return frame['c']\n")
    with pytest.raises(UserError, match=f"^the model cannot be loaded and used: .*{reason}"):
        log(shown)


def test_hidden_project_cannot_be_imported(tmp_path: Path) -> None:
    """What makes the check worth something: a process that MLflow starts would import the project from here."""
    from pipeline.tracking.model_export import _project_hidden

    with _project_hidden(tmp_path):
        code = f"import json, sys; sys.path = json.loads({json.dumps(json.dumps(sys.path))}); import pipeline.errors"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a logged model is loaded without the project that trained it" in done.stderr
