"""From the run to MLflow and back, with MLflow's own client as the judge."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT

from pipeline.errors import TrainingError, UserError
from pipeline.journal import JournalReader, JournalWriter, read_all
from pipeline.run import MlflowRun, RunRequest, Writer
from pipeline.tracking.store import is_random, tracking_uri


def open_run(writer: Writer, **request: Any) -> MlflowRun:
    return MlflowRun(writer, RunRequest(**{"name": "test"} | request), Path("outputs"))


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_journal_reader_sees_whole_records_only(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    writer = JournalWriter(file)
    reader = JournalReader(file)
    assert reader.read() == []
    writer.append({"op": "one"})
    assert reader.read() == []  # not flushed
    writer.flush()
    assert reader.read() == [{"op": "one"}]
    with file.open("ab") as stream:
        stream.write(b'{"op":"tw')
        stream.flush()
        assert reader.read() == []
        stream.write(b'o"}\n{"op":"three"}\n')
        stream.flush()
    assert reader.read() == [{"op": "two"}, {"op": "three"}]
    assert [record["op"] for record in read_all(file)] == ["one", "two", "three"]


def test_everything_arrives_in_mlflow_and_in_history(client: Any, workplace: Path) -> None:
    note = workplace / "note.txt"
    note.write_text("read me")
    with Writer() as writer:
        run = open_run(writer, experiment="mine", tags={"arm": "a"})
        run.log_params({"loss.aux_focal.lambda": "0.1"} | {f"key{number}": str(number) for number in range(150)})
        run.set_tags({"data_digest": "f" * 64})
        run.log_input("data", "0123456789abcdef" * 4, "a file", {"rows": 3})
        run.log_artifact(note, "notes")
        for step in range(700):  # more points than one batch takes
            run.log_metrics(step, {"loss_total": 1 / (step + 1), "valid/auc": step / 7, "on": step >= 3}, 1000 + step)
        assert len(run.history()) == 700
        run.finish("FINISHED")
        assert run.writer_cpu_seconds > 0
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert found.info.run_name == "test"
    assert found.data.params == {"loss.aux_focal.lambda": "0.1"} | {f"key{n}": str(n) for n in range(150)}
    assert found.data.tags["arm"] == "a"
    assert found.data.tags["data_digest"] == "f" * 64
    assert found.data.tags["run_dir"] == str((workplace / "outputs" / run.id).resolve())
    assert found.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef" * 2
    assert client.list_artifacts(run.id, "notes")[0].path == "notes/note.txt"
    history = pd.read_parquet(client.download_artifacts(run.id, "history.parquet"))
    assert len(history) == 2100
    for key, values in history.groupby("metric"):
        points = [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run.id, key)]
        rows = values[["step", "value", "timestamp"]].itertuples(index=False, name=None)
        assert sorted(points) == sorted(rows)
    assert points[5] == (5, 1 / 6, 1005) or key != "loss_total"


def test_params_that_mlflow_run_wrote_are_left_as_typed(client: Any, workplace: Path) -> None:
    opened = client.create_run("0", run_name="legendary-gnat-695")
    for key, value in {"lambda": "1e-1", "optim.dense.lr": "3e-4"}.items():
        client.log_param(opened.info.run_id, key, value)
    with Writer() as writer:
        run = open_run(writer, run_id=opened.info.run_id, name="short name")
        run.log_params({"lambda": "0.1", "loss.aux_focal.lambda": "0.1", "optim.dense.lr": "0.0003"})
        run.finish("FINISHED")
    found = client.get_run(opened.info.run_id)
    assert found.data.params == {"lambda": "1e-1", "loss.aux_focal.lambda": "0.1", "optim.dense.lr": "3e-4"}
    assert found.data.tags["canonical.optim.dense.lr"] == "0.0003"
    assert "canonical.lambda" not in found.data.tags
    assert found.info.run_name == "short name"


def test_a_name_the_user_gave_is_kept(client: Any, workplace: Path) -> None:
    opened = client.create_run("0", run_name="my best one")
    with Writer() as writer:
        run = open_run(writer, run_id=opened.info.run_id)
        run.finish("FINISHED")
    assert run.name == client.get_run(opened.info.run_id).info.run_name == "my best one"
    assert [is_random(name) for name in ("legendary-gnat-695", "mmoe l.1 g1 w2000 s0", "try-3")] == [True, False, True]


def test_another_experiment_than_the_launchers_gets_a_run_of_its_own(client: Any, workplace: Path) -> None:
    opened = client.create_run("0", run_name="legendary-gnat-695")
    with Writer() as writer:
        run = open_run(writer, run_id=opened.info.run_id, experiment="elsewhere")
        run.finish("FINISHED")
    assert run.id != opened.info.run_id
    assert client.get_run(opened.info.run_id).data.tags["role"] == "launcher"
    assert client.get_experiment(client.get_run(run.id).info.experiment_id).name == "elsewhere"


def test_one_writer_serves_run_after_run(client: Any, workplace: Path) -> None:
    with Writer() as writer:
        for number in range(3):
            run = open_run(writer, name=f"run {number}")
            run.log_metrics(0, {"value": number})
            run.finish("FINISHED" if number < 2 else "KILLED")
    runs = {run.info.run_name: run for run in client.search_runs(["0"])}
    assert {name: (run.info.status, run.data.metrics["value"]) for name, run in runs.items()} == {
        "run 0": ("FINISHED", 0), "run 1": ("FINISHED", 1), "run 2": ("KILLED", 2),
    }  # fmt: skip


def test_points_arrive_while_the_run_goes_on(client: Any, workplace: Path) -> None:
    with Writer() as writer:
        run = open_run(writer)
        run.log_metrics(0, {"loss_total": 0.5})
        run.flush()
        wait_for(lambda: client.get_run(run.id).data.metrics)
        assert client.get_run(run.id).info.status == "RUNNING"
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
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=workplace)
    assert trainer.stdout
    run_id = trainer.stdout.readline().strip()
    os.kill(trainer.pid, signal.SIGKILL)
    wait_for(lambda: client.get_run(run_id).info.status == "FAILED")
    assert len(client.get_metric_history(run_id, "loss_total")) == 50
    assert len(pd.read_parquet(client.download_artifacts(run_id, "history.parquet"))) == 50


def test_what_the_store_refuses_is_told_and_the_run_is_not_finished(client: Any, workplace: Path) -> None:
    with Writer() as writer:
        run = open_run(writer)
        run.log_metrics(0, {"bad key!": 1.0, "good": 2.0})
        run.log_metrics(1, {"good": 3.0})
        run.set_tags({"after": "all"})
        with pytest.raises(TrainingError, match="not delivered") as caught:
            run.finish("FINISHED")
    assert "points were delivered" in str(caught.value)
    assert str(run.journal.file) in str(caught.value)
    assert client.get_run(run.id).info.status == "FAILED"
    assert client.get_run(run.id).data.tags["after"] == "all"


def test_an_output_folder_that_cannot_be(workplace: Path) -> None:
    (workplace / "outputs").write_text("a file in the way")
    with Writer() as writer, pytest.raises(UserError, match="output_dir outputs"):
        open_run(writer)


def test_a_store_that_cannot_be_written(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "damaged.db").write_bytes(b"this is no database, whatever its name says" * 50)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace / 'damaged.db'}")
    with Writer() as writer, pytest.raises(UserError, match=r"tracking store sqlite.*not a database"):
        open_run(writer)


def test_a_closed_artifact_folder_is_refused_at_once(client: Any, workplace: Path) -> None:
    (workplace / "closed").write_text("a file in the way")
    client.create_experiment("closed", artifact_location=str(workplace / "closed"))
    with Writer() as writer, pytest.raises(UserError, match="Not a directory"):
        open_run(writer, experiment="closed")
    (run,) = client.search_runs([client.get_experiment_by_name("closed").experiment_id])
    assert run.info.status == "FAILED"


def test_a_tracking_server_takes_the_same(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{workplace / 'mlflow.db'}",
         "--artifacts-destination", str(workplace / "served"), "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        uri = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        wait_for(lambda: _answers(uri), 60)
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
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
    finally:
        mlflow.set_tracking_uri(None)
        os.killpg(server.pid, signal.SIGKILL)


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_a_deleted_experiment_is_refused(client: Any, workplace: Path) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with Writer() as writer, pytest.raises(UserError, match="experiment gone is deleted"):
        open_run(writer, experiment="gone")


def test_the_environments_experiment_is_mlflows_choice(
    client: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the shell")
    with Writer() as writer:
        run = open_run(writer)
        run.finish("FINISHED")
    assert client.get_experiment(client.get_run(run.id).info.experiment_id).name == "from the shell"


def test_no_password_in_a_shown_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "postgresql://user:secret@host/base")
    assert tracking_uri() == "postgresql://host/base"


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
