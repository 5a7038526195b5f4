"""Weights on disk, whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict so that the file is always a complete one: the new or the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, partial)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)


def load_weights(model: nn.Module, file: Path) -> None:
    """Put saved weights into the model; names and shapes must be the model's."""
    model.load_state_dict(load_file(file))
