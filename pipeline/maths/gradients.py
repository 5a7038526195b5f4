"""Gradients of loss components at shared weights, with their norms and angles.

They are computed on the graph of a step before its backward pass, without another forward pass, random numbers or
changes to `grad`, so that training is the same bit for bit with and without them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

PREFIX = "influence/"  # prefix of metric names


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of a scalar loss for each parameter; zeros if the loss does not depend on it. The graph is retained."""
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Flatten the tensors and concatenate them to one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def norm(gradient: Tensor) -> Tensor:
    """Euclidean norm of a vector, 0-d."""
    length: Tensor = torch.linalg.vector_norm(gradient)
    return length


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of the angle between two gradients, 0-d, between -1 and 1; NaN if one of them is 0.

    1: a step that lowers one loss also lowers the other; -1: a step that lowers one loss raises the other.
    """
    return torch.dot(one / norm(one), other / norm(other)).clamp(-1, 1)
