"""The keys of `train_mmoe` (configs/mtl_mmoe.yaml) and of `prepare_ctr`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.blocks import (
    AdamConfig,
    DenseOptimizerConfig,
    EvaluationConfig,
    RunConfig,
    ScheduleConfig,
    TrackingSwitch,
)
from pipeline.config import Config, Positive, Probability
from pipeline.schedules import clipped_pos_weight

TASKS = ("ctr", "cvr")


class EmbeddedDataConfig(Config):
    rows: int = Field(4_000_000, ge=1000)
    """impressions to generate; 80% train, 10% validation, 10% test"""
    seed: int = Field(0, ge=0)
    """of the generator (not of the model)"""
    cache: str = Field("data_cache", min_length=1)
    """folder where generated data is kept"""


class DataConfig(Config):
    path: str | None = Field(None, min_length=1)
    """a folder that prepare_ctr wrote; null = the embedded data"""
    embedded: EmbeddedDataConfig = EmbeddedDataConfig()


class ExpertsConfig(Config):
    count: Positive = 4
    """number of experts (shared_bottom has one)"""
    hidden: tuple[Positive, ...] = Field((128,), min_length=1)
    """widths of an expert's layers"""
    dropout: Probability = 0.0
    """dropout after each of an expert's layers"""


class GateConfig(Config):
    temperature: float = Field(1.0, gt=0)
    """the gate's logits are divided by this before the softmax"""
    noise: float = Field(0.0, ge=0)
    """standard deviation of normal noise on the gate's logits while training"""
    entropy_weight: float = Field(0.0, ge=0)
    """weight of the regulariser log E - H(gate): keeps gates from settling on one expert"""
    balance_weight: float = Field(0.0, ge=0)
    """weight of the regulariser on unequal shares of the experts over a batch"""


class TowersConfig(Config):
    hidden: tuple[Positive, ...] = (64,)
    """widths of a task tower's layers"""
    dropout: Probability = 0.0
    """dropout after each of a tower's layers"""


class HeadConfig(Config):
    wide: bool = False
    """add a linear term: one weight an id (Cheng et al. 2016)"""
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
    """mmoe: experts mixed by one gate a task (Ma et al. 2018); shared_bottom: one expert, no gates"""
    embedding_dim: Positive = 8
    """width of a feature's embedding"""
    embedding_dropout: Probability = 0.0
    """dropout on the embeddings"""
    experts: ExpertsConfig = ExpertsConfig()
    gate: GateConfig = GateConfig()
    towers: TowersConfig = TowersConfig()
    heads: HeadsConfig = HeadsConfig()


class AuxFocalConfig(Config):
    enabled: bool = False
    """add the auxiliary focal loss on CTCVR"""
    warmup_steps: int = Field(2000, ge=0)
    """the focal term acts from this optimizer step on"""
    target_head: Literal["ctcvr"] = "ctcvr"
    """the head that gets the focal term"""
    lambda_: float = Field(0.1, alias="lambda", ge=0)
    """weight of the focal term; usual: 0.05-0.2"""
    gamma: float = Field(1.0, ge=0, le=100)
    """focusing exponent; usual: 1-2"""
    use_alpha: bool = False
    """weigh positives by alpha and negatives by 1 - alpha in the focal term"""
    alpha: float = Field(0.25, ge=0, le=1)
    """weight of positives, with use_alpha"""
    detach_p_for_weight: bool = True
    """no gradient through the factor (1 - p_t)^gamma"""
    compute_fp32: bool = True
    """compute the focal term in fp32 under mixed precision too"""
    log_components: bool = True
    """log every part of the loss; false: the total alone"""


class PosWeightConfig(Config):
    ctr: float = Field(1.0, gt=0)
    """weight of clicks in loss_ctr"""
    ctcvr: float = Field(1.0, gt=0)
    """weight of conversions in loss_ctcvr_bce"""


class PosWeightClipConfig(Config):
    ctr: float | None = Field(None, gt=0)
    """the click weight is at most this"""
    ctcvr: float | None = Field(None, gt=0)
    """the conversion weight is at most this"""


class LossConfig(Config):
    aux_focal: AuxFocalConfig = AuxFocalConfig()
    static_pos_weight: PosWeightConfig = PosWeightConfig()
    pos_weight_clip: PosWeightClipConfig = PosWeightClipConfig()

    def pos_weight(self, task: Literal["ctr", "ctcvr"]) -> float:
        """The effective weight: min(raw, clip)."""
        return clipped_pos_weight(getattr(self.static_pos_weight, task), getattr(self.pos_weight_clip, task))


class EsmmConfig(Config):
    """Weights of the losses in the total (ESMM, Ma et al. 2018)."""

    lambda_ctr: float = Field(1.0, ge=0)
    """weight of loss_ctr"""
    lambda_ctcvr: float = Field(1.0, ge=0)
    """weight of loss_ctcvr"""
    lambda_cvr_aux: float = Field(0.1, ge=0)
    """weight of loss_cvr_aux, the conversion loss on clicked rows alone"""


class EmbeddingOptimizerConfig(AdamConfig):
    name: Literal["adam", "sparse_adam"] = "sparse_adam"
    """sparse_adam updates only the rows of the batch; adam updates every row"""


class OptimConfig(Config):
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    embedding: EmbeddingOptimizerConfig = EmbeddingOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()


class MmoeEvaluationConfig(EvaluationConfig):
    metric: str = Field("valid/auc_ctcvr", pattern=r"^valid/.+")
    """the validation metric that chooses the best weights"""


class MmoeConfig(RunConfig):
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
        if self.run_name:
            return self.run_name
        focal = self.loss.aux_focal
        arm = f"l{focal.lambda_:g} g{focal.gamma:g} w{focal.warmup_steps}" if focal.enabled else "baseline"
        kind = "mmoe" if self.model.kind == "mmoe" else "bottom"
        return f"{kind} {arm.replace('l0.', 'l.')} s{self.seed}"

    def warnings(self, given: frozenset[str] = frozenset()) -> list[str]:
        found, focal, block = [], self.loss.aux_focal, "loss.aux_focal"
        if focal.lambda_ > 0.2:
            found.append(f"{block}.lambda is {focal.lambda_:g}; usual: 0.05-0.2")
        if not 1 <= focal.gamma <= 2:
            found.append(f"{block}.gamma is {focal.gamma:g}; usual: 1-2")
        for task in ("ctr", "ctcvr"):
            raw, effective = getattr(self.loss.static_pos_weight, task), self.loss.pos_weight(task)
            if effective < raw:
                found.append(f"pos_weight of {task} is clipped: {raw:g} -> {effective:g}")
        acting = {f"{block}.{key}" for key in ("enabled", "log_components")}
        idle = {key for key in given if key.startswith(block + ".")} - acting if not focal.enabled else set()
        found += [f"{key} has no effect while {block}.enabled is false" for key in sorted(idle)]
        if f"{block}.alpha" in given and focal.enabled and not focal.use_alpha:
            found.append(f"{block}.alpha has no effect while {block}.use_alpha is false")
        gate_keys = {key for key in given if key.startswith(("model.gate.", "model.experts.count"))}
        if self.model.kind == "shared_bottom":
            found += [f"{key} has no effect with model.kind shared_bottom" for key in sorted(gate_keys)]
        if self.data.path:
            idle = {key for key in given if key.startswith("data.embedded.")}
            found += [f"{key} has no effect while data.path is given" for key in sorted(idle)]
        return found


class PrepareCtrConfig(Config):
    """Raw impressions to a folder that train_mmoe reads."""

    short: ClassVar[dict[str, str]] = {}

    data: str = Field(min_length=1)
    """the raw file (.csv, .csv.gz, .parquet), or a folder of such files"""
    schema_: str = Field(alias="schema", min_length=1)
    """YAML that says what the columns are (see configs/data/census.yaml)"""
    output_dir: str = Field(min_length=1)
    """folder for the Parquet splits and schema.json"""
    experiment: str | None = Field(None, min_length=1)
    """MLflow experiment; null = the one `mlflow run` opened, or MLflow's default"""
    runs_dir: str = Field("outputs", min_length=1)
    """folder of the runs' own files, one folder a run"""
    tracking: TrackingSwitch = TrackingSwitch()
