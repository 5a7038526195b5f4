"""Config classes of `train_visobert` (configs/config_multi.yaml) and `data_prep` (configs/data_prep.yaml)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.run_config import (
    AdamConfig,
    EvaluationConfig,
    RunConfig,
    ScheduleConfig,
    TrackingSwitch,
    TrainingConfig,
    embedded_line,
)
from pipeline.config.strict_config import Config, Positive, Probability, with_default
from pipeline.tasks.visobert.reviews.dialects import DialectName, Meaning, repeated_spelling

METRIC_WITHOUT_DETECTION = "valid/sentiment_f1_macro"
EMBEDDED = "embedded"  # value of model.name and tokenizer that selects the small ones, which are trained from scratch


class EmbeddedReviewsConfig(Config):
    rows: int = Field(3200, ge=100)
    """reviews to generate; 80% train, 10% validation, 10% test"""
    seed: int = Field(0, ge=0)
    """seed of the generator (not of the model)"""


class ReviewFormatConfig(Config):
    """Format of review files: tables with one label column per aspect or one for all aspects, or published layouts."""

    text_column: str | None = Field(None, min_length=1)
    """column of the text; null = data, text, comment, review, content or sentence"""
    label_column: str | None = Field(None, min_length=1)
    """column of all labels, {ASPECT#Polarity};{ASPECT} or JSON; null = label or labels, else one column per aspect"""
    aspects: tuple[str, ...] | None = Field(None, min_length=1)
    """the aspects; null = every other column, or every aspect that the label column names"""
    detection_only: tuple[str, ...] = ()
    """aspects that are only detected, in addition to those whose labels have no polarity"""
    labels: DialectName | dict[Meaning, tuple[str, ...]] | None = None
    """what labels mean, a name or {positive: [1, POS], not_mentioned: [None]}; null = English or Vietnamese words"""
    on_bad_label: Literal["error", "drop"] = "error"
    """a label that data.labels does not know: error = stop, drop = ignore that cell with a warning"""
    delimiter: str | None = None
    """what separates the columns of a text file, one character or `tab`; null = a comma, in .tsv a tab"""
    embedded: EmbeddedReviewsConfig = EmbeddedReviewsConfig()
    cache: str = Field("data_cache", min_length=1)
    """folder for generated reviews and tokenised texts"""

    @field_validator("labels", mode="before")
    @classmethod
    def _check_labels(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if unknown := sorted(set(value) - set(get_args(Meaning))):
            raise ValueError(f"no meaning {unknown[0]}; there are: {', '.join(get_args(Meaning))}")
        if not all(isinstance(texts, list | tuple) and texts for texts in value.values()) or not value:
            raise ValueError("a list of labels for each meaning")
        if any(isinstance(text, bool) for texts in value.values() for text in texts):
            raise ValueError("write true, false, yes and no in quotes")
        labels = {meaning: ["" if text is None else str(text) for text in texts] for meaning, texts in value.items()}
        if repeated := repeated_spelling(labels):
            raise ValueError(repeated)
        return labels

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: Any) -> Any:
        value = "\t" if value in ("tab", "\\t") else value
        if value is not None and (len(value) != 1 or value in '"\r\n\0'):
            raise ValueError("one character other than a quote or a line break, or tab")
        return value


class PrepDataConfig(ReviewFormatConfig):
    path: str | None = Field(None, min_length=1)
    """the training file (docs/data.md lists the formats); null = the embedded reviews"""
    validation: str | None = Field(None, min_length=1)
    """the validation file, to find duplicates across splits; null = none"""
    test: str | None = Field(None, min_length=1)
    """the test file, to find duplicates across splits; null = none"""


class DataPrepConfig(Config):
    """Config of `data_prep`: reviews to analyse, and where to write the results."""

    short: ClassVar[dict[str, str]] = {"data": "data.path"}

    data: PrepDataConfig = PrepDataConfig()
    tokenizer: str = Field(EMBEDDED, min_length=1)
    """tokenizer for token lengths: embedded = one trained on the training file; else a hub id or a local folder"""
    output_dir: str = Field("outputs/data_prep", min_length=1)
    """folder for the figures, tables and alpha.json"""
    experiment: str | None = Field(None, min_length=1, coerce_numbers_to_str=True)
    """MLflow experiment, by name or id, created if missing; null = that of `mlflow run`, or MLflow's default"""
    runs_dir: str = Field("outputs", min_length=1)
    """folder of the runs' own files, one folder per run"""
    tracking: TrackingSwitch = TrackingSwitch()

    def embedded(self) -> str | None:
        """Return the message that the reviews are generated; None if the user supplied data."""
        return None if self.data.path else embedded_line(self.data.embedded.rows, "reviews", "data.path")


class TrainDataConfig(ReviewFormatConfig):
    train: str | None = Field(None, min_length=1)
    """the training file (docs/data.md lists the formats); null = the embedded reviews"""
    validation: str | None = Field(None, min_length=1)
    """the validation file; null = data.validation_share of the training file"""
    test: str | None = Field(None, min_length=1)
    """the test file; null = no test"""
    validation_share: float = Field(0.1, gt=0, lt=1)
    """share of the training file held out for validation if data.validation is null, chosen by a hash of the text"""
    oversampling: Literal["none", "capped"] = "none"
    """capped: an epoch repeats training reviews of rare sentiments, each at most data.oversampling_ratio times"""
    oversampling_ratio: float = Field(3.0, ge=1)
    """with data.oversampling: a review is drawn at most this often per epoch"""

    @model_validator(mode="after")
    def _check_files(self) -> "TrainDataConfig":
        if self.train is None and (self.validation or self.test):
            raise ValueError("validation or test is given without train; allowed: all of them embedded, or train too")
        return self


class EmbeddedModelConfig(Config):
    """Config of the small encoder, which is trained from scratch."""

    vocabulary: int = Field(8000, ge=300)
    """entries of its tokenizer, which is trained on the training split"""
    width: int = Field(192, ge=2, multiple_of=2)
    """width of the token embeddings and of every layer"""
    layers: Positive = 2
    """residual blocks, each a convolution and a gated recurrence in both directions"""
    dropout: Probability = 0.2
    """dropout of channels of embeddings and layers"""
    token_dropout: Probability = 0.15
    """share of the tokens that are replaced with the mask token in training"""


class ModelConfig(Config):
    name: str = Field("5CD-AI/visobert-14gb-corpus", min_length=1)
    """a hub id, a local folder, or `embedded`: a small encoder and tokenizer, trained from scratch"""
    revision: str | None = Field(None, min_length=1)
    """hub: branch, tag or commit; null = main"""
    init: Literal["pretrained", "random"] = "pretrained"
    """if model.name is a hub id or folder: pretrained = its weights, random = its architecture with new weights"""
    pooling: Literal["pooler", "cls", "aspect_attention"] = "aspect_attention"
    """features of the heads: the model's own pooler, the first token, or one attention per aspect over the text"""
    hidden: Positive | None = 512
    """width of the dense layer before the classifier; null = no such layer. Default for the embedded model: null"""
    dropout: Probability = 0.1
    """dropout on the pooled features and after the dense layer. Default for the embedded model: 0.3"""
    aspect_detection: bool = True
    """add a head that detects whether an aspect is mentioned; false: sentiments only"""
    max_tokens: int = Field(256, ge=8)
    """longer texts are truncated to this many tokens"""
    segmenter: Literal["pyvi"] | None = None
    """join the syllables of each word by _ before tokenising, which PhoBERT needs; pyvi is an extra. null = no"""
    embedded: EmbeddedModelConfig = EmbeddedModelConfig()
    calibrate: bool = True
    """fit a temperature for each head on the validation split, for the logged model; does not affect training"""


def _refuse_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


Weight = Annotated[float, BeforeValidator(_refuse_flag), Field(ge=0)]


class AspectLossConfig(Config):
    loss: Literal["bce", "focal"] = "bce"
    """loss of the aspect detection head"""
    gamma: float = Field(2.0, ge=0, le=100)
    """focal: focusing exponent"""
    alpha: float | None = Field(None, ge=0, le=1)
    """focal: weight of mentioned aspects (the others have 1 - alpha); null = no weights"""


class MultiLabelConfig(Config):
    use_focal_loss: bool = True
    """false: plain cross-entropy on the labelled cells"""
    focal_gamma: float = Field(2.0, ge=0, le=100)
    """focusing exponent; 0 = no focusing"""
    focal_alpha: Literal["auto"] | tuple[Weight, Weight, Weight] | None = "auto"
    """weights of positive, negative, neutral; auto = total / (3 * count) of the training split; null = ones"""
    alpha_from: Literal["original", "oversampled"] = "original"
    """auto alpha counts the training split before (original) or after (oversampled) data.oversampling"""
    lambda_sentiment: float = Field(1.0, ge=0)
    """weight of loss_sentiment in the total"""
    lambda_aspect: float = Field(2.0, ge=0)
    """weight of loss_aspect in the total"""
    aspect: AspectLossConfig = AspectLossConfig()

    @field_validator("focal_alpha")
    @classmethod
    def _check_weights(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not any(value):
            raise ValueError("at least one above 0")
        return value


class VisobertTrainingConfig(TrainingConfig):
    num_train_epochs: Positive = 15
    """passes over the training split"""
    batch_size: Positive = 64
    """maximum number of reviews in a micro-batch"""
    batch_tokens: Positive = 4096
    """maximum number of tokens in a micro-batch, padding included (a single review may exceed it)"""
    clip_norm: float | None = Field(1.0, gt=0)
    """clip the gradient norms of encoder and head, each separately, to this"""
    amp: Literal["no", "bf16", "fp16"] = "bf16"
    """automatic mixed precision; losses stay fp32. Default for the embedded model: no"""


class EncoderOptimizerConfig(AdamConfig):
    lr: float = Field(3e-5, gt=0)
    """peak learning rate of the encoder's last layer. Default for the embedded model: 0.003"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled weight decay (AdamW, Loshchilov & Hutter 2019); none on biases and normalisation"""
    layer_decay: float = Field(0.9, gt=0, le=1)
    """ratio of a layer's learning rate to that of the layer above it. Default for the embedded model: 1"""


class HeadOptimizerConfig(AdamConfig):
    lr: float = Field(3e-4, gt=0)
    """peak learning rate of pooling and heads. Default for the embedded model: 0.003"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled weight decay (AdamW, Loshchilov & Hutter 2019); none on biases and normalisation"""


class VisobertScheduleConfig(ScheduleConfig):
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """the learning rate rises linearly over this share of all steps, or over warmup_steps if that is longer"""


class VisobertOptimConfig(Config):
    encoder: EncoderOptimizerConfig = EncoderOptimizerConfig()
    head: HeadOptimizerConfig = HeadOptimizerConfig()
    schedule: VisobertScheduleConfig = VisobertScheduleConfig()


class VisobertEvaluationConfig(EvaluationConfig):
    metric: str = Field("valid/pair_f1_micro", pattern=r"^valid/.+")
    """the validation metric that selects the best weights. Without aspect detection: valid/sentiment_f1_macro"""
    batch_size: Positive = 256
    """maximum number of reviews in an evaluation batch"""


# Defaults if model.name is embedded: the small model is trained from scratch.
EMBEDDED_DEFAULTS: Mapping[str, Any] = {
    "model.hidden": None,
    "model.dropout": 0.3,
    "training.amp": "no",
    "optim.encoder.lr": 3e-3,
    "optim.encoder.layer_decay": 1.0,
    "optim.encoder.betas": (0.9, 0.99),
    "optim.head.lr": 3e-3,
    "optim.head.betas": (0.9, 0.99),
}


class VisobertConfig(RunConfig):
    task: ClassVar[str] = "visobert"
    added_keys: ClassVar[frozenset[str]] = RunConfig.added_keys | {"data.labels", "data.delimiter", "model.segmenter"}
    charts: ClassVar[tuple[str, ...]] = ("loss_sentiment",)
    short: ClassVar[dict[str, str]] = RunConfig.short | {
        "alpha": "multi_label.focal_alpha",
        "gamma": "multi_label.focal_gamma",
        "data": "data.train",
    }

    data: TrainDataConfig = TrainDataConfig()
    data_prep_run: str | None = Field(None, min_length=1)
    """id of a data_prep run of the same training file, to use its alpha; null = compute alpha here"""
    model: ModelConfig = ModelConfig()
    multi_label: MultiLabelConfig = MultiLabelConfig()
    training: VisobertTrainingConfig = VisobertTrainingConfig()
    optim: VisobertOptimConfig = VisobertOptimConfig()
    evaluation: VisobertEvaluationConfig = VisobertEvaluationConfig()
    baselines: bool = True
    """also score two baselines on the same splits: majority, and TF-IDF with logistic regression"""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, tree: Any) -> Any:
        """Set the missing keys whose defaults differ for the embedded model or without aspect detection."""
        block = tree.get("model")
        model: Mapping[str, Any] = block if isinstance(block, Mapping) else {}
        defaults = dict(EMBEDDED_DEFAULTS) if model.get("name") == EMBEDDED else {}
        if str(model.get("aspect_detection", True)).lower() in ("false", "f", "no", "n", "off", "0"):
            defaults["evaluation.metric"] = METRIC_WITHOUT_DETECTION
        for path, value in defaults.items():
            tree = with_default(tree, path, value)
        return tree

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        if not (self.multi_label.lambda_sentiment or (self.multi_label.lambda_aspect and self.model.aspect_detection)):
            both = "and multi_label.lambda_aspect are" if self.model.aspect_detection else "is"
            raise ValueError(f"multi_label.lambda_sentiment {both} 0, allowed: a loss with a weight above 0")
        return self

    def name(self) -> str:
        kind = "small" if self.model.name == EMBEDDED else "bert"
        return self.run_name or f"{kind} {self.arm_name()} s{self.seed}"

    def default_metric(self) -> str:
        return super().default_metric() if self.model.aspect_detection else METRIC_WITHOUT_DETECTION

    def embedded(self) -> str | None:
        return None if self.data.train else embedded_line(self.data.embedded.rows, "reviews", "data.train")

    def arm_name(self) -> str:
        loss = self.multi_label
        alpha: str = "ones" if loss.focal_alpha is None else "auto"
        if isinstance(loss.focal_alpha, tuple):
            alpha = " ".join(f"{weight:g}" for weight in loss.focal_alpha)
        return f"{alpha} g{loss.focal_gamma:g}" if loss.use_focal_loss else "ce"

    def warnings(self, given: frozenset[str] = frozenset()) -> list[str]:
        loss, embedded = self.multi_label, self.model.name == EMBEDDED
        without_effect: list[tuple[bool, str, Sequence[str]]] = [  # (condition, reason, prefixes of keys)
            (not loss.use_focal_loss, "multi_label.use_focal_loss is false",
             ["multi_label.focal_gamma", "multi_label.focal_alpha", "multi_label.alpha_from", "data_prep_run"]),
            (loss.focal_alpha != "auto", "multi_label.focal_alpha is not auto",
             ["multi_label.alpha_from", "data_prep_run"]),
            (self.data.oversampling == "none", "data.oversampling is none",
             ["data.oversampling_ratio", "multi_label.alpha_from"]),
            (self.data_prep_run is not None, "alpha comes from data_prep_run", ["multi_label.alpha_from"]),
            (loss.aspect.loss == "bce", "multi_label.aspect.loss is bce",
             ["multi_label.aspect.gamma", "multi_label.aspect.alpha"]),
            (not self.model.aspect_detection, "model.aspect_detection is false",
             ["multi_label.aspect.", "multi_label.lambda_aspect"]),
            (embedded, "model.name is embedded", ["model.revision", "model.init"]),
            (not embedded, "model.name is not embedded", ["model.embedded."]),
            (self.data.train is not None, "data.train is given", ["data.embedded."]),
            (self.data.train is None, "the data are the embedded reviews",
             ["data.validation_share", "data.labels", "data.delimiter"]),
            (self.data.validation is not None, "data.validation is given", ["data.validation_share"]),
        ]  # fmt: skip
        warnings = [f"{key} has no effect while {reason}" for holds, reason, prefixes in without_effect if holds
                    for key in sorted(given) if key.startswith(tuple(prefixes))]  # fmt: skip
        if loss.use_focal_loss and not 0.5 <= loss.focal_gamma <= 5:
            warnings.append(f"multi_label.focal_gamma is {loss.focal_gamma:g}; usual: 0.5-5")
        if "phobert" in self.model.name.lower() and self.model.segmenter is None:
            warnings.append("model.segmenter is null, but PhoBERT was pretrained on segmented words; usual: pyvi")
        return warnings
