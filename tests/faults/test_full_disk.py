"""A whole training on a disk that fills up: one line, FAILED in the store, and what was saved before stays whole."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHRUNK, only_full

pytestmark = [pytest.mark.faults, only_full]

# The disk is there as long as the process is: what it holds at the end is copied out.
PROGRAM = """
disk="$1"; size="$2"; copy="$3"; shift 3
mount -t tmpfs -o "size=$size" none "$disk"
"$@"
code=$?
cp -r "$disk"/. "$copy"
exit $code
"""


def trained_on(size: str, impressions: Path, folder: Path, **overrides: str) -> subprocess.CompletedProcess[str]:
    """`train_mmoe` with its output folder on a disk of this size; skips where a user may mount none."""
    disk, copy = folder / "disk", folder / "copy"
    disk.mkdir()
    copy.mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)]
    if not shutil.which("unshare") or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    settings = SHRUNK | {"data.path": str(impressions), "output_dir": str(disk), "training.max_steps": "4000",
                         "training.num_train_epochs": "1000", "evaluation.every_steps": "1000",
                         "tracking.log_report": "false"}  # fmt: skip
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    options = [part for key, value in settings.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "pipeline", "train_mmoe", *options]
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", PROGRAM, "sh", str(disk), size, str(copy), *command],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def the_run(folder: Path) -> tuple[str, str, dict[str, str], int]:
    """Id, status, tags and the number of logged steps of the one run in the store."""
    with sqlite3.connect(folder / "mlflow.db") as base:
        ((run_id, status),) = base.execute("select run_uuid, status from runs").fetchall()
        tags = dict(base.execute("select key, value from tags").fetchall())
        (steps,) = base.execute("select count(*) from metrics where key = 'global_step'").fetchone()
    return run_id, status, tags, steps


def test_a_journal_that_no_longer_fits(workplace: Path, impressions: Path) -> None:
    nothing_else = {"checkpoint__enabled": "false", "evaluation__every_steps": "4000"}
    result = trained_on("600k", impressions, workplace, **nothing_else)
    run_id, status, tags, steps = the_run(workplace)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "journal.jsonl: No space left on device" in line
    assert status == "FAILED"
    assert "No space left on device" in tags["failure"]
    journal = (workplace / "copy" / run_id / "journal.jsonl").read_bytes()
    assert journal.endswith(b"\n")  # whole records alone
    assert steps == sum(b'"global_step"' in record for record in journal.splitlines()) > 50  # all of them arrived


def test_a_checkpoint_that_no_longer_fits(workplace: Path, impressions: Path) -> None:
    from pipeline.storage.checkpoints import Checkpoints

    # a checkpoint has 375 kB: the best weights and two checkpoints fit, a third beside them does not
    result = trained_on(
        "1500k", impressions, workplace, checkpoint__every_steps="20", checkpoint__keep_steps="[20, 40]"
    )
    run_id, status, tags, _ = the_run(workplace)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "checkpoint of step " in line
    assert status == "FAILED"
    assert tags["failure"] in line
    kept = Checkpoints(workplace / "copy" / run_id)
    newest = kept.latest()
    assert newest
    assert newest.step == max(kept.steps()) >= 40
    assert f"checkpoint of step {newest.step + 20}" in line
