"""Config keys of `train_fraud`, and what the rest of the pipeline needs to know of the task. No torch here."""

from typing import ClassVar, Self

from pydantic import Field

from pipeline.config.loss_config import FocalConfig
from pipeline.config.run_config import DenseOptimizerConfig, EvaluationConfig, RunConfig, ScheduleConfig, embedded_line
from pipeline.config.strict_config import Config, Positive, Probability
from pipeline.maths.schedules import gate_is_open


class DataConfig(Config):
    path: str | None = Field(None, min_length=1)
    """a .csv or .parquet file of transactions; null = generated ones"""
    rows: int = Field(60_000, ge=1000)
    """transactions to generate"""
    seed: int = Field(0, ge=0)
    """seed of the generator, and of the split into 80% train, 10% validation and 10% test"""


class ModelConfig(Config):
    embedding_dim: Positive = 8
    """width of the embedding of a categorical column"""
    hidden: tuple[Positive, ...] = (64, 32)
    """widths of the layers"""
    dropout: Probability = 0.1
    """dropout after each layer"""


class PosWeightConfig(Config):
    static: float = Field(1.0, gt=0)
    """weight of frauds in loss_bce"""
    late: float = Field(0.0, ge=0)
    """added to the weight of frauds from warmup_steps on; 0 = nothing"""
    warmup_steps: int = Field(0, ge=0)
    """first optimizer step with the added weight"""

    def at(self, step: int) -> float:
        """Weight of frauds at an optimizer step."""
        return self.static + (self.late if gate_is_open(step, self.warmup_steps) else 0.0)


class LossConfig(Config):
    focal: FocalConfig = FocalConfig()
    pos_weight: PosWeightConfig = PosWeightConfig()


class OptimConfig(DenseOptimizerConfig):
    schedule: ScheduleConfig = ScheduleConfig()


class FraudEvaluationConfig(EvaluationConfig):
    metric: str = Field("valid/auc_fraud", pattern=r"^valid/.+")
    """the validation metric that selects the best weights"""


class FraudConfig(RunConfig):
    task: ClassVar[str] = "fraud"
    short: ClassVar[dict[str, str]] = RunConfig.short | {
        "lambda": "loss.focal.lambda",
        "gamma": "loss.focal.gamma",
        "warmup_steps": "loss.focal.warmup_steps",
        "focal": "loss.focal.enabled",
        "data": "data.path",
    }
    side_metrics: ClassVar[tuple[str, ...]] = ("auc_", "pr_auc_", "logloss_", "ece_")
    gates: ClassVar[tuple[str, ...]] = ("focal_on",)
    events: ClassVar[dict[str, str]] = {"fraud": "frauds"}

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: FraudEvaluationConfig = FraudEvaluationConfig()

    def name(self) -> str:
        return self.run_name or f"fraud {self.arm_name()} s{self.seed}"

    def arm_name(self) -> str:
        focal, weight = self.loss.focal, self.loss.pos_weight
        parts = [f"l{focal.lambda_:g} g{focal.gamma:g} w{focal.warmup_steps}"] if focal.enabled else []
        parts += [f"w+{weight.late:g} w{weight.warmup_steps}"] if weight.late else []
        return " ".join(parts) or "baseline"

    def embedded(self) -> str | None:
        return None if self.data.path else embedded_line(self.data.rows, "transactions", "data.path")

    def shared_prefix(self) -> tuple[Self, int | None]:
        """Return this config without the terms that act late, and the first step at which one of them acts."""
        focal, weight = self.loss.focal, self.loss.pos_weight
        steps = [focal.warmup_steps] * focal.enabled + [weight.warmup_steps] * (weight.late > 0)
        return self._without_focal(late=0.0, warmup_steps=0), min(steps, default=None)

    def control(self) -> Self | None:
        """Return the control of the focal loss: lambda is added to the weight of frauds instead.

        For a rare event, (1 - p_t)^gamma is near 1 for positives and near 0 for easy negatives, so the focal term is
        nearly lambda times the cross-entropy of the positives.
        """
        focal, weight = self.loss.focal, self.loss.pos_weight
        if not focal.enabled or not focal.lambda_:
            return None
        return self._without_focal(late=focal.lambda_ + weight.late, warmup_steps=focal.warmup_steps)

    def _without_focal(self, late: float, warmup_steps: int) -> Self:
        focal = {"log_components": self.loss.focal.log_components}
        weight = {"static": self.loss.pos_weight.static, "late": late, "warmup_steps": warmup_steps}
        return self.with_values(loss={"focal": focal, "pos_weight": weight})

    def warnings(self, given: frozenset[str] = frozenset()) -> list[str]:
        warnings = self.loss.focal.warnings("loss.focal", given)
        if self.data.path and "data.rows" in given:
            warnings.append("data.rows has no effect while data.path is given")
        return warnings
