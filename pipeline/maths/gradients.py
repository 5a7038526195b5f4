"""How much each part of a loss moves the weights that the parts share: gradients as vectors, their norms and angles.

Measured on the step's own graph before its backward pass: no second forward pass, no random number, no `grad` touched,
so that a training with these measurements is the training without them, bit for bit.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

PREFIX = "influence/"  # of the metrics' names


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of a scalar loss at each parameter, in its shape; zeros where the loss does not depend on it.

    The graph stays, for the other losses and for the backward pass.
    """
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(found)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of the tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def norm(gradient: Tensor) -> Tensor:
    """Euclidean length of a vector, 0-d."""
    length: Tensor = torch.linalg.vector_norm(gradient)
    return length


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of the angle between two vectors, 0-d, between -1 and 1; NaN where one of them is 0.

    1: one step along either lowers both losses; -1: what lowers one raises the other.
    """
    return torch.dot(one / norm(one), other / norm(other)).clamp(-1, 1)
