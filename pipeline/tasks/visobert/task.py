"""The task `train_visobert` as the training loop uses it: aspect sentiment of reviews."""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pipeline.config.run_config import AdamConfig, ScheduleConfig
from pipeline.maths.calibration import Fitted
from pipeline.runtime.console import info, warn
from pipeline.storage.files import write_json
from pipeline.tasks.base import Dataset, ModelExport, Rows, Task, count_parameters, save_model
from pipeline.tasks.visobert.config import EMBEDDED, VisobertConfig
from pipeline.tasks.visobert.encoders.embedded_encoder import Convolution
from pipeline.tasks.visobert.encoders.model_folder import model_folder
from pipeline.tasks.visobert.encoders.pretrained_encoder import PretrainedEncoder
from pipeline.tasks.visobert.evaluation import Evaluation
from pipeline.tasks.visobert.model import (
    AspectSentimentModel,
    NamedParameters,
    Output,
    build_model,
    layers_from_the_top,
)
from pipeline.tasks.visobert.objective import Objective
from pipeline.tasks.visobert.predict import ASPECTS_FILE, ENCODER_FOLDER, TOKENIZER_FOLDER
from pipeline.tasks.visobert.reviews.alpha import ALPHA_FILE, Alpha, check_same_data, compute_alpha
from pipeline.tasks.visobert.reviews.review_data import ReviewData
from pipeline.tasks.visobert.reviews.review_table import ReviewBatch, length_buckets
from pipeline.tasks.visobert.reviews.sentiments import NOT_MENTIONED, SENTIMENTS, UNKNOWN
from pipeline.tasks.visobert.scoring.predictions import column_types
from pipeline.tracking.writer_client import fetch_artifact

EXAMPLE_LETTERS = 200


def make_task(config: VisobertConfig) -> "VisobertTask":
    """Create the task, with the alpha of a data_prep run if the config names one."""
    if config.data_prep_run is None or config.multi_label.focal_alpha != "auto":
        return VisobertTask(config)
    with tempfile.TemporaryDirectory() as folder:
        alpha = Alpha.read(fetch_artifact(config.data_prep_run, ALPHA_FILE, Path(folder)))
    return VisobertTask(config, alpha)


class VisobertTask(Task[VisobertConfig]):
    """Multi-label aspect sentiment with a global-alpha focal loss."""

    data: ReviewData

    def __init__(self, config: VisobertConfig, alpha: Alpha | None = None, like: "VisobertTask | None" = None) -> None:
        """Read the data, or share the data of another task.

        `alpha`: alpha of a `data_prep` run; None = compute it as configured. `like`: a task whose data are shared where
        the configs agree.

        Raises:
            UserError: a file, the tokenizer or the model's folder is missing or damaged, or alpha is of other data.
        """
        self.config, model = config, config.model
        if model.name != EMBEDDED:  # fail on a missing file before anything else
            model_folder(model.name, model.revision, weights=model.init == "pretrained")
        self.data = ReviewData(config, like.data if like else None)
        self.prepared_alpha = alpha
        self.alpha = self._alpha()
        self.objective = Objective(config, self.alpha.vector)
        self.evaluation = Evaluation(config, self.data, self.objective)
        self.parameters = count_parameters(lambda: self._build(weights=False))

    def with_config(self, config: VisobertConfig) -> "VisobertTask | None":
        uses_run = config.data_prep_run is not None and config.multi_label.focal_alpha == "auto"
        if uses_run and (self.prepared_alpha is None or config.data_prep_run != self.config.data_prep_run):
            return None
        return VisobertTask(config, self.prepared_alpha if uses_run else None, like=self)

    def _alpha(self) -> Alpha:
        loss, train, only = self.config.multi_label, self.data.splits.train, self.data.splits.detection_only
        if self.prepared_alpha is None or loss.focal_alpha != "auto":
            repeats = self.data.repeats if loss.alpha_from == "oversampled" else None
            return compute_alpha(train, only, loss.focal_alpha, repeats)
        check_same_data(self.prepared_alpha, train, only, f"data_prep_run {self.config.data_prep_run}")
        return self.prepared_alpha

    # --- data --------------------------------------------------------------------------------------------------------

    @property
    def dataset(self) -> Dataset:
        return self.data.dataset

    @property
    def splits(self) -> Collection[str]:
        return [name for name, reviews in self.data.splits.by_name.items() if len(reviews)]

    @property
    def files(self) -> Sequence[Path]:
        data = self.config.data
        return [Path(file) for file in (data.train, data.validation, data.test) if file]

    def summary(self) -> Mapping[str, str]:
        counts = ", ".join(f"{name} {count}" for name, count in zip(SENTIMENTS, self.alpha.counts, strict=True))
        return {
            "alpha_mode": self.alpha.mode,
            "distribution": counts,
            "alpha_vector": self.alpha.text,
            "gamma": f"{self.config.multi_label.focal_gamma}",
            "aspects": str(len(self.data.splits.train.aspects)),
            "parameters": str(self.parameters),
        } | {f"reviews_{name}": str(len(reviews)) for name, reviews in self.data.splits.by_name.items()}

    def describe(self, folder: Path) -> Mapping[str, float]:
        info(f"Total parameters: {self.parameters:,}")
        self.alpha.write(folder / ALPHA_FILE)
        return self.alpha.metrics()

    def warnings(self, total_steps: int) -> Sequence[str]:  # noqa: ARG002
        return self.data.warnings()

    # --- training ----------------------------------------------------------------------------------------------------

    def model(self) -> AspectSentimentModel:
        model = self._build(weights=True)
        labels = self.data.splits.train.labels
        known, mentioned = (labels != UNKNOWN).sum(0), (labels > NOT_MENTIONED).sum(0)
        model.start_from(torch.from_numpy((mentioned + 1) / (known + 2)))  # smoothed, so that no rate is 0 or 1
        return model

    def _build(self, *, weights: bool) -> AspectSentimentModel:
        aspects = len(self.data.splits.train.aspects)
        return build_model(self.config.model, aspects, self.data.tokenizer, weights=weights, warn=warn)

    def dense_methods(self, model: Any) -> Sequence[tuple[nn.Module, str]]:
        if isinstance(model.encoder, PretrainedEncoder):
            return [(model, "forward")]
        layers = model.encoder.layers  # the other layers loop over the tokens
        return [(layer, "forward") for layer in layers if isinstance(layer, Convolution)]

    @property
    def schedule(self) -> ScheduleConfig:
        return self.config.optim.schedule

    def optimizers(self, model: Any) -> Mapping[str, Optimizer]:
        encoder, head = self.config.optim.encoder, self.config.optim.head
        layers = [
            (encoder.layer_decay**steps, parameters) for steps, parameters in layers_from_the_top(model.encoder).items()
        ]
        heads = [(name, weight) for name, weight in model.named_parameters() if not name.startswith("encoder.")]
        return {
            "encoder": _adamw(layers, encoder, encoder.weight_decay),
            "head": _adamw([(1.0, heads)], head, head.weight_decay),
        }

    def plan(self, epoch: int) -> Sequence[Rows]:
        training = self.config.training
        generator = np.random.Generator(np.random.PCG64([self.config.seed, epoch]))
        lengths = self.data.table("train").lengths.numpy()
        return length_buckets(lengths, training.batch_size, training.batch_tokens, generator, self.data.repeats)

    def batch(self, rows: Rows) -> ReviewBatch:
        return self.data.table("train").batch(rows)

    def counts(self, batch: ReviewBatch) -> Mapping[str, Tensor]:
        return self.objective.counts(batch.labels)

    def forward(self, model: nn.Module, batch: ReviewBatch) -> Output:
        return cast(Output, model(batch.ids, batch.mask))

    def losses(
        self, output: Output, batch: ReviewBatch, counts: Mapping[str, Tensor], step: int
    ) -> Mapping[str, Tensor]:
        return self.objective.losses(output, batch.labels, counts, step)

    def probe(self, model: Any, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.objective.probe(model, losses)

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.objective.influence(probed, losses)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, model: Any, split: str, device: str) -> Mapping[str, float]:
        return self.evaluation.evaluate(model, split, device)

    def known_metrics(self, split: str) -> Mapping[str, str]:
        return self.evaluation.known_metrics(split)

    def calibrate(self, model: Any, device: str) -> Fitted:
        return self.evaluation.calibrate(model, device)

    def report(self, model: Any, folder: Path, device: str) -> None:
        self.evaluation.report(model, folder, device)

    def export(self, model: Any, folder: Path) -> ModelExport:
        reviews = self.data.splits
        save_model(folder, model, self.config, self.evaluation.calibration)
        self.data.tokenizer.save(folder / TOKENIZER_FOLDER)
        if isinstance(model.encoder, PretrainedEncoder):
            model.encoder.config.save_pretrained(str(folder / ENCODER_FOLDER))
        aspects = {"aspects": reviews.train.aspects, "detection_only": reviews.detection_only,
                   "text_column": reviews.train.text_column}  # fmt: skip
        write_json(folder / ASPECTS_FILE, aspects, indent=None)
        return ModelExport(
            folder=folder,
            inputs=None,
            outputs=column_types(reviews.train.aspects, reviews.polar, detection=self.config.model.aspect_detection),
            example=[text[:EXAMPLE_LETTERS] for text in reviews.valid.texts[:2]],
        )


def _adamw(layers: Sequence[tuple[float, NamedParameters]], config: AdamConfig, weight_decay: float) -> AdamW:
    """AdamW without weight decay on biases and normalisation. layers: (share of the learning rate, parameters)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for share, parameters in layers:
        for name, weight in parameters:
            decays = weight.ndim > 1 and not name.endswith("bias")
            groups.setdefault((share, weight_decay if decays else 0.0), []).append(weight)
    return AdamW(
        [{"params": weights, "lr": share * config.lr, "weight_decay": decay}
         for (share, decay), weights in groups.items()],
        betas=config.betas, eps=config.eps, fused=True,
    )  # fmt: skip
