"""`sync` delivers the rest of a journal to the same store or another one, however late."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Place, one_writer, store_in
from server import free_port

from pipeline.errors import TrainingError, Undelivered, UserError
from pipeline.storage.journal import JOURNAL_FILE, JournalWriter
from pipeline.storage.ownership import Ownership, live_owner
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking import sync as syncing
from pipeline.tracking.delivery import WAS_KILLED, Delivery
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import FinishRun, OpenedRun, OpenRun, RunRequest, TakenOver
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.run_opening import Opening
from pipeline.tracking.store_calls import GaveUpError
from pipeline.tracking.sync import sync

pytestmark = one_writer
TESTED = {"test/auc": 1 / 3, "test/logloss": 0.25, "test/f1/screen": float("nan")}


class Unserved:
    """Replaces the writer: a run begins without a store, and its journal waits for `sync`."""

    def ask(self, request: OpenRun, _: type[OpenedRun]) -> OpenedRun:
        return Opening(request.run, Path(request.output_dir), {}).without_store("nobody serves it")

    def send(self, _: object) -> None:
        """Do nothing."""


def waiting_run(name: str, status: str, log: Callable[[MlflowRun], None], **request: Any) -> MlflowRun:
    """A run that ended while no store was there."""
    run = MlflowRun(Unserved(), RunRequest(name, **request), Path("outputs"), offline=True)  # type: ignore[arg-type]
    log(run)
    run.journal.append({"op": "finish", "status": status, "time": 0})
    run.journal.close()
    run.owner.release()
    return run


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that nobody serves."""
    monkeypatch.chdir(tmp_path)
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def other(tmp_path: Path, empty_store: Path) -> str:
    """Another store, which exists."""
    (tmp_path / "other").mkdir()
    store_in(tmp_path / "other", empty_store)
    return f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"


def use(uri: str, patch: pytest.MonkeyPatch) -> Any:
    """Make `sync` and MLflow's client in this process use a store."""
    import mlflow

    patch.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow.MlflowClient(uri)


def points(client: Any, run_id: str, key: str) -> list[tuple[int, float, int]]:
    return sorted((point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, key))


def log_all(run: MlflowRun, export: dict[str, Any]) -> None:
    run.log_params({"seed": "3", "loss.aux_focal.lambda": "0.1"})
    run.set_tags({"data_digest": "ab" * 32})
    run.log_input("data", "ab" * 32, "a file", {"rows": 3})
    note = run.folder / "note.txt"
    note.write_text("read me")
    run.log_artifact(note, "notes")
    for step in range(700):
        run.log_metrics(
            step, {"loss_total": step / 3, "valid/auc": float("nan") if step == 5 else step / 7}, 1000 + step
        )
    if export:
        run.log_metrics(700, TESTED, 1800)
        shutil.copytree(export["folder"], run.folder / "model")
        run.log_model(export | {"folder": str(run.folder / "model")})


@pytest.fixture(scope="module")
def export(impressions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small model, as a journal's record of it."""
    from dataclasses import asdict

    from conftest import ROOT, SHRUNK

    from pipeline.config.strict_config import load
    from pipeline.tasks.mmoe.config import MmoeConfig
    from pipeline.tasks.mmoe.task import MmoeTask

    config = load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", SHRUNK | {"data.path": str(impressions)})
    task = MmoeTask(config)
    facts = {"task": "mmoe", "predictor": "pipeline.tasks.mmoe.predict"}
    return asdict(task.export(task.model(), tmp_path_factory.mktemp("export") / "model")) | facts


def test_a_run_without_a_store_is_delivered_completely(
    other: str,
    away: str,
    export: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = waiting_run("lonely", "FINISHED", lambda run: log_all(run, export), experiment="synced", tags={"arm": "a"})
    with pytest.raises(Undelivered, match=r"does not answer.*; everything stays in") as caught:
        sync(run.folder)
    assert caught.value.exit_code == 3
    client = use(other, monkeypatch)
    sync(run.folder)
    assert "records delivered to" in capsys.readouterr().err
    (made,) = client.search_runs([client.get_experiment_by_name("synced").experiment_id])
    assert made.info.run_name == "lonely"
    assert made.info.status == "FINISHED"
    assert made.data.params == {"seed": "3", "loss.aux_focal.lambda": "0.1"}
    tags = {"arm": "a", "data_digest": "ab" * 32, "original_run_id": run.id, "run_dir": str(run.folder.resolve())}
    assert made.data.tags.items() >= tags.items()
    assert points(client, made.info.run_id, "loss_total") == [(step, step / 3, 1000 + step) for step in range(700)]
    assert [step for step, *_ in points(client, made.info.run_id, "valid/auc")] == list(range(700))
    assert [value != value for _, value, _ in points(client, made.info.run_id, "valid/auc")].index(True) == 5  # noqa: PLR0124
    assert made.inputs.dataset_inputs[0].dataset.digest == "ab" * 16
    assert Path(client.download_artifacts(made.info.run_id, "notes/note.txt")).read_text(encoding="utf-8") == "read me"
    assert "history.parquet" in [stored.path for stored in client.list_artifacts(made.info.run_id)]
    (model,) = models(client, made)
    tested = [("test/auc", 1 / 3, 700, 1800, "data", "ab" * 16), ("test/logloss", 0.25, 700, 1800, "data", "ab" * 16)]
    assert of_model(client, model) == tested
    sync(run.folder)
    assert "nothing to deliver" in capsys.readouterr().err
    assert client.get_run(made.info.run_id).info.end_time == made.info.end_time
    (run.folder / "delivered.json").unlink()  # all of it a second time, of the model all but a metric
    with closing(sqlite3.connect(other.removeprefix("sqlite:///"))) as base, base:
        assert base.execute("delete from logged_model_metrics where metric_name = 'test/auc'").rowcount == 1
    sync(run.folder.parent)
    assert len(client.search_runs([made.info.experiment_id])) == 1
    assert len(points(client, made.info.run_id, "loss_total")) == 700
    assert [stored.model_id for stored in models(client, made)] == [model.model_id]
    assert of_model(client, model) == tested
    assert [len(points(client, made.info.run_id, name)) for name in TESTED] == [1, 1, 1]


def of_model(client: Any, model: Any) -> list[tuple[Any, ...]]:
    """The model's metrics; without NaN, which MLflow would show as 0."""
    return sorted((of.key, of.value, of.step, of.timestamp, of.dataset_name, of.dataset_digest)
                  for of in client.get_logged_model(model.model_id).metrics)  # fmt: skip


def models(client: Any, run: Any) -> list[Any]:
    stored = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    return [model for model in stored if model.status == "READY"]


def test_a_run_of_one_store_is_created_in_another(place: Place, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first store stays as it is; points are compared through MLflow."""
    client = place.client
    run = MlflowRun(place.writer, RunRequest("twice", experiment="shared"), Path("outputs"))
    log_all(run, {})
    run.finish("FINISHED")
    first = client.get_run(run.id)
    second = use(other, monkeypatch)
    sync(run.folder)
    (made,) = second.search_runs([second.get_experiment_by_name("shared").experiment_id])
    assert made.data.tags["original_run_id"] == run.id
    assert made.info.start_time == first.info.start_time or abs(made.info.start_time - first.info.start_time) < 60_000
    assert made.data.params == first.data.params
    for key in ("loss_total", "valid/auc"):
        before, after = points(client, run.id, key), points(second, made.info.run_id, key)
        assert repr(before) == repr(after)  # NaN as NaN
    use(f"sqlite:///{place.folder / 'mlflow.db'}", monkeypatch)
    sync(run.folder)  # the first still knows that it has all of it
    assert client.get_run(run.id).info.end_time == first.info.end_time

    def dies(*_: object) -> None:
        raise ConnectionError("died just now")

    monkeypatch.setattr("pipeline.tracking.sync.find_by_id", dies)
    with pytest.raises(Undelivered, match="died just now; everything stays in"):
        sync(run.folder)
    assert live_owner(run.folder) is None


def test_in_a_hurry_the_end_comes_before_the_history(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    client = place.client
    run = MlflowRun(place.writer, RunRequest("hurried"), Path("outputs"))
    run.log_metrics(0, {"loss_total": 1.0})
    run.finish("KILLED")
    client.update_run(run.id, status="RUNNING")
    (run.folder / "delivered.json").unlink()
    seen = []

    def slow(*_: object) -> None:
        seen.append(client.get_run(run.id).info.status)
        raise GaveUpError

    monkeypatch.setattr("pipeline.tracking.delivery.write_history", slow)
    inbox = Inbox(None, FinishRun("KILLED", patience=60, hurry=True))
    report = Delivery(run.folder, 1, inbox, lambda _: None).follow()
    assert seen == ["KILLED"]
    assert report.waiting == 1  # the end, with its history


def test_the_end_is_when_the_run_ended_however_late_it_is_delivered(place: Place, away: str) -> None:
    run = waiting_run("late", "FINISHED", lambda run: run.log_metrics(0, {"loss_total": 1.0}, 1000))
    records = [json.loads(line) for line in (run.folder / JOURNAL_FILE).read_text().splitlines()]
    records[0]["time"], records[-1]["time"] = 500_000, 700_000
    (run.folder / JOURNAL_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.MonkeyPatch.context() as patch:
        client = use(f"sqlite:///{place.folder / 'mlflow.db'}", patch)
        sync(run.folder)
    (info,) = [stored.info for stored in client.search_runs(["0"], f"tags.original_run_id = '{run.id}'")]
    assert (info.start_time, info.end_time) == (500_000, 700_000)


def test_a_writer_that_finds_another_owner_in_the_store_stops(place: Place) -> None:
    run = MlflowRun(place.writer, RunRequest("owned"), Path("outputs"))
    claim = place.client.get_run(run.id).data.tags["owner"]
    assert claim.split()[0] == str(os.getpid())
    run.finish("KILLED")
    run.journal = JournalWriter(run.folder / JOURNAL_FILE)
    run.journal.append({"op": "metrics", "step": 0, "time": 1, "values": {"loss_total": 1.0}})
    run.journal.close()
    place.client.set_tag(run.id, "owner", "77 ab12cd34")
    place.client.set_tag(run.id, "host", "elsewhere")
    message: list[Any] = []
    delivery = Delivery(run.folder, 1, Inbox(None, FinishRun("KILLED", patience=60)), message.append, claim)
    report = delivery.follow()
    assert message == [TakenOver("process 77 on elsewhere")]
    assert (report.waiting, report.reason) == (1, f"run {run.id} was taken over by process 77 on elsewhere")
    assert place.client.get_metric_history(run.id, "loss_total") == []
    theirs = Delivery(run.folder, 1, Inbox(None, FinishRun("KILLED", patience=60)), message.append, "77 ab12cd34")
    assert theirs.follow().waiting == 0
    assert len(place.client.get_metric_history(run.id, "loss_total")) == 1


def test_a_run_that_was_deleted_is_one_warning(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = MlflowRun(place.writer, RunRequest("deleted"), Path("outputs"))
    run.finish("KILLED")
    place.client.delete_run(run.id)
    journal = JournalWriter(run.folder / JOURNAL_FILE)
    for step in range(3000):
        journal.append({"op": "metrics", "step": step, "time": 1, "values": {"loss_total": 1.0}})
    journal.close()
    before = (run.folder / "delivered.json").read_text()
    inbox = Inbox(None)
    capsys.readouterr()
    report = Delivery(run.folder, 1, inbox, lambda _: None).follow()
    assert (report.waiting, report.problems) == (3000, ())
    assert "was deleted in sqlite" in report.reason
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: run {run.id} was deleted in ")
    assert (run.folder / "delivered.json").read_text() == before
    place.client.restore_run(run.id)
    sync(run.folder)
    assert len(place.client.get_metric_history(run.id, "loss_total")) == 3000
    place.client.delete_run(run.id)
    with pytest.raises(UserError, match=rf"^run {run.id} was deleted in .*`mlflow runs restore --run-id {run.id}`"):
        sync(run.folder)  # all is delivered


def test_a_data_set_that_another_run_inserts_at_the_same_moment(place: Place) -> None:
    """MLflow looks for the data set, another run inserts it, and the insert of MLflow fails."""
    from mlflow.store.tracking.dbmodels.models import SqlDataset
    from sqlalchemy import event

    client = place.client
    run = MlflowRun(place.writer, RunRequest("second"), Path("outputs"))
    run.log_input("data", "ab" * 32, "a file", {"rows": 3})
    run.finish("FINISHED")
    with closing(sqlite3.connect(place.folder / "mlflow.db")) as base:  # as if nothing had been delivered
        base.executescript("delete from input_tags; delete from inputs; delete from datasets;")
    client.update_run(run.id, status="RUNNING")
    (run.folder / "delivered.json").unlink()
    others: list[str] = []

    def make_it_too(_mapper: Any, _connection: Any, row: Any) -> None:
        if not others:
            others.append("c" * 32)
            with closing(sqlite3.connect(place.folder / "mlflow.db")) as base:
                base.execute("insert into datasets values (?, ?, ?, ?, 'local', '{}', null, null)",
                             (others[0], row.experiment_id, row.name, row.digest))  # fmt: skip
                base.commit()

    event.listen(SqlDataset, "before_insert", make_it_too)
    try:
        inbox = Inbox(None, FinishRun("FINISHED", patience=60))
        report = Delivery(run.folder, 1, inbox, lambda _: None).follow()
    finally:
        event.remove(SqlDataset, "before_insert", make_it_too)
    assert others
    assert report.problems == ()
    assert client.get_run(run.id).info.status == "FINISHED"
    (stored,) = client.get_run(run.id).inputs.dataset_inputs
    assert (stored.dataset.name, stored.dataset.digest) == ("data", "ab" * 16)


def test_a_killed_run_is_ended_as_failed(place: Place) -> None:
    """Trainer and writer are killed together."""
    code = """
import os, signal
from pathlib import Path
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.writer_client import Writer
run = MlflowRun(writer := Writer(), RunRequest("doomed"), Path("outputs"))
for step in range(50):
    run.log_metrics(step, {"loss_total": step / 3}, 1000 + step)
os.kill(writer.process.pid, signal.SIGSTOP)
run.journal.flush()
print(run.id, writer.process.pid, flush=True)
signal.pause()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=place.folder) as trainer:
        assert trainer.stdout
        run_id, writer = trainer.stdout.readline().split()
        folder = place.folder / "outputs" / run_id
        with pytest.raises(UserError, match=f"run {run_id} is in use by process {trainer.pid}"):
            sync(folder)
        os.kill(int(writer), signal.SIGKILL)
        trainer.kill()
    with (folder / JOURNAL_FILE).open("ab") as stream:
        stream.write(b'{"op":"met')  # and cut off in mid-record
    sync(folder)
    stored = place.client.get_run(run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["failure"] == WAS_KILLED
    assert points(place.client, run_id, "loss_total") == [(step, step / 3, 1000 + step) for step in range(50)]


def test_a_run_whose_model_cannot_answer_is_failed(place: Place, export: dict[str, Any]) -> None:
    run = MlflowRun(place.writer, RunRequest("mute"), Path("outputs"))
    folder = shutil.copytree(export["folder"], run.folder / "model")
    (folder / "model.safetensors").unlink()
    run.log_model(export | {"folder": str(folder)})
    with pytest.raises(TrainingError, match=r"model not delivered: the model cannot be loaded and used: .*safetensors"):
        run.finish("FINISHED")
    made = place.client.get_run(run.id)
    assert made.info.status == "FAILED"
    assert models(place.client, made) == []


def test_a_copied_folder_of_a_run_that_is_alive_is_refused(place: Place) -> None:
    run = MlflowRun(place.writer, RunRequest("copied"), Path("outputs"))
    copy = shutil.copytree(run.folder, Path("copies") / run.id)
    with pytest.raises(UserError, match=f"run {run.id} is in use by process {os.getpid()} on "):
        sync(copy)
    assert place.client.get_run(run.id).info.status == "RUNNING"
    run.finish("FINISHED")
    sync(copy)
    assert place.client.get_run(run.id).info.status == "FINISHED"


def test_a_folder_of_runs_is_delivered_but_for_the_one_that_is_alive(
    away: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [waiting_run(name, "KILLED", lambda run: run.log_metrics(0, {"loss_total": 1.0}), experiment="several")
            for name in ("one", "two")]  # fmt: skip
    client = use(other, monkeypatch)
    owner = Ownership(runs[0].folder)
    with pytest.raises(UserError, match="1 of 2 runs of outputs were not fully delivered"):
        sync(Path("outputs"))
    assert f"run {runs[0].id} is in use by" in capsys.readouterr().err
    owner.release()
    sync(Path("outputs"))
    made = client.search_runs([client.get_experiment_by_name("several").experiment_id])
    assert {run.info.run_name: run.info.status for run in made} == {"one": "KILLED", "two": "KILLED"}


def test_a_damaged_folder_leaves_the_others(
    away: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program's `delivered.json`, records without fields, no record `open`, and an unforeseen error."""
    names = ("foreign", "lacking", "headless", "unforeseen", "whole")
    runs = {name: waiting_run(name, "KILLED", lambda run: run.log_metrics(0, {"loss_total": 1.0}), experiment="damage")
            for name in names}  # fmt: skip
    (runs["foreign"].folder / "delivered.json").write_text('{"sqlite:///x.db": {}}')
    for name, text in (("lacking", '{"op":"metrics"}\n{"op":"finish"}\n'), ("headless", '{"op":"open"}\n')):
        records = runs[name].journal.file.read_text().splitlines(keepends=True)
        runs[name].journal.file.write_text(text + "".join(records if name == "lacking" else records[1:]))
    client, deliver = use(other, monkeypatch), syncing._deliver

    def stumbles(folder: RunFolder, *arguments: Any) -> Any:
        if folder.path.name == runs["unforeseen"].id:
            raise KeyError("offset")
        return deliver(folder, *arguments)

    monkeypatch.setattr(syncing, "_deliver", stumbles)
    with pytest.raises(UserError, match="2 of 5 runs of outputs were not fully delivered"):
        sync(Path("outputs"))
    lines = capsys.readouterr().err.splitlines()
    damaged = runs["lacking"].journal.file.resolve()
    assert f"warning: {damaged}: skipped damaged lines: 2" in lines
    errors = [line for line in lines if line.startswith("error: ")]
    assert sorted(line.partition(": found")[0].partition(": KeyError")[0] for line in errors) == sorted(
        [f"error: {runs['headless'].journal.file.resolve()}", f"error: run folder {runs['unforeseen'].folder}"]
    )
    made = client.search_runs([client.get_experiment_by_name("damage").experiment_id])
    assert {run.info.run_name: run.info.status for run in made} == dict.fromkeys(
        ("foreign", "lacking", "whole"), "KILLED"
    )
    with pytest.raises(TrainingError, match="KeyError"):
        sync(runs["unforeseen"].folder)


def test_what_was_refused_is_tried_again(place: Place) -> None:
    run, client = MlflowRun(place.writer, RunRequest("refused"), Path("outputs")), place.client
    note = run.folder / "late note.txt"
    run.log_artifact(note)  # is not there yet
    with pytest.raises(TrainingError, match="not delivered"):
        run.finish("FINISHED")
    assert client.get_run(run.id).info.status == "FAILED"
    with pytest.raises(TrainingError, match="not delivered"):
        sync(run.folder)
    note.write_text("read me")
    sync(run.folder)
    assert client.get_run(run.id).info.status == "FINISHED"
    assert Path(client.download_artifacts(run.id, "late note.txt")).read_text(encoding="utf-8") == "read me"


def no_journal(folder: Path) -> None:
    folder.mkdir()


def no_beginning(folder: Path) -> None:
    folder.mkdir()
    (folder / JOURNAL_FILE).write_text('{"op":"tags","values":{}}\n')


@pytest.mark.parametrize(
    ("make", "message"),
    [(no_journal, r"found no journal\.jsonl, allowed"), (no_beginning, "found no record of the run's")],
)
def test_a_folder_without_a_run_is_refused(
    make: Callable[[Path], None], message: str, client: Any, workplace: Path
) -> None:
    make(workplace / "folder")
    with pytest.raises(UserError, match=message):
        sync(workplace / "folder")
