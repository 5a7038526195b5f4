"""Small data, small configs and a ready-made tracking store for the tests."""

import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from laboratory import Laboratory

    from pipeline.tracking.writer_client import Writer

# on a busy machine any example takes long
settings.register_profile("project", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

ROOT = Path(__file__).parent.parent
FULL = os.environ.get("FAULTS") == "full"  # `make faults`
only_full = pytest.mark.skipif(not FULL, reason="`make faults` alone: FAULTS=full")
PROJECT_FILES = ("MLproject", "conda.yaml", "configs", "notebooks")
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; several test processes share the cores
for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[name]

gc.disable()  # while tests are collected: imports create many objects but no garbage

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

# They take longest: last, they would leave other test processes idle. First, groups of tests that run in one process,
# of which each of the four processes takes two at the start: one of the first row, then the one below it.
GROUPS = ("laboratory", "one writer", "workshop", "entry points",
          "kubernetes", "embedded", "deployment", "review model",
          "ranks", "compare", "model package", "embedded reviews")  # fmt: skip
SLOW = ("test_own_task", "test_start", "test_wheel", "test_security", "test_resume", "test_training", "test_browser",
        "test_entry_points")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        group = item.get_closest_marker("xdist_group")
        if group and group.args[0] in GROUPS:
            return GROUPS.index(group.args[0])
        return len(GROUPS) if group or item.path.stem in SLOW else len(GROUPS) + 1

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection: a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def impressions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 5,000 generated impressions."""
    from pipeline.tasks.mmoe.impressions.embedded_impressions import generate

    folder = tmp_path_factory.mktemp("impressions")
    generate(folder, rows=5000, seed=0)
    return folder


@pytest.fixture(scope="session")
def many_impressions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared folder of 40,000 impressions: every split has conversions."""
    from pipeline.tasks.mmoe.impressions.embedded_impressions import generate

    folder = tmp_path_factory.mktemp("many_impressions")
    generate(folder, rows=40_000, seed=0)
    return str(folder)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database without runs; making one takes seconds, copying it none. One for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / "store" / "mlflow.db"
    with FileLock(folder / "store.lock"):
        if not file.exists():
            made = tmp_path_factory.mktemp("store")
            code = "import mlflow; mlflow.MlflowClient().search_experiments()"
            subprocess.run([sys.executable, "-c", code], cwd=made, check=True, capture_output=True)
            made.rename(file.parent)
    return file


@pytest.fixture
def workplace(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a ready tracking store."""
    store_in(tmp_path, empty_store)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def store_in(folder: Path, empty_store: Path) -> None:
    """A ready tracking store in the folder, that keeps its artifacts there, too."""
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with closing(sqlite3.connect(folder / "mlflow.db")) as base:
        base.execute("update experiments set artifact_location = ?", (str(folder / "mlruns" / "0"),))
        base.commit()


@dataclass(frozen=True)
class Place:
    """A folder with a tracking store, and a writer process that serves all runs of it."""

    folder: Path
    client: Any  # MLflow's
    writer: "Writer"


one_writer = pytest.mark.xdist_group("one writer")  # tests of the shared place run in one process


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Place]:
    from mlflow import MlflowClient

    from pipeline.tracking.writer_client import Writer

    folder = tmp_path_factory.mktemp("place")
    store_in(folder, empty_store)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        writer = Writer()
    with writer:
        yield Place(folder, MlflowClient(uri), writer)


@pytest.fixture
def place(shared_place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A tracking store that is not empty, with a running writer: a writer of its own takes a test seconds."""
    monkeypatch.chdir(shared_place.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared_place.folder / 'mlflow.db'}")
    if shared_place.writer.process.poll() is not None:  # a test has ended it
        shared_place.writer.start()
    return shared_place


@pytest.fixture
def lent(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The place, whose writer serves what is called by `call_pipeline` too, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.tracking.writer_client.Writer", lending(place.writer))
    return place


def lending(writer: "Writer") -> type["Writer"]:
    """A class whose writers are all the one that runs already: starting another takes seconds."""
    from pipeline.tracking.writer_client import Writer

    class Lent(Writer):
        def __init__(self) -> None:
            self.__dict__ = writer.__dict__

        def close(self, seconds: float | None = None) -> None:
            """Its owner does that."""

    return Lent


in_laboratory = pytest.mark.xdist_group("laboratory")  # one process makes the runs that these tests look at


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator["Laboratory"]:
    """Small real sweeps to look at."""
    from laboratory import laboratory_in

    with laboratory_in(tmp_path_factory.mktemp("laboratory"), empty_store) as laboratory:
        yield laboratory


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """Poll until the condition holds; returns what it returned. The bound only guards against hanging."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


@pytest.fixture
def client(workplace: Path) -> Iterator[Any]:
    """MLflow's own client on the workplace's store."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{workplace / 'mlflow.db'}")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def small(impressions: Path, tmp_path: Path) -> Callable[..., Any]:
    """`small(key=value, ...)`: the shipped MMoE config shrunk to 12 steps, with dotted overrides on top."""
    from pipeline.config.strict_config import load
    from pipeline.tasks.mmoe.config import MmoeConfig

    def make(**overrides: Any) -> Any:
        texts = SHRUNK | {"data.path": str(impressions), "output_dir": str(tmp_path / "outputs")}
        texts |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
        return load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", texts)

    return make


SHRUNK = {
    "training.amp": "no",  # the same numbers on every machine
    "training.max_steps": "12",
    "training.batch_size": "64",
    "training.threads": "1",
    "loss.aux_focal.warmup_steps": "5",
    "model.experts.hidden": "[16]",
    "model.towers.hidden": "[8]",
    "evaluation.every_steps": "6",
    "tracking.log_model": "false",
}


def run_pipeline(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ...` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call_pipeline(capfd: pytest.CaptureFixture[str]) -> Call:
    """`call_pipeline("train_mmoe", "--lambda", "-1")`: what `run_pipeline` does, without a process of its own.

    That would import torch for seconds, and a traceback would be text to look for; here it fails the test.
    """
    from pipeline.__main__ import main

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        shown = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture
def opened(client: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a run that was opened as `mlflow run` opens one for what it starts, which is called next."""
    run_id = str(client.create_run("0", run_name="legendary-gnat-695").info.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    return run_id


@pytest.fixture
def project(workplace: Path) -> Path:
    """A working copy of the project: mlflow.db and mlruns stay out of the real one."""
    return project_in(workplace)


def project_in(folder: Path) -> Path:
    for name in PROJECT_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    return folder


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Here nobody can import the packages, as in a process that has only a logged model and the code in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(sys.modules):
            if name.partition(".")[0] in packages or name.startswith("focal_model_"):
                patch.delitem(sys.modules, name)
        for name in packages:
            patch.setitem(sys.modules, name, None)
        yield


def mlflow_run(entry: str, project: Path, **overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = [part for key, value in overrides.items() for part in ("-P", f"{key}={value}")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the entry's command says `python`
    return subprocess.run(
        [sys.executable, "-m", "mlflow", "run", str(project), "-e", entry, "--env-manager=local", *arguments],
        cwd=project, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
