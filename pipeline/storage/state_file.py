"""The file of a training state, written by `torch.save` and read with `weights_only=True`, which runs no code.

A state is a nested structure of dicts (keys: strings or integers), lists, tuples, None, bool, int, float, str and
dense tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.storage.files import Entry, write_hashed

TENSOR_BYTES, VALUE_BYTES = 1 << 10, 1 << 5  # estimated overhead of a tensor, and of a value with its key


def write_state(file: Path, state: Mapping[str, Any]) -> Entry:
    """Write a state; numpy scalars become Python numbers, mappings dicts, and parameters tensors.

    Raises:
        TypeError: the state contains an unsupported value; the message names its path.
        OSError: the disk is full or fails.
    """
    plain = _plain(state, "", set())
    return write_hashed(file, lambda stream: torch.save(plain, cast(IO[bytes], stream)))


def read_state(file: Path) -> dict[str, Any]:
    """Read a state, with its tensors on the CPU.

    Raises:
        ValueError: the file does not contain a state.
        OSError: the file cannot be read.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many types of errors for a damaged file
        if "can't allocate memory" in str(error):
            raise
        raise ValueError("found no state in it") from error
    if not isinstance(state, dict):
        raise ValueError("found no state in it")
    return state


def state_bytes(value: Any) -> int:
    """Upper estimate of the size of a state's file in bytes."""
    if isinstance(value, Tensor):
        return value.nbytes + TENSOR_BYTES
    if isinstance(value, Mapping):
        return sum(state_bytes(key) + state_bytes(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return sum(map(state_bytes, value)) + VALUE_BYTES
    return VALUE_BYTES + (len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else 0)


def _plain(value: Any, path: str, storages: set[int]) -> Any:
    """Convert a part of a state to plain values and separate tensors.

    path: the keys that lead to it. storages: addresses of the tensor storages converted so far.
    """

    def inner(key: object, part: Any) -> Any:
        return _plain(part, f"{path}/{key}" if path else str(key), storages)

    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"state {path}: found a tensor of {value.dtype}, {value.layout}, allowed: a dense one")
        return _separate(value.detach(), storages)
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"state {path}: found key {key!r}, allowed: text and whole numbers")
        return {key: inner(key, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [inner(index, part) for index, part in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"state {path}: found {type(value).__name__}, which is no part of a state")


def _separate(tensor: Tensor, storages: set[int]) -> Tensor:
    """Copy the tensor if it shares its storage or uses only a part of it, since `torch.save` writes whole storages."""
    storage = tensor.untyped_storage()
    dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # empty_like has no gaps or overlaps
    if not dense or storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
        tensor = tensor.clone()
        storage = tensor.untyped_storage()
    storages.add(storage.data_ptr())
    return tensor
