"""Delivery loses nothing when the store, the writer or the trainer fails, or the disk is full."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import FULL, Place, one_writer, only_full, wait_for
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from server import Door, MlflowServer, free_port
from test_journal import JSON, Disk

from pipeline.errors import TrainingError, Undelivered, UserError
from pipeline.runtime import processes
from pipeline.runtime.interrupts import SIGNALS
from pipeline.runtime.protocol import encode
from pipeline.storage.journal import (
    read_records,
)
from pipeline.storage.ownership import live_owner
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking import delivery, inbox, store_calls
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.delivery import WAS_KILLED, Delivery, wait_for_turn
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import DeliveryReport, FinishRun, RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.store import check_reachable
from pipeline.tracking.writer_client import Writer

pytestmark = one_writer


def open_run(writer: Writer, offline: bool = False, **request: Any) -> MlflowRun:
    return MlflowRun(writer, RunRequest(**{"name": "test"} | request), Path("outputs"), offline)


def resume(writer: Writer, run_id: str, **request: Any) -> MlflowRun:
    return open_run(writer, run_id=run_id, resume=True, **request)


def log_steps(run: MlflowRun, steps: range) -> None:
    """Log and flush each step."""
    for step in steps:
        run.log_metrics(step, {"loss_total": step / 3}, 1000 + step)
        run.flush()


def points(client: Any, run_id: str, key: str = "loss_total") -> list[tuple[int, float, int]]:
    return sorted((point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, key))


def expected(steps: range) -> list[tuple[int, float, int]]:
    return [(step, step / 3, 1000 + step) for step in steps]


def delivered_bytes(run: MlflowRun) -> int:
    file = run.run_folder.delivered
    (entry,) = json.loads(file.read_text()).values() if file.exists() else ({"offset": 0},)
    return int(entry["offset"])


@pytest.fixture
def client(place: Place) -> Any:
    return place.client


@pytest.fixture
def writer(place: Place) -> Writer:
    return place.writer


@pytest.fixture
def here(place: Place) -> Path:
    return place.folder


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(started: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """A tracking server, and a working folder for the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    return started


@pytest.fixture(scope="module")
def door(started: MlflowServer) -> Iterator[Door]:
    with Door(started) as door:
        yield door


@pytest.fixture(scope="module")
def shared_writer() -> Iterator[Writer]:
    """A killed writer: it starts again in the first test that uses it, and writes to that test's output."""
    with Writer() as writer:
        writer.process.kill()
        yield writer


@pytest.fixture
def its_writer(server: MlflowServer, door: Door, shared_writer: Writer, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """A writer that reaches the server through the door."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", door.uri)
    return shared_writer


# --- the store goes away ---------------------------------------------------------------------------------------------


def test_an_outage_of_the_server_loses_nothing(
    server: MlflowServer, door: Door, its_writer: Writer, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run before and during the outage, one that begins during it, and one that resumes after it.

    Only the connection is cut; faults/test_outage kills a server.
    """
    import mlflow

    client = mlflow.MlflowClient(server.uri)
    lines: list[str] = []

    def says(text: str) -> int:
        lines.extend(capfd.readouterr().err.splitlines())
        return sum(text in line for line in lines)

    writer = its_writer
    first, process = open_run(writer), writer.process
    note = first.folder / "note.txt"
    note.write_text("read me")
    first.log_artifact(note, "notes")
    log_steps(first, range(100))
    wait_for(lambda: len(points(client, first.id)) == 100)

    door.shut()
    log_steps(first, range(100, 1500))
    first.set_tags({"failure": "stopped", "branched_from": "prefix 1"})
    first.flush()
    wait_for(lambda: says("is unavailable"))
    with pytest.raises(Undelivered, match="1,402 records wait") as caught:  # steps, tags, and the end
        first.finish("KILLED", patience=0.5)
    assert caught.value.exit_code == 3
    assert says("is unavailable") == 1
    assert writer.process is process  # it serves the next one
    assert process.poll() is None
    second = open_run(writer, offline=True, name="second", experiment="later", tags={"arm": "a"})
    assert second.run_folder.journal.is_file()
    log_steps(second, range(10))
    wait_for(lambda: says("is unavailable") == 2)

    door.open()
    wait_for(lambda: says("is back"))
    second.finish("FINISHED")
    (stored,) = writer.find(run_id=second.id)
    assert (stored.first_id, stored.status) == (second.id, "FINISHED")
    third = resume(writer, first.id)
    log_steps(third, range(1490, 1600))
    third.finish("FINISHED")
    (stored,) = writer.find(run_id=first.id)

    assert says("is back") == 1
    assert points(client, first.id) == expected(range(1600))
    assert (stored.status, stored.start_time) == ("FINISHED", client.get_run(first.id).info.start_time)
    assert "failure" not in stored.tags  # the earlier start's tag was delivered after the next start
    assert stored.tags.items() >= {"branched_from": "prefix 1", "host": socket.gethostname()}.items()
    assert Path(client.download_artifacts(first.id, "notes/note.txt")).read_text(encoding="utf-8") == "read me"
    assert len(pd.read_parquet(client.download_artifacts(first.id, "history.parquet"))) == 1600
    assert live_owner(first.folder) is None
    (made,) = client.search_runs([client.get_experiment_by_name("later").experiment_id])
    assert made.data.tags.items() >= {"original_run_id": second.id, "arm": "a"}.items()
    assert (made.info.status, made.info.run_name) == ("FINISHED", "second")
    assert points(client, made.info.run_id) == expected(range(10))


def test_waiting_for_a_hanging_server_ends_with_the_patience(
    server: MlflowServer, door: Door, its_writer: Writer
) -> None:
    import mlflow

    client = mlflow.MlflowClient(server.uri)
    writer = its_writer
    run = open_run(writer)
    log_steps(run, range(3))
    wait_for(lambda: len(points(client, run.id)) == 3)
    server.pause()
    try:
        carried = door.carried
        log_steps(run, range(3, 50))
        wait_for(lambda: door.carried > carried)  # the writer is in a call
        with pytest.raises(Undelivered) as caught:
            run.finish("FINISHED", patience=1)
        assert str(caught.value).endswith(f"deliver it with `python -m pipeline sync {run.folder}`")
        assert live_owner(run.folder) is None
        assert writer.process.poll() == -signal.SIGKILL  # in a call that does not return
        with pytest.raises(UserError, match=r"^tracking store .*does not answer.*$"):  # one line
            open_run(writer)
    finally:
        server.resume()


@pytest.mark.faults
@only_full
def test_a_writer_whose_trainer_is_gone_leaves_a_server_that_hangs(server: MlflowServer) -> None:
    import mlflow

    client = mlflow.MlflowClient(server.uri)
    with Writer() as writer:
        writer.process.kill()
        run = open_run(writer)  # a sweep's worker goes on with the same writer
        wait_for(lambda: delivered_bytes(run))
        server.pause()
        try:
            log_steps(run, range(3))
            writer.process.end_input()  # its trainer is gone
            wait_for(lambda: writer.process.poll() is not None)
        finally:
            server.resume()
            run.owner.release()
    assert client.get_run(run.id).info.status == "RUNNING"
    assert delivered_bytes(run) < run.journal.size


def test_a_call_that_does_not_return_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the trainer is gone and the store accepts nothing."""
    monkeypatch.setattr(inbox, "GONE_SECONDS", 0.01)
    monkeypatch.setattr(inbox, "HANGING_SECONDS", 0.01)
    ended = threading.Event()
    monkeypatch.setattr(inbox.os, "_exit", lambda _: ended.set())
    read, write = os.pipe()
    watching = Inbox(os.fdopen(read))
    os.close(write)
    assert ended.wait(120)
    assert watching.ending


# --- a process dies --------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_writer_that_dies_is_replaced_and_nothing_is_lost(client: Any, writer: Writer, here: Path) -> None:
    """In the middle of a run, and while the rest is delivered."""
    run, first = open_run(writer), writer.process
    log_steps(run, range(50))
    wait_for(lambda: points(client, run.id))
    assert client.get_run(run.id).info.status == "RUNNING"
    first.kill()
    log_steps(run, range(50, 100))
    second = writer.process
    assert second is not first
    if FULL:  # else it stops before it has imported mlflow, which takes seconds
        wait_for(lambda: len(points(client, run.id)) == 100)
    os.kill(second.pid, signal.SIGSTOP)
    log_steps(run, range(100, 150))
    threading.Timer(0.5, second.kill).start()
    run.finish("FINISHED")
    assert writer.process is not second
    assert points(client, run.id) == expected(range(150))
    assert client.get_run(run.id).info.status == "FINISHED"


def test_a_killed_trainer_leaves_a_failed_run_and_no_lock(client: Any, writer: Writer, here: Path) -> None:
    code = """
import signal, sys
from pathlib import Path
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.writer_client import Writer
run = MlflowRun(writer := Writer(), RunRequest("doomed"), Path("outputs"))
for step in range(50):
    run.log_metrics(step, {"loss_total": step / 3}, 1000 + step)
run.flush()
run.log_metrics(50, {"loss_total": 0.0})
print(run.id, writer.process.pid, "mlflow" in sys.modules, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=here) as trainer:
        assert trainer.stdout
        run_id, pid, has_imported = trainer.stdout.readline().split()
        folder = here / "outputs" / run_id
        assert live_owner(folder)
        assert has_imported == "False"  # only the writer imports MLflow
        trainer.kill()
    wait_for(lambda: client.get_run(run_id).info.status == "FAILED")
    assert client.get_run(run_id).data.tags["failure"] == WAS_KILLED
    assert points(client, run_id) == expected(range(50))
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert live_owner(folder) is None
    run = resume(writer, run_id)
    run.check_position(0)
    log_steps(run, range(60))
    run.finish("FINISHED")
    assert points(client, run_id) == expected(range(60))
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert "failure" not in stored.data.tags
    assert len(pd.read_parquet(client.download_artifacts(run_id, "history.parquet"))) == 60


def test_an_earlier_owner_and_its_writer_stop_at_once(
    client: Any, writer: Writer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(writer)
    log_steps(run, range(5))
    wait_for(lambda: len(points(client, run.id)) == 5)
    taken = {"number": run.owner.number + 1, "host": "elsewhere", "pid": 1}
    (run.folder / "owner.json").write_text(json.dumps(taken))  # as another host takes the folder over
    theirs = b'{"op":"metrics","step":5,"time":1,"values":{"loss_total":1.0}}\n'
    with run.journal.file.open("ab") as stream:
        stream.write(theirs)
    whole = run.journal.file.read_bytes()
    with FileLock(run.run_folder.writer_lock, 300):  # the writer has stopped
        assert len(points(client, run.id)) == 5
    assert not run.lost
    with pytest.raises(TrainingError, match="taken over"):
        run.flush()
    assert run.lost
    run.set_tags({"failure": "x" * 70_000})  # not written: the run has another owner
    killed = []
    with monkeypatch.context() as patch:
        patch.setattr(writer.process, "kill", lambda: killed.append(writer.process))  # the tests' writer stays
        with pytest.raises(TrainingError, match="taken over") as caught:
            run.finish("FAILED", patience=1)
    assert killed == [writer.process]
    writer.send(FinishRun("FAILED", patience=1))  # not delivered either
    wait_for(lambda: isinstance(writer.inbox.get(timeout=300)[1], DeliveryReport))
    assert not isinstance(caught.value, Undelivered)
    assert run.journal.file.read_bytes() == whole
    stored = client.get_run(run.id)
    assert stored.info.status == "RUNNING"  # the other owner ends it
    assert "failure" not in stored.data.tags


def test_an_interrupt_while_the_rest_is_delivered_ends_the_wait(
    client: Any, writer: Writer, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, killed = open_run(writer), []
    with monkeypatch.context() as patch:
        patch.setattr(writer.inbox, "get", lambda **_: signal.raise_signal(signal.SIGINT))
        patch.setattr(writer.process, "kill", lambda: killed.append(writer.process))  # the tests' writer stays
        with pytest.raises(KeyboardInterrupt):
            run.finish("FINISHED")
    assert killed == [writer.process]
    assert f"deliver it with `python -m pipeline sync {run.folder}`" in capsys.readouterr().err
    wait_for(lambda: isinstance(writer.inbox.get(timeout=300)[1], DeliveryReport))  # it was not killed after all
    assert live_owner(run.folder) is None
    assert list(read_records(run.journal.file))[-1]["status"] == "FINISHED"


def test_a_writer_is_not_waited_for_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr("pipeline.tracking.writer_client.STOPPED_SECONDS", 0.2)
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        raise KeyboardInterrupt
    assert writer.process.poll() == -signal.SIGKILL


def test_a_writer_ignores_a_schedulers_signals(client: Any, writer: Writer, here: Path) -> None:
    run, process = open_run(writer), writer.process
    for number in SIGNALS:
        os.kill(process.pid, number)
    log_steps(run, range(3))
    run.finish("KILLED")
    assert process is writer.process
    assert points(client, run.id) == expected(range(3))


def test_a_run_that_is_alive_cannot_be_resumed(client: Any, writer: Writer, here: Path) -> None:
    run = open_run(writer)
    with pytest.raises(UserError, match=f"run {run.id} is in use by process {os.getpid()} on"):
        resume(writer, run.id)
    run.finish("FINISHED")


# --- a run goes on ---------------------------------------------------------------------------------------------------


def interrupted(writer: Writer, steps: range) -> MlflowRun:
    run = open_run(writer)
    log_steps(run, steps)
    run.finish("KILLED")
    return run


def test_a_resume_waits_for_the_last_writers_call(client: Any, writer: Writer, here: Path) -> None:
    before = interrupted(writer, range(2))
    lock = FileLock(before.run_folder.writer_lock, thread_local=False)
    lock.acquire()
    statuses = []

    def leave() -> None:
        statuses.append(client.get_run(before.id).info.status)
        lock.release()

    threading.Timer(0.5, leave).start()
    run = resume(writer, before.id)
    assert statuses == ["KILLED"]
    run.finish("FINISHED")


def test_waiting_for_a_hanging_writer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "TURN_SECONDS", 0.3)
    checks = []
    with FileLock(RunFolder(tmp_path).writer_lock, is_singleton=False):
        assert not wait_for_turn(RunFolder(tmp_path), lambda: checks.append(1)).is_locked
    assert checks  # the caller can give up meanwhile
    lock = wait_for_turn(RunFolder(tmp_path))
    assert lock.is_locked
    lock.release()


def test_points_logged_before_are_compared_and_not_logged_again(client: Any, writer: Writer, here: Path) -> None:
    before = interrupted(writer, range(10))
    run = resume(writer, before.id)
    run.check_position(before.journal.size)
    log_steps(run, range(4, 15))
    run.log_metrics(15, {"system/rows_per_second": 1.0, "system/checkpoint_megabytes": 1.0})
    run.finish("FINISHED")
    again = resume(writer, before.id)
    again.check_position(0)
    again.log_metrics(15, {"system/rows_per_second": 2.0, "system/checkpoint_megabytes": 2.0})  # once, not compared
    assert [(step, *values.values()) for step, values in again.history()] == [
        *((step, step / 3) for step in range(15)), (15, 1.0, 1.0)
    ]  # fmt: skip
    again.finish("FINISHED")
    stored = client.get_run(before.id)
    assert run.folder == before.folder
    assert points(client, before.id) == expected(range(15))
    assert [value for _, value, _ in points(client, before.id, "system/rows_per_second")] == [1.0]
    assert "determinism" not in stored.data.tags
    assert stored.info.status == "FINISHED"


def test_another_value_than_before_is_a_warning_and_mlflows_stays(
    client: Any, writer: Writer, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = interrupted(writer, range(10))
    run = resume(writer, before.id)
    run.check_position(0)
    for step in range(10):
        run.log_metrics(step, {"loss_total": step / 3 + (1e-16 if step == 0 else 1e-3 if step >= 7 else 0)})
    run.finish("FINISHED")
    assert points(client, before.id) == expected(range(10))
    assert client.get_run(before.id).data.tags["determinism"] == "broken@0"
    assert capsys.readouterr().err.count("loss_total is") == 1


def test_a_launcher_of_a_resumed_run_is_tagged_and_dead_ones_are_ended(client: Any, writer: Writer, here: Path) -> None:
    dead, alive = (client.create_run("0").info.run_id for _ in range(2))
    before = interrupted(writer, range(2))
    resume(writer, before.id, launcher=dead).finish("KILLED")
    resume(writer, before.id, launcher=alive).finish("FINISHED")
    for run_id, status in {dead: "KILLED", alive: "RUNNING"}.items():
        stored = client.get_run(run_id)
        assert (stored.info.status, stored.data.tags["role"], stored.data.tags["launches"]) == (
            status, "launcher", before.id
        )  # fmt: skip
        assert not stored.data.metrics


def test_runs_are_found_by_key_and_fork(client: Any, writer: Writer, here: Path) -> None:
    plain = open_run(writer, tags={"run_key": "k1"})
    plain.log_metrics(0, {"loss_total": 0.5})
    plain.finish("FINISHED")
    fork = open_run(writer, tags={"run_key": "k1", "forked_from": "x@3"})
    fork.finish("KILLED")
    (stored,) = writer.find(run_key="k1")
    assert (stored.run_id, stored.name, stored.status, stored.metrics) == (
        plain.id,
        "test",
        "FINISHED",
        {"loss_total": 0.5},
    )
    assert stored.tags["run_dir"] == str(plain.folder.resolve())
    assert [run.run_id for run in writer.find(run_key="k1", fork="x@3")] == [fork.id]
    assert writer.find(run_key="k2") == []
    assert writer.find(run_id="0" * 32) == []
    assert writer.find(run_id=plain.id)[0].tags["run_key"] == "k1"


# --- the journal is damaged ------------------------------------------------------------------------------------------


def test_an_incomplete_last_record_is_skipped(client: Any, writer: Writer, here: Path) -> None:
    before = interrupted(writer, range(5))
    with before.journal.file.open("ab") as stream:
        stream.write(b'{"op":"metrics","step":5,"ti')
    run = resume(writer, before.id)
    run.check_position(0)
    log_steps(run, range(8))
    run.finish("FINISHED")
    assert points(client, before.id) == expected(range(8))
    assert [record["step"] for record in read_records(before.journal.file) if "step" in record] == list(range(8))


@pytest.mark.parametrize("kept", [0.0, 0.4], ids=["lost", "its tail lost"])
def test_points_that_only_the_store_has_are_read_back(client: Any, writer: Writer, here: Path, kept: float) -> None:
    before = interrupted(writer, range(40))
    before_size = before.journal.file.stat().st_size
    os.truncate(before.journal.file, int(kept * before_size))
    run = resume(writer, before.id)
    run.check_position(before_size)
    assert [step for step, _ in run.history()] == list(range(40))
    log_steps(run, range(30, 50))
    run.finish("FINISHED")
    assert points(client, before.id) == expected(range(50))
    history = pd.read_parquet(client.download_artifacts(before.id, "history.parquet"))
    assert sorted(history[["step", "value", "timestamp"]].itertuples(index=False, name=None)) == expected(range(50))
    assert "determinism" not in client.get_run(before.id).data.tags


WHOLE = {"run_id": "a", "offset": 7, "ended": None, "problems": ["x"]}


@given(saved=JSON, field=st.sampled_from(sorted(WHOLE)))
def test_another_programs_delivered_file_is_ignored(saved: Any, field: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stored in (saved, {"store": saved}, {"store": WHOLE | {field: saved}, "other": WHOLE}):
            RunFolder(folder).delivered.write_text(json.dumps(stored))
            cursor = Cursor(RunFolder(folder), "store")
            assert cursor.at.offset == 0  # there is no journal
            assert all(isinstance(saved.run_id, str | None) for saved in cursor.stores.values())


def test_a_folder_that_was_moved_still_has_its_files(client: Any, writer: Writer, here: Path, tmp_path: Path) -> None:
    run = open_run(writer)
    inside = run.folder / "notes" / "note.txt"
    inside.parent.mkdir()
    inside.write_text("read me")
    run.log_artifact(inside)
    run.finish("KILLED")
    run.folder.rename(tmp_path / "moved")
    RunFolder(tmp_path / "moved").delivered.unlink()
    (here / "mlruns" / "0" / run.id / "artifacts" / "note.txt").unlink()
    moved = resume(writer, run.id, folder=str(tmp_path / "moved"))
    moved.finish("FINISHED")
    assert client.get_run(run.id).data.tags["run_dir"] == str((tmp_path / "moved").resolve())
    assert Path(client.download_artifacts(run.id, "note.txt")).read_text(encoding="utf-8") == "read me"


def test_files_from_elsewhere_are_copied_when_they_are_logged(client: Any, writer: Writer, here: Path) -> None:
    report, gone = here / "report.txt", here / "gone.txt"
    report.write_text("as it was")
    run = open_run(writer)
    run.log_artifact(report, "tables")
    report.write_text("changed later")
    with pytest.raises(TrainingError, match=r"artifact .*gone\.txt: No such file or directory"):
        run.log_artifact(gone)
    run.finish("FINISHED")
    assert Path(client.download_artifacts(run.id, "tables/report.txt")).read_text(encoding="utf-8") == "as it was"


def test_a_journal_names_files_of_its_run_alone(client: Any, writer: Writer, here: Path) -> None:
    """A journal may come from elsewhere: files outside the run's folder are refused by name, the rest is delivered."""
    secret = here / "home" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("hunter2")
    run = open_run(writer)
    for folder in ("../outside", "/outside", "a/../../outside", "a\\..\\..\\b"):
        with pytest.raises(UserError, match=r"artifact secret\.txt: found folder .*allowed"):
            run.log_artifact(secret, folder)
    os.mkfifo(run.folder / "pipe")
    (run.folder / "link.txt").symlink_to(secret)
    (run.folder / "linked").symlink_to(secret.parent)
    (run.folder / "weights").mkdir()
    (run.folder / "weights" / "part").symlink_to(secret)
    (run.folder / "good.txt").write_text("read me")
    files = [str(secret), "../../home/secret.txt", "link.txt", "linked/secret.txt", "pipe", "weights", "", "a\0b"]
    for file in files:
        run.journal.append({"op": "artifact", "file": file, "folder": ""})
    run.journal.append({"op": "artifact", "file": "good.txt", "folder": "../outside"})
    models = [str(secret.parent), "../../home", "linked", "weights", "good.txt", "."]
    model = {"task": "mmoe", "predictor": "mmoe.predict", "inputs": ["a"], "example": {"a": [1]},
             "outputs": {"p": "double"}}  # fmt: skip
    for folder in models:
        run.journal.append({"op": "model", "folder": folder} | model)
    run.log_artifact(run.folder / "good.txt")
    with pytest.raises(TrainingError, match="not delivered") as refused:
        run.finish("FINISHED")
    message = str(refused.value)
    for text in (f"{secret}: its path leaves the run's folder", "link.txt: link.txt is a symbolic link",
                 "linked/secret.txt: linked is a symbolic link", "pipe: not a file", "weights/part: part is a symbolic "
                 "link", f"model not delivered: {secret.parent}: its path leaves the run's folder"):  # fmt: skip
        assert text in message
    assert message.count("not delivered") == len(files) + 1 + len(models)
    assert [stored.path for stored in client.list_artifacts(run.id)] == ["good.txt", "history.parquet"]
    assert not client.search_logged_models(["0"], f"source_run_id = '{run.id}'")
    assert os.listdir(secret.parent) == ["secret.txt"]


# --- the disk is full ------------------------------------------------------------------------------------------------


def test_a_full_disk_fails_the_run_in_one_line(
    client: Any, writer: Writer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(writer)
    Disk(monkeypatch, 1000)
    with pytest.raises(TrainingError, match=r"journal .*journal\.jsonl: No space left on device") as caught:
        log_steps(run, range(100))
    run.set_tags({"failure": str(caught.value)})
    with pytest.raises(TrainingError, match="No space left on device"):
        run.finish("FAILED")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    stored = client.get_run(run.id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["failure"] == str(caught.value)
    arrived = points(client, run.id)
    assert arrived == expected(range(len(arrived)))
    assert len(arrived) == sum(record["op"] == "metrics" for record in read_records(run.journal.file)) > 5


def test_a_run_whose_journal_cannot_begin_is_ended(
    client: Any, writer: Writer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, 0)
    with pytest.raises(TrainingError, match="No space left on device"):
        open_run(writer, name="no room")
    disk.room = 1 << 20
    run = open_run(writer)
    run.finish("FINISHED")
    (failed,) = client.search_runs(["0"], "attributes.run_name = 'no room'")
    assert failed.info.status == "FAILED"
    assert "No space left on device" in failed.data.tags["failure"]
    assert live_owner(Path("outputs") / failed.info.run_id) is None
    assert client.get_run(run.id).info.status == "FINISHED"
    run.journal.file.unlink()
    run.journal.file.mkdir()
    with pytest.raises(TrainingError, match=f"run folder .*{run.id}: not a file"):
        resume(writer, run.id)
    assert live_owner(run.folder) is None


# --- units ---


def test_a_finish_interrupts_a_pause() -> None:
    read, write = os.pipe()
    waiting = Inbox(os.fdopen(read))
    pause = threading.Thread(target=waiting.wait, args=(3600,), daemon=True)
    pause.start()
    with os.fdopen(write, "w") as requests:
        requests.write(encode(FinishRun("FINISHED", patience=3600)))
        requests.flush()
        pause.join(300)
        assert not pause.is_alive()
        assert waiting.ending
        assert waiting.seconds_left
        waiting.finish = FinishRun("FINISHED", patience=0)
        wait_for(lambda: waiting.seconds_left == 0)
        waiting.finish = FinishRun("FINISHED", patience=3600)
        waiting.progress()
        assert waiting.seconds_left
        waiting.progress_at = float("inf")  # or it would end this process once the stream is closed


@pytest.mark.parametrize("takes_others", [True, False])
def test_a_call_that_goes_on_to_fail_is_refused_only_where_others_succeed(
    place: Place, monkeypatch: pytest.MonkeyPatch, takes_others: bool
) -> None:
    """One kind of call gets HTTP 500 forever."""
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException

    run = open_run(place.writer)
    run.log_metrics(0, {"loss_total": 1.0})
    run.set_tags({"after": "all"})
    run.finish("KILLED")
    run.run_folder.delivered.unlink()

    def fails(*_: Any, **given: Any) -> None:
        if "metrics" in given or not takes_others:
            raise RestException({"error_code": "INTERNAL_ERROR", "message": "no"})
        log_batch(*_, **given)

    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", fails)
    monkeypatch.setattr(store_calls, "FAILING_SECONDS", 0.2)
    monkeypatch.setattr(store_calls, "PAUSE_SECONDS", (0.05, 0.05))
    patience = 300 if takes_others else 1
    report = Delivery(run.folder, 1, Inbox(None, FinishRun("KILLED", patience=patience)), lambda _: None).follow()
    if takes_others:
        assert report.problems == ("1 points of loss_total not delivered: INTERNAL_ERROR: no",)
        assert report.waiting == 0
    else:
        assert report.problems == ()
        assert report.waiting
        assert "INTERNAL_ERROR: no" in report.reason


def test_the_probe_knows_who_answers(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    check_reachable()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server.uri}/no/such/page")  # any answer will do
    check_reachable()
    dead = f"127.0.0.1:{free_port()}"
    for uri in (f"http://user:secret@{dead}", f"postgresql+psycopg://user:secret@{dead}/base"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ConnectionError, match=r"does not answer: .*refused") as caught:
            check_reachable()
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("HTTP_PROXY", f"http://{dead}")  # the proxy may reach what we cannot
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host.invalid")
    check_reachable()
