"""Interface between a task and the training loop: data, model, named losses and evaluation."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from pipeline.config.strict_config import closest, to_yaml
from pipeline.errors import UserError
from pipeline.maths.calibration import Fitted
from pipeline.names import TEST_ROWS_FILE
from pipeline.runtime.importing import uncollected
from pipeline.storage.calibration_file import write_calibration
from pipeline.storage.weights import save_weights

C = TypeVar("C", bound=RunConfig)
Rows = npt.NDArray[np.int64]
TOTAL = "loss_total"  # the loss that is differentiated


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and disable gradients; afterwards restore the model's previous mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def write_test_rows(folder: Path, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write per-row values of the test split, in its order, from which `compare` computes intervals on new rows.

    Columns are named `<kind>/<metric without its split>`. The kinds are `label` (0 or 1) and `score` for an AUC,
    `numerator` and `denominator` for a ratio of sums.
    """
    file = folder / TEST_ROWS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), file, compression="zstd")


def count_parameters(make: Callable[[], nn.Module]) -> int:
    """Number of parameters of the model that `make` builds, with tensors that have shapes but no values."""
    with uncollected(), torch.device("meta"):  # imports torch's compiler, as optimizers do
        return sum(weight.numel() for weight in make().parameters())


def save_model(folder: Path, model: nn.Module, config: RunConfig, calibration: Fitted) -> None:
    """Write what every exported model has: `model.safetensors`, `config.yaml` and `calibration.json`."""
    save_weights(model.state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8", newline="\n")
    write_calibration(folder, calibration)


def undefined(task: "Task[Any]", key: str, metric: str) -> str:
    """Return the reason why a metric (`valid/...` or `test/...`) is undefined on the task's data; "" if it is defined.

    Raises:
        UserError: the task has no such metric; the message names the config's `key` and the nearest metric.
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
    """Tensors of the rows of a micro-batch."""

    def to(self, device: str) -> Self: ...

    def __len__(self) -> int: ...


class Dataset(NamedTuple):
    """Description of a run's data, logged as an MLflow input."""

    name: str
    digest: str  # SHA-256, hex
    source: str
    profile: Mapping[str, Any]  # counts shown with the name, such as rows


@dataclass(frozen=True)
class ModelExport:
    """Files of an exported model, which `predict.load(folder)` of the task's package turns into a predictor."""

    folder: Path
    inputs: Sequence[str] | None  # names of the raw columns; None = one unnamed column of text
    outputs: Mapping[str, str]  # column -> "double" or "string"
    example: Any  # example input for predict, as plain lists: {column: values}, or a list of texts


class Task(ABC, Generic[C]):
    """Base class of tasks: the methods that the training loop calls. Rows are indices into the training split.

    The loop calls `forward` with the mixed precision of `training.amp` and `losses` in fp32. It calls `evaluate`,
    `calibrate` and `report` with the model in evaluation mode, without gradients. `batch` runs in a background thread.

    `losses` returns every named loss as this micro-batch's share of the mean over the whole optimizer step
    (accumulation window). The shares of the micro-batches must sum to the exact mean, whatever their sizes: divide
    sums by the `counts` of the step, never by those of the micro-batch. In distributed training each process gets its
    part of the rows of a micro-batch, and the same rule applies. If a loss is a function of a batch mean, compute that
    mean with `distributed.all_reduce_mean`. `evaluate` may distribute its rows with `distributed.split_evenly`.
    """

    config: C  # as given, or with the defaults that the data call for

    # --- data --------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def dataset(self) -> Dataset:
        """The data of all splits, with one digest."""

    @property
    @abstractmethod
    def splits(self) -> Collection[str]:
        """Names of the splits that have rows: `train`, `valid`, and `test` if there is one."""

    @property
    def files(self) -> Sequence[Path]:
        """Data files that were read. A run fails if one of them changes during training."""
        return ()

    def with_config(self, config: C) -> "Task[C] | None":
        """A task with another config that shares the loaded data; None if it must be created from its entry point."""
        return type(self)(config)  # type: ignore[call-arg]

    def summary(self) -> Mapping[str, str]:
        """Params to log in addition to those of the config, such as numbers of rows; also printed at the start."""
        return {}

    def describe(self, folder: Path) -> Mapping[str, float]:  # noqa: ARG002
        """Return metrics to log at step 0, and write artifacts into the folder. Called once, before training."""
        return {}

    def warnings(self, total_steps: int) -> Sequence[str]:  # noqa: ARG002
        """Warnings about probable mistakes, given the data and the number of optimizer steps."""
        return ()

    # --- training ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model. Its weights depend only on torch's seed, and training steps do not change its buffers.

        A checkpoint holds all persistent buffers, but running statistics such as those of BatchNorm would depend on the
        micro-batches, differ between the processes of a distributed training, and be changed by an interrupted step
        that is taken again. A run therefore refuses modules with `track_running_stats` that are in training mode after
        `model.train()`; other changes of buffers are found by `conformance.check_steps_change_no_buffer`.
        """

    def dense_methods(self, model: nn.Module) -> Sequence[tuple[nn.Module, str]]:
        """The modules' methods that `training.compile` compiles; by default, the model's `forward`.

        They must not have loops over a dimension of the batch, which would be compiled anew for each length, nor
        operations with sparse gradients.
        """
        return [(model, "forward")]

    @property
    def schedule(self) -> ScheduleConfig:
        """Schedule of the learning rate."""
        return ScheduleConfig(decay="constant")

    @abstractmethod
    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        """Optimizers with their peak learning rates, by the names used in the metrics `lr/*` and `grad_norm/*`."""

    @abstractmethod
    def plan(self, epoch: int) -> Sequence[Rows]:
        """The rows of each micro-batch of an epoch; micro-batch i depends only on (seed, epoch, i)."""

    @abstractmethod
    def batch(self, rows: Rows) -> Any:
        """Create a `Batch` of some rows of the training split, on the CPU."""

    @abstractmethod
    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        """Numbers that the losses are divided by: rows, clicks, labelled cells. They depend only on the labels."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Call the model and return its output."""
        return model(batch)

    @abstractmethod
    def losses(self, output: Any, batch: Any, counts: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """Every named loss, including `loss_total`; components come before their sums.

        counts: those of the whole optimizer step. If `tracking.probes(step)` is true, the result also has detached
        shares of the values that `influence` needs, with names that begin with `influence/`.
        """

    def scheduled_values(self, step: int) -> Mapping[str, float | bool]:  # noqa: ARG002
        """Scheduled values to log with the losses, such as the weight of a loss."""
        return {}

    def logged_losses(self, names: Sequence[str]) -> Sequence[str]:
        """Select the names of the losses that are logged."""
        return names

    def probe(self, model: nn.Module, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """This micro-batch's share of the gradients that `influence` needs: named vectors, summed over micro-batches.

        Called if `tracking.probes(step)` is true, with the result of `losses`, before `loss_total` is differentiated.
        Must not change the graph, `grad` or the state of random number generators.
        """
        return {}

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Metrics of the influence of each loss component at this step: 0-d tensors named `influence/...`.

        Values that are not finite are undefined. `probed` and `losses` are summed over the step's micro-batches.
        """
        return {}

    # --- evaluation --------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        """Metrics of a split that has rows (`valid` or `test`), by their full names (`valid/...`)."""

    @abstractmethod
    def known_metrics(self, split: str) -> Mapping[str, str]:
        """Map every metric that `evaluate` can return for a split to the reason why it is undefined; "" if defined.

        Metrics whose names do not begin with a split, such as those of gates, are not included.
        """

    def calibrate(self, model: nn.Module, device: str) -> Fitted:  # noqa: ARG002
        """Fit the calibration of the finished model's probabilities on the validation split, and store it in the task.

        Afterwards `evaluate` adds `test/..._calibrated` metrics, and the exported model applies the calibration. Other
        metrics and the weights do not depend on it. Returns an empty mapping if `model.calibrate` is false, or if the
        split has too few labels, which is reported in one line.
        """
        return {}

    def findings(self, metrics: Mapping[str, float]) -> Sequence[str]:  # noqa: ARG002
        """Warnings about the metrics of an evaluation."""
        return ()

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        """Write artifacts of the finished model into the folder.

        `tracking.log_report`: pictures and tables; `tracking.log_rows`: the file of `write_test_rows`.
        """

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> ModelExport:
        """Write all files that are needed to predict from raw input into the folder."""


def new_model(task: Task[Any]) -> nn.Module:
    """Create the model to train, in training mode.

    Raises:
        UserError: a module has running statistics, see `Task.model`.
    """
    model = task.model().train()
    for name, module in model.named_modules():
        if module.training and getattr(module, "track_running_stats", False):
            kind = type(module).__name__
            raise UserError(f"model: found {kind} {name} with running statistics, which depend on the micro-batches, "
                            "allowed: LayerNorm, GroupNorm, or the module in evaluation mode")  # fmt: skip
    return model


def predictor_module(task: Task[Any]) -> str:
    """Full name of the module that loads exported models: `predict` in the package of the task's class.

    For a class outside a package with this module, such as one in a notebook, it is that of its base class.

    Raises:
        UserError: there is no such module.
    """
    for parent in type(task).__mro__:
        package = parent.__module__.rpartition(".")[0]
        if package and importlib.util.find_spec(f"{package}.predict"):
            return f"{package}.predict"
    name = f"{type(task).__module__}.{type(task).__qualname__}"
    raise UserError(f"{name}: found no module `predict` beside it, allowed: a package with predict.py")


def evaluate(task: Task[Any], model: nn.Module, split: str, device: str) -> dict[str, float]:
    """Evaluate a split with the model in evaluation mode; returns {} for a split without rows."""
    if split not in task.splits:
        return {}
    with evaluating(model):
        return dict(task.evaluate(model, split, device))
