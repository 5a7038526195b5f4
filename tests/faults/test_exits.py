"""How runs end early and are found again: signals, a dead parent, a run that is alive, another config, forks."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT_FILES, ROOT, SHRUNK
from killing import Kill, start
from server import MlflowServer
from test_kills import Job, Reference, points, runs, weights

FULL = os.environ.get("FAULTS") == "full"
LONG = 100_000  # steps: longer than any test waits
END_SECONDS = 10

pytestmark = [pytest.mark.faults, pytest.mark.xdist_group("kills")]


@pytest.fixture
def folder(workplace: Path, impressions: Path) -> Path:
    """A working folder with a store."""
    return workplace


def job(impressions: Path, **overrides: str) -> Job:
    settings = SHRUNK | {"data.path": str(impressions), "training.max_steps": str(LONG), "tracking.log_report": "false",
                         "training.num_train_epochs": str(LONG), "evaluation.every_steps": "1000",
                         "checkpoint.every_steps": "200"}  # fmt: skip
    return Job("train_mmoe", settings | {key.replace("__", "."): value for key, value in overrides.items()}, 0)


def short(impressions: Path, **overrides: str) -> Job:
    wanted = {"training.max_steps": "30", "evaluation.every_steps": "10", "checkpoint.every_steps": "10"}
    return job(impressions, **wanted | {key.replace("__", "."): value for key, value in overrides.items()})


@contextmanager
def started(command: list[str], folder: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A real process in a session of its own, whose standard output says which steps it has made."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "stderr.txt").open("w") as told:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=told, text=True, start_new_session=True,
            env={**os.environ, "PATH": path, **environment},
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        for pid in children_in(folder):
            os.kill(pid, signal.SIGKILL)


def python(job: Job, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *job.arguments, *more]


def wait_for_step(process: "subprocess.Popen[str]", step: int) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{") and f'"global_step": {step}' in line:
            return
    raise AssertionError(f"ended with {process.wait()} before step {step}")


def children_in(folder: Path) -> list[int]:
    """Processes of the pipeline that work in the folder, whoever started them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if "pipeline" in command and " -m pytest" not in command and "forkserver" not in command:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - begun


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS if FULL else SIGNALS[2:3])
def test_a_signal_saves_and_ends_the_run_within_ten_seconds(
    number: signal.Signals, folder: Path, impressions: Path
) -> None:
    with started(python(job(impressions)), folder) as process:
        wait_for_step(process, 250)
        process.send_signal(number)
        begun = time.monotonic()
        process.communicate(timeout=END_SECONDS + 5)
        assert time.monotonic() - begun < END_SECONDS
        assert process.returncode == 128 + number
        wait_for(lambda: not children_in(folder), 5)
    ((run_id, (status, _)),) = runs(folder).items()
    assert status == "KILLED"
    told = (folder / "stderr.txt").read_text()
    assert f"error: stopped by {number.name}" in told
    assert f"run {run_id} is KILLED; the same command with resume=auto goes on with it" in told
    assert "Traceback" not in told
    saved = max(int(entry.name) for entry in (folder / "outputs" / run_id / "checkpoints").iterdir())
    logged = [step for key, step, _ in points(folder, run_id) if key == "global_step"]
    assert saved == max(logged) + 1 > 250  # not the last multiple of 200: where it was


def test_a_signal_ends_the_run_whose_output_nobody_reads(folder: Path, impressions: Path) -> None:
    """As in a pager that stands still: the pipe is full, and the trainer waits."""
    with started(python(job(impressions)), folder) as process:
        wait_for_step(process, 1)
        (journal,) = (folder / "outputs").glob("*/journal.jsonl")
        sizes = [-1, -2]

        def stands_still() -> bool:
            time.sleep(1)
            sizes.append(journal.stat().st_size)
            return sizes[-1] == sizes[-2] == sizes[-3]

        wait_for(stands_still, 60)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        process.wait(END_SECONDS + 5)
        assert time.monotonic() - begun < END_SECONDS
        assert process.returncode == 128 + signal.SIGTERM
    assert [status for status, _ in runs(folder).values()] == ["KILLED"]


@pytest.mark.parametrize("kind", ["hanging", "dead"] if FULL else ["hanging"])
def test_a_signal_ends_the_run_within_ten_seconds_without_the_server(
    kind: str, tmp_path: Path, empty_store: Path, impressions: Path
) -> None:
    server = MlflowServer(tmp_path / "server")
    shutil.copyfile(empty_store, tmp_path / "server" / "server.db")
    with server, started(python(job(impressions)), tmp_path, MLFLOW_TRACKING_URI=server.uri) as process:
        wait_for_step(process, 50)
        (server.kill if kind == "dead" else server.pause)()
        wait_for_step(process, 400)  # the training goes on
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        process.communicate(timeout=END_SECONDS + 5)
        assert time.monotonic() - begun < END_SECONDS
        assert process.returncode == 128 + signal.SIGTERM
        wait_for(lambda: not children_in(tmp_path), 5)
        told = (tmp_path / "stderr.txt").read_text()
        assert "python -m pipeline sync outputs/" in told
        assert "Traceback" not in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL] if FULL else [signal.SIGKILL])
def test_the_trainer_ends_with_mlflow_run(number: signal.Signals, folder: Path, impressions: Path) -> None:
    """`mlflow run` passes no signal on: the trainer sees that its parent is gone."""
    for name in PROJECT_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    overrides = [part for key, value in job(impressions).settings.items() for part in ("-P", f"{key}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", ".", "-e", "train_mmoe", "--env-manager=local", *overrides]
    with started(command, folder) as process:
        wait_for_step(process, 100)
        process.send_signal(number)
        process.wait()
        wait_for(lambda: not children_in(folder), END_SECONDS if FULL else 3 * END_SECONDS)  # beside other tests
    ((_, (status, _)),) = runs(folder).items()
    assert status == "KILLED"
    assert "stopped by SIGTERM" in (folder / "stderr.txt").read_text()


def test_a_run_that_is_alive_is_refused_within_five_seconds(folder: Path, impressions: Path) -> None:
    alive = job(impressions)
    start(["--help"], folder)  # so that what all starts share is loaded
    with started(python(alive, "--resume", "auto"), folder) as process:
        wait_for_step(process, 10)
        ((run_id, _),) = runs(folder).items()
        for resume in ("auto", run_id):
            begun = time.monotonic()
            code, told = start([*alive.arguments, "--resume", resume], folder)
            assert time.monotonic() - begun < 5
            assert code == 2
            assert told.strip().splitlines()[-1].startswith(f"error: run {run_id} is alive: process {process.pid} on ")
        assert list(runs(folder)) == [run_id]


def test_of_starts_at_one_moment_one_begins_the_run(folder: Path, impressions: Path) -> None:
    command = python(job(impressions), "--resume", "auto")
    with started(command, folder) as one, started(command, folder) as other:
        ended = wait_for_either(one, other)
        assert ended.returncode == 2
        assert len(runs(folder)) == 1


def wait_for_either(*processes: "subprocess.Popen[str]") -> "subprocess.Popen[str]":
    wait_for(lambda: any(process.poll() is not None for process in processes), 60)
    return next(process for process in processes if process.poll() is not None)


def test_another_config_or_other_data_is_refused_by_name(
    folder: Path, impressions: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code, told = start(short(impressions).arguments, folder, Kill(15))
    assert code == -9, told
    ((run_id, _),) = runs(folder).items()
    code, told = start([*short(impressions).arguments, "--resume", run_id, "--lambda", "0.2", "--seed", "3"], folder)
    assert code == 2
    assert f"resume {run_id}: that run is another one: " in told
    assert "seed was 0, now 3" in told
    assert "loss.aux_focal.lambda was 0.1, now 0.2" in told
    from pipeline.tasks.mmoe.embedded import generate

    other = tmp_path_factory.mktemp("other")
    generate(other, rows=5000, seed=1)
    code, told = start([*short(other).arguments, "--resume", run_id], folder)
    assert code == 2
    assert "data has SHA-256" in told
    code, told = start([*short(impressions).arguments, "--resume", "0" * 32], folder)
    assert code == 2
    assert "there is no such run" in told
    assert list(runs(folder)) == [run_id]
    # what does not decide the result may differ: other paths of logs, other checkpoints, prefetching
    free = ["--checkpoint.every_steps", "7", "--training.prefetch", "0", "--tracking.log_report", "true"]
    code, told = start([*short(impressions).arguments, "--resume", run_id, *free], folder)
    assert code == 0, told
    assert "goes on after step 10 of 30" in told
    assert runs(folder) == {run_id: ("FINISHED", "")}


def test_a_fork_starts_from_an_old_state(folder: Path, impressions: Path) -> None:
    whole = Reference.of(short(impressions), folder)
    ((origin, _),) = runs(folder).items()
    code, told = start([*short(impressions).arguments, "--fork", f"{origin}@15"], folder)
    assert code == 2
    assert "found no checkpoint of step 15; kept: " in told
    code, told = start([*short(impressions).arguments, "--fork", f"{origin}@20"], folder)
    assert code == 0, told
    (same,) = set(runs(folder)) - {origin}
    whole.check(folder, same)  # of the same config: it comes out where the first one did
    code, told = start([*short(impressions).arguments, "--fork", f"{origin}@20", "--lambda", "0.5"], folder)
    assert code == 0, told
    (other,) = set(runs(folder)) - {origin, same}
    with sqlite3.connect(folder / "mlflow.db") as base:
        tags = dict(base.execute("select key, value from tags where run_uuid = ?", (other,)).fetchall())
    assert tags["forked_from"] == f"{origin}@20"
    before, after = ([point for point in points(folder, other) if (point[1] >= 20) == late and point[0] == "loss_total"]
                     for late in (False, True))  # fmt: skip
    assert before == [point for point in whole.points if point[1] < 20 and point[0] == "loss_total"]
    assert [step for _, step, _ in after] == list(range(20, 30))
    assert after[1:] != [point for point in whole.points if point[1] > 20 and point[0] == "loss_total"]
    # a resume of the plain config is not the fork's business, and the other way round
    code, told = start([*short(impressions).arguments, "--lambda", "0.5", "--resume", "auto"], folder)
    assert code == 0
    assert len(runs(folder)) == 4
    code, told = start([*short(impressions).arguments, "--lambda", "0.5", "--resume", "auto", "--fork",
                        f"{origin}@20"], folder)  # fmt: skip
    assert code == 0
    assert f"run {other} is finished already" in told


def test_through_mlflow_run_the_new_run_is_only_the_launcher(folder: Path, impressions: Path) -> None:
    """`mlflow run` opens a run for each start; all but the first only start the one that goes on."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    ids = [client.create_run("0").info.run_id for _ in range(3)]
    resuming = [*short(impressions).arguments, "--resume", "auto"]
    for run_id, kill, expected in zip(ids, (Kill(12), Kill(25), None), (-9, -9, 0), strict=True):
        code, told = start(resuming, folder, kill, MLFLOW_RUN_ID=run_id)
        assert code == expected, told
    statuses = runs(folder)
    assert list(statuses) == ids or set(statuses) == set(ids)
    assert statuses[ids[0]] == ("FINISHED", "")
    assert statuses[ids[1]] == ("KILLED", "launcher")  # it was killed, and nobody else could say so
    assert statuses[ids[2]] == ("RUNNING", "launcher")  # for `mlflow run` to end
    assert not points(folder, ids[1])
    assert weights(folder, ids[0])
