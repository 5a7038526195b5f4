"""From the run to MLflow and back, with MLflow's own client as the judge."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT, store_in
from server import MlflowServer

from pipeline.errors import TrainingError, UserError
from pipeline.journal import JournalReader, JournalWriter, read_all
from pipeline.run import MlflowRun, RunRequest, Writer
from pipeline.tracking.store import is_random


def open_run(writer: Writer, **request: Any) -> MlflowRun:
    return MlflowRun(writer, RunRequest(**{"name": "test"} | request), Path("outputs"))


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@dataclass(frozen=True)
class Place:
    """A folder with a tracking store, and a writer process that is there for all runs."""

    folder: Path
    client: Any  # MLflow's
    writer: Writer


one_process = pytest.mark.xdist_group("one writer")  # which takes seconds to start


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Place]:
    from mlflow import MlflowClient

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
def place(started: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(started.folder)
    return started


def test_journal_reader_sees_whole_records_only(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    writer = JournalWriter(file)
    reader = JournalReader(file)
    assert reader.read() == []
    writer.append({"op": "one"})
    assert reader.read() == []  # not flushed
    writer.flush()
    assert reader.read() == [(13, {"op": "one"})]
    with file.open("ab") as stream:
        stream.write(b'{"op":"tw')
        stream.flush()
        assert reader.read() == []
        stream.write(b'o"}\n{"op":"three"}\n')
        stream.flush()
    assert reader.read() == [(26, {"op": "two"}), (41, {"op": "three"})]
    assert [record["op"] for record in read_all(file)] == ["one", "two", "three"]


@one_process
def test_everything_arrives_in_mlflow_and_in_history(place: Place) -> None:
    note = place.folder / "note.txt"
    note.write_text("read me")
    run = open_run(place.writer, experiment="mine", tags={"arm": "a"})
    run.log_params({"loss.aux_focal.lambda": "0.1"} | {f"key{number}": str(number) for number in range(150)})
    run.set_tags({"data_digest": "f" * 64})
    run.log_input("data", "0123456789abcdef" * 4, "a file", {"rows": 3})
    run.log_artifact(note, "notes")
    for step in range(700):  # more points than one batch takes
        run.log_metrics(step, {"loss_total": 1 / (step + 1), "valid/auc": step / 7, "on": step >= 3}, 1000 + step)
    assert len(list(run.history())) == 700
    run.finish("FINISHED")
    assert run.writer_cpu_seconds > 0
    found = place.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert place.client.get_experiment(found.info.experiment_id).name == "mine"
    assert found.info.run_name == "test"
    assert found.data.params == {"loss.aux_focal.lambda": "0.1"} | {f"key{n}": str(n) for n in range(150)}
    assert found.data.tags["arm"] == "a"
    assert found.data.tags["data_digest"] == "f" * 64
    assert found.data.tags["run_dir"] == str((place.folder / "outputs" / run.id).resolve())
    assert found.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef" * 2
    assert place.client.list_artifacts(run.id, "notes")[0].path == "notes/note.txt"
    history = pd.read_parquet(place.client.download_artifacts(run.id, "history.parquet"))
    assert len(history) == 2100
    for key, values in history.groupby("metric"):
        points = [(p.step, p.value, p.timestamp) for p in place.client.get_metric_history(run.id, key)]
        rows = values[["step", "value", "timestamp"]].itertuples(index=False, name=None)
        assert sorted(points) == sorted(rows)
    assert points[5] == (5, 1 / 6, 1005) or key != "loss_total"


@one_process
def test_params_that_mlflow_run_wrote_are_left_as_typed(place: Place) -> None:
    opened = place.client.create_run("0", run_name="legendary-gnat-695")
    for key, value in {"lambda": "1e-1", "optim.dense.lr": "3e-4"}.items():
        place.client.log_param(opened.info.run_id, key, value)
    run = open_run(place.writer, run_id=opened.info.run_id, name="short name")
    run.log_params({"lambda": "0.1", "loss.aux_focal.lambda": "0.1", "optim.dense.lr": "0.0003"})
    run.finish("FINISHED")
    found = place.client.get_run(opened.info.run_id)
    assert found.data.params == {"lambda": "1e-1", "loss.aux_focal.lambda": "0.1", "optim.dense.lr": "3e-4"}
    assert found.data.tags["canonical.optim.dense.lr"] == "0.0003"
    assert "canonical.lambda" not in found.data.tags
    assert found.info.run_name == "short name"


@one_process
def test_a_name_the_user_gave_is_kept(place: Place) -> None:
    opened = place.client.create_run("0", run_name="my best one")
    run = open_run(place.writer, run_id=opened.info.run_id)
    run.finish("FINISHED")
    assert run.name == place.client.get_run(opened.info.run_id).info.run_name == "my best one"
    assert [is_random(name) for name in ("legendary-gnat-695", "mmoe l.1 g1 w2000 s0", "try-3")] == [True, False, True]


@one_process
def test_another_experiment_than_the_launchers_gets_a_run_of_its_own(place: Place) -> None:
    opened = place.client.create_run("0", run_name="legendary-gnat-695")
    run = open_run(place.writer, run_id=opened.info.run_id, experiment="elsewhere")
    run.finish("FINISHED")
    assert run.id != opened.info.run_id
    assert place.client.get_run(opened.info.run_id).data.tags["role"] == "launcher"
    assert place.client.get_experiment(place.client.get_run(run.id).info.experiment_id).name == "elsewhere"


@one_process
def test_a_second_start_in_the_same_run_goes_on_with_it(
    place: Place, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pod that follows one that was evicted: the same command, the same MLFLOW_RUN_ID, no resume."""
    from pipeline.launch import train_run
    from pipeline.tasks.mmoe.task import MmoeTask
    from pipeline.training import Training

    opened = place.client.create_run("0").info.run_id
    config = small(**{"tracking.log_model": False, "tracking.log_report": False, "checkpoint.every_steps": 4})

    def start(**other: Any) -> Any:
        asked = config.model_copy(update=other)
        return train_run(asked, MmoeTask, place.writer, RunRequest(run_id=opened), quiet=True)

    step = Training._step

    def cut_off(self: Training, *arguments: Any) -> None:
        if self.result.steps == 7:
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert place.client.get_run(opened).info.status == "KILLED"
    with pytest.raises(UserError, match="seed was 0, now 5"):
        start(seed=5)
    trained = start()
    assert (trained.id, trained.steps) == (opened, 12)
    history = place.client.get_metric_history(opened, "loss_total")
    assert sorted(point.step for point in history) == list(range(12))
    assert place.client.get_run(opened).info.status == "FINISHED"
    assert start().before


@one_process
def test_a_checkpoint_of_another_format_is_refused_and_the_run_stays_as_it_is(
    place: Place, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import checkpoint
    from pipeline.launch import train_run
    from pipeline.tasks.mmoe.task import MmoeTask
    from pipeline.training import Training

    overrides = {"tracking.log_model": False, "tracking.log_report": False, "checkpoint.every_steps": 4, "seed": 77}
    config = small(**overrides, resume="auto")
    step = Training._step

    def cut_off(self: Training, *arguments: Any) -> None:
        if self.result.steps == 7:
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, MmoeTask, place.writer, quiet=True)
    (run,) = place.client.search_runs(["0"], "tags.seed = '77'")
    folder = Path(run.data.tags["run_dir"])
    manifests = sorted(folder.glob("checkpoints/*/manifest.json"))
    assert len(manifests) == 2
    for file in manifests:
        content = json.loads(file.read_text()) | {"format": 1}
        del content["sha256"]
        file.write_text(json.dumps(content | {"sha256": checkpoint._seal(content)}))
    journal = (folder / "journal.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"found checkpoint format 1, this program reads 2; .* or delete ") as refused:
        train_run(config, MmoeTask, place.writer, quiet=True)
    assert refused.value.exit_code == 2
    again = RunRequest(run_id=run.info.run_id, resume=True, folder=str(folder))  # as a sweep's worker goes on with it
    with pytest.raises(UserError, match="found checkpoint format 1"):
        train_run(small(**overrides), MmoeTask, place.writer, again, quiet=True)
    (after,) = place.client.search_runs(["0"], "tags.seed = '77'")
    assert (after.info.status, after.data.tags) == ("KILLED", run.data.tags)
    assert (folder / "journal.jsonl").read_bytes() == journal
    with pytest.raises(UserError, match=f"fork {run.info.run_id}@4: .*found checkpoint format 1"):
        train_run(small(**overrides, fork=f"{run.info.run_id}@4"), MmoeTask, place.writer, quiet=True)

    shutil.rmtree(folder / "checkpoints")  # as the line says
    trained = train_run(config, MmoeTask, place.writer, quiet=True)
    assert (trained.id, trained.steps) == (run.info.run_id, 12)
    history = place.client.get_metric_history(trained.id, "loss_total")
    assert sorted(point.step for point in history) == list(range(12))
    assert "determinism" not in place.client.get_run(trained.id).data.tags


@one_process
def test_one_writer_serves_run_after_run(place: Place) -> None:
    for number in range(3):
        run = open_run(place.writer, name=f"run {number}", experiment="three")
        run.log_metrics(0, {"value": number})
        run.finish("FINISHED" if number < 2 else "KILLED")
    experiment = place.client.get_experiment_by_name("three").experiment_id
    runs = {run.info.run_name: run for run in place.client.search_runs([experiment])}
    assert {name: (run.info.status, run.data.metrics["value"]) for name, run in runs.items()} == {
        "run 0": ("FINISHED", 0), "run 1": ("FINISHED", 1), "run 2": ("KILLED", 2),
    }  # fmt: skip


@one_process
def test_points_arrive_while_the_run_goes_on(place: Place) -> None:
    run = open_run(place.writer)
    run.log_metrics(0, {"loss_total": 0.5})
    run.flush()
    wait_for(lambda: place.client.get_run(run.id).data.metrics)
    assert place.client.get_run(run.id).info.status == "RUNNING"
    run.finish("FINISHED")


def test_a_killed_trainer_leaves_what_it_logged_and_no_running_run(client: Any, workplace: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from pipeline.run import MlflowRun, RunRequest, Writer
run = MlflowRun(Writer(), RunRequest("doomed"), Path("outputs"))
for step in range(50):
    run.log_metrics(step, {"loss_total": step})
run.flush()
print(run.id, flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=workplace)
    assert trainer.stdout
    run_id = trainer.stdout.readline().strip()
    os.kill(trainer.pid, signal.SIGKILL)
    wait_for(lambda: client.get_run(run_id).info.status == "FAILED")
    assert len(client.get_metric_history(run_id, "loss_total")) == 50
    assert len(pd.read_parquet(client.download_artifacts(run_id, "history.parquet"))) == 50


@one_process
def test_what_the_store_refuses_is_told_and_the_run_is_not_finished(place: Place) -> None:
    run = open_run(place.writer)
    run.log_metrics(0, {"bad key!": 1.0, "good": 2.0})
    run.log_metrics(1, {"good": 3.0})
    run.set_tags({"after": "all"})
    with pytest.raises(TrainingError, match="not delivered") as caught:
        run.finish("FINISHED")
    assert "1 points of bad key! not delivered" in str(caught.value)
    assert str(run.journal.file) in str(caught.value)
    assert place.client.get_run(run.id).info.status == "FAILED"
    points = place.client.get_metric_history(run.id, "good")  # what stood beside the bad name is not lost
    assert [(point.step, point.value) for point in points] == [(0, 2.0), (1, 3.0)]
    assert place.client.get_run(run.id).data.tags["after"] == "all"


@one_process
def test_an_output_folder_that_cannot_be(place: Place) -> None:
    (place.folder / "in the way").write_text("a file")
    with pytest.raises(UserError, match="output_dir in the way"):
        MlflowRun(place.writer, RunRequest("test"), Path("in the way"))


def test_a_store_that_cannot_be_written(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "damaged.db").write_bytes(b"this is no database, whatever its name says" * 50)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace / 'damaged.db'}")
    with Writer() as writer, pytest.raises(UserError, match=r"tracking store sqlite.*not a database"):
        open_run(writer)


@one_process
def test_a_closed_artifact_folder_is_refused_at_once(place: Place) -> None:
    (place.folder / "closed").write_text("a file in the way")
    place.client.create_experiment("closed", artifact_location=str(place.folder / "closed"))
    with pytest.raises(UserError, match="Not a directory"):
        open_run(place.writer, experiment="closed")
    (run,) = place.client.search_runs([place.client.get_experiment_by_name("closed").experiment_id])
    assert run.info.status == "FAILED"


def test_a_tracking_server_takes_the_same(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    with MlflowServer(workplace / "server", f"sqlite:///{workplace / 'mlflow.db'}") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        client = MlflowClient(server.uri)
        client.create_experiment("served")
        note = workplace / "note.txt"
        note.write_text("read me")
        with Writer() as writer:
            run = open_run(writer, experiment="served")
            run.log_artifact(note)
            for step in range(300):
                run.log_metrics(step, {"loss_total": step / 3, "loss_ctr": step / 7}, 1000 + step)
            run.finish("FINISHED")
        assert client.get_run(run.id).info.status == "FINISHED"
        points = client.get_metric_history(run.id, "loss_total")
        assert [(p.step, p.value, p.timestamp) for p in points] == [(s, s / 3, 1000 + s) for s in range(300)]
        assert Path(client.download_artifacts(run.id, "note.txt")).read_text() == "read me"
        assert len(pd.read_parquet(client.download_artifacts(run.id, "history.parquet"))) == 600


@one_process
def test_a_deleted_experiment_is_refused(place: Place) -> None:
    place.client.delete_experiment(place.client.create_experiment("gone"))
    with pytest.raises(UserError, match="experiment gone is deleted"):
        open_run(place.writer, experiment="gone")


def test_the_environments_experiment_is_mlflows_choice(
    client: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the shell")
    with Writer() as writer:
        run = open_run(writer)
        run.finish("FINISHED")
    assert client.get_experiment(client.get_run(run.id).info.experiment_id).name == "from the shell"


def test_a_database_without_tables_is_made_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded default: nothing is there, and nothing is configured."""
    monkeypatch.chdir(tmp_path)
    with Writer() as writer:
        run = open_run(writer)
        run.finish("FINISHED")
    base = sqlite3.connect(tmp_path / "mlflow.db")
    assert base.execute("select status from runs").fetchall() == [("FINISHED",)]
    assert json.loads(json.dumps(run.tracking_uri)).startswith("sqlite:///")
    assert (ROOT / ".gitignore").read_text().count("mlflow.db") == 1
