"""The aspect sentiment task: its data, model, named losses and evaluation, for the loop in `pipeline.training.loop`."""

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from pipeline.compute import distributed as ranks
from pipeline.config.run_config import AdamConfig, ScheduleConfig
from pipeline.config.strict_config import to_yaml
from pipeline.errors import UserError
from pipeline.maths.calibration import Fitted, fit_temperature
from pipeline.maths.gradients import PREFIX, cosine, flat, gradients, norm
from pipeline.maths.losses import (
    binary_cross_entropy,
    binary_focal,
    log_probability,
    multi_label_focal,
    multi_label_focal_factor,
)
from pipeline.names import CALIBRATED, metric_names
from pipeline.runtime.console import optional, say, warn
from pipeline.runtime.importing import uncollected
from pipeline.storage.calibration_file import write_calibration
from pipeline.storage.checkpoints import save_weights
from pipeline.tasks.base import TOTAL, Dataset, ModelExport, Rows, Task, autocast
from pipeline.tasks.visobert.config import EMBEDDED, VisobertConfig
from pipeline.tasks.visobert.encoders.model_folder import model_folder
from pipeline.tasks.visobert.encoders.tokenizer import MANY_UNKNOWN, Tokenizer, load_tokenizer, unknown_share
from pipeline.tasks.visobert.model import AspectSentimentModel, Output, PretrainedEncoder, build_model, by_depth
from pipeline.tasks.visobert.predict import predict_logits
from pipeline.tasks.visobert.prepare.duplicates import folded
from pipeline.tasks.visobert.reviews.alpha import ALPHA_FILE, Alpha, compute_alpha
from pipeline.tasks.visobert.reviews.review_table import (
    LengthBuckets,
    ReviewBatch,
    ReviewTable,
    capped_repeats,
    tokenise,
)
from pipeline.tasks.visobert.reviews.sentiments import NOT_MENTIONED, SENTIMENTS, UNKNOWN, labelled
from pipeline.tasks.visobert.reviews.splits import Splits, load_splits
from pipeline.tasks.visobert.scoring.baselines import TfidfBaseline, majority
from pipeline.tasks.visobert.scoring.predictions import (
    ASPECTS_FILE,
    ENCODER_FOLDER,
    TOKENIZER_FOLDER,
    Answers,
    column_types,
)
from pipeline.tasks.visobert.scoring.report import write_pair_rows, write_report
from pipeline.tasks.visobert.scoring.scores import known_scores, score, tuned_thresholds
from pipeline.tracking.mlflow_run import fetch_artifact

COMPARED = ("aspect_f1_macro", "sentiment_f1_macro", "pair_f1_micro", "pair_f1_macro")  # of the baselines
BASELINES = ("majority", "tfidf")
COMPONENTS = ("loss_sentiment", "loss_aspect")
EXAMPLE_LETTERS = 200
MANY_CUT = 0.01

Named = Sequence[tuple[str, nn.Parameter]]


def make_task(config: VisobertConfig) -> "VisobertTask":
    """The task of `train_visobert`, with the alpha of a data_prep run if the config names one."""
    if config.data_prep_run is None or config.multi_label.focal_alpha != "auto":
        return VisobertTask(config)
    with tempfile.TemporaryDirectory() as folder:
        alpha = Alpha.read(fetch_artifact(config.data_prep_run, ALPHA_FILE, Path(folder)))
    return VisobertTask(config, alpha)


class VisobertTask(Task[VisobertConfig]):
    def __init__(self, config: VisobertConfig, alpha: Alpha | None = None, like: "VisobertTask | None" = None) -> None:
        """Reads the data, or shares what another task has of the same. `alpha`: of a `data_prep` run; None = as the
        config says.

        Raises:
            UserError: a file, the tokenizer or the model's folder is missing or damaged, or alpha is of other data.
        """
        self.config = config
        self.calibration: Fitted = {}  # of `calibrate`
        if config.model.name != EMBEDDED:  # a missing file is told before anything is begun
            model_folder(config.model.name, config.model.revision, weights=config.model.init == "pretrained")
        same = like is not None and like.config.data == config.data
        self.reviews: Splits = like.reviews if like and same else load_splits(config.data)
        train = self.reviews.train
        self.aspects = train.aspects
        self.polar = ~np.isin(self.aspects, self.reviews.detection_only)
        names = metric_names(self.aspects)
        self.names = [names[aspect] for aspect in self.aspects]
        self.repeats = self._repeats()
        self.given_alpha, self.alpha = alpha, self._alpha(alpha)
        self.tokenizer: Tokenizer
        self.table: Callable[[str], ReviewTable]
        if like and same and like.config.model == config.model:
            self.tokenizer, self.table = like.tokenizer, like.table
        else:
            self.tokenizer = load_tokenizer(
                config.model.name, config.model.revision, train.texts, config.model.embedded.vocabulary
            )
            self.table = cache(self._table)
        with uncollected(), torch.device("meta"):  # shapes without values; imports torch's compiler, as optimizers do
            model = self._build(weights=False)
        self.parameters = sum(weight.numel() for weight in model.parameters())
        shared = like and same and like.config.baselines == config.baselines
        self.baselines: Callable[[str], dict[str, float]] = (
            like.baselines if like and shared else cache(self._baselines)
        )

    def with_config(self, config: VisobertConfig) -> "VisobertTask | None":
        fetched = config.data_prep_run is not None and config.multi_label.focal_alpha == "auto"
        if fetched and (self.given_alpha is None or config.data_prep_run != self.config.data_prep_run):
            return None
        return VisobertTask(config, self.given_alpha if fetched else None, like=self)

    def _table(self, split: str) -> ReviewTable:
        reviews = self.reviews.by_name[split]
        tokens = tokenise(self.tokenizer, reviews.texts, self.config.model.max_tokens, Path(self.config.data.cache))
        return ReviewTable(tokens, reviews.labels, self.tokenizer.pad_id)

    def _repeats(self) -> npt.NDArray[np.float64] | None:
        """[N], how often an epoch draws each training review, on average; None = once."""
        if self.config.data.oversampling == "none":
            return None
        return capped_repeats(self.reviews.train.labels, self.config.data.oversampling_ratio)

    def _alpha(self, given: Alpha | None) -> Alpha:
        """The alpha that acts, checked against the data."""
        loss, train = self.config.multi_label, self.reviews.train
        if given is None or loss.focal_alpha != "auto":
            repeats = self.repeats if loss.alpha_from == "oversampled" else None
            return compute_alpha(train, self.reviews.detection_only, loss.focal_alpha, repeats)
        run = f"data_prep_run {self.config.data_prep_run}"
        if given.digest != train.digest:
            raise UserError(
                f"{run}: its alpha is of {given.source} (SHA-256 {given.digest[:12]}...), but the training file is "
                f"{train.source} ({train.digest[:12]}...); allowed: a data_prep run of the same file"
            )
        if given.aspects != train.aspects or set(given.detection_only) != set(self.reviews.detection_only):
            raise UserError(
                f"{run}: it counted {', '.join(given.aspects)} with detection-only {list(given.detection_only)}, "
                f"this run {', '.join(train.aspects)} with {list(self.reviews.detection_only)}; allowed: the same"
            )
        return given

    @property
    def dataset(self) -> Dataset:
        train = self.reviews.train
        profile: dict[str, object] = {"train_file_digest": train.digest}
        for name, reviews in self.reviews.by_name.items():
            cells = labelled(reviews.labels)
            profile[name] = {"reviews": len(reviews), "labelled_cells": int(cells.sum()), "file": reviews.source}
        return Dataset(Path(train.source).name, self.reviews.digest, train.source, profile)

    @property
    def splits(self) -> Collection[str]:
        return [name for name, reviews in self.reviews.by_name.items() if len(reviews)]

    @property
    def files(self) -> Sequence[Path]:
        data = self.config.data
        return [Path(file) for file in (data.train, data.validation, data.test) if file]

    def summary(self) -> Mapping[str, str]:
        counts = ", ".join(f"{name} {count}" for name, count in zip(SENTIMENTS, self.alpha.counts, strict=True))
        loss = self.config.multi_label
        return {
            "alpha_mode": self.alpha.mode,
            "distribution": counts,
            "alpha_vector": self.alpha.text,
            "gamma": f"{loss.focal_gamma}",
            "aspects": str(len(self.aspects)),
            "parameters": str(self.parameters),
        } | {f"reviews_{name}": str(len(reviews)) for name, reviews in self.reviews.by_name.items()}

    def describe(self, folder: Path) -> Mapping[str, float]:
        say(f"Total parameters: {self.parameters:,}")
        self.alpha.write(folder / ALPHA_FILE)
        return self.alpha.metrics()

    def warnings(self, total_steps: int) -> Sequence[str]:  # noqa: ARG002
        found: list[str] = []
        for name, reviews in self.reviews.by_name.items():
            found += reviews.notes
            if reviews.dropped:
                found.append(f"{reviews.source}: bad cells that are dropped: {len(reviews.dropped)} ({name})")
            unknown = unknown_share(self.tokenizer, self.table(name).ids[:-1].numpy())
            if unknown > MANY_UNKNOWN:
                found.append(f"{unknown:.1%} of the tokens of {name} are unknown to the tokenizer")
            copies = self._copies(name)
            if copies:
                found.append(f"{copies} of {len(reviews)} {name} reviews are in train")
        lengths = self.table("train").lengths.numpy()
        cut = float((lengths >= self.config.model.max_tokens).mean())
        if cut > MANY_CUT:
            found.append(f"{cut:.1%} of the training reviews reach model.max_tokens {self.config.model.max_tokens}")
        return found

    def _copies(self, split: str) -> int:
        """Reviews of a file that are in the training file too; those of the embedded reviews are made so."""
        data = self.config.data
        if split == "train" or data.train is None or (split == "valid" and data.validation is None):
            return 0
        known = set(map(folded, self.reviews.train.texts))
        if data.validation is None:  # a share of the training file
            known |= set(map(folded, self.reviews.valid.texts))
        return sum(folded(text) in known for text in self.reviews.by_name[split].texts)

    def _build(self, *, weights: bool) -> AspectSentimentModel:
        return build_model(self.config.model, len(self.aspects), self.tokenizer, weights=weights, warn=warn)

    def model(self) -> AspectSentimentModel:
        model = self._build(weights=True)
        labels = self.reviews.train.labels
        known, mentioned = (labels != UNKNOWN).sum(0), (labels > NOT_MENTIONED).sum(0)
        model.start_from(torch.from_numpy((mentioned + 1) / (known + 2)))  # +1, +2: no rate of 0 or 1
        return model

    @property
    def schedule(self) -> ScheduleConfig:
        return self.config.optim.schedule

    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        assert isinstance(model, AspectSentimentModel)
        encoder, head = self.config.optim.encoder, self.config.optim.head
        layers = [(encoder.layer_decay**depth.steps, depth.parameters) for depth in by_depth(model.encoder)]
        rest = [(name, weight) for name, weight in model.named_parameters() if not name.startswith("encoder.")]
        return {
            "encoder": _adamw(layers, encoder, encoder.weight_decay),
            "head": _adamw([(1.0, rest)], head, head.weight_decay),
        }

    def plan(self, epoch: int) -> Sequence[Rows]:
        training = self.config.training
        generator = np.random.Generator(np.random.PCG64([self.config.seed, epoch]))
        lengths = self.table("train").lengths.numpy()
        return LengthBuckets(lengths, training.batch_size, training.batch_tokens, generator, self.repeats)

    def batch(self, rows: Rows) -> ReviewBatch:
        return self.table("train").batch(rows)

    def counts(self, batch: ReviewBatch) -> Mapping[str, Tensor]:
        sentiments = {name: (batch.labels == index).sum() for index, name in enumerate(SENTIMENTS)}
        labelled = (batch.labels >= 0) & (batch.labels < len(SENTIMENTS))
        return sentiments | {"labelled": labelled.sum(), "known": (batch.labels != UNKNOWN).sum()}

    def forward(self, model: nn.Module, batch: ReviewBatch) -> Output:
        output: Output = model(batch.ids, batch.mask)
        return output

    def losses(
        self, output: Output, batch: ReviewBatch, counts: Mapping[str, Tensor], step: int
    ) -> Mapping[str, Tensor]:
        losses = self._losses(output, batch.labels, counts)
        if self.config.tracking.probes(step) and self.config.multi_label.use_focal_loss:
            losses |= self._focal_factors(output.sentiment.detach().float(), batch.labels, counts)
        return losses

    def _focal_factors(self, logits: Tensor, labels: Tensor, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shares of the mean (1 - p_t)^gamma over each sentiment's cells; 0/0 where it has none."""
        factor = multi_label_focal_factor(logits, labels, self.config.multi_label.focal_gamma)
        return {f"influence/focal_factor/{name}": (factor * (labels == index)).sum() / counts[name]
                for index, name in enumerate(SENTIMENTS)}  # fmt: skip

    def _losses(self, output: Output, labels: Tensor, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.config.multi_label
        gamma, alpha = (config.focal_gamma, self.alpha.vector) if config.use_focal_loss else (0.0, None)
        values = multi_label_focal(output.sentiment.float(), labels, gamma, alpha)
        found = {"loss_sentiment": values.sum() / counts["labelled"].clamp_min(1)}
        total = config.lambda_sentiment * found["loss_sentiment"]
        if output.aspect is not None:
            probability = log_probability(output.aspect.float())
            mentioned = (labels > NOT_MENTIONED).float()
            if config.aspect.loss == "focal":
                aspect = config.aspect
                values = binary_focal(probability, mentioned, aspect.gamma, aspect.alpha, detach_weight=False)
            else:
                values = binary_cross_entropy(probability, mentioned)
            known = labels != UNKNOWN
            found["loss_aspect"] = torch.where(known, values, 0.0).sum() / counts["known"].clamp_min(1)
            total = total + config.lambda_aspect * found["loss_aspect"]
        return found | {TOTAL: total}

    def probe(self, model: nn.Module, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of the parts at the encoder's last layer."""
        assert isinstance(model, AspectSentimentModel)
        shared = [weight for _, weight in by_depth(model.encoder)[0].parameters]
        return {name: flat(gradients(losses[name], shared)) for name in COMPONENTS if name in losses}

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = {f"influence/grad_norm/{name}": norm(gradient) for name, gradient in probed.items()}
        if "loss_aspect" in probed:
            found["influence/cosine_sentiment_aspect"] = cosine(probed["loss_sentiment"], probed["loss_aspect"])
        return found | {name: value for name, value in losses.items() if name.startswith(PREFIX)}

    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        """Scores of a split; on `valid` the model's thresholds are tuned first, and stay with its weights."""
        assert isinstance(model, AspectSentimentModel)
        reviews, output = self.reviews.by_name[split], self._predict(model, self.table(split), device)
        if split == "valid" and output.aspect is not None:
            probability = torch.sigmoid(output.aspect.double()).numpy()
            model.thresholds.copy_(torch.from_numpy(tuned_thresholds(reviews.labels, probability)))
        answers = self._answers(model, output)
        labels = torch.from_numpy(reviews.labels)
        counts = self.counts(ReviewBatch(labels, labels, labels))
        losses = {name: value.item() for name, value in self._losses(output, labels, counts).items()}
        found = score(reviews.labels, answers.prediction, self.names, self.polar)
        beside = {name: value for name, value in self.baselines(split).items() if name.rpartition("_")[0] in found}
        if split == "test":
            losses |= self._log_losses(output, labels)
        return {f"{split}/{name}": value for name, value in (losses | found | beside).items()}

    def known_metrics(self, split: str) -> Mapping[str, str]:
        detection, reviews = self.config.model.aspect_detection, self.reviews.by_name.get(split)
        labels = reviews.labels if reviews else None
        lacks = known_scores(labels, self.names, self.polar, detection)
        if self.config.baselines:
            lacks |= {f"{name}_{by}": lacks[name] for name in COMPARED if name in lacks for by in BASELINES}
        heads = ("sentiment", "aspect") if detection else ("sentiment",)
        lacks |= dict.fromkeys(["loss_total", *(f"loss_{head}" for head in heads)], "")
        if split == "test":
            lacks |= {f"logloss_{head}": _lack(head, labels) for head in heads}
        if reviews is None:
            return dict.fromkeys((f"{split}/{name}" for name in lacks), f"needs a {split} split: there is none")
        where = f"{'validation' if split == 'valid' else split} has none in {len(reviews):,} reviews"
        found = {name: f"needs {what}: {where}" if what else "" for name, what in lacks.items()}
        if split == "test" and self.config.model.calibrate:
            valid = self.reviews.valid
            fitted = {head: f"needs labels: validation has none in {len(valid):,} reviews" for head in heads
                      if _lack(head, valid.labels)}  # fmt: skip
            found |= {f"logloss_{head}{CALIBRATED}": found[f"logloss_{head}"] or fitted.get(head, "") for head in heads}
        return {f"{split}/{name}": why for name, why in found.items()}

    def _log_losses(self, output: Output, labels: Tensor) -> dict[str, float]:
        """Cross-entropy of each head without weights, and of its calibrated probabilities."""
        found = {}
        for head, (logits, classes) in _cells(output, labels).items():
            found[f"logloss_{head}"] = cross_entropy(logits, classes).item()
            if head in self.calibration:
                calibrated = logits / self.calibration[head]["temperature"]
                found[f"logloss_{head}{CALIBRATED}"] = cross_entropy(calibrated, classes).item()
        return found

    def calibrate(self, model: nn.Module, device: str) -> Fitted:
        self.calibration = {}
        if not self.config.model.calibrate:
            return {}
        assert isinstance(model, AspectSentimentModel)
        output = self._predict(model, self.table("valid"), device)
        cells = _cells(output, torch.from_numpy(self.reviews.valid.labels))
        if "sentiment" not in cells:
            say("sentiments are not calibrated: found no labelled cell in the validation split")
        fitted: dict[str, dict[str, float]] = {}
        for head, of_head in cells.items():
            with optional(f"the calibration of {head}"):
                fitted[head] = {"temperature": fit_temperature(*of_head)}
        self.calibration = fitted
        return self.calibration

    def _predict(self, model: AspectSentimentModel, table: ReviewTable, device: str) -> Output:
        """Logits of all rows, on the CPU in fp32."""
        size, budget = self.config.evaluation.batch_size, self.config.training.batch_tokens
        with autocast(self.config.training.amp, device):
            found = ranks.each_its_part(
                len(table),
                lambda first, last: predict_logits(model, table, size, budget, device, first=first, last=last).parts,
            )
        return Output(*found)

    def _answers(self, model: AspectSentimentModel, output: Output) -> Answers:
        thresholds = model.thresholds.cpu().double().numpy()
        return Answers(output, thresholds, self.aspects, self.polar, self.calibration)

    def _baselines(self, split: str) -> dict[str, float]:
        """What the majority and TF-IDF with logistic regression reach on the same rows."""
        if not self.config.baselines:
            return {}
        reviews = self.reviews.by_name[split]
        predictions = {"majority": majority(self.reviews.train.labels, len(reviews))}
        if self._tfidf:
            predictions["tfidf"] = self._tfidf.predict(reviews.texts)
        found: dict[str, float] = {}
        for name, prediction in predictions.items():
            scores = score(reviews.labels, prediction, self.names, self.polar)
            found |= {f"{metric}_{name}": scores[metric] for metric in COMPARED if metric in scores}
        return found

    @cached_property
    def _tfidf(self) -> TfidfBaseline | None:
        train, valid = self.reviews.train, self.reviews.valid
        with optional("the TF-IDF baseline"):
            return TfidfBaseline(train.texts, train.labels, (valid.texts, valid.labels))
        return None

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        """Tables and pictures of the finished model on the test split, or on validation where there is none."""
        assert isinstance(model, AspectSentimentModel)
        split, tracking = "test" if "test" in self.reviews.by_name else "valid", self.config.tracking
        if not (tracking.log_report or tracking.log_rows):
            return
        answers = self._answers(model, self._predict(model, self.table(split), device))
        if tracking.log_report:
            with optional(f"the report of {split}"):
                write_report(folder, split, self.reviews.by_name[split], answers)
        if split == "test" and tracking.log_rows:
            with optional("evaluation/test_rows.parquet"):
                write_pair_rows(folder, self.reviews.by_name[split], answers)

    def export(self, model: nn.Module, folder: Path) -> ModelExport:
        assert isinstance(model, AspectSentimentModel)
        save_weights(model.state_dict(), folder / "model.safetensors")
        (folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        write_calibration(folder, self.calibration)
        self.tokenizer.save(folder / TOKENIZER_FOLDER)
        if isinstance(model.encoder, PretrainedEncoder):
            cast(Any, model.encoder.model).config.save_pretrained(str(folder / ENCODER_FOLDER))
        told = {"aspects": self.aspects, "detection_only": self.reviews.detection_only,
                "text_column": self.reviews.train.text_column}  # fmt: skip
        (folder / ASPECTS_FILE).write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
        outputs = column_types(self.aspects, self.polar, detection=self.config.model.aspect_detection)
        return ModelExport(
            folder=folder,
            task="visobert",
            inputs=None,
            outputs=outputs,
            example=[text[:EXAMPLE_LETTERS] for text in self.reviews.valid.texts[:2]],
        )


def _cells(output: Output, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits [N, C] and classes [N] of the cells that a head is judged on, in float64; heads without cells left out."""
    with_sentiment, known = (labels >= 0) & (labels < len(SENTIMENTS)), labels != UNKNOWN
    found = {"sentiment": (output.sentiment[with_sentiment].double(), labels[with_sentiment].long())}
    if output.aspect is not None:
        mentioned = output.aspect[known].double()
        logits = torch.stack([torch.zeros_like(mentioned), mentioned], -1)  # sigmoid(z) as a softmax
        found["aspect"] = logits, (labels[known] > NOT_MENTIONED).long()
    return {head: cells for head, cells in found.items() if len(cells[1])}


def _lack(head: str, labels: npt.NDArray[np.int8] | None) -> str:
    """What the labels lack for the cells that a head is judged on; "" = nothing."""
    cells = None if labels is None else labelled(labels) if head == "sentiment" else labels != UNKNOWN
    return "" if cells is not None and cells.any() else "labels"


def _adamw(
    layers: Sequence[tuple[float, Sequence[tuple[str, nn.Parameter]]]], config: AdamConfig, decay: float
) -> AdamW:
    """AdamW over (share of the learning rate, named parameters); no weight decay on biases and normalisation."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for share, parameters in layers:
        for name, weight in parameters:
            decays = weight.ndim > 1 and not name.endswith("bias")
            groups.setdefault((share, decay if decays else 0.0), []).append(weight)
    return AdamW(
        [{"params": weights, "lr": share * config.lr, "weight_decay": weight_decay}
         for (share, weight_decay), weights in groups.items()],
        betas=config.betas, eps=config.eps, fused=True,
    )  # fmt: skip
