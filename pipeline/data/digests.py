"""Combined SHA-256 of files, and 64-bit hashes of texts and row numbers."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.storage.files import file_sha256

FNV_START, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


def combined_sha256(files: Iterable[Path]) -> str:
    """SHA-256 (hex) of the concatenated hex digests of several files."""
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def text_hashes(texts: pa.Array) -> npt.NDArray[np.uint64]:
    """FNV-1a (64 bits) of the UTF-8 bytes of each text, finalised as in SplitMix64. Texts must not be null."""
    copy = pa.concat_arrays([texts.cast(pa.string())])  # a copy has no slice offset
    _, offsets, text = copy.buffers()
    starts = np.frombuffer(offsets, dtype=np.int32)[copy.offset : copy.offset + len(copy) + 1].astype(np.int64)
    letters = np.frombuffer(text, dtype=np.uint8) if text is not None else np.zeros(0, dtype=np.uint8)
    lengths = np.diff(starts)
    longest_first = np.argsort(-lengths, kind="stable")
    hashes = np.full(len(lengths), FNV_START, dtype=np.uint64)
    for position in range(lengths.max(initial=0)):
        longer = longest_first[: np.searchsorted(-lengths[longest_first], -position)]
        hashes[longer] = (hashes[longer] ^ letters[starts[longer] + position]) * FNV_PRIME
    return splitmix64(hashes)


def split_positions(keys: npt.NDArray[np.uint64], seed: int, shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """Assign each row to one of the shares by a hash of its key and the seed, independently of batches and files.

    keys: [rows]. shares: relative to their sum.
    """
    start = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    uniform = (splitmix64(keys ^ start) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    borders = np.cumsum(shares)
    return np.searchsorted(borders[:-1] / borders[-1], uniform, side="right")


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a permutation of the 64-bit integers."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)  # overflow in arrays wraps around without a warning
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
