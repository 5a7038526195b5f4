"""What a task supplies to the one training loop: data, model, named losses and evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.config.run_config import RunConfig, ScheduleConfig
from pipeline.config.strict_config import closest
from pipeline.errors import UserError
from pipeline.maths.calibration import Fitted
from pipeline.names import TEST_ROWS_FILE

C = TypeVar("C", bound=RunConfig)
Rows = npt.NDArray[np.int64]
TOTAL = "loss_total"  # the one that is differentiated


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def write_test_rows(folder: Path, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write per-row values of the test split, in the split's order: `compare` resamples them for intervals over rows.

    A column is named `<kind>/<metric without its split>`: `label` (0 or 1) and `score` of an AUC, `numerator` and
    `denominator` of a ratio of sums.
    """
    file = folder / TEST_ROWS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), file, compression="zstd")


def undefined(task: "Task[Any]", key: str, metric: str) -> str:
    """Return why a metric (`valid/...` or `test/...`) is undefined on the task's data; "" = it is defined.

    Raises:
        UserError: no evaluation gives it; names the config's `key` and the nearest metric.
    """
    split, _, name = metric.partition("/")
    known = {each.removeprefix(f"{split}/"): why for each, why in task.known_metrics(split).items()}
    if name in known:
        return known[name] and f"{metric} {known[name]}"
    if near := closest(name, list(known)):
        raise UserError(f"{key}: found {metric}, allowed: a metric that evaluations give; did you mean {split}/{near}?")
    plain = [f"{split}/{each}" for each in known if "/" not in each]
    more = f" and {len(known) - len(plain)} others" if len(plain) < len(known) else ""
    raise UserError(f"{key}: found {metric}, allowed: {', '.join(plain)}{more}")


class Batch(Protocol):
    """Tensors of a micro-batch's rows."""

    def to(self, device: str) -> Self: ...

    def __len__(self) -> int: ...


class Dataset(NamedTuple):
    """The data of a run, as MLflow's inputs show it."""

    name: str
    digest: str  # SHA-256, hex
    source: str
    profile: Mapping[str, Any]  # counts worth seeing beside the name


@dataclass(frozen=True)
class ModelExport:
    """A logged model: files that `pipeline.tasks.<task>.predict.load(folder)` turns into a predictor."""

    folder: Path
    task: str
    inputs: Sequence[str] | None  # names of the raw columns; None = one unnamed column of text
    outputs: Mapping[str, str]  # column -> "double" or "string"
    example: Any  # what predict takes, as plain lists: {column: values}, or a list of texts


class Task(ABC, Generic[C]):
    """One kind of experiment: what the training loop calls. Rows are indices into the training split.

    The loop calls `forward` under `training.amp` and `losses` in fp32; `evaluate`, `calibrate` and `report` with the
    model in evaluation mode, without gradients. `batch` runs in a background thread.

    Losses are named. `losses` returns each as this micro-batch's share of the mean over the whole optimizer step
    (accumulation window), so that summing over micro-batches gives the exact mean whatever their sizes: divide sums
    by the step's `counts`, never by the micro-batch's own. With several processes each gets its rows of a
    micro-batch, and the same holds: a function of a batch mean takes it from `distributed.all_reduce_mean`, and
    `evaluate` may divide its rows with `distributed.split_evenly`.
    """

    config: C

    # --- data --------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def dataset(self) -> Dataset:
        """The data, all splits together, under one digest."""

    @property
    @abstractmethod
    def splits(self) -> Collection[str]:
        """`train`, `valid`, and `test` if there is one: the splits that have rows."""

    @property
    def files(self) -> Sequence[Path]:
        """Files that were read: a run ends with an error where one changes meanwhile."""
        return ()

    def with_config(self, config: C) -> "Task[C] | None":
        """A task with another config that shares what is loaded; None = only the entry point can make it."""
        return type(self)(config)  # type: ignore[call-arg]

    def summary(self) -> Mapping[str, str]:
        """Params beside the config's, also printed at the start: rows, parameters."""
        return {}

    def describe(self, folder: Path) -> Mapping[str, float]:  # noqa: ARG002
        """Metrics of step 0; files written into the folder become artifacts. Called once, before training."""
        return {}

    def warnings(self, total_steps: int) -> Sequence[str]:  # noqa: ARG002
        """What is allowed but looks like a mistake, given the data and the number of optimizer steps."""
        return ()

    # --- training ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model; its weights depend on torch's seed alone, and a training step changes no buffer of it."""

    @property
    def schedule(self) -> ScheduleConfig:
        """The learning rate's schedule."""
        return ScheduleConfig(decay="constant")

    @abstractmethod
    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        """Optimizers at their peak learning rates, by the names that appear in `lr/*` and `grad_norm/*`."""

    @abstractmethod
    def plan(self, epoch: int) -> Sequence[Rows]:
        """The rows of each micro-batch of an epoch; the i-th depends on (seed, epoch, i) alone."""

    @abstractmethod
    def batch(self, rows: Rows) -> Any:
        """A `Batch` of the training rows, on the CPU."""

    @abstractmethod
    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        """What each loss is a mean over: rows, clicks, labelled cells. They depend on labels alone."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's output."""
        return model(batch)

    @abstractmethod
    def losses(self, output: Any, batch: Any, counts: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """Every named loss, parts before their sums, `loss_total` among them.

        counts: those of the whole optimizer step. At the steps of `tracking.probes` also detached shares of what
        `influence` needs, under names that begin with `influence/`.
        """

    def settings(self, step: int) -> Mapping[str, float | bool]:  # noqa: ARG002
        """Scheduled values to log beside the losses: a gate, its weight."""
        return {}

    def logged_losses(self, names: Sequence[str]) -> Sequence[str]:
        """Those of the losses' names that are logged."""
        return names

    def probe(self, model: nn.Module, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """This micro-batch's share of the gradients that `influence` needs: named vectors, additive.

        Called at the steps of `tracking.probes` with the result of `losses`, before its total is differentiated. Must
        leave the graph, `grad` and the random numbers as they are.
        """
        return {}

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """What each part of the loss does at this step: 0-d tensors under `influence/...`, not finite = undefined.

        `probed` and `losses` are summed over the step's micro-batches.
        """
        return {}

    # --- evaluation --------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        """Metrics of `valid` or `test`, which has rows, under their full names."""

    @abstractmethod
    def known_metrics(self, split: str) -> Mapping[str, str]:
        """Every metric that `evaluate` can give of a split -> what the split's labels lack for it, "" where nothing.

        Gates and the like, which stand under no split's name, are not among them.
        """

    def calibrate(self, model: nn.Module, device: str) -> Fitted:  # noqa: ARG002
        """Fit the calibration of the finished model's probabilities on the validation split, and keep it.

        From then on `evaluate` adds `test/..._calibrated` metrics, and the exported model applies it. Empty where
        `model.calibrate` is false, or where the split does not allow it, which is reported in one line. No other metric
        and no weight depends on it.
        """
        return {}

    def findings(self, metrics: Mapping[str, float]) -> Sequence[str]:  # noqa: ARG002
        """Warnings about an evaluation's metrics."""
        return ()

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        """Write pictures and tables of the finished model into the folder; each file becomes an artifact.

        `tracking.log_report` asks for them, `tracking.log_rows` for the file of `write_test_rows`.
        """

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> ModelExport:
        """Write everything that predicting from raw input needs into the folder."""


def evaluate(task: Task[Any], model: nn.Module, split: str, device: str) -> dict[str, float]:
    """The task's metrics of a split, in evaluation mode; {} of a split without rows."""
    if split not in task.splits:
        return {}
    with evaluating(model):
        return dict(task.evaluate(model, split, device))
