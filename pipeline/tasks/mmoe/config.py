"""Config keys of `train_mmoe` (configs/mtl_mmoe.yaml) and of `prepare_ctr`."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.loss_config import FocalConfig
from pipeline.config.run_config import (
    AdamConfig,
    DenseOptimizerConfig,
    EvaluationConfig,
    RunConfig,
    ScheduleConfig,
    TrackingSwitch,
    embedded_line,
)
from pipeline.config.strict_config import Config, Positive, Probability
from pipeline.errors import UserError
from pipeline.maths.schedules import clipped_pos_weight, gate_is_open

HEADS = ("ctr", "cvr")
CLICK_METRIC = "valid/auc_ctr"  # default evaluation metric of data without conversion labels


class EmbeddedDataConfig(Config):
    rows: int = Field(4_000_000, ge=1000)
    """impressions to generate; 80% train, 10% validation, 10% test"""
    seed: int = Field(0, ge=0)
    """seed of the generator (not of the model)"""
    cache: str = Field("data_cache", min_length=1)
    """folder where generated data is kept"""


class DataConfig(Config):
    path: str | None = Field(None, min_length=1)
    """a folder that prepare_ctr wrote; null = the embedded data"""
    embedded: EmbeddedDataConfig = EmbeddedDataConfig()


class ExpertsConfig(Config):
    count: Positive = 4
    """number of experts (always 1 for shared_bottom)"""
    hidden: tuple[Positive, ...] = Field((128,), min_length=1)
    """widths of an expert's layers"""
    dropout: Probability = 0.0
    """dropout after each of an expert's layers"""


class GateConfig(Config):
    temperature: float = Field(1.0, gt=0)
    """divides the gate's logits before the softmax"""
    noise: float = Field(0.0, ge=0)
    """standard deviation of normal noise on the gate's logits while training"""
    entropy_weight: float = Field(0.0, ge=0)
    """weight of the regulariser log E - H(gate), which keeps gates from collapsing onto one expert"""
    balance_weight: float = Field(0.0, ge=0)
    """weight of the regulariser on unequal shares of the experts over a batch"""


class TowersConfig(Config):
    hidden: tuple[Positive, ...] = (64,)
    """widths of a task tower's layers"""
    dropout: Probability = 0.0
    """dropout after each of a tower's layers"""


class HeadConfig(Config):
    wide: bool = False
    """add a linear term: one weight per id (Cheng et al. 2016)"""
    fm: bool = False
    """add pairwise products of the embeddings (factorisation machine, Rendle 2010; DeepFM, Guo et al. 2017)"""
    deep: bool = True
    """add the expert mixture and the tower"""

    @model_validator(mode="after")
    def _some_part(self) -> "HeadConfig":
        if not (self.wide or self.fm or self.deep):
            raise ValueError("wide, fm and deep are all off, allowed: at least one on")
        return self


class HeadsConfig(Config):
    ctr: HeadConfig = HeadConfig()
    cvr: HeadConfig = HeadConfig()


class ModelConfig(Config):
    kind: Literal["mmoe", "shared_bottom"] = "mmoe"
    """mmoe: experts mixed by one gate per task (Ma et al. 2018); shared_bottom: one expert, no gates"""
    embedding_dim: Positive = 8
    """width of a feature's embedding"""
    embedding_dropout: Probability = 0.0
    """dropout on the embeddings"""
    experts: ExpertsConfig = ExpertsConfig()
    gate: GateConfig = GateConfig()
    towers: TowersConfig = TowersConfig()
    heads: HeadsConfig = HeadsConfig()
    calibrate: bool = True
    """fit a scale and a shift of each logit on the validation split, for the logged model; does not affect training"""


class AuxFocalConfig(FocalConfig):
    enabled: bool = False
    """add the auxiliary focal loss on CTCVR"""
    target_head: Literal["ctcvr"] = "ctcvr"
    """head of the focal term"""


class PosWeightConfig(Config):
    ctr: float = Field(1.0, gt=0)
    """weight of clicks in loss_ctr"""
    ctcvr: float = Field(1.0, gt=0)
    """weight of conversions in loss_ctcvr_bce"""


class PosWeightClipConfig(Config):
    ctr: float | None = Field(None, gt=0)
    """upper bound of the click weight"""
    ctcvr: float | None = Field(None, gt=0)
    """upper bound of the conversion weight"""


class LatePosWeightConfig(Config):
    """Control for a focal arm: a higher weight of conversions from the same step on, without focusing."""

    warmup_steps: int = Field(2000, ge=0)
    """first optimizer step with the added weight"""
    ctcvr: float = Field(0.0, ge=0)
    """added to the effective weight of conversions in loss_ctcvr_bce, after the clip; 0 = nothing"""


class LossConfig(Config):
    aux_focal: AuxFocalConfig = AuxFocalConfig()
    static_pos_weight: PosWeightConfig = PosWeightConfig()
    pos_weight_clip: PosWeightClipConfig = PosWeightClipConfig()
    late_pos_weight: LatePosWeightConfig = LatePosWeightConfig()

    def pos_weight(self, task: Literal["ctr", "ctcvr"]) -> float:
        """The effective static weight: min(raw, clip)."""
        return clipped_pos_weight(getattr(self.static_pos_weight, task), getattr(self.pos_weight_clip, task))

    def ctcvr_pos_weight(self, step: int) -> float:
        """The effective weight of conversions at an optimizer step: the static weight, plus the late one if active."""
        late = self.late_pos_weight
        return self.pos_weight("ctcvr") + (late.ctcvr if gate_is_open(step, late.warmup_steps) else 0.0)


class EsmmConfig(Config):
    """Weights of the losses in the total (ESMM, Ma et al. 2018)."""

    lambda_ctr: float = Field(1.0, ge=0)
    """weight of loss_ctr"""
    lambda_ctcvr: float = Field(1.0, ge=0)
    """weight of loss_ctcvr"""
    lambda_cvr_aux: float = Field(0.1, ge=0)
    """weight of loss_cvr_aux, the conversion loss on clicked rows"""

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not (self.lambda_ctr or self.lambda_ctcvr or self.lambda_cvr_aux):
            raise ValueError("lambda_ctr, lambda_ctcvr and lambda_cvr_aux are all 0, allowed: at least one above 0")
        return self


class EmbeddingOptimizerConfig(AdamConfig):
    name: Literal["sparse_adam", "row_adagrad", "adam"] = "sparse_adam"
    """sparse_adam, row_adagrad: update only the rows of the batch; adam: updates every row"""

    def warnings(self, given: frozenset[str]) -> list[str]:
        warnings = []
        if self.name == "row_adagrad" and self.lr < 0.01:
            warnings.append(f"optim.embedding.lr is {self.lr:g} with row_adagrad; usual: 0.01-0.2")
        if self.name == "row_adagrad" and "optim.embedding.betas" in given:
            warnings.append("optim.embedding.betas has no effect with optim.embedding.name row_adagrad")
        return warnings


class OptimConfig(Config):
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    embedding: EmbeddingOptimizerConfig = EmbeddingOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()


class MmoeEvaluationConfig(EvaluationConfig):
    metric: str = Field("valid/auc_ctcvr", pattern=r"^valid/.+")
    """validation metric that selects the best weights"""


class MmoeConfig(RunConfig):
    task: ClassVar[str] = "mmoe"
    gates: ClassVar[tuple[str, ...]] = ("aux_focal_on",)
    events: ClassVar[dict[str, str]] = {"ctr": "clicks", "ctcvr": "conversions"}
    charts: ClassVar[tuple[str, ...]] = ("loss_ctcvr_bce", "loss_ctcvr_focal")
    short: ClassVar[dict[str, str]] = RunConfig.short | {
        "lambda": "loss.aux_focal.lambda",
        "gamma": "loss.aux_focal.gamma",
        "warmup_steps": "loss.aux_focal.warmup_steps",
        "aux_focal": "loss.aux_focal.enabled",
        "alpha": "loss.aux_focal.alpha",
        "data": "data.path",
    }

    evaluation: MmoeEvaluationConfig = MmoeEvaluationConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    esmm: EsmmConfig = EsmmConfig()
    optim: OptimConfig = OptimConfig()

    def name(self) -> str:
        kind = "mmoe" if self.model.kind == "mmoe" else "bottom"
        return self.run_name or f"{kind} {self.arm_name()} s{self.seed}"

    def embedded(self) -> str | None:
        return None if self.data.path else embedded_line(self.data.embedded.rows, "impressions", "data.path")

    def shared_prefix(self) -> tuple[Self, int | None]:
        focal, late = self.loss.aux_focal, self.loss.late_pos_weight
        steps = [focal.warmup_steps] * focal.enabled + [late.warmup_steps] * (late.ctcvr > 0)
        return self._without_focal({}), min(steps, default=None)

    def control(self) -> Self | None:
        """Config of the control; None if this config has no focal loss.

        The control has no focal loss; instead, lambda is added to the weight of conversions from `warmup_steps` on. For
        a rare event, (1 - p_t)^gamma is near 1 for positives and near 0 for easy negatives, so the focal term is nearly
        lambda times the positives' cross-entropy.
        """
        focal = self.loss.aux_focal
        if not focal.enabled or not focal.lambda_:
            return None
        late = {"warmup_steps": focal.warmup_steps, "ctcvr": focal.lambda_ + self.loss.late_pos_weight.ctcvr}
        return self._without_focal(late)

    def _without_focal(self, late_pos_weight: Mapping[str, float]) -> Self:
        """The config without a focal loss, and with these late positive weights."""
        focal = {"log_components": self.loss.aux_focal.log_components}
        parts = {"aux_focal": focal, "late_pos_weight": late_pos_weight}
        return self.with_values(loss=self.loss.model_dump(by_alias=True) | parts)

    def for_clicks(self, data: str) -> Self:
        """Config of a run on data without conversion labels; the default evaluation metric becomes `valid/auc_ctr`.

        Raises:
            UserError: a loss on conversions is switched on, or that on clicks is switched off.
        """
        why, late = f"{data} has no conversion labels", self.loss.late_pos_weight.ctcvr
        if self.loss.aux_focal.enabled:
            raise UserError(f"loss.aux_focal.enabled: found true, but {why}; allowed: false")
        if late:
            raise UserError(f"loss.late_pos_weight.ctcvr: found {late:g}, but {why}; allowed: 0")
        if not self.esmm.lambda_ctr:
            raise UserError(f"esmm.lambda_ctr: found 0, but {why}; allowed: above 0")
        if self.evaluation.metric != self.default_metric():
            return self
        return self.with_values(evaluation=self.evaluation.model_dump() | {"metric": CLICK_METRIC})

    def arm_name(self) -> str:
        focal, late = self.loss.aux_focal, self.loss.late_pos_weight
        parts = [f"l{_short(focal.lambda_)} g{focal.gamma:g} w{focal.warmup_steps}"] if focal.enabled else []
        parts += [f"w+{_short(late.ctcvr)} w{late.warmup_steps}"] if late.ctcvr else []
        return " ".join(parts) or "baseline"

    def warnings(self, given: frozenset[str] = frozenset()) -> list[str]:
        warnings = self.loss.aux_focal.warnings("loss.aux_focal", given)
        for task in ("ctr", "ctcvr"):
            raw, effective = getattr(self.loss.static_pos_weight, task), self.loss.pos_weight(task)
            if effective < raw:
                warnings.append(f"pos_weight of {task} is clipped: {raw:g} -> {effective:g}")
        if "loss.late_pos_weight.warmup_steps" in given and not self.loss.late_pos_weight.ctcvr:
            warnings.append("loss.late_pos_weight.warmup_steps has no effect while loss.late_pos_weight.ctcvr is 0")
        warnings += self.optim.embedding.warnings(given)
        if self.model.kind == "shared_bottom":
            idle = sorted(key for key in given if key.startswith(("model.gate.", "model.experts.count")))
            warnings += [f"{key} has no effect with model.kind shared_bottom" for key in idle]
        if self.data.path:
            idle = sorted(key for key in given if key.startswith("data.embedded."))
            warnings += [f"{key} has no effect while data.path is given" for key in idle]
        return warnings


def _short(value: float) -> str:
    """Shorten 0.1 to `.1`, because legends truncate long names."""
    text = f"{value:g}"
    return text[1:] if text.startswith("0.") else text


class RawDataConfig(Config):
    train: str = Field(min_length=1)
    """a .csv, .jsonl (or with .gz) or .parquet file, a folder of such files, or that of the original Ali-CCP files"""
    validation: str | None = Field(None, min_length=1)
    """file or folder that is the validation split; null = rows of data.train"""
    test: str | None = Field(None, min_length=1)
    """file or folder that is the test split; null = rows of data.train"""


class PrepareCtrConfig(Config):
    """Config of `prepare_ctr`, which converts raw impressions to a folder that train_mmoe reads."""

    short: ClassVar[dict[str, str]] = {"data": "data.train"}

    data: RawDataConfig
    schema_: str = Field(alias="schema", min_length=1)
    """YAML that declares the columns (see configs/data/census.yaml; configs/data/aliccp.yaml for Ali-CCP)"""
    output_dir: str = Field(min_length=1)
    """folder for the Parquet splits and schema.json"""
    experiment: str | None = Field(None, min_length=1, coerce_numbers_to_str=True)
    """MLflow experiment, by name or id, created if absent; null = that of `mlflow run`, or MLflow's default"""
    runs_dir: str = Field("outputs", min_length=1)
    """folder of the runs' own files, one folder per run"""
    tracking: TrackingSwitch = TrackingSwitch()
