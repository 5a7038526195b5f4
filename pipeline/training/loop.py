"""The training loop, shared by all tasks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.compute import distributed
from pipeline.compute.compilation import compile_method, compiling
from pipeline.compute.device import autocast
from pipeline.compute.prefetch import prefetched
from pipeline.compute.sparse import coalesced
from pipeline.errors import RankLost, UserError
from pipeline.maths.gradients import PREFIX
from pipeline.maths.schedules import learning_rate_factor
from pipeline.names import CALIBRATION, TRAIN_SECONDS, WEIGHTS_DIGEST
from pipeline.runtime import process_rank
from pipeline.runtime.console import Console, info, optional, warn
from pipeline.runtime.interrupts import check, deferred
from pipeline.runtime.memory import keep_freed_memory
from pipeline.storage.checkpoint_format import Checkpoint
from pipeline.storage.weights import load_weights, save_weights, weights_digest
from pipeline.tasks.base import TOTAL, Rows, Task, evaluate, evaluating, new_model
from pipeline.tracking.run import Run
from pipeline.training.best_weights import BestWeights
from pipeline.training.random_state import random_state, set_random_state
from pipeline.training.recorder import Recorder
from pipeline.training.saver import Saver
from pipeline.training.step_values import gradient_norm, summed, weighted

Watch = Callable[[int, Mapping[str, float]], bool]

PREFETCHED = 2
FINAL_FILE = Path("final", "model.safetensors")
BEST_FILE = Path("best", "model.safetensors")
BEST_LINK = "best.safetensors"  # name of the best weights in a checkpoint


@dataclass
class Result:
    """The outcome of a training; the model holds the best weights."""

    model: nn.Module
    steps: int = 0  # optimizer steps completed
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of every evaluation metric
    weights_digest: str = ""  # of the last weights


class Window(NamedTuple):
    """The micro-batches of one optimizer step."""

    rows: list[Rows]  # rows of each micro-batch
    ends_epoch: bool


class Training:
    """The state and the loop of a training run.

    On the same hardware and software, the result depends only on config, data, and number of threads and processes.
    """

    def __init__(
        self,
        task: Task[Any],
        run: Run,
        console: Console,
        device: str,
        *,
        watch: Watch | None = None,
        saver: Saver | None = None,
    ) -> None:
        """watch: called with step and metrics of every evaluation; returns True to stop. saver: saves checkpoints."""
        self.watch, self.stopped = watch, False
        self.task, self.config, self.run, self.console, self.device = task, task.config, run, console, device
        keep_freed_memory()
        torch.manual_seed(self.config.seed)
        self.model = new_model(task).to(device)
        self.optimizers = task.optimizers(self.model)
        self.peaks = {
            name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in self.optimizers.items()
        }
        self.scaler = torch.amp.GradScaler(device, enabled=self.config.training.amp == "fp16")
        self.total_steps, self.schedule = count_steps(task), task.schedule.model_dump()
        self.recorder = Recorder(run, console, self.config.tracking.log_every, task.logged_losses)
        self.best_weights = BestWeights(self.config.evaluation, run.folder / BEST_FILE)
        self.result = Result(self.model)
        self.plan = lru_cache(1)(task.plan)  # cached, since shuffling many rows is slow
        self.evaluated_at, self.due = -1, False  # due: the evaluation after the last step is still missing
        self.saver = saver or Saver(None)
        self.done = False  # True once the last weights are saved and the best ones may be in the model
        self.random = random_state(device)  # restored in `advance`, since other code uses the generators too
        self.compiled = not self.config.training.compile  # False: to be compiled before the next step
        for module, name in () if self.compiled else task.dense_methods(self.model):
            compile_method(module, name)

    def train(self) -> Result:
        """Train, evaluate, keep the best weights, and evaluate them once on the test split.

        Raises:
            NonFiniteError: a loss became NaN or infinite; the steps before it are logged.
            Interrupted, RankLost: a signal was received, or another process ended; a checkpoint is saved first.
        """
        started = time.perf_counter()
        try:
            self.advance()
            if self.evaluated_at != self.result.steps:
                self._evaluate()
            self.recorder.drain()
            self.console.flush()
            distributed.destroy()
            if process_rank.is_main_process():
                self._finish(time.perf_counter() - started)
        except (KeyboardInterrupt, RankLost):
            self.save_interrupted()
            raise
        finally:
            self.console.close()
        return self.result

    def _finish(self, seconds: float) -> None:
        """Save the last weights; calibrate the best ones and evaluate them on the test split."""
        self.saver.check_data()
        self.run.log_metrics(self.result.steps, {TRAIN_SECONDS: seconds})
        if self.best_weights.step is not None:
            self.run.log_metrics(self.result.steps, {"best_step": self.best_weights.step})
        save_weights(self.model.state_dict(), self.run.folder / FINAL_FILE)
        self.result.weights_digest = weights_digest(self.model.state_dict())
        self.run.set_tags({WEIGHTS_DIGEST: self.result.weights_digest})
        self.done = True
        self.best_weights.restore(self.model)
        with evaluating(self.model):
            fitted = self.task.calibrate(self.model, self.device)
        if fitted:
            self.run.log_params({f"{CALIBRATION}{head}.{name}": repr(value)
                                 for head, values in fitted.items() for name, value in values.items()})  # fmt: skip
        tested = evaluate(self.task, self.model, "test", self.device)
        self.run.log_metrics(self.result.steps, tested)
        self.result.metrics |= tested

    def save_interrupted(self) -> None:
        """Save a checkpoint before the process ends."""
        if self.done:  # a checkpoint needs the last weights
            self.model.load_state_dict(load_weights(self.run.folder / FINAL_FILE))
            self.done = False
        try:
            self._save()
        except UserError as error:
            warn(str(error))

    def advance(self, until: int | None = None) -> None:
        """Train to the end, or until `until` optimizer steps are completed (and evaluated, if due)."""
        self.model.train()
        if not self.compiled:
            self._compile()
        set_random_state(self.random)
        try:
            if self.due:
                self._evaluate()
            last = self.total_steps if until is None else min(until, self.total_steps)
            for window, batches in self._loaded(self._remaining(last)):
                if self._is_over():
                    break
                check()
                self._step(window, batches)
                if self.due:
                    self._evaluate()
                if self.saver.is_due(self.result.steps, self.best_weights.step):
                    self._save()
                self.console.flush()
        finally:
            self.random = random_state(self.device)

    def _compile(self) -> None:
        """Compile the model with the first batch of the training, whichever step is next.

        Compiled code can depend on the batch that it is compiled with, so that a resumed run would get other code from
        its own first batch.
        """
        started, together = time.perf_counter(), process_rank.world_size() > 1
        rows = self.plan(0)[0]
        settings = {key: value for key, value in self.config.decisive().items()
                    if key.startswith("model.") or key == "training.amp"}  # fmt: skip
        shapes = [(name, weight.shape) for name, weight in self.model.named_parameters()]
        with compiling((type(self.model), settings, shapes), alone=not together):
            try:
                self._backward(Window([rows], ends_epoch=False), self._load(Window([rows], ends_epoch=False)), 0)
            finally:
                self.model.zero_grad(set_to_none=True)
                set_random_state(self.random)
        self.compiled = True
        info(f"training.compile: compiled in {time.perf_counter() - started:.1f} s")
        self.recorder.last_log = time.perf_counter()  # exclude the time from the throughput

    def _save(self) -> None:
        self.random = random_state(self.device)
        seconds = self.saver.save(self.result.steps, self.best_weights.step, self.state, self.files)
        self.recorder.last_log += seconds  # exclude the save from the throughput

    def _loaded(self, windows: Iterator[Window]) -> Iterator[tuple[Window, list[Any]]]:
        ahead = self.config.training.prefetch
        return prefetched(windows, self._load, PREFETCHED if ahead is None else ahead)

    def _load(self, window: Window) -> list[Any]:
        return [self.task.batch(distributed.local_rows(rows)) for rows in window.rows]

    def _remaining(self, until: int) -> Iterator[Window]:
        """The windows of the remaining optimizer steps, up to step `until`."""
        size, before, first = self.config.training.accumulation_steps, 0, self.result.steps
        for epoch in range(self.config.training.num_train_epochs):
            if before >= until:
                break
            plan = self.plan(epoch)
            count = -(-len(plan) // size)
            for number in range(max(0, first - before), min(count, until - before)):
                rows = [plan[index] for index in range(number * size, min((number + 1) * size, len(plan)))]
                yield Window(rows, number == count - 1)
            before += count

    def state(self) -> dict[str, Any]:
        """The state needed to continue, as tensors and plain values; the best weights are in `files`."""
        self.recorder.drain()
        return {
            "steps": self.result.steps,
            "evaluated_at": self.evaluated_at,
            "due": self.due,
            "metrics": self.result.metrics,
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "keeper": self.best_weights.state(),
            "random": self.random,
        }

    def files(self) -> dict[str, Path]:
        """Files that belong to the state: name in a checkpoint -> path."""
        return {BEST_LINK: self.best_weights.file} if self.best_weights.step is not None else {}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint of the same task.

        Raises:
            ValueError, RuntimeError: the state does not fit the model.
        """
        self.load_state(checkpoint.state, checkpoint.folder / BEST_LINK)

    def load_state(self, state: Mapping[str, Any], best: Path | None = None) -> None:
        """Load the result of `state`. best: the file of the best weights; None = there is none."""
        self.result.steps, self.evaluated_at, self.due = state["steps"], state["evaluated_at"], state["due"]
        self.result.metrics = dict(state["metrics"])
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.best_weights.load_state(state["keeper"], best)
        self.random = state["random"]

    def _is_over(self) -> bool:
        return self.result.steps >= self.total_steps or self.best_weights.exhausted or self.stopped

    def _step(self, window: Window, batches: Sequence[Any]) -> None:
        """Take one optimizer step; if interrupted before the update, reset gradients and random state."""
        step, every = self.result.steps, self.config.evaluation.every_steps
        distributed.seed_rank(self.config.seed, step)
        random = random_state(self.device)
        try:
            factor = learning_rate_factor(step, self.total_steps, **self.schedule)
            for name, optimizer in self.optimizers.items():
                for group, peak in zip(optimizer.param_groups, self.peaks[name], strict=True):
                    group["lr"] = peak * factor
            losses, influence = self._backward(window, batches, step)
            with deferred():
                norms = self._update()
                self.result.steps = step + 1
                self.due = self.result.steps % every == 0 if every else window.ends_epoch and not self._is_over()
                rates = {f"lr/{name}": optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
                settings = rates | dict(self.task.scheduled_values(step))
                if process_rank.is_main_process():
                    self.recorder.step(step, losses, norms | influence, settings, sum(map(len, window.rows)))
        except (KeyboardInterrupt, RankLost):
            if self.result.steps == step:
                self.model.zero_grad(set_to_none=True)
                set_random_state(random)
            raise

    def _backward(
        self, window: Window, loaded: Sequence[Any], step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the gradients of the window's mean losses; returns the losses and the metrics of `Task.influence`."""
        amp, probes = self.config.training.amp, self.config.tracking.probes(step)
        batches: list[Any] = [batch.to(self.device) for batch in loaded]
        weights = [distributed.local_weight(len(rows)) for rows in window.rows]
        counts = distributed.all_reduce(summed([weighted(self.task.counts(batch), weight)
                                    for batch, weight in zip(batches, weights, strict=True)]))  # fmt: skip
        shares, probed = [], []
        for batch, weight in zip(batches, weights, strict=True):
            with autocast(amp, self.device):
                output = self.task.forward(self.model, batch)
            losses = weighted(self.task.losses(output, batch, counts, step), weight)
            if probes:
                probed.append(self.task.probe(self.model, losses))
            self.scaler.scale(losses[TOTAL]).backward()  # type: ignore[no-untyped-call]
            shares.append({name: loss.detach() for name, loss in losses.items()})
        distributed.all_reduce_gradients(self.model.parameters())
        means = distributed.all_reduce(summed(shares))
        influence = dict(self.task.influence(distributed.all_reduce(summed(probed)), means)) if probes else {}
        return {name: loss for name, loss in means.items() if not name.startswith(PREFIX)}, influence

    def _update(self) -> dict[str, Tensor]:
        """Step every optimizer; returns the gradient norms before clipping."""
        norms = {}
        for name, optimizer in self.optimizers.items():
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            sparse = [parameter for parameter in parameters if parameter.grad.is_sparse]
            for parameter in sparse:  # add up each row's gradients, for the norm and for the optimizer
                parameter.grad = coalesced(parameter.grad)
            norm = gradient_norm([p.grad.values() if p.grad.is_sparse else p.grad for p in parameters])
            if self.config.training.clip_norm is not None and not sparse:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.training.clip_norm, norm)
            norms[f"grad_norm/{name}"] = norm
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norms

    def _evaluate(self) -> None:
        """Evaluate on the validation split, log the metrics at the current step, and keep the best weights."""
        step = self.result.steps
        self.saver.check_data()
        self.recorder.pause()
        metrics = evaluate(self.task, self.model, "valid", self.device)
        with deferred():
            self.run.log_metrics(step, metrics)
            self.run.flush()
            self.result.metrics |= metrics
            self.best_weights.consider(metrics, self.model, step)
            self.evaluated_at, self.due = step, False
        self.stopped = self.watch is not None and self.watch(step, metrics)
        name = self.best_weights.metric
        score = f"{name} {metrics[name]:.4f}" if name in metrics else "evaluated"
        info(f"step {step}: {score}" + (" (best)" if self.best_weights.step == step else ""))
        with optional("what the evaluation shows"):
            for finding in self.task.findings(metrics):
                warn(f"step {step}: {finding}")
        self.recorder.resume()


def count_steps(task: Task[Any]) -> int:
    """Number of optimizer steps if training does not stop early."""
    training = task.config.training
    longest = training.max_steps or math.inf
    steps = 0
    for epoch in range(training.num_train_epochs):
        if steps >= longest:
            break
        steps += -(-len(task.plan(epoch)) // training.accumulation_steps)
    return int(min(steps, longest))
