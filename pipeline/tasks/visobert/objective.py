"""The named losses of the task and their weighted total."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.maths.gradients import PREFIX, cosine, flat, gradients, norm
from pipeline.maths.losses import (
    binary_cross_entropy,
    binary_focal,
    log_probability,
    multi_label_focal,
    multi_label_focal_factor,
)
from pipeline.tasks.base import TOTAL
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.model import AspectSentimentModel, Output, layers_from_the_top
from pipeline.tasks.visobert.reviews.sentiments import NOT_MENTIONED, SENTIMENTS, UNKNOWN

COMPONENTS = ("loss_sentiment", "loss_aspect")


class Objective:
    """Losses of both heads: of sentiments over labelled cells, of mentions over all cells that are not unknown."""

    def __init__(self, config: VisobertConfig, alpha: tuple[float, float, float]) -> None:
        self.loss, self.tracking, self.alpha = config.multi_label, config.tracking, alpha

    def counts(self, labels: Tensor) -> dict[str, Tensor]:
        """Count the cells of each sentiment, labelled cells, and cells that are not unknown. labels: [B, A]"""
        counts = {name: (labels == code).sum() for code, name in enumerate(SENTIMENTS)}
        labelled = (labels >= 0) & (labels < len(SENTIMENTS))
        return counts | {"labelled": labelled.sum(), "known": (labels != UNKNOWN).sum()}

    def losses(self, output: Output, labels: Tensor, counts: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Losses as in `terms`; also the mean focal factors if `tracking.probes(step)` is true. labels: [B, A]"""
        losses = self.terms(output, labels, counts)
        if self.tracking.probes(step) and self.loss.use_focal_loss:
            # the mean of (1 - p_t)^gamma over the cells of each sentiment; NaN (0/0) if there are none
            factor = multi_label_focal_factor(output.sentiment.detach().float(), labels, self.loss.focal_gamma)
            losses |= {f"influence/focal_factor/{name}": (factor * (labels == code)).sum() / counts[name]
                       for code, name in enumerate(SENTIMENTS)}  # fmt: skip
        return losses

    def terms(self, output: Output, labels: Tensor, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of each head, and their weighted total. labels: [B, A]"""
        loss = self.loss
        gamma, alpha = (loss.focal_gamma, self.alpha) if loss.use_focal_loss else (0.0, None)
        values = multi_label_focal(output.sentiment.float(), labels, gamma, alpha)
        terms = {"loss_sentiment": values.sum() / counts["labelled"].clamp_min(1)}
        total = loss.lambda_sentiment * terms["loss_sentiment"]
        if output.aspect is not None:
            probability, mentioned = log_probability(output.aspect.float()), (labels > NOT_MENTIONED).float()
            if loss.aspect.loss == "focal":
                values = binary_focal(probability, mentioned, loss.aspect.gamma, loss.aspect.alpha, detach_weight=False)
            else:
                values = binary_cross_entropy(probability, mentioned)
            terms["loss_aspect"] = torch.where(labels != UNKNOWN, values, 0.0).sum() / counts["known"].clamp_min(1)
            total = total + loss.lambda_aspect * terms["loss_aspect"]
        return terms | {TOTAL: total}

    def probe(self, model: AspectSentimentModel, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of the losses of both heads at the encoder's last layer, as vectors."""
        last_layer = [weight for _, weight in layers_from_the_top(model.encoder)[0]]
        return {name: flat(gradients(losses[name], last_layer)) for name in COMPONENTS if name in losses}

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        influence = {f"influence/grad_norm/{name}": norm(gradient) for name, gradient in probed.items()}
        if "loss_aspect" in probed:
            influence["influence/cosine_sentiment_aspect"] = cosine(probed["loss_sentiment"], probed["loss_aspect"])
        return influence | {name: value for name, value in losses.items() if name.startswith(PREFIX)}
