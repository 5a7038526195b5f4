"""How runs end early and are found again: signals, a dead parent, a run that is alive, another config, forks."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PROJECT_FILES, ROOT, SHRUNK, only_full, wait_for
from killing import Kill, start
from server import MlflowServer
from test_kills import Job, points, runs, weights

from pipeline.sweeps import worker
from pipeline.tracking import mlflow_run, writer_client

LONG = 100_000  # steps: longer than any test waits
END_SECONDS = 10  # that a run may take to end, on a machine with nothing else to do

pytestmark = pytest.mark.faults


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
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    with (folder / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
            env={**os.environ, "PATH": path, **environment},
        )  # fmt: skip
    signal.signal(signal.SIGHUP, before)
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


def end_of(process: "subprocess.Popen[str]") -> int:
    """Its exit code, once it has ended; nobody reads what it prints."""
    begun = time.monotonic()
    process.wait(300)
    assert time.monotonic() - begun < END_SECONDS
    return process.returncode


def output_is_full(process: "subprocess.Popen[str]") -> bool:
    """Whoever writes to its standard output has to wait until somebody reads there."""
    descriptor = os.open(f"/proc/{process.pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    try:
        return not select.select([], [descriptor], [], 0)[1]
    finally:
        os.close(descriptor)


def test_the_waits_make_up_what_is_promised() -> None:
    assert writer_client.STOPPED_SECONDS + mlflow_run.HURRY_SECONDS < END_SECONDS < worker.EXIT_SECONDS


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@only_full
@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_is_alive_is_refused_and_a_signal_saves_and_ends_it(
    number: signal.Signals, folder: Path, impressions: Path
) -> None:
    """In the end nobody reads its output, as in a pager that stands still: the pipe is full, the trainer goes on."""
    alive = job(impressions)
    with started(python(alive, "--resume", "auto"), folder) as process:
        wait_for_step(process, 250)
        ((run_id, _),) = runs(folder).items()
        for resume in ("auto", run_id):
            code, stderr = start([*alive.arguments, "--resume", resume], folder)
            assert code == 2
            refusal = f"error: run {run_id} is in use by process {process.pid} on "
            assert stderr.strip().splitlines()[-1].startswith(refusal)
        wait_for(lambda: output_is_full(process))
        process.send_signal(number)
        assert end_of(process) == 128 + number
        wait_for(lambda: not children_in(folder))
    assert runs(folder) == {run_id: ("KILLED", "")}
    stderr = (folder / "stderr.txt").read_text()
    assert f"error: stopped by {number.name}" in stderr
    assert f"run {run_id} is KILLED; the same command with resume=auto continues it" in stderr
    assert "Traceback" not in stderr
    saved = max(int(entry.name) for entry in (folder / "outputs" / run_id / "checkpoints").iterdir())
    logged = [step for key, step, _ in points(folder, run_id) if key == "global_step"]
    assert saved == max(logged) + 1 > 250  # not the last multiple of 200: where it was
    assert (folder / "mlruns" / "0" / run_id / "artifacts" / "history.parquet").is_file()


@only_full
@pytest.mark.parametrize("kind", ["hanging", "dead"])
def test_a_signal_ends_the_run_without_the_server(
    kind: str, tmp_path: Path, empty_store: Path, impressions: Path
) -> None:
    server = MlflowServer(tmp_path / "server")
    shutil.copyfile(empty_store, tmp_path / "server" / "server.db")
    with server, started(python(job(impressions)), tmp_path, MLFLOW_TRACKING_URI=server.uri) as process:
        wait_for_step(process, 50)
        (server.kill if kind == "dead" else server.pause)()
        wait_for_step(process, 400)  # the training goes on
        process.send_signal(signal.SIGTERM)
        assert end_of(process) == 128 + signal.SIGTERM
        wait_for(lambda: not children_in(tmp_path))
        stderr = (tmp_path / "stderr.txt").read_text()
        assert "python -m pipeline sync outputs/" in stderr
        assert "Traceback" not in stderr


@only_full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
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
        wait_for(lambda: not children_in(folder))
    ((_, (status, _)),) = runs(folder).items()
    assert status == "KILLED"
    assert "stopped by SIGTERM" in (folder / "stderr.txt").read_text()


@only_full
def test_of_starts_at_one_moment_one_begins_the_run(folder: Path, impressions: Path) -> None:
    command = python(job(impressions), "--resume", "auto")
    with started(command, folder) as one, started(command, folder) as other:
        ended = wait_for(lambda: next((process for process in (one, other) if process.poll() is not None), None))
        assert ended.returncode == 2
        assert len(runs(folder)) == 1


@only_full
def test_through_mlflow_run_the_new_run_is_only_the_launcher(folder: Path, impressions: Path) -> None:
    """`mlflow run` opens a run for each start; all but the first only start the one that goes on."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    ids = [client.create_run("0").info.run_id for _ in range(3)]
    resuming = [*short(impressions).arguments, "--resume", "auto"]
    for run_id, kill, expected in zip(ids, (Kill(12), Kill(25), None), (-9, -9, 0), strict=True):
        code, stderr = start(resuming, folder, kill, MLFLOW_RUN_ID=run_id)
        assert code == expected, stderr
    statuses = runs(folder)
    assert list(statuses) == ids or set(statuses) == set(ids)
    assert statuses[ids[0]] == ("FINISHED", "")
    assert statuses[ids[1]] == ("KILLED", "launcher")  # it was killed, and nobody else could say so
    assert statuses[ids[2]] == ("RUNNING", "launcher")  # for `mlflow run` to end
    assert not points(folder, ids[1])
    assert weights(folder, ids[0])
