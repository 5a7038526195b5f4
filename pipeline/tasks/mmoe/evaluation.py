"""Evaluation of the MMoE task: metrics, calibration and reports.

N = rows of a split, T = tasks (ctr, cvr), E = experts.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.compute import distributed
from pipeline.data.schema import DataSchema, Split
from pipeline.maths.arrays import Floats
from pipeline.maths.calibration import Affine, Fitted, fit_click, fit_funnel, rescaled
from pipeline.maths.losses import (
    LogProbability,
    binary_cross_entropy,
    binary_focal,
    log_probability,
    product_log_probability,
)
from pipeline.maths.metrics import binary_metrics, calibration_bins
from pipeline.names import CALIBRATED
from pipeline.runtime.console import info
from pipeline.tasks.base import write_test_rows
from pipeline.tasks.mmoe.config import HEADS, MmoeConfig
from pipeline.tasks.mmoe.impressions.impression_data import ImpressionData
from pipeline.tasks.mmoe.impressions.impression_table import ImpressionTable
from pipeline.tasks.mmoe.model import Output
from pipeline.tracking import plots

EVENTS = ("ctr", "cvr", "ctcvr")
CLICK_EVENTS = EVENTS[:1]  # those of data without conversion labels
EVALUATED_GAMMAS = (1, 2)  # the same for every arm, independent of its config
COMMON_LOSSES = {
    "ctr": ["loss_ctr"],
    "cvr": ["loss_cvr_aux"],
    "ctcvr": ["loss_ctcvr_bce", *(f"loss_ctcvr_focal_g{gamma}" for gamma in EVALUATED_GAMMAS)],
}
CALIBRATION_METRICS = ("ece", "logloss", "calibration")
GATE_METRIC = re.compile(r"gate/(\w+)/expert_(\d+)")

Events = Mapping[str, tuple[Floats, LogProbability]]


class Outputs(NamedTuple):
    """Model outputs for all rows of a split, on the CPU."""

    logits: Tensor  # [N, T]; [N, 1] without conversion labels
    gate_means: Tensor | None  # [T, E]
    gate_entropy: Tensor | None  # [T] mean, nats


class Evaluation:
    """The methods of `Task` that evaluate a model. `calibration` is the result of `calibrate`."""

    def __init__(self, config: MmoeConfig, data: ImpressionData) -> None:
        self.config, self.data = config, data
        self.heads = HEADS[:1] if data.schema.click_only else HEADS
        self.calibration: Fitted = {}

    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        table = self.data.held_out(split)
        predictions = self.predict(model, table, device)
        metrics: dict[str, float] = {}
        events = labelled(table, predictions.logits)
        for event, (label, probability) in events.items():
            values = binary_metrics(label, *(part.double().numpy() for part in probability))
            metrics |= {f"{split}/{name}_{event}": value for name, value in values.items()}
        metrics |= {f"{split}/{name}": value for name, value in self._common_losses(events).items()}
        if split == "test" and self.calibration:
            values = self._calibrated(table, predictions.logits)
            metrics |= {f"test/{name}{CALIBRATED}": value for name, value in values.items()}
        metrics |= self._bayes_aucs(split)
        if split == "valid":
            metrics |= self._gate_metrics(predictions)
        return metrics

    def known_metrics(self, split: str) -> Mapping[str, str]:
        return known_metrics(self.data.schema, split, calibrated=self.config.model.calibrate)

    def findings(self, metrics: Mapping[str, float]) -> Sequence[str]:
        return [
            f"expert {gate[2]} has {share:.1%} of the {gate[1]} gate; usual: 1%-80%"
            for name, share in metrics.items()
            if (gate := GATE_METRIC.fullmatch(name)) and not 0.01 <= share <= 0.8
        ]

    def calibrate(self, model: nn.Module, device: str) -> Fitted:
        self.calibration = {}
        if not self.config.model.calibrate:
            return {}
        table = self.data.valid
        z = self.predict(model, table, device).logits.unbind(1)
        click, conversion = (torch.from_numpy(label.astype(np.float64)) for label in table.labels)
        if len(z) == 1:
            of_click = fit_click(z[0], click)
            fitted: Sequence[Affine] | None = of_click and [of_click]
        else:
            fitted = fit_funnel(z[0], z[1], click, conversion)
        if fitted is None:
            clicks, conversions = int(click.sum()), int(conversion.sum())
            found = f"{len(table)} validation rows, {clicks} clicks"
            found += "" if self.data.schema.click_only else f" and {conversions} conversions"
            info(f"probabilities are not calibrated: found {found}; needed: {calibration_needs(self.data.schema)}")
            return {}
        self.calibration = {head: affine._asdict() for head, affine in zip(self.heads, fitted, strict=True)}
        return self.calibration

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        if self.config.tracking.log_rows and len(self.data.test):
            table = self.data.test
            events = labelled(table, self.predict(model, table, device).logits)
            columns: dict[str, npt.NDArray[Any]] = {}
            for event in events_of(self.data.schema)[::2]:  # click and both: the events whose AUC is over all rows
                label, probability = events[event]
                columns[f"label/auc_{event}"] = label.astype(np.uint8)
                columns[f"score/auc_{event}"] = probability.log_p.float().numpy()
            write_test_rows(folder, columns)
        if self.config.tracking.log_report:
            table = self.data.valid
            events = labelled(table, self.predict(model, table, device).logits)
            curves = {
                event: calibration_bins(label, np.exp(probability.log_p.double().numpy()))
                for event, (label, probability) in events.items() if len(label)
            }  # fmt: skip
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            plots.calibration(curves, folder / "plots" / "calibration.png")

    def predict(self, model: nn.Module, table: ImpressionTable, device: str) -> Outputs:
        def predict_rows(first: int, last: int) -> list[Tensor]:
            logits, shares, entropies = [], [], []
            for rows in table.batches(self.config.evaluation.batch_size, first, last):
                output: Output = model(table.batch(rows).to(device))
                logits.append(output.logits)
                if output.gates is not None:
                    shares.append(output.gates.double().sum(0))
                    entropies.append(torch.special.entr(output.gates.double()).sum((0, 2)))
            return [torch.cat(logits), *(torch.stack(part) for part in (shares, entropies) if part)]

        logits, *sums = (part.cpu() for part in distributed.split_evenly(len(table), predict_rows))
        logits = logits[:, : len(self.heads)]
        if not sums:
            return Outputs(logits, None, None)
        return Outputs(logits, *(part.sum(0) / len(table) for part in sums))

    def _gate_metrics(self, predictions: Outputs) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if predictions.gate_means is not None and predictions.gate_entropy is not None:
            names = [head for head in HEADS if getattr(self.config.model.heads, head).deep]
            means, entropies = predictions.gate_means.tolist(), predictions.gate_entropy.tolist()
            for task, shares, entropy in zip(names, means, entropies, strict=True):
                if task not in self.heads:  # the gate of a head that is not trained
                    continue
                metrics |= {f"gate/{task}/expert_{expert}": share for expert, share in enumerate(shares)}
                metrics[f"gate/{task}/entropy"] = entropy
        return metrics

    def _calibrated(self, table: ImpressionTable, logits: Tensor) -> dict[str, float]:
        """Metrics that calibration changes. It keeps the ranking by one logit, but changes the ranking by a product."""
        metrics: dict[str, float] = {}
        for event, (label, probability) in labelled(table, rescaled(logits, self.calibration, self.heads)).items():
            names = ("auc", *CALIBRATION_METRICS) if event == "ctcvr" else CALIBRATION_METRICS
            values = binary_metrics(label, *(part.numpy() for part in probability))
            metrics |= {f"{name}_{event}": values[name] for name in names if name in values}
        return metrics

    def _common_losses(self, events: Events) -> dict[str, float]:
        """Losses on the same scale for every arm: independent of its gate, lambda, gamma and late weight."""
        loss = self.config.loss
        terms = {
            event: (LogProbability(*(part.double() for part in probability)), torch.from_numpy(label))
            for event, (label, probability) in events.items()
        }
        values = {"loss_ctr": binary_cross_entropy(*terms["ctr"], loss.pos_weight("ctr"))}
        if "ctcvr" in terms:
            ctcvr = terms["ctcvr"]
            values["loss_ctcvr_bce"] = binary_cross_entropy(*ctcvr, loss.pos_weight("ctcvr"))
            values["loss_cvr_aux"] = binary_cross_entropy(*terms["cvr"])
            values |= {f"loss_ctcvr_focal_g{gamma}": binary_focal(*ctcvr, gamma) for gamma in EVALUATED_GAMMAS}
        return {name: value.mean().item() for name, value in values.items() if len(value)}  # no cvr loss without clicks

    def _bayes_aucs(self, split: str) -> dict[str, float]:
        """AUCs of the true probabilities, if they are known: the best that a model can be expected to reach."""
        table, aucs = self.data.held_out(split), self.data.bayes_aucs
        if split not in aucs:
            aucs[split] = {}
            if table.truth is not None:
                logits = np.stack([np.log(p) - np.log1p(-p) for p in (table.truth["p_ctr"], table.truth["p_cvr"])], 1)
                for event, (label, probability) in labelled(table, torch.from_numpy(logits)).items():
                    values = binary_metrics(label, *(part.numpy() for part in probability))
                    if "auc" in values:
                        aucs[split][f"{split}/auc_{event}_bayes"] = values["auc"]
        return aucs[split]


def labelled(table: ImpressionTable, logits: Tensor) -> Events:
    """Labels and log probabilities of each event; `ctr` alone if logits are [N, 1].

    `cvr` (conversion given a click) covers only clicked rows.
    """
    click, conversion = (label.astype(np.float64) for label in table.labels)
    z_ctr = logits[:, 0]
    if logits.shape[1] == 1:
        return {"ctr": (click, log_probability(z_ctr))}
    z_cvr, clicked = logits[:, 1], click == 1
    return {
        "ctr": (click, log_probability(z_ctr)),
        "cvr": (conversion[clicked], log_probability(z_cvr[torch.from_numpy(clicked)])),
        "ctcvr": (conversion, product_log_probability(z_ctr, z_cvr)),
    }


def known_metrics(schema: DataSchema, split: str, calibrated: bool) -> dict[str, str]:
    """Map every metric of a split (`valid` or `test`) to the reason why it is undefined; "" if it is defined."""
    name = {"valid": "validation", "test": "test"}[split]
    counts = _counts(schema.splits.get(name))
    events = events_of(schema)
    known: dict[str, str] = {}
    for event, label, among in (("ctr", "clicks", "rows"), ("cvr", "conversions", "clicks"),
                                ("ctcvr", "conversions", "rows")):  # fmt: skip
        positives, rows = counts[label], counts[among]
        summary = f"{name} has {positives:,} {label} of {rows:,} {among}"
        lacks_positives = "" if positives else f"needs {label}: {summary}"
        lacks_class = "" if 0 < positives < rows else f"needs both classes: {summary}"
        lacks_rows = "" if rows else f"needs {among}: {summary}"
        if event not in events:
            lacks_class = lacks_rows = lacks_positives = "needs conversion labels: the data are of clicks alone"
        known |= {f"auc_{event}": lacks_class, f"pr_auc_{event}": lacks_class}
        known |= dict.fromkeys([f"logloss_{event}", f"ece_{event}", *COMMON_LOSSES[event]], lacks_rows)
        known[f"calibration_{event}"] = lacks_positives
        if schema.truth:
            known[f"auc_{event}_bayes"] = lacks_class
    if split == "test" and calibrated:
        valid = _counts(schema.splits.get("validation"))
        counted = list(valid)[: 2 if schema.click_only else 3]
        ordered = [0, *(valid[name] for name in reversed(counted))]  # 0 < conversions < clicks < rows
        lacks = ""
        if any(less >= more for less, more in itertools.pairwise(ordered)):
            summary = ", ".join(f"{valid[name]:,} {name}" for name in counted)
            lacks = f"needs {calibration_needs(schema)}: validation has {summary}"
        metrics = ["auc_ctcvr", *(f"{kind}_{event}" for kind in CALIBRATION_METRICS for event in EVENTS)]
        known |= {f"{metric}{CALIBRATED}": known[metric] or lacks for metric in metrics}
    return {f"{split}/{metric}": lacks for metric, lacks in known.items()}


def events_of(schema: DataSchema) -> Sequence[str]:
    """The events whose labels the data have."""
    return CLICK_EVENTS if schema.click_only else EVENTS


def calibration_needs(schema: DataSchema) -> str:
    """What the validation split must have for a calibration."""
    conversions = "" if schema.click_only else "a conversion, more clicks than conversions, "
    return f"{conversions or 'a click, '}more rows than clicks"


def _counts(split: Split | None) -> Mapping[str, int]:
    return {name: getattr(split, name, 0) for name in ("rows", "clicks", "conversions")}
