"""Settings that all training tasks have in common."""

import hashlib
import json
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from pipeline.config.strict_config import Config, Positive, Probability, flatten, keys


class AdamConfig(Config):
    lr: float = Field(1e-3, gt=0)
    """peak learning rate"""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """decay of the running mean of the gradient and of its square (Kingma & Ba 2015)"""
    eps: float = Field(1e-8, gt=0)
    """added to the denominator"""


class DenseOptimizerConfig(AdamConfig):
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay (AdamW, Loshchilov & Hutter 2019)"""


class ScheduleConfig(Config):
    warmup_steps: int = Field(0, ge=0)
    """optimizer steps over which the learning rate rises linearly (the loss's own warm-up is another key)"""
    decay: Literal["cosine", "constant"] = "cosine"
    """learning rate after the warm-up"""
    final_ratio: float = Field(0.0, ge=0, le=1)
    """final learning rate of cosine decay, as a share of the peak"""


class TrainingConfig(Config):
    num_train_epochs: Positive = 1
    """passes over the training split"""
    max_steps: Positive | None = None
    """stop after this many optimizer steps, if that comes before the last epoch's end"""
    batch_size: Positive = 512
    """rows of a micro-batch"""
    accumulation_steps: Positive = 1
    """micro-batches of an optimizer step; losses are normalised over all of them together"""
    clip_norm: float | None = Field(None, gt=0)
    """clip the norm of the dense gradients to this"""
    amp: Literal["auto", "no", "bf16", "fp16"] = "no"
    """mixed precision of forward and backward, losses stay fp32; auto = bf16 if the device has it, else no"""
    compile: bool = False
    """compile the dense part of the model with torch.compile; needs a C++ compiler"""
    threads: Positive | None = None
    """CPU threads of torch; null = one fewer than cores, for the writer process. Rounding depends on the number"""
    prefetch: int | None = Field(None, ge=0)
    """number of steps whose batches are prepared in advance, in the background; 0 = none; null = 2"""


class EvaluationConfig(Config):
    every_steps: Positive | None = None
    """optimizer steps between evaluations on the validation split, with one at the end; null = after each epoch"""
    metric: str = Field(pattern=r"^valid/.+")
    """the validation metric that selects the best weights"""
    mode: Literal["max", "min"] = "max"
    """whether a higher or a lower evaluation.metric is better"""
    patience: Positive | None = None
    """stop after this many evaluations without a better evaluation.metric; null = never"""
    batch_size: Positive = 8192
    """rows of an evaluation batch"""


class CheckpointConfig(Config):
    enabled: bool = True
    """false: an interrupted run starts again from its first step"""
    every_steps: Positive | None = None
    """optimizer steps between checkpoints"""
    every_seconds: float | None = Field(None, gt=0)
    """seconds between checkpoints; if every_steps is null too, saving takes less than 5% of the training time"""
    keep_steps: tuple[Positive, ...] = ()
    """optimizer steps after which a checkpoint is saved and kept, in addition to the last two and the best one"""
    max_gb: float | None = Field(None, gt=0)
    """limit of disk space for a run's checkpoints, in GB (1e9 bytes); null = no limit"""


class TrackingSwitch(Config):
    enabled: bool = True
    """false: nothing is written to MLflow"""


class TrackingConfig(TrackingSwitch):
    offline: bool = False
    """true: start even if the tracking store is unreachable; logged values wait in the run's folder"""
    log_every: Positive = 1
    """optimizer steps between log entries; 1 = log every step"""
    influence_every: int = Field(50, ge=0)
    """optimizer steps between measurements of each loss component's influence (at logged steps only); 0 = never"""
    log_model: bool = True
    """log the best weights as an MLflow model"""
    log_report: bool = True
    """keep pictures and tables of the finished model as artifacts"""
    log_rows: bool = True
    """keep the test split's per-row scores as an artifact, for intervals over rows"""
    log_diff: bool = True
    """keep the diff of tracked files that are not committed as an artifact, its first MB"""

    def probes(self, step: int) -> bool:
        """Return True if influence metrics are measured at this optimizer step."""
        return self.influence_every > 0 and step % self.influence_every == 0 and step % self.log_every == 0


def embedded_line(rows: int, what: str, key: str) -> str:
    """Return the message that a run uses generated data because no file is configured."""
    return f"embedded data: generated, {rows:,} {what}, because {key} is null"


OPERATIONAL = ("output_dir", "run_name", "experiment", "device", "resume", "fork", "training.prefetch",
               "model.calibrate")  # fmt: skip


def is_operational(key: str) -> bool:
    """Return True if a dotted key has no effect on the result of the training."""
    return key in OPERATIONAL or key.startswith(("tracking.", "checkpoint."))


class RunConfig(Config):
    """The config of a training task."""

    task: ClassVar[str] = ""  # name of the task, a-z, 0-9 and _; its entry point is train_<task>
    # Keys that older versions did not have. While they have their defaults they are not part of fingerprints, so that
    # older runs are still found.
    added_keys: ClassVar[frozenset[str]] = frozenset({"training.compile"})
    data_keys: ClassVar[tuple[str, ...]] = ("data.",)  # prefixes of the keys that decide the data
    # Prefixes of the metrics (without split) that comparisons show beside the primary one, in the order of display. The
    # first two are shown before the others, and panels of the page show all validation metrics of the first.
    side_metrics: ClassVar[tuple[str, ...]] = ("auc_", "f1_", "ece_", "logloss_", "calibration_")
    gates: ClassVar[tuple[str, ...]] = ()  # metrics that are 1 while a scheduled loss acts, else 0
    events: ClassVar[dict[str, str]] = {}  # last part of an AUC's name -> its rows of class 1, such as clicks
    charts: ClassVar[tuple[str, ...]] = ()  # metrics that `make ui` charts beside the primary one
    headline: ClassVar[tuple[str, ...]] = ()  # metrics (without split) of a run's last line; () = AUCs and F1 scores
    short: ClassVar[dict[str, str]] = {
        "epochs": "training.num_train_epochs",
        "max_steps": "training.max_steps",
        "batch_size": "training.batch_size",
    }

    experiment: str | None = Field(None, min_length=1, coerce_numbers_to_str=True)
    """MLflow experiment, by name or id, created if missing; null = that of `mlflow run`, or MLflow's default"""
    run_name: str | None = Field(None, min_length=1)
    """name of the run; null = a short name made from the most important settings"""
    output_dir: str = Field("outputs", min_length=1)
    """folder of the runs' own files, one folder per run"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of initial weights, shuffling and dropout"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda if available, else cpu"""
    resume: str | None = Field(None, pattern=r"^(auto|\w+)$")
    """auto = continue the run of this config and data, or start it; a run id = continue that run; null = a new run"""
    fork: str | None = Field(None, pattern=r"^\w+@\d+$")
    """<run id>@<step>: start a new run from the checkpoint of another run"""
    checkpoint: CheckpointConfig = CheckpointConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig
    tracking: TrackingConfig = TrackingConfig()

    def name(self) -> str:
        """Name of the run, short enough for a chart's legend."""
        return self.run_name or f"seed {self.seed}"

    def arm_name(self) -> str:
        """Name of the arm; equal for runs that differ only in their seed."""
        return self.run_name or "run"

    def embedded(self) -> str | None:
        """Return the message that the data are generated; None if the user supplied data."""
        return None

    def default_metric(self) -> str:
        """Default value of evaluation.metric."""
        return str(type(self.evaluation).model_fields["metric"].default)

    def relies_on_metric(self, given: frozenset[str]) -> bool:
        """Return True if evaluation.metric must be defined: the user chose it, or early stopping (patience) needs it.

        given: dotted keys that the user set.
        """
        evaluation = self.evaluation
        chosen = "evaluation.metric" in given or evaluation.metric != self.default_metric()
        return chosen or evaluation.patience is not None

    def shared_prefix(self) -> "tuple[Self, int | None]":
        """Return the config of the shared prefix, and the first step that differs from it; None = no step differs."""
        return self, None

    def control(self) -> "Self | None":
        """Return the config of the control, which only changes the weights of examples; None without a control."""
        return None

    def decisive(self) -> dict[str, str]:
        """Return the flat config without operational keys: the settings that decide the result."""
        return {key: value for key, value in flatten(self).items() if not is_operational(key)}

    def operational(self, given: frozenset[str]) -> dict[str, str]:
        """Return the operational keys that are set: not null, and either in `given` or different from the default."""
        default = flatten(type(self).model_validate({}))
        return {key: value for key, value in flatten(self).items()
                if is_operational(key) and value != "null" and (key in given or value != default[key])}  # fmt: skip

    def fingerprint(self, data_digest: str = "") -> str:
        """Return the SHA-256 (hex) of everything that decides the result: task, settings and data."""
        defaults = {key.path: key.default for key in keys(type(self)) if key.path in self.added_keys}
        settings = {key: value for key, value in self.decisive().items() if defaults.get(key) != value}
        text = json.dumps([self.task, settings, data_digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def warnings(self, given: frozenset[str] = frozenset()) -> list[str]:  # noqa: ARG002
        """Return warnings about allowed settings that are probably mistakes. given: dotted keys that the user set."""
        return []

    def with_values(self, **values: Any) -> Self:
        """Return a validated copy with some top-level blocks or values replaced."""
        return type(self).model_validate(self.model_dump(by_alias=True) | values)
