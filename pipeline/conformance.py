"""Checks of what the training loop expects from a task, for use in the task's own tests.

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_task(check, tmp_path):
        check(MyTask, my_config, tmp_path)

The config should train at least 4 optimizer steps in a few seconds on one thread, with dropout and several
micro-batches per step if the task supports them. Every check raises `AssertionError` with the reason. `make_task`
creates the task from its config: a Task class or a function, as named in the task's entry point.
"""

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.config.run_config import RunConfig
from pipeline.names import MEASURED
from pipeline.runs.shared_prefix import start_from_prefix, train_prefix
from pipeline.runtime.console import Console
from pipeline.serving import load_predictor
from pipeline.tasks.base import TOTAL, Task, evaluate, evaluating, predictor_module
from pipeline.tracking.model_package import write_package
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training, count_steps

MakeTask = Callable[[Any], Task[Any]]
Check = Callable[[MakeTask, RunConfig, Path], None]

SUM_TOLERANCE = 1e-4  # relative: fp32 sums depend on the order of summation


def check_losses_are_shares(make_task: MakeTask, config: RunConfig, folder: Path) -> None:  # noqa: ARG001
    """Losses and counts of micro-batches of different sizes sum to those of the whole step."""
    task = make_task(config)
    torch.manual_seed(config.seed)
    model = task.model()
    rows = np.concatenate([np.asarray(part) for part in list(task.plan(0))[:2]])
    parts = np.split(rows, [1, len(rows) // 3])
    whole = task.batch(rows)
    counts = task.counts(whole)
    each = [task.counts(task.batch(part)) for part in parts]
    for name, value in counts.items():
        total = sum(float(part[name]) for part in each)
        assert total == float(value), f"counts[{name!r}] is {float(value)} of all rows, {total} summed over their parts"
    with evaluating(model):
        expected = task.losses(task.forward(model, whole), whole, counts, 1)
        shares = [task.losses(task.forward(model, batch), batch, counts, 1) for batch in map(task.batch, parts)]
    assert TOTAL in expected, f"losses lack {TOTAL!r}"
    for name, value in expected.items():
        total = sum(float(part[name]) for part in shares)
        assert np.isclose(total, float(value), rtol=SUM_TOLERANCE, atol=1e-6), (
            f"losses[{name!r}] is {float(value)} of a step's rows, {total} summed over three micro-batches: divide "
            "sums by the step's counts, not by the micro-batch's rows"
        )


def check_batches_are_reproducible(make_task: MakeTask, config: RunConfig, folder: Path) -> None:  # noqa: ARG001
    """Plan and batches depend only on (seed, epoch, i), not on the state of the global random number generators."""
    plans, batches = [], []
    for seed in (1, 2):
        _seed_all(seed)
        task = make_task(config)
        plan = [np.asarray(rows) for epoch in (0, 1) for rows in task.plan(epoch)]
        batches.append(task.batch(plan[0]))
        plans.append(plan)
        _seed_all(seed + 10)
        again = [np.asarray(rows) for epoch in (0, 1) for rows in task.plan(epoch)]
        assert _equal(plan, again), "plan(epoch) gives other rows the second time"
        assert _equal(_tensors(batches[-1]), _tensors(task.batch(plan[0]))), "batch(rows) differs the second time"
    assert _equal(*plans), "plan(epoch) depends on more than seed and epoch"
    assert _equal(*map(_tensors, batches)), "batch(rows) depends on more than its rows"


def check_optimizers_hold_every_parameter(make_task: MakeTask, config: RunConfig, folder: Path) -> None:  # noqa: ARG001
    """Each trainable parameter belongs to exactly one optimizer."""
    task = make_task(config)
    model = task.model()
    held = [id(p) for optimizer in task.optimizers(model).values() for g in optimizer.param_groups for p in g["params"]]
    for name, parameter in model.named_parameters():
        count = held.count(id(parameter))
        assert count == parameter.requires_grad, f"parameter {name} is in {count} optimizers, allowed: 1"


def check_steps_change_no_buffer(make_task: MakeTask, config: RunConfig, folder: Path) -> None:
    """A training step changes no buffers; they would depend on the micro-batches, see `Task.model`."""
    training = _training(make_task(config), folder)
    before = {name: buffer.clone() for name, buffer in training.model.named_buffers()}
    for window, batches in training._loaded(training._remaining(1)):
        training.model.train()
        training._step(window, batches)
    for name, buffer in training.model.named_buffers():
        assert torch.equal(buffer, before[name]), f"buffer {name} is changed by a training step"


def check_resumes_exactly(make_task: MakeTask, config: RunConfig, folder: Path) -> None:
    """Training that is stopped, saved and resumed in a new task ends with the weights of uninterrupted training."""
    task = make_task(config)
    steps = count_steps(task)
    assert steps >= 4, f"the config trains {steps} steps, allowed: at least 4"
    whole = _training(task, folder / "whole")
    whole.advance()
    first = _training(make_task(config), folder / "first")
    first.advance(steps // 2)
    second = _training(make_task(config), folder / "second")
    _seed_all(7)
    second.load_state(copy.deepcopy(first.state()))
    second.advance()
    _assert_same_weights(second, whole, "resumed after half of the steps")


def check_shared_prefix(make_task: MakeTask, config: RunConfig, folder: Path) -> None:
    """A run that starts from the shared prefix has the same history and weights as a run that trains every step."""
    torch.set_num_threads(1)
    prefix, step = config.shared_prefix()
    steps = count_steps(make_task(config))
    step = steps if step is None else min(step, steps)
    train_prefix(make_task(prefix), {step: folder / "prefix"}, "cpu")
    alone, branched = _training(make_task(config), folder / "alone"), _training(make_task(config), folder / "branched")
    start_from_prefix(branched, folder / "prefix")
    for training in (alone, branched):
        training.advance()
        training.recorder.drain()
    _assert_same_weights(branched, alone, f"started from the prefix of {step} steps")
    assert _points(branched) == _points(alone), f"the history differs when started from the prefix of {step} steps"


def check_evaluation_is_deterministic(make_task: MakeTask, config: RunConfig, folder: Path) -> None:  # noqa: ARG001
    """Repeated evaluations give the same metrics, draw no random numbers, and leave the model in training mode."""
    task = make_task(config)
    torch.manual_seed(config.seed)
    model = task.model().train()
    metrics = []
    for seed in (1, 2):
        _seed_all(seed)
        state = torch.get_rng_state()
        metrics.append(evaluate(task, model, "valid", "cpu"))
        assert torch.equal(state, torch.get_rng_state()), "evaluate draws random numbers: is dropout off?"
        assert model.training, "evaluate changes the model's mode"
    assert metrics[0], "evaluate gives no metrics of valid"
    assert metrics[0] == metrics[1], "evaluate gives other metrics the second time"
    known = {name for name, reason in task.known_metrics("valid").items() if not reason}
    given = {name for name in metrics[0] if name.startswith("valid/")}
    assert given == known, f"known_metrics and evaluate differ in {sorted(given ^ known)}"


def check_export_predicts(make_task: MakeTask, config: RunConfig, folder: Path) -> None:
    """The exported model can be loaded by the task's `predict`, and predicts the declared columns for the example.

    The code of `predict` can be packaged with a logged model.
    """
    task = make_task(config)
    torch.manual_seed(config.seed)
    model = task.model()
    export = task.export(model, _empty(folder / "export"))
    example = export.example if export.inputs is None else pd.DataFrame(export.example)
    answer = load_predictor(predictor_module(task), export.folder)(example, raw=False)
    assert list(answer.columns) == list(export.outputs), f"predict gives {list(answer.columns)}, {export.outputs=}"
    for name, kind in export.outputs.items():
        finite = kind != "double" or np.isfinite(answer[name].dropna()).all()
        assert finite, f"predict gives infinite values of {name}"
    try:
        write_package(predictor_module(task), folder / "code")
    except ImportError as error:
        raise AssertionError(f"the code of predict cannot be packaged: {error}") from None


CHECKS: tuple[Check, ...] = (
    check_losses_are_shares, check_batches_are_reproducible, check_optimizers_hold_every_parameter,
    check_steps_change_no_buffer, check_resumes_exactly, check_shared_prefix, check_evaluation_is_deterministic,
    check_export_predicts,
)  # fmt: skip


def _training(task: Task[Any], folder: Path) -> Training:
    return Training(task, MemoryRun(folder=_empty(folder)), Console(0, quiet=True), "cpu")


def _empty(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _points(training: Training) -> list[tuple[int, dict[str, float]]]:
    """Logged metrics by step, without those that a repeated run does not reproduce, such as timings."""
    assert isinstance(training.run, MemoryRun)
    points = [(step, {name: value for name, value in values.items() if not name.startswith(MEASURED)})
              for step, values in training.run.points]  # fmt: skip
    return [(step, values) for step, values in points if values]


def _assert_same_weights(one: Training, other: Training, what: str) -> None:
    weights, expected = one.model.state_dict(), other.model.state_dict()
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert not different, f"{what}, the model differs from an uninterrupted training in {different[:3]}"


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _tensors(value: Any) -> list[Tensor]:
    """List the tensors of a batch, in the order of its attributes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []


def _equal(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool((a == b).all()) for a, b in zip(one, other, strict=True)
    )
