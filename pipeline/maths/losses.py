"""Losses as pure functions of tensors. Most return one value per element, of which the caller takes the mean.

Shapes: B = rows of a batch. Logits, labels and results are [B] unless stated otherwise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOG_HALF = -math.log(2)


class LogProbability(NamedTuple):
    """log p and log(1 - p) of an event. Both are accurate even if p is near 0 or 1."""

    log_p: Tensor
    log_1mp: Tensor


def log_probability(z: Tensor) -> LogProbability:
    """log p and log(1 - p) of p = sigmoid(z).

    torch's binary_cross_entropy_with_logits adds z to log(1 + exp(-z)), which is inaccurate if the two nearly cancel:
    the loss of a negative at z = -12 is off by 7% in fp32.
    """
    return LogProbability(logsigmoid(z), logsigmoid(-z))


def product_log_probability(z_ctr: Tensor, z_cvr: Tensor) -> LogProbability:
    """p_ctcvr = sigmoid(z_ctr) * sigmoid(z_cvr) (ESMM, Ma et al. 2018, equation 1), in log space."""
    return product(log_probability(z_ctr), log_probability(z_cvr))


def product(ctr: LogProbability, cvr: LogProbability) -> LogProbability:
    """log p and log(1 - p) of p = ab, the probability of two events; b is that of the second given the first.

    log(1 - p) is computed in two ways. For p < 1/2 it is log1p(-p). For larger p this would lose precision, so the
    terms of 1 - ab = (1 - a) + a(1 - b) are added in log space. Clamping log p away from 0 instead would lose the
    gradient, which is 1/2 at z_ctr = z_cvr = 20.
    """
    log_p = ctr.log_p + cvr.log_p
    unlikely = log_p < LOG_HALF
    # torch.where also differentiates the branch that it does not select. At log p = 0 that derivative is infinite, and
    # multiplied by zero it would be NaN.
    log1p_form = torch.log1p(-torch.exp(torch.where(unlikely, log_p, LOG_HALF)))
    sum_form = torch.logaddexp(ctr.log_1mp, ctr.log_p + cvr.log_1mp)
    return LogProbability(log_p, torch.where(unlikely, log1p_form, sum_form))


def binary_cross_entropy(probability: LogProbability, label: Tensor, pos_weight: float = 1.0) -> Tensor:
    """-w y log p - (1 - y) log(1 - p), in nats."""
    return -torch.lerp(probability.log_1mp, pos_weight * probability.log_p, label)


def binary_focal(
    probability: LogProbability,
    label: Tensor,
    gamma: float,
    alpha: float | None = None,
    detach_weight: bool = True,
) -> Tensor:
    """(1 - p_t)^gamma times cross-entropy (Lin et al. 2017, equations 4 and 5), in nats.

    p_t is p if the label is 1, and 1 - p if it is 0. `alpha` is the weight of positives; negatives have 1 - alpha.
    With `detach_weight`, no gradient flows through the factor (1 - p_t)^gamma. `gamma` must be at most 100, because
    larger values overflow in fp16.
    """
    log_pt = torch.where(label > 0.5, probability.log_p, probability.log_1mp)
    factor = binary_focal_factor(probability, label, gamma)
    if detach_weight:
        factor = factor.detach()
    if alpha is not None:
        factor = factor * (alpha * label + (1 - alpha) * (1 - label))
    return -factor * log_pt


def binary_focal_factor(probability: LogProbability, label: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma: near 1 for misclassified rows, near 0 for confident correct ones."""
    log_1mpt = torch.where(label > 0.5, probability.log_1mp, probability.log_p)
    return torch.exp(gamma * log_1mpt)  # unlike a power, finite with a finite gradient for every gamma >= 0


def clicked_cross_entropy(cvr: LogProbability, click: Tensor, conversion: Tensor) -> Tensor:
    """Cross-entropy of the conversion on clicked rows; exactly 0, with zero gradient, on other rows."""
    return click * binary_cross_entropy(cvr, conversion)


def gate_entropy_deficit(gates: Tensor) -> Tensor:
    """log E - H(gate), in nats, averaged over tasks; 0 if all experts have the same share. gates [B, T, E] -> [B].

    T = tasks, E = experts.
    """
    entropy = -(gates * torch.log(gates.clamp_min(torch.finfo(gates.dtype).tiny))).sum(-1)
    return (math.log(gates.shape[-1]) - entropy).mean(-1)


def gate_imbalance(gates: Tensor) -> Tensor:
    """E * sum_e share_e^2 - 1, the squared coefficient of variation of the experts' shares of a batch.

    As in Shazeer et al. 2017, equation 7, but for softmax gates. Averaged over tasks; 0 if all experts have the same
    share of the batch. gates [B, T, E] -> scalar.
    """
    return (gates.shape[-1] * gates.mean(0).square().sum(-1) - 1).mean()


def multi_label_focal(
    logits: Tensor, label: Tensor, gamma: float = 0.0, alpha: Sequence[float] | Tensor | None = None
) -> Tensor:
    """-alpha[y] (1 - p_t)^gamma log p_t of every labelled cell (Lin et al. 2017, equation 5, over a softmax), in nats.

    logits: [..., C]. label: [...], index of the class; an index outside 0..C-1 marks an unlabelled cell, whose value
    and gradient are exactly 0. alpha: one weight per class; None = ones. With gamma 0 and without alpha this is
    cross-entropy. The gradient also flows through the factor (1 - p_t)^gamma. The caller divides the sum by the number
    of labelled cells.
    """
    labelled, index, log_p = _labelled_cells(logits, label)
    value = -log_p.gather(-1, index).squeeze(-1)
    if gamma:
        value = value * _softmax_focal_factor(log_p, index, gamma)
    if alpha is not None:
        weights = torch.as_tensor(alpha, dtype=log_p.dtype).to(log_p.device, non_blocking=True)  # do not wait for a GPU
        value = value * weights[index.squeeze(-1)]
    return torch.where(labelled, value, 0.0)


def multi_label_focal_factor(logits: Tensor, label: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma of every labelled cell, without alpha; 0 elsewhere. Shapes as in `multi_label_focal`."""
    labelled, index, log_p = _labelled_cells(logits, label)
    return torch.where(labelled, _softmax_focal_factor(log_p, index, gamma), 0.0)


def _labelled_cells(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask of labelled cells [...], class index [..., 1] (any class for unlabelled cells), and log softmax [..., C]."""
    classes = logits.shape[-1]
    labelled = (label >= 0) & (label < classes)
    index = label.clamp(0, classes - 1).long().unsqueeze(-1)
    # replace the logits of unlabelled cells first, so that a NaN among them does not reach the loss or the gradient
    return labelled, index, torch.log_softmax(torch.where(labelled.unsqueeze(-1), logits, 0.0), -1)


def _softmax_focal_factor(log_p: Tensor, index: Tensor, gamma: float) -> Tensor:
    others = log_p.scatter(-1, index, -torch.inf)
    return torch.exp(gamma * torch.logsumexp(others, -1))  # log(1 - p_t), accurate even if p_t is near 1
