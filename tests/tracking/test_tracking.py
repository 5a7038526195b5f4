"""Runs arrive in MLflow completely, as MLflow's own client sees them."""

import itertools
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from conftest import Place, one_writer

from pipeline.config.run_config import is_operational
from pipeline.errors import TrainingError, UserError
from pipeline.tracking import run_opening as opening
from pipeline.tracking.__main__ import _open
from pipeline.tracking.client import is_random_name
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import OpenRun, Refused, RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.run_opening import Opening, experiment_id
from pipeline.tracking.stored_runs import runs_of_filter
from pipeline.tracking.writer_client import Writer

pytestmark = one_writer


def open_run(writer: Writer, **request: Any) -> MlflowRun:
    return MlflowRun(writer, RunRequest(**{"name": "test"} | request), Path("outputs"))


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
    stored = place.client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert place.client.get_experiment(stored.info.experiment_id).name == "mine"
    assert stored.info.run_name == "test"
    assert stored.data.params == {"loss.aux_focal.lambda": "0.1"} | {f"key{n}": str(n) for n in range(150)}
    assert stored.data.tags["arm"] == "a"
    assert stored.data.tags["data_digest"] == "f" * 64
    assert stored.data.tags["run_dir"] == str((place.folder / "outputs" / run.id).resolve())
    assert stored.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef" * 2
    assert place.client.list_artifacts(run.id, "notes")[0].path == "notes/note.txt"
    history = pd.read_parquet(place.client.download_artifacts(run.id, "history.parquet"))
    assert len(history) == 2100
    for key, values in history.groupby("metric"):
        points = [(p.step, p.value, p.timestamp) for p in place.client.get_metric_history(run.id, key)]
        rows = values[["step", "value", "timestamp"]].itertuples(index=False, name=None)
        assert sorted(points) == sorted(rows)
    assert points[5] == (5, 1 / 6, 1005) or key != "loss_total"


def test_params_that_mlflow_run_wrote_are_left_as_typed(place: Place) -> None:
    opened = place.client.create_run("0", run_name="legendary-gnat-695")
    for key, value in {"lambda": "1e-1", "optim.dense.lr": "3e-4"}.items():
        place.client.log_param(opened.info.run_id, key, value)
    run = open_run(place.writer, run_id=opened.info.run_id, name="short name")
    run.log_params({"lambda": "0.1", "loss.aux_focal.lambda": "0.1", "optim.dense.lr": "0.0003"})
    run.finish("FINISHED")
    stored = place.client.get_run(opened.info.run_id)
    assert stored.data.params == {"lambda": "1e-1", "loss.aux_focal.lambda": "0.1", "optim.dense.lr": "3e-4"}
    assert stored.data.tags["canonical.optim.dense.lr"] == "0.0003"
    assert "canonical.lambda" not in stored.data.tags
    assert stored.info.run_name == "short name"


def test_a_name_the_user_gave_is_kept(place: Place) -> None:
    opened = place.client.create_run("0", run_name="my best one")
    run = open_run(place.writer, run_id=opened.info.run_id)
    run.finish("FINISHED")
    assert run.name == place.client.get_run(opened.info.run_id).info.run_name == "my best one"
    assert [is_random_name(name) for name in ("legendary-gnat-695", "mmoe l.1 g1 w2000 s0", "try-3")] == [
        True,
        False,
        True,
    ]


def test_another_experiment_than_the_launchers_gets_a_run_of_its_own(place: Place) -> None:
    opened = place.client.create_run("0", run_name="legendary-gnat-695")
    run = open_run(place.writer, run_id=opened.info.run_id, experiment="elsewhere")
    run.finish("FINISHED")
    assert run.id != opened.info.run_id
    assert place.client.get_run(opened.info.run_id).data.tags["role"] == "launcher"
    assert place.client.get_experiment(place.client.get_run(run.id).info.experiment_id).name == "elsewhere"


@contextmanager
def cut_off(steps: int) -> Iterator[None]:
    """Interrupt a training after these steps."""
    from pipeline.training.loop import Training

    step = Training._step

    def interrupted(self: Training, *arguments: Any) -> None:
        if self.result.steps == steps:
            raise KeyboardInterrupt
        step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def only_run(client: Any, seed: int) -> Any:
    (run,) = client.search_runs(["0"], f"tags.seed = '{seed}'")
    return run


def logged(client: Any, run_id: str, key: str = "loss_total") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


PLAIN = {"tracking.log_model": False, "tracking.log_report": False, "checkpoint.every_steps": 4}


def test_a_second_start_in_the_same_run_goes_on_with_it(place: Place, small: Any) -> None:
    """As a pod that replaces an evicted one: the same command, the same MLFLOW_RUN_ID, no resume."""
    from pipeline.runs.launch import train_run
    from pipeline.tasks.mmoe.task import MmoeTask

    opened = place.client.create_run("0").info.run_id
    config = small(**PLAIN)

    def start(**other: Any) -> Any:
        name = config.model_copy(update=other)
        return train_run(name, MmoeTask, place.writer, RunRequest(run_id=opened), quiet=True)

    with cut_off(7):
        start(device="cpu")
    assert place.client.get_run(opened).info.status == "KILLED"
    assert tagged(place.client.get_run(opened))["device"] == "cpu"
    with pytest.raises(UserError, match="seed was 0, now 5"):
        start(seed=5)
    trained = start()
    assert (trained.id, trained.steps) == (opened, 12)
    assert [step for step, _ in logged(place.client, opened)] == list(range(12))
    run = place.client.get_run(opened)
    assert run.info.status == "FINISHED"
    assert tagged(run) == {key: str(value).lower() for key, value in PLAIN.items()} | {"output_dir": config.output_dir}
    assert start().steps == 0


def tagged(run: Any) -> dict[str, str]:
    """The tags with the settings of the run's last start."""
    return {name: value for name, value in run.data.tags.items() if is_operational(name)}


def test_a_second_start_without_its_folder_goes_on_in_the_same_run(place: Place, small: Any) -> None:
    """As a pod with another volume: points in the store are compared, and not written again."""
    from pipeline.runs.launch import train_run
    from pipeline.tasks.mmoe.task import MmoeTask

    opened = place.client.create_run("0").info.run_id
    config = small(**PLAIN | {"seed": 41})

    def start(**other: Any) -> Any:
        name = config.model_copy(update=other)
        return train_run(name, MmoeTask, place.writer, RunRequest(run_id=opened), quiet=True)

    with cut_off(7):
        start()
    before = logged(place.client, opened)
    shutil.rmtree(Path(config.output_dir) / opened)
    with pytest.raises(UserError, match=f"^resume {opened}: that run differs: seed was 41, now 5; allowed"):
        start(seed=5)
    trained = start()
    assert (trained.id, trained.steps) == (opened, 12)
    assert [step for step, _ in logged(place.client, opened)] == list(range(12))
    assert logged(place.client, opened)[:7] == before
    shutil.rmtree(Path(config.output_dir) / opened)
    assert start().steps == 0
    assert place.client.get_run(opened).data.tags.get("determinism") is None


@pytest.mark.parametrize("resume", ["auto", "id"])
def test_a_run_that_the_store_lost_goes_on_from_its_checkpoint_in_a_new_one(
    place: Place, small: Any, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from pipeline.runs.launch import train_run
    from pipeline.tasks.mmoe.task import MmoeTask

    seed = 42 + (resume == "id")

    def start(**other: Any) -> Any:
        return train_run(small(**PLAIN | {"seed": seed} | other), MmoeTask, place.writer, quiet=True)

    with cut_off(7):
        start()
    lost = only_run(place.client, seed).info.run_id
    place.client.delete_run(lost)  # by somebody: not lost
    if resume == "id":
        with pytest.raises(UserError, match=f"resume {lost}: the run was deleted in the tracking store"):
            start(resume=lost)
    SqlAlchemyStore(f"sqlite:///{place.folder / 'mlflow.db'}", "mlruns")._hard_delete_run(lost)
    capsys.readouterr()
    trained = start(resume="auto" if resume == "auto" else lost)
    output = capsys.readouterr().err
    assert f"found no run {lost}, whose folder is here; it is created there, with tag original_run_id" in output
    assert "continues after step 7 of 12" in output
    assert (trained.id, trained.steps) == (lost, 12)
    run = only_run(place.client, seed)
    assert (run.info.run_id != lost, run.data.tags["original_run_id"], run.info.status) == (True, lost, "FINISHED")
    assert [step for step, _ in logged(place.client, run.info.run_id)] == list(range(12))


def test_a_copy_of_a_folder_whose_run_is_alive_is_refused(place: Place) -> None:
    run = open_run(place.writer)
    copy = shutil.copytree(run.folder, place.folder / "copy" / run.id)
    alive = f"run {run.id} is in use by process {os.getpid()} on {socket.gethostname()};"
    with pytest.raises(UserError, match=alive):
        Opening(RunRequest("copy", run_id=run.id, resume=True, folder=str(copy)), Path("outputs"), {}).open()
    with pytest.raises(UserError, match=alive):  # the same MLFLOW_RUN_ID
        Opening(RunRequest("again", run_id=run.id), Path("elsewhere"), {}).open()
    assert place.client.get_run(run.id).info.status == "RUNNING"
    run.log_metrics(0, {"loss_total": 1.0})
    run.finish("FINISHED")
    assert len(logged(place.client, run.id)) == 1


def test_a_run_of_another_host_is_refused_as_long_as_it_gets_points(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count(3)
    tags = {"host": "elsewhere", "owner": "77 ab12cd34", "run_dir": "/not/here"}
    run_id = place.client.create_run("0", tags=tags).info.run_id
    request = RunRequest("test", run_id=run_id, resume=True, folder=str(place.folder / "outputs" / run_id))
    with monkeypatch.context() as patch:
        patch.setattr(opening, "WATCH_SECONDS", 300)  # it ends with the first new point
        # of this module alone: threads of other tests sleep, too
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: place.client.log_metric(
            run_id, "loss_total", 1.0, step=next(steps)))  # fmt: skip
        patch.setattr(opening, "time", clock)
        with pytest.raises(UserError, match=f"run {run_id} is in use by process 77 on elsewhere"):
            Opening(request, Path("outputs"), {"loss_total": 3}).open()
    assert place.client.get_run(run_id).data.tags["owner"] == "77 ab12cd34"
    monkeypatch.setattr(opening, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(opening, "PAUSE_SECONDS", 0.1)
    opened = Opening(request, Path("outputs"), {"loss_total": next(steps)})
    assert opened.open().online
    assert place.client.get_run(run_id).data.tags["owner"] == opened.claim
    opened.give_up("enough")
    assert place.client.get_run(run_id).info.status == "FAILED"


def test_another_config_or_other_data_is_refused_by_name(
    place: Place, small: Any, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.runs.launch import train_run
    from pipeline.tasks.mmoe.impressions.embedded_impressions import generate
    from pipeline.tasks.mmoe.task import MmoeTask

    def start(**other: Any) -> Any:
        return train_run(small(**PLAIN | {"seed": 70} | other), MmoeTask, place.writer, quiet=True)

    with cut_off(7):
        start()
    run_id = only_run(place.client, 70).info.run_id
    with pytest.raises(UserError, match=f"^resume {run_id}: that run differs: ") as refused:
        start(resume=run_id, seed=3, **{"loss.aux_focal.lambda": 0.2})
    assert "seed was 70, now 3" in str(refused.value)
    assert "loss.aux_focal.lambda was 0.1, now 0.2" in str(refused.value)
    other = tmp_path_factory.mktemp("other")
    generate(other, rows=5000, seed=1)
    with pytest.raises(UserError, match="data has SHA-256"):
        start(resume=run_id, **{"data.path": other})
    with pytest.raises(UserError, match="there is no such run"):
        start(resume="0" * 32)
    assert only_run(place.client, 70).info.status == "KILLED"
    # what does not decide the result may differ: other checkpoints, prefetching, what is logged beside
    capsys.readouterr()
    trained = start(resume=run_id, **{"checkpoint.every_steps": 5, "training.prefetch": 0, "tracking.log_report": True})
    assert (trained.id, trained.steps) == (run_id, 12)
    assert "continues after step 7 of 12" in capsys.readouterr().err
    assert only_run(place.client, 70).info.status == "FINISHED"


def test_a_fork_starts_from_an_old_state(place: Place, small: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from pipeline.runs.launch import train_run
    from pipeline.tasks.mmoe.task import MmoeTask

    def start(**other: Any) -> Any:
        return train_run(small(**PLAIN | {"seed": 71} | other), MmoeTask, place.writer, quiet=True)

    whole = start()
    points = logged(place.client, whole.id)
    with pytest.raises(UserError, match="found no checkpoint of step 5; kept: "):
        start(fork=f"{whole.id}@5")
    same = start(fork=f"{whole.id}@8")  # of the same config: it comes out where the first one did
    assert logged(place.client, same.id) == points
    one, other = (load_file(tmp_path / "outputs" / run.id / "final" / "model.safetensors") for run in (whole, same))
    assert all(one[name].equal(other[name]) for name in one)
    changed = {"fork": f"{whole.id}@8", "loss.aux_focal.lambda": 0.5}
    fork = start(**changed)
    assert place.client.get_run(fork.id).data.tags["forked_from"] == f"{whole.id}@8"
    assert logged(place.client, fork.id)[:8] == points[:8]
    assert [step for step, _ in logged(place.client, fork.id)] == list(range(12))
    assert logged(place.client, fork.id)[9:] != points[9:]
    # a resume of the plain config is not the fork's business, and the other way round
    plain = start(resume="auto", **{"loss.aux_focal.lambda": 0.5})
    assert plain.steps == 12
    assert plain.id not in {whole.id, same.id, fork.id}
    again = start(resume="auto", **changed)
    assert again.steps == 0
    assert again.id == fork.id


def test_a_checkpoint_of_another_format_is_refused_and_the_run_stays_as_it_is(place: Place, small: Any) -> None:
    from pipeline.runs.launch import train_run
    from pipeline.storage import checkpoint_format
    from pipeline.tasks.mmoe.task import MmoeTask

    overrides = PLAIN | {"seed": 77}
    config = small(**overrides, resume="auto")
    with cut_off(7):
        train_run(config, MmoeTask, place.writer, quiet=True)
    run = only_run(place.client, 77)
    folder = Path(run.data.tags["run_dir"])
    manifests = sorted(folder.glob("checkpoints/*/manifest.json"))
    assert len(manifests) == 2
    for file in manifests:
        content = json.loads(file.read_text()) | {"format": 1}
        del content["sha256"]
        file.write_text(json.dumps(content | {"sha256": checkpoint_format._seal(content)}))
    journal = (folder / "journal.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"found checkpoint format 1, this program reads 2; .* or delete ") as refused:
        train_run(config, MmoeTask, place.writer, quiet=True)
    assert refused.value.exit_code == 2
    again = RunRequest(run_id=run.info.run_id, resume=True, folder=str(folder))  # as a sweep's worker goes on with it
    with pytest.raises(UserError, match="found checkpoint format 1"):
        train_run(small(**overrides), MmoeTask, place.writer, again, quiet=True)
    after = only_run(place.client, 77)
    assert (after.info.status, after.data.tags) == ("KILLED", run.data.tags)
    assert (folder / "journal.jsonl").read_bytes() == journal
    with pytest.raises(UserError, match=f"fork {run.info.run_id}@4: .*found checkpoint format 1"):
        train_run(small(**overrides, fork=f"{run.info.run_id}@4"), MmoeTask, place.writer, quiet=True)

    shutil.rmtree(folder / "checkpoints")  # as the line says
    trained = train_run(config, MmoeTask, place.writer, quiet=True)
    assert (trained.id, trained.steps) == (run.info.run_id, 12)
    assert [step for step, _ in logged(place.client, trained.id)] == list(range(12))
    assert "determinism" not in place.client.get_run(trained.id).data.tags


def test_refused_points_are_reported_and_the_run_fails(place: Place) -> None:
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


def test_an_output_folder_that_cannot_be(place: Place) -> None:
    (place.folder / "in the way").write_text("a file")
    with pytest.raises(UserError, match="output_dir in the way"):
        MlflowRun(place.writer, RunRequest("test"), Path("in the way"))


def test_a_store_that_cannot_be_written(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "damaged.db").write_bytes(b"this is no database, whatever its name says" * 50)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace / 'damaged.db'}")
    warm = threading.Thread()
    warm.start()
    request = OpenRun(RunRequest("test"), "outputs", offline=False)
    monkeypatch.setattr("pipeline.tracking.__main__.OPEN_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.tracking.__main__.ABANDON_SECONDS", 0.0)
    reply = _open(request, Opening(request.run, Path("outputs"), {}), Inbox(None), warm)
    assert isinstance(reply, Refused)
    assert reply.error.startswith(f"tracking store sqlite:///{workplace / 'damaged.db'}: ")
    assert "not a database" in reply.error
    assert "\n" not in reply.error


def test_a_closed_artifact_folder_is_refused_at_once(place: Place) -> None:
    (place.folder / "closed").write_text("a file in the way")
    place.client.create_experiment("closed", artifact_location=str(place.folder / "closed"))
    with pytest.raises(UserError, match="Not a directory"):
        open_run(place.writer, experiment="closed")
    (run,) = place.client.search_runs([place.client.get_experiment_by_name("closed").experiment_id])
    assert run.info.status == "FAILED"


def test_a_deleted_experiment_is_refused(place: Place) -> None:
    place.client.delete_experiment(gone := place.client.create_experiment("gone"))
    for name in ("gone", gone):
        with pytest.raises(UserError, match=f"experiment {name} is deleted; restore it"):
            open_run(place.writer, experiment=name)
    with pytest.raises(UserError, match=f"experiment {gone} is deleted; restore it"):
        runs_of_filter(gone, None)


def test_an_experiment_is_found_by_name_or_else_by_id(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.client.PAGE_ROWS", 2)
    mine, run_id = place.client.create_experiment("by id"), None
    for name in (mine, "by id"):
        opened = Opening(RunRequest("test", experiment=name, run_id=run_id), Path("outputs").resolve(), {}).open()
        assert opened.experiment == "by id"
        assert opened.run_id == (run_id or opened.run_id)  # `mlflow run` opened it there
        run_id = opened.run_id
        assert [run.run_id for run in runs_of_filter(name, None)] == [run_id]
        place.client.set_terminated(run_id)
    assert experiment_id(place.client, "0") == "0"
    with pytest.raises(UserError, match=f"no experiment {mine}0 in sqlite"):
        runs_of_filter(f"{mine}0", None)
    named = place.client.create_experiment(mine)
    assert experiment_id(place.client, mine) == named != mine
    assert runs_of_filter(mine, None) == []
    new = experiment_id(place.client, f"{mine}0")
    assert place.client.get_experiment(new).name == f"{mine}0"


def test_failing_plots_and_notes_do_not_fail_the_run(
    place: Place, small: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.runs.launch import train_run
    from pipeline.tasks.mmoe.task import MmoeTask

    def fails(*_: object) -> None:
        raise RuntimeError("no canvas")

    for name in ("pipeline.tracking.plots.losses", "pipeline.tracking.plots.calibration",
                 "pipeline.runs.run_artifacts.note", "pipeline.tasks.mmoe.task.MmoeTask.findings"):  # fmt: skip
        monkeypatch.setattr(name, fails)
    trained = train_run(small(seed=77), MmoeTask, place.writer, quiet=True)
    output = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    left_out = ["what the evaluation shows", "what the evaluation shows", "plots/losses.png",
                "the report on the finished model", "the run's note"]  # fmt: skip
    assert [line.partition(" is left out: RuntimeError: no canvas (")[0] for line in output[-5:]] == [
        f"warning: {what}" for what in left_out
    ]
    run = place.client.get_run(trained.id)
    assert run.info.status == "FINISHED"
    assert "mlflow.note.content" not in run.data.tags
    names = {artifact.path for artifact in place.client.list_artifacts(trained.id, "evaluation")}
    assert names == {"evaluation/test_rows.parquet"}


def test_the_environments_experiment_is_mlflows_choice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the shell")
    opened = Opening(RunRequest("test"), Path("outputs").resolve(), {}).open()
    assert opened.experiment == "from the shell"
    experiment = place.client.get_run(opened.run_id).info.experiment_id
    assert place.client.get_experiment(experiment).name == "from the shell"
    place.client.set_terminated(opened.run_id)
