"""Settings that all training tasks share."""

import hashlib
import json
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from pipeline.config.strict_config import Config, Positive, Probability, flatten


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
    """optimizer steps over which the learning rate rises linearly (not the focal gate: that is loss.aux_focal)"""
    decay: Literal["cosine", "constant"] = "cosine"
    """what the learning rate does after its warm-up"""
    final_ratio: float = Field(0.0, ge=0, le=1)
    """where cosine decay ends, as a share of the peak"""


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
    """mixed precision of forward and backward, losses stay fp32; auto = bf16 where the machine has it, else no"""
    threads: Positive | None = None
    """CPU threads of torch; null = one fewer than cores, for the tracking writer. Another number rounds differently"""
    prefetch: int | None = Field(None, ge=0)
    """steps whose batches are made ready in the background; 0 = none; null = 2"""


class EvaluationConfig(Config):
    every_steps: Positive | None = None
    """evaluate on the validation split every so many optimizer steps, and at the end; null = each epoch's end"""
    metric: str = Field(pattern=r"^valid/.+")
    """the validation metric that chooses the best weights"""
    mode: Literal["max", "min"] = "max"
    """whether a higher or a lower evaluation.metric is better"""
    patience: Positive | None = None
    """stop after this many evaluations without a better evaluation.metric; null = never"""
    batch_size: Positive = 8192
    """rows of an evaluation batch"""


class CheckpointConfig(Config):
    enabled: bool = True
    """false: a run that is cut off starts over from its first step"""
    every_steps: Positive | None = None
    """save every so many optimizer steps"""
    every_seconds: float | None = Field(None, gt=0)
    """save when this much time has passed; with every_steps null too: as often as costs less than 5% of the training"""
    keep_steps: tuple[Positive, ...] = ()
    """numbers of completed steps at which a checkpoint is saved and kept, beside the last two and the best one"""
    max_gb: float | None = Field(None, gt=0)
    """GB (1e9 bytes) of disk that a run's checkpoints may take; null = what the disk has"""


class TrackingSwitch(Config):
    enabled: bool = True
    """false: nothing is written to MLflow"""


class TrackingConfig(TrackingSwitch):
    offline: bool = False
    """true: a store that does not answer at the start is no error; what is logged waits in the run's folder"""
    log_every: Positive = 1
    """log every so many optimizer steps"""
    influence_every: int = Field(50, ge=0)
    """measure what each part of the loss does every so many optimizer steps, where they are logged; 0 = never"""
    log_model: bool = True
    """log the best weights as an MLflow model"""
    log_report: bool = True
    """keep pictures and tables of the finished model as artifacts"""
    log_rows: bool = True
    """keep the test split's per-row scores as an artifact, for intervals over rows"""

    def probes(self, step: int) -> bool:
        """Return whether influence metrics are measured at this optimizer step."""
        return self.influence_every > 0 and step % self.influence_every == 0 and step % self.log_every == 0


def embedded_line(rows: int, what: str, key: str) -> str:
    """Announcement of a run on generated data."""
    return f"embedded data: generated, {rows:,} {what}, because {key} is null"


OPERATIONAL = ("output_dir", "run_name", "experiment", "device", "resume", "fork", "training.prefetch",
               "model.calibrate")  # fmt: skip


def is_operational(key: str) -> bool:
    """Return whether a dotted key has no effect on the result of the training."""
    return key in OPERATIONAL or key.startswith(("tracking.", "checkpoint."))


class RunConfig(Config):
    """The config of a training task."""

    task: ClassVar[str] = ""  # tag `task` of its runs
    short: ClassVar[dict[str, str]] = {
        "epochs": "training.num_train_epochs",
        "max_steps": "training.max_steps",
        "batch_size": "training.batch_size",
    }

    experiment: str | None = Field(None, min_length=1, coerce_numbers_to_str=True)
    """MLflow experiment, by name or id, made where there is none; null = that of `mlflow run`, or MLflow's default"""
    run_name: str | None = Field(None, min_length=1)
    """name of the run; null = a short one made of what is most often tuned"""
    output_dir: str = Field("outputs", min_length=1)
    """folder of the runs' own files, one folder a run"""
    seed: int = Field(0, ge=0, lt=2**63)
    """of initial weights, shuffling and dropout"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one"""
    resume: str | None = Field(None, pattern=r"^(auto|\w+)$")
    """auto = bring the run of this config and data to its end, or begin it; a run id = that one; null = a new run"""
    fork: str | None = Field(None, pattern=r"^\w+@\d+$")
    """<run id>@<step>: a new run that starts from another's checkpoint"""
    checkpoint: CheckpointConfig = CheckpointConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig
    tracking: TrackingConfig = TrackingConfig()

    def name(self) -> str:
        """Name of the run, short enough for a chart's legend."""
        return self.run_name or f"seed {self.seed}"

    def arm_name(self) -> str:
        """Name of the arm: the same for runs that differ only in their seed."""
        return self.run_name or "run"

    def embedded(self) -> str | None:
        """Announcement of generated data; None = the data is the user's own."""
        return None

    def default_metric(self) -> str:
        """Default of evaluation.metric."""
        return str(type(self.evaluation).model_fields["metric"].default)

    def relies_on_metric(self, given: frozenset[str]) -> bool:
        """Return whether evaluation.metric must be defined: it was chosen (`given`), or patience depends on it."""
        evaluation = self.evaluation
        chosen = "evaluation.metric" in given or evaluation.metric != self.default_metric()
        return chosen or evaluation.patience is not None

    def shared_prefix(self) -> "tuple[Self, int | None]":
        """Return the config of the shared prefix, and the first step that differs from it; None = no step differs."""
        return self, None

    def control(self) -> "Self | None":
        """Return the config of the control run, which only re-weights; None = there is none."""
        return None

    def decisive(self) -> dict[str, str]:
        """Return the flat config without operational keys: the settings that decide the result."""
        return {key: value for key, value in flatten(self).items() if not is_operational(key)}

    def operational(self, given: frozenset[str]) -> dict[str, str]:
        """Return the operational keys that were set: no null, and no defaults except for `given` keys."""
        default = flatten(type(self).model_validate({}))
        return {key: value for key, value in flatten(self).items()
                if is_operational(key) and value != "null" and (key in given or value != default[key])}  # fmt: skip

    def fingerprint(self, data_digest: str = "") -> str:
        """Return the hash of everything that decides the result, as hex."""
        text = json.dumps([self.task, self.decisive(), data_digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def warnings(self, given: frozenset[str] = frozenset()) -> list[str]:  # noqa: ARG002
        """Return what is allowed but looks like a mistake. given: dotted keys that the user overrode."""
        return []

    def with_values(self, **values: Any) -> Self:
        """Return a validated copy with top-level blocks or values replaced."""
        return type(self).model_validate(self.model_dump(by_alias=True) | values)
