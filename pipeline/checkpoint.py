"""Tensors on disk, whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.names import TRUNK_FILES

STATE_FILE = TRUNK_FILES[1]


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict so that the file is always a complete one: the new or the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, partial)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that `save_weights` wrote, on the CPU."""
    return load_file(file)


def save_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write a training's state, of tensors and plain values, into the folder."""
    with (folder / STATE_FILE).open("wb") as stream:
        torch.save(dict(state), stream)
        stream.flush()
        os.fsync(stream.fileno())


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote, its tensors on the CPU; holds no code. Optimizers move theirs to their parameters."""
    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    return state
