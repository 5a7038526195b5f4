"""The code that travels with a logged model, and the check that a process without the project can use it."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT, SHRUNK, only_full

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
    "pyvi",  # only if model.segmenter names it
}  # fmt: skip

SUMS_PREDICT = "pipeline.tasks.sums.predict"
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
    name = write_package(f"pipeline.tasks.{task}.predict", tmp_path)
    assert re.fullmatch(r"focal_model_[0-9a-f]{12}", name)
    assert {path.name for path in (tmp_path / name).iterdir()} == {"__init__.py", "pipeline"}
    project = tmp_path / name / "pipeline"
    files = {file.relative_to(project).as_posix(): file for file in project.rglob("*.py")}
    assert len([file for file in files if not file.endswith("__init__.py")]) <= 30
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
        (export.folder / "serving.json").write_text(json.dumps({"predictor": f"pipeline.tasks.{name}.predict"}))
        monkeypatch.syspath_prepend(tmp_path / "code")
        serving = importlib.import_module(
            f"{write_package(f'pipeline.tasks.{name}.predict', tmp_path / 'code')}.pipeline.serving"
        )
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
    first = write_package(SUMS_PREDICT, tmp_path / "first")
    assert write_package(SUMS_PREDICT, tmp_path / "again") == first
    predict = tmp_path / "first" / first / "pipeline" / "tasks" / "sums" / "predict.py"
    assert "from ....pipeline.sums import total" in predict.read_text()
    (toy / "sums.py").write_text("def total(frame):\n    return frame['a'] - frame['b']\n")
    assert write_package(SUMS_PREDICT, tmp_path / "second") != first


@pytest.mark.parametrize(
    ("line", "message"),
    [("from pipeline.nothing import a", r"pipeline\.nothing: no such module"), ("import pipeline.sums", "relative")],
)
def test_import_that_cannot_travel_is_refused(toy: Path, tmp_path: Path, line: str, message: str) -> None:
    (toy / "sums.py").write_text(f"def total(frame):\n    {line}\n")
    with pytest.raises(ImportError, match=message):
        write_package(SUMS_PREDICT, tmp_path / "package")


def export(toy: Path) -> dict[str, Any]:
    model = toy.parent / "model"
    model.mkdir()
    (model / "weight.txt").write_text("3")
    return {"folder": str(model), "task": "sums", "predictor": SUMS_PREDICT, "inputs": ["a", "b"],
            "outputs": {"sum": "double"}, "example": {"a": [1.0, 2.0], "b": [10.0, 20.0]}}  # fmt: skip


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
    [
        ("module", "No module named 'nosuchlibrary'"),
        pytest.param("file", "No such file or directory: .*weight.txt", marks=[only_full, pytest.mark.faults]),
        pytest.param("answer", "KeyError: 'c'", marks=[only_full, pytest.mark.faults]),
    ],
)
def test_model_that_cannot_answer_is_refused_with_the_reason(toy: Path, log: Any, fault: str, reason: str) -> None:
    shown = export(toy)
    if fault == "file":
        (toy.parent / "model" / "weight.txt").unlink()
    else:
        wrong = "import nosuchlibrary\n" if fault == "module" else ""
        (toy / "sums.py").write_text(f"{wrong}def total(frame):\n    return frame['c']\n")
    with pytest.raises(UserError, match=f"^the model cannot be loaded and used: .*{reason}"):
        log(shown)


OUTSIDE = """
from pathlib import Path
import pandas as pd
from pipeline.sums import total
from .parts.weights import weight_in
from outside_model.names import COLUMN

def load(folder: Path):
    return lambda frame, raw: pd.DataFrame({COLUMN: total(frame) * weight_in(folder)})
"""


@pytest.fixture
def outside(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A task in a package of its own, which imports its modules by relative and by absolute imports."""
    package = tmp_path / "site" / "outside_model"
    (package / "parts").mkdir(parents=True)
    files = {"__init__": "import pipeline.errors", "predict": OUTSIDE, "names": "COLUMN = 'sum'", "parts/__init__": "",
             "parts/weights": "from .files import FILE\ndef weight_in(path): return float((path / FILE).read_text())",
             "parts/files": "from ..names import COLUMN\nFILE = 'weight.txt' if COLUMN == 'sum' else ''"}  # fmt: skip
    for name, text in files.items():
        (package / f"{name}.py").write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield package
    for module in [module for module in sys.modules if module.startswith("outside_model")]:
        del sys.modules[module]


def test_package_of_another_packages_task_holds_its_modules(outside: Path, tmp_path: Path) -> None:
    name = write_package("outside_model.predict", tmp_path / "code")
    files = {file.relative_to(tmp_path / "code" / name).as_posix(): file.read_text()
             for file in (tmp_path / "code" / name).rglob("*.py")}  # fmt: skip
    assert {file for file in files if not file.endswith("__init__.py")} == {
        "pipeline/serving.py", "pipeline/sums.py", "outside_model/predict.py", "outside_model/names.py",
        "outside_model/parts/weights.py", "outside_model/parts/files.py",
    }  # fmt: skip
    assert not any(text for file, text in files.items() if file.endswith("__init__.py"))
    lines = files["outside_model/predict.py"].splitlines()
    assert "from ..pipeline.sums import total" in lines
    assert "from .parts.weights import weight_in" in lines
    assert "from ..outside_model.names import COLUMN" in lines
    assert "from ..names import COLUMN" in files["outside_model/parts/files.py"].splitlines()


def test_model_of_another_packages_task_answers_without_it(outside: Path, toy: Path, log: Any) -> None:
    import mlflow

    run, _ = log(export(toy) | {"predictor": "outside_model.predict"})
    for file in outside.rglob("*.py"):
        file.unlink()
    model = mlflow.pyfunc.load_model(f"runs:/{run}/model")
    assert model.predict(model.input_example)["sum"].tolist() == [33.0, 66.0]  # 3 * (1 + 10), 3 * (2 + 20)


def test_model_that_needs_its_package_installed_is_refused(outside: Path, toy: Path, log: Any) -> None:
    late = "import importlib\nCOLUMN = importlib.import_module('outside_model.parts.files').__name__ and 'sum'\n"
    (outside / "names.py").write_text(late)
    with pytest.raises(UserError, match="ImportError: a logged model is loaded without the project that trained it"):
        log(export(toy) | {"predictor": "outside_model.predict"})


@pytest.mark.parametrize(
    ("line", "message"),
    [("from . import COLUMN", r"outside_model\.COLUMN: no such module of pipeline or outside_model; the __init__"),
     ("from .nothing import a", r"outside_model\.nothing: no such module"),
     ("import outside_model.names", "import outside_model.names: write from")],
)  # fmt: skip
def test_import_of_another_package_that_cannot_travel(outside: Path, tmp_path: Path, line: str, message: str) -> None:
    (outside / "names.py").write_text(f"{line}\nCOLUMN = 'sum'\n")
    with pytest.raises(ImportError, match=message):
        write_package("outside_model.predict", tmp_path / "package")
    from pipeline.tracking.model_export import log_model

    (tmp_path / "model").mkdir()
    shown = {"folder": str(tmp_path / "model"), "task": "sums", "predictor": "outside_model.predict", "inputs": None,
             "outputs": {"sum": "double"}, "example": ["a"]}  # fmt: skip
    with pytest.raises(UserError, match=f"the model's code cannot be packaged: .*{message}"):
        log_model(shown, lambda: pytest.fail("a model is created"))


def test_predictor_without_a_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="outside_nothing: no such package"):
        write_package("outside_nothing.predict", tmp_path)


def test_hidden_project_cannot_be_imported(tmp_path: Path) -> None:
    """What makes the check worth something: a process that MLflow starts would import the project from here."""
    from pipeline.tracking.model_export import _project_hidden

    with _project_hidden(tmp_path, ["pipeline"]):
        code = f"import json, sys; sys.path = json.loads({json.dumps(json.dumps(sys.path))}); import pipeline.errors"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a logged model is loaded without the project that trained it" in done.stderr
