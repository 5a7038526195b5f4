"""Systems that lack what Linux has, and other encodings: the same numbers."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SHRUNK, Call, only_full, store_in

pytestmark = pytest.mark.faults

# Run by every Python process before anything else. On Linux, torch needs os.register_at_fork and filelock fcntl: those
# are refused to others only.
WITHOUT = """
import builtins, os, signal, sys
for name in ("pread", "pwrite", "sched_getaffinity", "killpg", "getpgid", "fork", "forkpty", "O_CLOEXEC", "O_NOFOLLOW"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
    delattr(signal, name)

def caller_is(*packages):
    return sys._getframe(2).f_globals.get("__name__", "").split(".")[0] in packages

register, load = os.register_at_fork, builtins.__import__

def register_at_fork(**functions):
    if caller_is("pipeline"):
        raise AttributeError("module 'os' has no attribute 'register_at_fork'")
    register(**functions)

def load_unless_missing(name, *others, **more):
    if name in ("fcntl", "resource") and not caller_is("filelock"):
        raise ImportError(f"No module named {name!r}")
    return load(name, *others, **more)

os.register_at_fork, builtins.__import__ = register_at_fork, load_unless_missing
with open(os.environ["STARTED"], "a", encoding="utf-8") as file:
    file.write(" ".join(sys.orig_argv) + "\\n")
"""


def start(folder: Path, *arguments: str, **environment: str) -> str:
    """Run an entry point; returns what it printed on standard error."""
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def values(database: Path) -> dict[tuple[str, str], float]:
    """(arm, metric) -> last value of the losses and of the evaluations."""
    with closing(sqlite3.connect(database)) as base:
        rows = base.execute(
            "select tags.value, latest_metrics.key, latest_metrics.value from latest_metrics "
            "join tags on tags.run_uuid = latest_metrics.run_uuid and tags.key = 'arm'"
        ).fetchall()
    return {(arm, key): value for arm, key, value in rows if key.startswith(("loss", "valid/", "test/"))}


@only_full
def test_train_sweep_and_compare_without_what_only_some_systems_have(
    workplace: Path, impressions: Path, empty_store: Path, call_pipeline: Call
) -> None:
    settings = {key: yaml.safe_load(value) for key, value in SHRUNK.items()} | {"data": str(impressions)}
    sweep = {"task": "train_mmoe", "config": str(ROOT / "configs/mtl_mmoe.yaml"), "settings": settings,
             "baseline": {"aux_focal": False}, "arms": [{"lambda": 5.0}], "seeds": [0], "jobs": 1}  # fmt: skip
    (workplace / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    assert call_pipeline("sweep", "--config", "sweep.yaml").returncode == 0

    lacking = workplace / "lacking"
    (lacking / "site").mkdir(parents=True)
    (lacking / "site" / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    store_in(lacking, empty_store)
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{lacking / 'mlflow.db'}", "STARTED": str(lacking / "started"),
                   "PYTHONPATH": os.pathsep.join((str(lacking / "site"), str(ROOT)))}  # fmt: skip
    start(lacking, "sweep", "--config", str(workplace / "sweep.yaml"), **environment)
    expected = values(workplace / "mlflow.db")
    assert len(expected) > 20
    assert values(lacking / "mlflow.db") == expected
    typed = [part for key, text in (SHRUNK | {"data": str(impressions)}).items() for part in (f"--{key}", text)]
    start(lacking, "train_mmoe", *typed, "--aux_focal", "false", "--output_dir", "alone", **environment)
    with closing(sqlite3.connect(lacking / "mlflow.db")) as base:
        one, other = base.execute(
            "select value from latest_metrics where key = 'test/logloss_ctcvr' and run_uuid in "
            "(select run_uuid from params where key = 'loss.aux_focal.enabled' and value = 'false')"
        ).fetchall()
        ((sweep_id,),) = base.execute("select distinct value from tags where key = 'sweep_id'").fetchall()
    assert one == other
    shown = start(lacking, "compare", "--sweep_id", sweep_id, **environment)
    assert "baseline" in shown
    started = (lacking / "started").read_text(encoding="utf-8")
    assert all(module in started for module in ("pipeline sweep", "pipeline.tracking", "pipeline.sweeps.worker"))
