"""A training that was interrupted anywhere goes on to the bits of one that was not; real signals, in this process.

Kills from outside, MLflow and the journal are in tests/faults.
"""

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FULL, ROOT
from safetensors.torch import load_file

from pipeline.compute import distributed
from pipeline.config.run_config import CheckpointConfig
from pipeline.config.strict_config import load
from pipeline.errors import RankLost, TrainingError, UserError
from pipeline.names import CHECKPOINT_MEGABYTES, CHECKPOINT_SECONDS, MEASURED
from pipeline.runs.machine_errors import explained
from pipeline.runs.resume import fork, restore
from pipeline.runtime.console import Console
from pipeline.runtime.interrupts import Interrupted, deferred, interruptible
from pipeline.storage.checkpoints import Checkpoints
from pipeline.tasks.base import Task
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training
from pipeline.training.saver import Saver

Make = Callable[..., Any]
FACTS = {"torch": torch.__version__}
SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"model.experts.dropout": 0.3, "model.gate.noise": 0.5, "model.embedding_dropout": 0.1},
    "accumulation, prefetch off": {"model.experts.dropout": 0.3, "training.accumulation_steps": 4,
                                   "training.batch_size": 16, "training.prefetch": 0},
    "bf16, by epoch": {"model.experts.dropout": 0.2, "training.amp": "bf16", "evaluation.every_steps": "null",
                       "training.batch_size": 1300, "training.num_train_epochs": 3, "loss.aux_focal.warmup_steps": 7},
    "fp16, dense table": {"training.amp": "fp16", "optim.embedding.name": "adam", "training.clip_norm": 0.5},
    "early stopping": {"evaluation.every_steps": 2, "evaluation.patience": 2,
                       "evaluation.metric": "valid/calibration_ctr"},
}  # fmt: skip


class Kept(MemoryRun):
    """A run whose journal is its list of points; what is there already is not logged again."""

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        there = {name for at, values in self.points if at == step for name in values}
        fresh = {name: value for name, value in metrics.items() if name not in there}
        super().log_metrics(step, fresh, time_ms)

    def position(self) -> int:
        return len(self.points)


def training_of(task: Task, run: MemoryRun, every: int = 4) -> Training:
    torch.set_num_threads(1)
    saver = Saver(run, CheckpointConfig(every_steps=every), FACTS)  # type: ignore[arg-type]
    return Training(task, run, Console(0, quiet=True), "cpu", saver=saver)


def compared(points: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    kept = [(step, {name: value for name, value in values.items() if not name.startswith(MEASURED)})
            for step, values in points]  # fmt: skip
    return [(step, values) for step, values in kept if values]


def weights(run: MemoryRun) -> dict[str, torch.Tensor]:
    files = {kind: run.folder / kind / "model.safetensors" for kind in ("final", "best")}
    return {f"{kind}/{name}": value for kind, file in files.items() if file.exists()
            for name, value in load_file(file).items()}  # fmt: skip


def resumed(task: Task, before: MemoryRun, folder: Path) -> MemoryRun:
    """A second start, from what the first left on disk; its run holds the whole history."""
    run = Kept(folder=before.folder)
    training = training_of(task, run)
    state = Checkpoints(run.folder).latest()
    if state:
        torch.rand(7)  # whatever another process would have done
        run.points = before.points[: state.facts["position"]]
        restore(training, state)
    training.train()
    return run


class Trap:
    """Sends this process a signal at the n-th call of a method of the task or the training."""

    def __init__(self, target: Any, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, original = number, getattr(target, name)

        def sprung(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            found = original(*arguments, **named)
            if self.left == 0:
                signal.raise_signal(signal.SIGTERM)
            return found

        monkeypatch.setattr(target, name, sprung)


def interrupted(task: Task, folder: Path, where: str, number: int, every: int) -> MemoryRun:
    run = Kept(folder=folder)
    with pytest.MonkeyPatch.context() as patch, interruptible():
        training = training_of(task, run, every)
        target: Any = {"losses": task, "evaluate": task, "_update": training, "step": training.recorder,
                       "log_metrics": run}[where]  # fmt: skip
        Trap(target, where, number, patch)
        with pytest.raises(Interrupted, match="SIGTERM"):
            training.train()
    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_anywhere_it_goes_on_to_the_same_bits(small: Make, tmp_path: Path, name: str) -> None:
    """In a micro-batch, in an update, while a step is recorded, in each evaluation; before and after the gate.

    `make faults` interrupts each setting at every moment, else every second setting at each.
    """
    task = MmoeTask(small(**SETTINGS[name]))
    whole = Kept(folder=tmp_path / "whole")
    steps = training_of(task, whole).train().steps
    parts = task.config.training.accumulation_steps
    evaluations = sum(any(name.startswith("valid/auc_ctr") for name in values) for _, values in whole.points)
    moments = [("losses", parts * step + 1) for step in (4, 5)] + [("_update", 6), ("step", steps), ("log_metrics", 2)]
    moments += [("evaluate", number) for number in (1, evaluations, evaluations + 1)]  # the last is of the test split
    for where, number in moments if FULL else moments[list(SETTINGS).index(name) % 2 :: 2]:
        folder = tmp_path / f"{where}{number}"
        before = interrupted(task, folder, where, number, every=100)  # so that what the signal saved is all there is
        assert compared(before.points) == compared(whole.points)[: len(compared(before.points))]
        after = resumed(task, before, folder)
        assert compared(after.points) == compared(whole.points), (where, number)
        one, other = weights(after), weights(whole)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), (where, number)
    assert steps >= 6
    assert any("loss_ctcvr_focal" in values for _, values in whole.points)


def test_a_lost_rank_is_an_interruption_too(small: Make, tmp_path: Path) -> None:
    """In the sum of the gradients: random numbers of the step are drawn by then, and drawn again when it is made."""
    task = MmoeTask(small(**SETTINGS["random"]))
    whole = Kept(folder=tmp_path / "whole")
    training_of(task, whole).train()
    before = Kept(folder=tmp_path / "before")
    training, sums = training_of(task, before, every=100), iter(range(100))

    def lost(_: Any) -> None:
        if next(sums) == 5:
            raise RankLost("rank 0 of 2: another process of this training is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_reduce_gradients", lost)
        with pytest.raises(RankLost):
            training.train()
    assert Checkpoints(before.folder).steps() == [5]
    after = resumed(task, before, before.folder)
    assert compared(after.points) == compared(whole.points)
    one, other = weights(after), weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_cut_off_without_a_word_it_goes_on_from_the_last_checkpoint(small: Make, tmp_path: Path) -> None:
    task = MmoeTask(small(**SETTINGS["random"]))
    whole = Kept(folder=tmp_path / "whole")
    training_of(task, whole).train()
    for steps in (3, 4, 5, 9, 11):
        run = Kept(folder=tmp_path / str(steps))
        training = training_of(task, run)
        training.advance(steps)
        training.recorder.drain()
        state = Checkpoints(run.folder).latest()
        assert (state.step if state else None) == (steps // 4 * 4 or None)  # at most one interval is lost
        after = resumed(task, run, run.folder)
        assert compared(after.points) == compared(whole.points)
        one, other = weights(after), weights(whole)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_reviews_go_on_to_the_same_bits(tmp_path: Path) -> None:
    overrides = {"data.embedded.rows": "150", "data.cache": str(tmp_path / "cache"), "baselines": "false",
                 "model.embedded.width": "16",
                 "training.num_train_epochs": "3", "training.batch_size": "32", "evaluation.every_steps": "5",
                 "data.oversampling": "capped", "training.accumulation_steps": "2"}  # fmt: skip
    task = VisobertTask(load(VisobertConfig, ROOT / "configs/config_multi_embedded.yaml", overrides))
    whole = Kept(folder=tmp_path / "whole")
    steps = training_of(task, whole).train().steps
    for where, number in (("losses", steps + 1), ("evaluate", 2)):
        before = interrupted(task, tmp_path / f"{where}{number}", where, number, every=100)
        after = resumed(task, before, before.folder)
        assert compared(after.points) == compared(whole.points), (where, number)
        one, other = weights(after), weights(whole)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_best_weights_are_those_up_to_the_checkpoint(small: Make, tmp_path: Path) -> None:
    """The file of the best weights goes on changing after a checkpoint; going back takes them back, too."""
    task = MmoeTask(small(**{"evaluation.every_steps": 2}))
    run = Kept(folder=tmp_path / "run")
    training = training_of(task, run)
    training.advance(4)
    best_then, weights_then = training.best_weights.step, load_file(training.best_weights.file)
    training.best_weights.best = -float("inf")  # whatever comes next is better
    training.advance(6)
    assert training.best_weights.step == 6
    again = training_of(task, Kept(folder=run.folder))
    state = Checkpoints(run.folder).at(4)
    restore(again, state)
    assert again.best_weights.step == best_then
    found = load_file(again.best_weights.file)
    assert all(torch.equal(found[name], weights_then[name]) for name in weights_then)


def test_patience_and_loss_scale_go_on_from_where_they_were(small: Make, tmp_path: Path) -> None:
    settings = {"training.amp": "fp16", "evaluation.every_steps": 2, "evaluation.patience": 3}
    task, run = MmoeTask(small(**settings)), Kept(folder=tmp_path / "run")
    training = training_of(task, run)
    training.advance(1)
    training.scaler.update(512.0)
    training.best_weights.best = float("inf")  # nothing that comes is better
    training.advance(4)
    again = training_of(task, Kept(folder=run.folder))
    restore(again, Checkpoints(run.folder).at(4))
    assert again.scaler.get_scale() == 512
    assert again.train().steps == 6  # the third evaluation in vain: the first two were before the checkpoint


def test_a_state_of_another_model_is_refused(small: Make, tmp_path: Path) -> None:
    run = Kept(folder=tmp_path / "run")
    training_of(MmoeTask(small()), run).train()
    state = Checkpoints(run.folder).latest()
    assert state
    with pytest.raises(UserError, match="does not fit this config"):
        restore(training_of(MmoeTask(small(**{"model.experts.hidden": "[32]"})), Kept()), state)


def test_threads_of_the_checkpoint_are_taken(small: Make, tmp_path: Path, capsys: Any) -> None:
    task = MmoeTask(small())
    run = Kept(folder=tmp_path / "run")
    training_of(task, run).train()
    training = training_of(task, Kept())
    torch.set_num_threads(2)
    state = Checkpoints(run.folder).latest()
    assert state
    restore(training, state)
    assert torch.get_num_threads() == 1
    assert "1 CPU threads, as before: 2 would round differently" in capsys.readouterr().err


def test_a_checkpoint_names_the_threads_that_made_it(small: Make, tmp_path: Path) -> None:
    run = Kept(folder=tmp_path / "run")
    training = training_of(MmoeTask(small()), run)
    torch.set_num_threads(2)  # as after a resume that took over another number
    training.advance(4)
    state = Checkpoints(run.folder).latest()
    torch.set_num_threads(1)
    assert state
    assert state.facts["threads"] == 2


def test_a_fork_has_its_own_settings_and_the_points_that_led_to_it(small: Make, tmp_path: Path) -> None:
    origin = Kept(folder=tmp_path / "origin")
    training_of(MmoeTask(small(**{"optim.dense.weight_decay": 0.1, "evaluation.every_steps": 4})), origin).train()
    state = Checkpoints(origin.folder).at(8)
    with (origin.folder / "journal.jsonl").open("w") as lines:
        for step, values in origin.points:
            lines.write(json.dumps({"op": "metrics", "step": step, "time": 7, "values": values}) + "\n")
    run = Kept(folder=tmp_path / "fork")
    changed = {"optim.dense.weight_decay": 0.5, "optim.dense.betas": "[0.5, 0.9]", "evaluation.metric": "valid/auc_ctr"}
    training = training_of(MmoeTask(small(**changed)), run)
    fork(training, run, state)  # type: ignore[arg-type]
    assert {group["weight_decay"] for group in training.optimizers["dense"].param_groups} == {0.5}
    assert {tuple(group["betas"]) for group in training.optimizers["dense"].param_groups} == {(0.5, 0.9)}
    assert training.best_weights.step is None  # what was best by another metric says nothing
    assert training.result.steps == 8
    steps = [step for step, values in run.points if "global_step" in values]
    evaluated = [step for step, values in run.points if "valid/auc_ctr" in values]
    assert (steps, evaluated) == (list(range(8)), [4, 8])
    assert not [step for step, values in run.points if "test/auc_ctr" in values or "best_step" in values]


# ---------------------------------------------------------------- when a checkpoint is due


def saver_at(config: CheckpointConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Saver, list[float]]:
    """A saver, and the clock that it reads."""
    clock = [100.0]
    monkeypatch.setattr("pipeline.training.saver.time.monotonic", lambda: clock[0])
    return Saver(Kept(folder=tmp_path), config), clock  # type: ignore[arg-type]


def test_a_save_costs_less_than_a_twentieth_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, clock = saver_at(CheckpointConfig(), tmp_path, monkeypatch)
    saver.seconds = 3.0  # of the last save
    due = []
    for step in range(1, 200):
        clock[0] += 1
        if saver.is_due(step, best=None):
            due.append(step)
            saver.saved_at, saver.last = step, clock[0]
    assert due == [60, 120, 180]  # 3 s in 60 are 5%
    saver.seconds, saver.last = 0.01, clock[0]
    clock[0] += 9.9
    assert not saver.is_due(500, best=None)  # not more often than needed
    clock[0] += 0.2
    assert saver.is_due(500, best=None)
    clock[0] = saver.last + 1
    assert saver.is_due(500, best=500)  # the best weights so far, and it costs little
    assert not saver.is_due(500, best=499)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"every_steps": 7}, [7, 14, 21, 28]),
        ({"every_seconds": 9}, [9, 18, 27]),
        ({"every_steps": 10, "keep_steps": [3, 25]}, [3, 10, 20, 25, 30]),
        ({"enabled": False, "every_steps": 7}, []),
    ],
)
def test_the_config_says_when(
    config: dict[str, Any], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, clock = saver_at(CheckpointConfig(**config), tmp_path, monkeypatch)
    due = []
    for step in range(1, 31):
        clock[0] += 1
        if saver.is_due(step, best=None):
            due.append(step)
            saver.saved_at, saver.last = step, clock[0]
    assert due == expected


def test_kept_are_the_last_two_the_best_and_those_asked_for(small: Make, tmp_path: Path) -> None:
    task = MmoeTask(small(**{"evaluation.every_steps": 2}))
    run = Kept(folder=tmp_path / "run")
    saver = Saver(run, CheckpointConfig(every_steps=2, keep_steps=(3,)), FACTS)  # type: ignore[arg-type]
    training = Training(task, run, Console(0, quiet=True), "cpu", saver=saver)
    training.train()
    assert Checkpoints(run.folder).steps() == sorted({3, 10, 12, training.best_weights.step or 0})
    assert {CHECKPOINT_SECONDS, CHECKPOINT_MEGABYTES} <= {name for _, values in run.points for name in values}


# ---------------------------------------------------------------- data, memory, disk


@pytest.mark.parametrize(("change", "message"), [("changed", "was changed"), ("gone", "is gone")])
def test_data_that_changes_under_a_run_ends_it(small: Make, tmp_path: Path, change: str, message: str) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"data")
    task = MmoeTask(small(**{"evaluation.every_steps": 4}))
    run = Kept(folder=tmp_path / "run")
    saver = Saver(run, CheckpointConfig(every_steps=4), FACTS, [file])  # type: ignore[arg-type]
    training = Training(task, run, Console(0, quiet=True), "cpu", saver=saver)
    training.advance(5)
    if change == "changed":
        file.write_bytes(b"other data")
    else:
        file.unlink()
    with pytest.raises(TrainingError, match=rf"rows.parquet: {message} while the run was training on it"):
        training.train()
    assert Checkpoints(run.folder).steps() == [4]


def test_every_task_names_its_data_files(small: Make, impressions: Path, tmp_path: Path) -> None:
    names = {file.name for file in MmoeTask(small()).files}
    assert "schema.json" in names
    assert len(names) == 4
    assert all(file.exists() for file in MmoeTask(small()).files)


def test_what_gives_in_is_told_in_one_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert str(explained(caught.value)).startswith("out of memory: ")
    assert "\n" not in str(explained(caught.value))
    assert str(explained(MemoryError())).startswith("out of memory: an allocation failed;")
    full = OSError(28, "No space left on device", "outputs/x")
    assert str(explained(full)) == "outputs/x: No space left on device"
    other = ValueError("a bug")
    assert explained(other) is other


# ---------------------------------------------------------------- signals and prefetching


def test_a_signal_waits_for_the_end_of_a_held_block() -> None:
    done = []
    with interruptible(), pytest.raises(Interrupted) as caught:  # noqa: PT012
        with deferred():
            signal.raise_signal(signal.SIGUSR1)
            done.append("first")
            with deferred():
                done.append("second")
        done.append("never")
    assert done == ["first", "second"]
    assert caught.value.exit_code == 128 + signal.SIGUSR1
    assert str(caught.value) == "stopped by SIGUSR1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_counts_and_handlers_come_back(number: signal.Signals) -> None:
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup starts these tests with SIGHUP ignored
    try:
        with interruptible():
            with pytest.raises(Interrupted):
                signal.raise_signal(number)  # to this thread: one to the process may be heard in another, later
            signal.raise_signal(number)  # while the run is being ended: nothing
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
