"""Files of model weights in the safetensors format."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import TrainingError, os_errors
from pipeline.storage.files import Damaged, replacing


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict; the file is replaced atomically.

    Raises:
        TrainingError: the disk is full or fails.
    """
    with os_errors(file, TrainingError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for leftover in file.parent.glob(".tmp*"):  # temporary files of safetensors, left by a killed process
            leftover.unlink()
        with replacing(file, durable=True) as work:
            try:
                save_file(_separate(weights), work)
            except SafetensorError as error:
                raise TrainingError(f"{file}: {error}") from None
            work.chmod(0o644)  # other users cannot read the files that safetensors writes


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        tensor = weight.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; the tensors are copies on the CPU.

    Raises:
        Damaged: the file cannot be read, or is not a safetensors file.
    """
    try:
        with os_errors(file, Damaged):  # memory-mapping the file and copying the tensors is faster than reading it
            return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise Damaged(f"{file}: found no file of tensors: {error}") from None


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the weights to the CPU, each contiguous and in its own storage, as safetensors requires."""
    separate: dict[str, Tensor] = {}
    storages = set[int]()
    for name, weight in weights.items():
        tensor = weight.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate
