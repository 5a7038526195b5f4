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


# An encoding that is left to the system is an error in the project's files.
NAMED = """
import warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"pipeline(\\\\.|$)")
"""
REVIEWS = [("Pin trâu, máy đẹp", "Positive", ""), ("Chụp ảnh quá tệ", "", "Negative"), ("Tạm được", "Neutral", "")]


@only_full
def test_reviews_are_read_trained_and_compared_with_another_encoding_of_the_system(workplace: Path) -> None:
    """LC_ALL=C without UTF-8 mode: the system's encoding is ASCII, as it is cp1252 on Windows."""
    (workplace / "site").mkdir()
    (workplace / "site" / "sitecustomize.py").write_text(NAMED, encoding="utf-8")
    rows = "".join(f'"{text} {number}",{pin},{photo}\r\n' for number in range(20) for text, pin, photo in REVIEWS)
    (workplace / "reviews.csv").write_text(f"data,Độ bền,Ảnh\r\n{rows}", encoding="utf-8", newline="")
    tiny = {"model": {"name": "embedded", "embedded": {"width": 16}}, "data": {"train": "reviews.csv"},
            "training": {"max_steps": 4, "batch_size": 16, "threads": 1}}  # fmt: skip
    text = yaml.safe_dump(tiny, allow_unicode=True) + "# Ngôn ngữ: tiếng Việt\n"
    (workplace / "config.yaml").write_text(text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    environment = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C",
                   "PYTHONPATH": os.pathsep.join((str(workplace / "site"), str(ROOT)))}  # fmt: skip
    start(workplace, "data_prep", "--data", "reviews.csv", "--output_dir", "prepared", **environment)
    assert "Độ bền" in (workplace / "prepared" / "sentiment_distribution.csv").read_text(encoding="utf-8")
    for alpha in ("auto", "null"):
        start(workplace, "train_visobert", "--config", "config.yaml", "--alpha", alpha, **environment)
    which = ("--filter", "tags.task = 'visobert'", "--baseline", "focal_alpha null")
    start(workplace, "compare", *which, "--output_dir", "compared", **environment)
    with closing(sqlite3.connect(workplace / "mlflow.db")) as base:
        assert base.execute("select count(*) from runs where status = 'FINISHED'").fetchone()[0] >= 3
