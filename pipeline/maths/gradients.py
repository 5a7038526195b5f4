"""Gradients of the parts of a loss at shared weights, with their norms and angles.

Measured on the graph of a step before its backward pass, without a second forward pass, random numbers or changes to
`grad`: the training is the same bit for bit.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

PREFIX = "influence/"  # of metric names


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of a scalar loss at each parameter, zeros where it does not depend on it. The graph is retained."""
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate the tensors to one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def norm(gradient: Tensor) -> Tensor:
    """Euclidean length of a vector, 0-d."""
    length: Tensor = torch.linalg.vector_norm(gradient)
    return length


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of the angle between two vectors, 0-d, between -1 and 1; NaN where one of them is 0.

    1: a step along either lowers both losses; -1: what lowers one raises the other.
    """
    return torch.dot(one / norm(one), other / norm(other)).clamp(-1, 1)
