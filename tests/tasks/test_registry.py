"""Tasks of other packages: found by their entry points, and refused in one line without harm to the others."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Call

from pipeline.config.run_config import RunConfig
from pipeline.config.strict_config import load
from pipeline.entries import OWN, entry_names, find_entry
from pipeline.errors import UserError
from pipeline.sweeps.requests import DigestData
from pipeline.sweeps.worker import parse_config
from pipeline.tasks import registry
from pipeline.tasks.registry import SHIPPED, config_class, declarations, task_entry, task_factory, task_names

INIT = """
from pathlib import Path
from pipeline.tasks.registry import TaskEntry

ENTRY = TaskEntry("Sums of two columns.", "{name}.config:SumsConfig", "{name}.task:SumsTask",
                  str(Path(__file__).parent / "sums.yaml"))
"""
CONFIG = """
from typing import ClassVar
from pipeline.config.run_config import EvaluationConfig, RunConfig

class SumsConfig(RunConfig):
    task: ClassVar[str] = "{task}"
    gates: ClassVar[tuple[str, ...]] = ("sums_on",)

    evaluation: EvaluationConfig
"""
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(name, {entry point: reference})`: a package of a task `sums`, with metadata as pip writes it."""

    def make(name: str, declared: dict[str, str], task: str = "sums", **files: str) -> Path:
        folder, metadata = tmp_path / "site" / name, tmp_path / "site" / f"{name}-1.dist-info"
        folder.mkdir(parents=True)
        metadata.mkdir()
        points = "\n".join(f"{point} = {reference}" for point, reference in declared.items())
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[focal_pipeline.tasks]\n{points}\n")
        (folder / "__init__.py").write_text(INIT.format(name=name))
        (folder / "config.py").write_text(CONFIG.format(task=task))
        (folder / "task.py").write_text("class SumsTask:\n    def __init__(self, config): self.config = config\n")
        (folder / "sums.yaml").write_text("evaluation: {metric: valid/error}\n")
        for file, text in files.items():
            (folder / f"{file}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "site")
        registry._declared.cache_clear()
        return folder

    yield make
    registry._declared.cache_clear()
    for module in [module for module in sys.modules if module.startswith("outside_")]:
        del sys.modules[module]


def test_a_task_of_another_package_is_one_more_entry_point(install: Install, call_pipeline: Call) -> None:
    folder = install("outside_sums", {"train_sums": "outside_sums:ENTRY"})
    outside = [name for name in task_names() if name not in SHIPPED]  # such as the worked example, if installed
    assert "train_sums" in outside
    assert task_names() == [*SHIPPED, *outside]
    assert entry_names() == [*OWN, *SHIPPED, *outside]
    assert "outside_sums" not in sys.modules  # not imported by listing the names
    assert find_entry("train_mmoe").trains
    assert "outside_sums" not in sys.modules
    entry = find_entry("train_sums")
    assert (entry.about, entry.trains, entry.file) == ("Sums of two columns.", True, str(folder / "sums.yaml"))
    assert "torch" not in vars(sys.modules["outside_sums"])
    shown = call_pipeline("--help").stdout
    assert "train_sums      Sums of two columns." in shown
    assert "--evaluation.metric" in call_pipeline("train_sums", "--help").stdout
    config = load(config_class("train_sums"), Path(str(entry.file)))
    assert (config.task, config.evaluation.metric) == ("sums", "valid/error")
    task = task_factory("train_sums")(config)
    assert type(task).__module__ == "outside_sums.task"
    assert declarations("sums").gates == ("sums_on",)
    request = DigestData(entry="train_sums", config="{evaluation: {metric: valid/a}}", metrics={})
    assert parse_config(request).task == "sums"


def test_a_similar_name_is_proposed(install: Install, call_pipeline: Call) -> None:
    install("outside_sums", {"train_sums": "outside_sums:ENTRY"})
    result = call_pipeline("train_sum")
    assert (result.returncode, result.stderr) == (
        2, "error: unknown entry point train_sum; did you mean train_sums?\n")  # fmt: skip
    result = call_pipeline("train_sums", "--gates", "1")
    assert (result.returncode, result.stderr) == (2, "error: unknown key gates; --help lists the keys\n")


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"declared": {"train_other": "outside_sums:ENTRY"}}, "train_other",
     "found task 'sums' in outside_sums.config:SumsConfig, allowed: 'other'"),
    ({"declared": {"sums": "outside_sums:ENTRY"}}, "sums",
     "found in outside_sums, allowed: train_<task>, where <task> begins with a letter and has a-z, 0-9 and _"),
    ({"declared": {"train_9": "outside_sums:ENTRY"}}, "train_9", "found in outside_sums, allowed: train_<task>"),
    ({"declared": {"train_sums": "outside_sums:MISSING"}}, "train_sums",
     "outside_sums:MISSING cannot be imported: AttributeError: module 'outside_sums' has no attribute 'MISSING'"),
    ({"declared": {"train_sums": "outside_nothing:ENTRY"}}, "train_sums",
     "outside_nothing:ENTRY cannot be imported: ModuleNotFoundError: No module named 'outside_nothing'"),
    ({"declared": {"train_sums": "outside_sums.config:SumsConfig"}}, "train_sums",
     "found outside_sums.config:SumsConfig of type ModelMetaclass, allowed: a TaskEntry"),
    ({"config": "1 / 0"}, "train_sums", "outside_sums.config:SumsConfig cannot be imported: ZeroDivisionError: "
     "division by zero (config.py, line 1)"),
    ({"config": "class SumsConfig: task = 'sums'"}, "train_sums",
     "found config outside_sums.config:SumsConfig, allowed: a subclass of RunConfig"),
    ({"declared": {"train_mmoe": "outside_sums:ENTRY"}}, "train_mmoe",
     "found in focal-pipeline and in outside_sums, allowed: one package with this name"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "name", "message"), BROKEN)
def test_a_broken_entry_is_refused_in_one_line_and_alone(
    options: dict[str, Any], name: str, message: str, install: Install, call_pipeline: Call
) -> None:
    install("outside_sums", **{"declared": {"train_sums": "outside_sums:ENTRY"}} | options)
    result = call_pipeline(name)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {name}: {message}")
    assert result.stderr.count("\n") == 1
    assert call_pipeline("--help").returncode == 0
    assert name in call_pipeline("--help").stdout
    assert config_class("train_visobert").task == "visobert"
    assert call_pipeline("train_visobert", "--help").returncode == 0
    assert declarations(name.removeprefix("train_")) is RunConfig


def test_a_name_of_two_packages_is_refused(install: Install, call_pipeline: Call) -> None:
    install("outside_sums", {"train_sums": "outside_sums:ENTRY"})
    install("outside_more", {"train_sums": "outside_more:ENTRY", "train_rest": "outside_more:ENTRY"}, task="rest")
    with pytest.raises(UserError, match=r"^train_sums: found in outside_\w+ and in outside_\w+, allowed: one package"):
        task_entry("train_sums")
    assert "train_sums: found in outside_" in " ".join(call_pipeline("--help").stdout.split())
    assert config_class("train_rest").task == "rest"


def test_a_task_that_is_not_installed_has_the_defaults() -> None:
    assert declarations("nowhere") is RunConfig
    assert declarations("") is RunConfig
    with pytest.raises(KeyError):
        task_entry("train_nowhere")
