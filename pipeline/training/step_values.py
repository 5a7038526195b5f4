"""Sums and norms of an optimizer step's tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, shape []."""
    norm: Tensor = torch.linalg.vector_norm(gradients[0]) if len(gradients) == 1 else get_total_norm(gradients)
    return norm


def weighted(values: Mapping[str, Tensor], weight: float) -> Mapping[str, Tensor]:
    return values if weight == 1 else {name: value * weight for name, value in values.items()}


def summed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum the tensors of each name over all mappings."""
    total = dict(parts[0])
    for part in parts[1:]:
        for name, value in part.items():
            total[name] = total[name] + value
    return total
