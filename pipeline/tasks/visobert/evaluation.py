"""Evaluation of a model: metrics of a split, thresholds, calibration, and the report of the finished model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.compute import distributed
from pipeline.compute.device import autocast
from pipeline.maths.calibration import Fitted, fit_temperature
from pipeline.names import CALIBRATED, metric_names
from pipeline.runtime.console import info, optional
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.model import AspectSentimentModel, Output
from pipeline.tasks.visobert.objective import Objective
from pipeline.tasks.visobert.predict import predict_logits
from pipeline.tasks.visobert.reviews.review_data import ReviewData
from pipeline.tasks.visobert.reviews.sentiments import NOT_MENTIONED, SENTIMENTS, UNKNOWN, labelled
from pipeline.tasks.visobert.scoring.baselines import BASELINE_METRICS, BASELINES
from pipeline.tasks.visobert.scoring.predictions import Predictions
from pipeline.tasks.visobert.scoring.report import write_pair_rows, write_report
from pipeline.tasks.visobert.scoring.scores import known_scores, score, tuned_thresholds


class Evaluation:
    """Evaluates models on the splits of a run."""

    def __init__(self, config: VisobertConfig, data: ReviewData, objective: Objective) -> None:
        self.config, self.data, self.objective = config, data, objective
        self.reviews = data.splits
        self.polar = self.reviews.polar
        self.names = list(metric_names(self.reviews.train.aspects).values())
        self.calibration: Fitted = {}  # set by `calibrate`

    def evaluate(self, model: AspectSentimentModel, split: str, device: str) -> Mapping[str, float]:
        """Metrics of a split. For `valid`, first tune the model's thresholds, which are saved with its weights."""
        reviews, output = self.reviews.by_name[split], self.predict(model, split, device)
        if split == "valid" and output.aspect is not None:
            probability = torch.sigmoid(output.aspect.double()).numpy()
            model.thresholds.copy_(torch.from_numpy(tuned_thresholds(reviews.labels, probability)))
        labels = torch.from_numpy(reviews.labels)
        terms = self.objective.terms(output, labels, self.objective.counts(labels))
        metrics = {name: value.item() for name, value in terms.items()}
        if split == "test":
            metrics |= self._log_losses(output, labels)
        scores = score(reviews.labels, self.predictions(model, output).labels, self.names, self.polar)
        metrics |= scores
        if self.config.baselines:
            metrics |= {name: value for name, value in self.data.baselines.scores(split).items()
                        if name.rpartition("_")[0] in scores}  # fmt: skip
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def known_metrics(self, split: str) -> Mapping[str, str]:
        detection, reviews = self.config.model.aspect_detection, self.reviews.by_name.get(split)
        labels = reviews.labels if reviews else None
        missing = known_scores(labels, self.names, self.polar, detection)  # metric -> labels that are missing for it
        if self.config.baselines:
            missing |= {f"{name}_{baseline}": missing[name]
                        for name in BASELINE_METRICS if name in missing for baseline in BASELINES}  # fmt: skip
        heads = ("sentiment", "aspect") if detection else ("sentiment",)
        missing |= dict.fromkeys(["loss_total", *(f"loss_{head}" for head in heads)], "")
        if split == "test":
            missing |= {f"logloss_{head}": "" if _has_cells(head, labels) else "labels" for head in heads}
        if reviews is None:
            return dict.fromkeys((f"{split}/{name}" for name in missing), f"needs a {split} split: there is none")
        where = f"{'validation' if split == 'valid' else split} has none in {len(reviews):,} reviews"
        reasons = {name: f"needs {labels}: {where}" if labels else "" for name, labels in missing.items()}
        if split == "test" and self.config.model.calibrate:
            valid = self.reviews.valid
            for head in heads:
                fitted = _has_cells(head, valid.labels)
                reason = "" if fitted else f"needs labels: validation has none in {len(valid):,} reviews"
                reasons[f"logloss_{head}{CALIBRATED}"] = reasons[f"logloss_{head}"] or reason
        return {f"{split}/{name}": reason for name, reason in reasons.items()}

    def calibrate(self, model: AspectSentimentModel, device: str) -> Fitted:
        """Fit a temperature for each head on the validation split."""
        self.calibration = {}
        if not self.config.model.calibrate:
            return {}
        cells = _judged_cells(self.predict(model, "valid", device), torch.from_numpy(self.reviews.valid.labels))
        if "sentiment" not in cells:
            info("sentiments are not calibrated: found no labelled cell in the validation split")
        fitted: dict[str, dict[str, float]] = {}
        for head, (logits, classes) in cells.items():
            with optional(f"the calibration of {head}"):
                fitted[head] = {"temperature": fit_temperature(logits, classes)}
        self.calibration = fitted
        return fitted

    def report(self, model: AspectSentimentModel, folder: Path, device: str) -> None:
        """Write tables and pictures of the test split; without a test split, of the validation split."""
        split, tracking = "test" if self.reviews.test is not None else "valid", self.config.tracking
        if not (tracking.log_report or tracking.log_rows):
            return
        reviews = self.reviews.by_name[split]
        predictions = self.predictions(model, self.predict(model, split, device))
        if tracking.log_report:
            with optional(f"the report of {split}"):
                write_report(folder, split, reviews, predictions)
        if split == "test" and tracking.log_rows:
            with optional("evaluation/test_rows.parquet"):
                write_pair_rows(folder, reviews, predictions)

    def predict(self, model: AspectSentimentModel, split: str, device: str) -> Output:
        """Logits of all rows of a split, on the CPU in fp32; the rows are distributed over the ranks."""
        table = self.data.table(split)
        size, budget = self.config.evaluation.batch_size, self.config.training.batch_tokens
        with autocast(self.config.training.amp, device):
            parts = distributed.split_evenly(
                len(table),
                lambda first, last: predict_logits(model, table, size, budget, device, first=first, last=last).parts,
            )
        return Output(*parts)

    def predictions(self, model: AspectSentimentModel, output: Output) -> Predictions:
        thresholds = model.thresholds.cpu().double().numpy()
        return Predictions(output, thresholds, self.reviews.train.aspects, self.polar, self.calibration)

    def _log_losses(self, output: Output, labels: Tensor) -> dict[str, float]:
        """Unweighted cross-entropy of each head, before and after calibration."""
        metrics = {}
        for head, (logits, classes) in _judged_cells(output, labels).items():
            metrics[f"logloss_{head}"] = cross_entropy(logits, classes).item()
            if head in self.calibration:
                calibrated = logits / self.calibration[head]["temperature"]
                metrics[f"logloss_{head}{CALIBRATED}"] = cross_entropy(calibrated, classes).item()
        return metrics


def _judged_cells(output: Output, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each head, logits [N, C] in float64 and classes [N] of the N cells on which it is evaluated.

    The sentiment head is evaluated on cells with a sentiment, the aspect head on cells that are not unknown. Heads
    without such cells are left out.
    """
    with_sentiment, known = (labels >= 0) & (labels < len(SENTIMENTS)), labels != UNKNOWN
    cells = {"sentiment": (output.sentiment[with_sentiment].double(), labels[with_sentiment].long())}
    if output.aspect is not None:
        mentioned = output.aspect[known].double()
        logits = torch.stack([torch.zeros_like(mentioned), mentioned], -1)  # sigmoid as a softmax of two logits
        cells["aspect"] = logits, (labels[known] > NOT_MENTIONED).long()
    return {head: (logits, classes) for head, (logits, classes) in cells.items() if len(classes)}


def _has_cells(head: str, labels: npt.NDArray[np.int8] | None) -> bool:
    """Return True if there are cells on which the head is evaluated, see `_judged_cells`."""
    return labels is not None and bool((labelled(labels) if head == "sentiment" else labels != UNKNOWN).any())
