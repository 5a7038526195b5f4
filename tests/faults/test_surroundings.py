"""Clocks that jump, a store restored from a backup, a trainer that stands still: the run is the undisturbed one."""

import os
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest
from conftest import only_full, run_pipeline, wait_for
from test_exits import children_in, folder, job, python, started, wait_for_step  # noqa: F401 (folder is a fixture)
from test_kills import Job, Reference, places, points, runs  # noqa: F401 (places is a fixture)

STEPS = 1200
pytestmark = [pytest.mark.faults, only_full]


@pytest.fixture(scope="module")
def long_job(impressions: Path) -> Job:
    return job(impressions, training__max_steps=str(STEPS), evaluation__patience="null")


@pytest.fixture(scope="module")
def reference(long_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference.of(long_job, tmp_path_factory.mktemp("reference"))


def killed_at(step: int, command: list[str], folder: Path, **environment: str) -> None:  # noqa: F811
    with started(command, folder, **environment) as process:
        wait_for_step(process, step)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    wait_for(lambda: not children_in(folder))


def ends_well(command: list[str], folder: Path, **environment: str) -> str:  # noqa: F811
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
                          timeout=900, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_clock_that_jumps_by_days_and_back(folder: Path, long_job: Job, reference: Reference) -> None:  # noqa: F811
    """Killed and resumed three days later, then killed and resumed three days earlier."""
    if shutil.which("faketime") is None:
        pytest.skip("needs faketime")
    resuming, wall_clock = python(long_job, "--resume", "auto"), {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    killed_at(300, resuming, folder)
    killed_at(700, ["faketime", "-f", "+3d", *resuming], folder, **wall_clock)
    ends_well(["faketime", "-f", "-3d", *resuming], folder, **wall_clock)
    ((run_id, (status, _)),) = runs(folder).items()
    assert status == "FINISHED"
    reference.check(folder, run_id)


@pytest.mark.parametrize("lost", ["points", "run"])
def test_store_restored_from_a_backup(
    lost: str,
    folder: Path,  # noqa: F811
    long_job: Job,
    reference: Reference,
) -> None:
    """The backup is from mid-run or from before it: the run goes on; `sync --again` delivers what the store lost."""
    store, backup, resuming = folder / "mlflow.db", folder / "backup.db", python(long_job, "--resume", "auto")
    if lost == "run":
        shutil.copyfile(store, backup)
    killed_at(300, resuming, folder)
    ((first, _),) = runs(folder).items()
    if lost == "points":
        with sqlite3.connect(store) as source, sqlite3.connect(backup) as target:
            source.backup(target)
    killed_at(700, resuming, folder)
    had = len(points(folder, first))
    backup.replace(store)
    assert len(points(folder, first)) < had
    ends_well(resuming, folder)
    again = run_pipeline("sync", "--again", "outputs", cwd=folder)
    assert again.returncode == 0, again.stderr
    ((run_id, (status, _)),) = runs(folder).items()
    assert status == "FINISHED"
    logged = points(folder, run_id)
    assert len({(key, step) for key, step, _ in logged}) == len(logged)
    assert [point for point in logged if point[0] == "loss_total"] == [
        point for point in reference.points if point[0] == "loss_total"
    ]
    if lost == "points":
        assert run_id == first
        reference.check(folder, run_id)


@pytest.mark.parametrize("place", ["saving", "stepping"])
def test_trainer_that_stands_still_is_taken_over_once_its_lock_is_gone(
    place: str,
    folder: Path,  # noqa: F811
    long_job: Job,
    reference: Reference,
) -> None:
    """It wakes when another process has trained on, sees it, and ends without a word to the store."""
    resuming = python(long_job, "--resume", "auto")
    module, holder, method, count = {"saving": ("storage.checkpoints", "Checkpoints", "save", 3),
                                     "stepping": ("training.loop", "Training", "_step", 500)}[place]  # fmt: skip
    stands = (
        f"import os, signal\nfrom pipeline.{module} import {holder}\n"
        f"method, calls = {holder}.{method}, []\n"
        "def standing(self, *given, **named):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {count}:\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return method(self, *given, **named)\n"
        f"{holder}.{method} = standing\n"
        "from pipeline.__main__ import main; main()"
    )
    first = [resuming[0], "-c", stands, *resuming[3:]]
    with started(first, folder) as process:
        reader = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        wait_for(
            lambda: Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"
        )
        refused = subprocess.run(resuming, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert refused.returncode == 2, refused.stderr
        assert "is in use by" in refused.stderr
        for lock in folder.glob("outputs/*/owner.lock"):
            lock.unlink()
        ends_well(resuming, folder)
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 1
        reader.wait(60)
    assert "was taken over by process" in (folder / "stderr.txt").read_text()
    ((run_id, (status, _)),) = runs(folder).items()
    assert status == "FINISHED"
    reference.check(folder, run_id)
