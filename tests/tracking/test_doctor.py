"""`doctor` finds differences between a run's journal, store and checkpoints, and says what repairs them."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import Place, one_writer

from pipeline.errors import TrainingError, UserError
from pipeline.storage import checkpoint_format
from pipeline.storage.checkpoints import Checkpoints
from pipeline.storage.journal import JOURNAL_FILE
from pipeline.tracking.doctor import doctor
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.sync import sync

pytestmark = one_writer


@pytest.fixture
def workplace(place: Place) -> Path:
    return place.folder


@pytest.fixture
def run(place: Place) -> Path:
    """The folder of a finished run of 20 steps with a checkpoint, an artifact and a param that `mlflow run` wrote."""
    opened = place.client.create_run("0", run_name="legendary-gnat-695")
    place.client.log_param(opened.info.run_id, "lambda", "1e-1")
    note = place.folder / "note.txt"
    note.write_text("read me")
    tracked = MlflowRun(place.writer, RunRequest("mine", run_id=opened.info.run_id), Path("outputs"))
    tracked.log_params({"lambda": "0.1", "loss.aux_focal.lambda": "0.1"})
    tracked.log_artifact(note, "notes")
    for step in range(20):
        tracked.log_metrics(step, {"loss_total": 1 / (step + 1), "odd": [float("nan"), float("inf")][step % 2]})
    for step in (10, 20):
        Checkpoints(tracked.folder).save(step, {"weight": torch.ones(9)}, {}, {}, None)
    tracked.finish("FINISHED")
    return tracked.folder.resolve()


def differences(run: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(TrainingError, match="checks failed"):
        doctor(run)
    return " ".join(capsys.readouterr().err.split())


def base(run: Path, workplace: Path, statement: str) -> None:
    """Change the store's rows of the run: `:run` stands for its id."""
    with closing(sqlite3.connect(workplace / "mlflow.db")) as store:
        store.execute(statement, {"run": run.name})
        store.commit()


def test_a_run_that_is_whole(run: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (run.name, str(run)):
        doctor(name)
        output = capsys.readouterr().err
        assert "DIFFERS" not in output
        for line in ("no process writes it", "40 points of 2 metrics", "ends as FINISHED",
                     "checkpoint of step 10: whole", "checkpoint of step 20: whole", "0 bytes of the journal wait",
                     "is FINISHED", "2 of 2 params", "40 of 40 points", "1 of 1 artifacts"):  # fmt: skip
            assert line in output


def test_losses_of_the_store_are_named_and_delivered_again(
    run: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a restore from an old backup: `delivered.json` says that everything was delivered."""
    base(run, workplace, "delete from metrics where step >= 15 and key = 'loss_total' and run_uuid = :run")
    base(run, workplace, "delete from params where key = 'loss.aux_focal.lambda' and run_uuid = :run")
    shutil.rmtree(workplace / "mlruns" / "0" / run.name / "artifacts" / "notes")
    output = differences(run.name, capsys)
    assert "store: 35 of 40 points 5 are missing, of loss_total: python -m pipeline sync" in output
    assert f"store: 1 of 2 params loss.aux_focal.lambda: python -m pipeline sync {run} --again" in output
    assert "store: 0 of 1 artifacts notes/note.txt:" in output
    sync(run, again=True)
    doctor(run.name)


def test_extra_points_in_the_store(run: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = "insert into metrics (key, value, timestamp, run_uuid, step, is_nan)"
    for step in (3, 99):
        base(run, workplace, f"{columns} values ('loss_total', 9.0, 7, :run, {step}, 0)")
    base(run, workplace, "update metrics set value = 5 where step = 4 and key = 'loss_total' and run_uuid = :run")
    base(run, workplace, "update runs set status = 'RUNNING' where run_uuid = :run")
    output = differences(run.name, capsys)
    assert "1 points are there more than once, of loss_total" in output
    assert "1 points have another value than in the journal, of loss_total" in output
    assert "1 points missing from the journal, of loss_total" in output
    assert f"run {run.name} is RUNNING python -m pipeline sync" in output


def test_a_torn_journal_and_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = run / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-9])
    state = run / "checkpoints" / f"{20:09d}" / "state.pt"
    state.write_bytes(b"\0" * state.stat().st_size)
    output = differences(run.name, capsys)
    assert "bytes of an incomplete one the next start (resume=auto) removes the incomplete line" in output
    assert "ends as a run that still trains, or was killed start it again with resume=auto" in output
    assert "checkpoint of step 10: whole" in output
    assert "DIFFERS checkpoint of step 20: " in output


def test_a_checkpoint_of_another_format(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run / "checkpoints" / f"{20:09d}" / "manifest.json"
    content = json.loads(manifest.read_text()) | {"format": 1}
    del content["sha256"]
    manifest.write_text(json.dumps(content | {"sha256": checkpoint_format._seal(content)}))
    output = differences(run.name, capsys)
    assert "DIFFERS checkpoint of step 20: " in output
    assert "found checkpoint format 1, this program reads 2" in output
    assert "resume=auto refuses it" in output


def test_a_store_that_dies_midway_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise ConnectionError("died just now")

    monkeypatch.setattr("pipeline.tracking.doctor._stored_points", dies)
    with pytest.raises(TrainingError, match=r"tracking store .*: died just now"):
        doctor(str(run))


def test_a_store_that_never_had_it_and_no_run_at_all(
    run: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="nothing: found no run"):
        doctor("nothing")
    other = tmp_path / "other.db"
    shutil.copyfile(empty_store, other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    output = differences(str(run), capsys)
    assert f"has no such run python -m pipeline sync {run} creates it" in output
