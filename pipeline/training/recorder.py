"""Log the losses of each step to the run and the console.

Losses and norms stay on their device until several steps are buffered, so that training does not wait for a transfer at
every step. A NaN is therefore detected some steps later, but reported with the step at which it occurred.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.names import ROWS_PER_SECOND
from pipeline.runtime.console import Console
from pipeline.runtime.interrupts import deferred
from pipeline.tracking.run import Run, now_ms

DRAIN_STEPS, DRAIN_SECONDS = 64, 0.5


class NonFiniteError(TrainingError):
    """A loss became NaN or infinite."""


@dataclass
class _Step:
    step: int
    losses: tuple[str, ...]
    norms: tuple[str, ...]
    values: Tensor  # values of the losses, then of the norms
    settings: Mapping[str, float | bool]
    rows: int
    time_ms: int
    clock: float


class Recorder:
    """Buffers steps; `drain` checks them, logs every `log_every`-th one, and empties the buffer."""

    def __init__(
        self, run: Run, console: Console, log_every: int, logged: Callable[[Sequence[str]], Sequence[str]]
    ) -> None:
        """logged: selects the losses to log from the names of all losses."""
        self.run, self.console, self.log_every, self.logged = run, console, log_every, logged
        self.waiting: list[_Step] = []
        self.rows_since_log, self.last_log = 0, time.perf_counter()
        self.last_drain = self.last_log

    def step(
        self,
        step: int,
        losses: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        settings: Mapping[str, float | bool],
        rows: int,
    ) -> None:
        """Buffer a step's values; every loss is checked to be finite, whether it is logged or not."""
        values = torch.stack([*losses.values(), *norms.values()])
        clock = time.perf_counter()
        self.waiting.append(_Step(step, tuple(losses), tuple(norms), values, settings, rows, now_ms(), clock))
        if len(self.waiting) >= DRAIN_STEPS or clock - self.last_drain > DRAIN_SECONDS:
            self.drain()

    def pause(self) -> None:
        """Exclude the time until `resume`, such as an evaluation, from the throughput."""
        self.drain()
        self.paused = time.perf_counter()

    def resume(self) -> None:
        self.last_log += time.perf_counter() - self.paused

    def drain(self) -> None:
        """Log the buffered steps.

        Raises:
            NonFiniteError: a loss is not finite; the message names it and its step. Earlier steps are logged.
        """
        with deferred():  # an interrupt while logging would lose steps
            self._drain()

    def _drain(self) -> None:
        waiting, self.waiting = self.waiting, []
        self.last_drain = time.perf_counter()
        if not waiting:
            return
        table = torch.cat([entry.values for entry in waiting]).tolist()  # one transfer from the device for all steps
        position = 0
        try:
            for entry in waiting:
                names = (*entry.losses, *entry.norms)
                self._log(entry, dict(zip(names, table[position : position + len(names)], strict=True)))
                position += len(names)
        finally:
            self.run.flush()

    def _log(self, entry: _Step, values: Mapping[str, float]) -> None:
        for name in entry.losses:
            if not math.isfinite(values[name]):
                raise NonFiniteError(f"{name} is {values[name]} at step {entry.step}; try a lower learning rate")
        self.rows_since_log += entry.rows
        if entry.step % self.log_every:
            return
        # with fp16, a norm is infinite if the loss scale was too high and the step was skipped
        norms = [name for name in entry.norms if math.isfinite(values[name])]
        metrics: dict[str, float | bool] = {name: values[name] for name in (*self.logged(entry.losses), *norms)}
        metrics |= entry.settings
        metrics[ROWS_PER_SECOND] = self.rows_since_log / max(1e-9, entry.clock - self.last_log)
        metrics["global_step"] = entry.step
        self.rows_since_log, self.last_log = 0, entry.clock
        self.run.log_metrics(entry.step, metrics, entry.time_ms)
        self.console.step(metrics)
