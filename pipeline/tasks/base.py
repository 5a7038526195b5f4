"""What a task supplies to the one training loop: data, model, named losses and evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

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

Rows = npt.NDArray[np.int64]
TOTAL = "loss_total"  # the one that is differentiated
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision(amp: str, device: str) -> str:
    """`auto` of training.amp as what it is here: bf16 where the device has instructions for it, else no."""
    if amp != "auto":
        return amp
    found = torch.cpu.get_capabilities()
    native = torch.cuda.is_bf16_supported() if device == "cuda" else found.get("amx_bf16") or found.get("avx512_bf16")
    return "bf16" if native else "no"


def autocast(amp: str, device: str) -> torch.autocast:
    """What a forward pass runs in."""
    kind = precision(amp, device)
    return torch.autocast(device, dtype=AMP.get(kind), enabled=kind != "no")


def write_test_rows(folder: Path, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """What metrics of the test split are made of, a row of it a row, in its order: for intervals over rows.

    A column is named `<kind>/<metric without its split>`: `label` (0 or 1) and `score` of an AUC, `numerator` and
    `denominator` of a ratio of sums.
    """
    file = folder / TEST_ROWS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), file, compression="zstd")


def undefined(task: "Task", key: str, metric: str) -> str:
    """Why a metric (`valid/...` or `test/...`) is undefined on the task's data; "" = it is defined.

    Raises:
        UserError: no evaluation gives it; names `key`, under which it was asked for, and the nearest one.
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
    """Tensors of some rows."""

    def to(self, device: str) -> Self: ...

    def __len__(self) -> int: ...


class Dataset(NamedTuple):
    """What the run was fed with, as MLflow's inputs show it."""

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


class Task(Protocol):
    """One kind of experiment. `B` is the task's batch type; rows are indices into the training split.

    Losses are named. `losses` returns each as this micro-batch's share of the mean over the whole optimizer step
    (accumulation window), so that summing over micro-batches gives the exact mean whatever their sizes: divide sums
    by the step's `counts`, never by the micro-batch's own. Where several processes train, each sees its rows of a
    micro-batch, and the same holds: what is no sum over rows takes their mean from `ranks.mean`, and `evaluate` may
    share its rows out by `ranks.each_its_part`.
    """

    @property
    def config(self) -> RunConfig: ...

    @property
    def schedule(self) -> ScheduleConfig:
        """Of the learning rate."""
        ...

    @property
    def dataset(self) -> Dataset:
        """Everything that the run is fed with."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """What it was read from: must stay as it is while the run trains."""
        ...

    def with_config(self, config: Any) -> "Task | None":
        """A task of this kind with another config, sharing what is loaded where the config names the same.

        None: it needs something that only its entry point can bring.
        """
        ...

    def summary(self) -> Mapping[str, str]:
        """Facts worth a param or a line at the start: rows, parameters."""
        ...

    def describe(self, folder: Path) -> Mapping[str, float]:
        """What is known before training: files written into the folder become artifacts; returns metrics of step 0."""
        ...

    def warnings(self, total_steps: int) -> Sequence[str]:
        """What is allowed but looks like a mistake, known once data and steps are."""
        ...

    def model(self) -> nn.Module:
        """A new model; its weights depend on torch's seed alone, and a training step changes no buffer of it."""
        ...

    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        """Named optimizers at their peak learning rates; the names appear in `lr/*` and `grad_norm/*`."""
        ...

    def plan(self, epoch: int) -> Sequence[Rows]:
        """The micro-batches of an epoch: the rows of the i-th, for any i, from (seed, epoch, i) alone."""
        ...

    def batch(self, rows: Rows) -> Any:
        """The training rows as a batch, on the CPU."""
        ...

    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        """What each loss is a mean over: rows, clicks, labelled cells. Labels alone decide."""
        ...

    def losses(self, model: nn.Module, batch: Any, counts: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """Every named loss, parts before what is made of them, `loss_total` among them.

        At the steps of `tracking.probes` also shares under `influence/...`, for `influence`: detached, no losses.
        """
        ...

    def probe(self, model: nn.Module, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This micro-batch's share of what `influence` needs of the gradients: named vectors, additive.

        Called at the steps of `tracking.probes` with what `losses` gave, before its total is differentiated. Must
        leave the graph, `grad` and the random numbers as they are.
        """
        ...

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What each part of the loss does at this step: 0-d tensors under `influence/...`, not finite = undefined.

        `probed` and `losses` are summed over the step's micro-batches.
        """
        ...

    def settings(self, step: int) -> Mapping[str, float | bool]:
        """What is scheduled by the step and logged beside the losses: a gate, its weight."""
        ...

    def logged_losses(self, names: Sequence[str]) -> Sequence[str]:
        """Of the losses, those to log."""
        ...

    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        """Metrics of a split (`valid` or `test`) under their full names."""
        ...

    def known_metrics(self, split: str) -> Mapping[str, str]:
        """Every metric that `evaluate` can give of a split -> what the split's labels lack for it, "" where nothing.

        Gates and the like, which stand under no split's name, are not among them.
        """
        ...

    def calibrate(self, model: nn.Module, device: str) -> Fitted:
        """Fit the calibration of the finished model's probabilities on the validation split, and keep it.

        From then on `evaluate` adds `test/..._calibrated` metrics, and the exported model applies it. Empty where
        `model.calibrate` is false, or where the split does not allow it, which is reported in one line. No other metric
        and no weight depends on it.
        """
        ...

    def findings(self, metrics: Mapping[str, float]) -> Sequence[str]:
        """What an evaluation shows that the user should hear of at once."""
        ...

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        """Pictures and tables of the finished model, as files in folders of this one; each becomes an artifact.

        `tracking.log_report` asks for them, `tracking.log_rows` for what `write_test_rows` leaves.
        """
        ...

    def export(self, model: nn.Module, folder: Path) -> ModelExport:
        """All that predicting from raw input needs, written into the folder."""
        ...
