"""Tokenised reviews in memory, and batches of reviews of similar length with a limit on tokens.

N = reviews, A = aspects, B = reviews of a batch, L = tokens of its longest review.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import os_errors
from pipeline.maths.arrays import Floats, Ints
from pipeline.storage.files import replacing
from pipeline.tasks.base import Rows
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS
from pipeline.tasks.visobert.tokenizer import Tokenizer, Tokens

LENGTH_JITTER = 0.04  # random increase of lengths before sorting, as a share, so that batches differ between epochs


@dataclass(frozen=True)
class ReviewBatch:
    """A batch: padded token ids of reviews, with their labels."""

    ids: Tensor  # [B, L] int32
    mask: Tensor  # [B, L] bool, false where padded
    labels: Tensor  # [B, A] int8, codes as in `sentiments`

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: str) -> "ReviewBatch":
        if device == "cpu":
            return self
        return ReviewBatch(*(part.to(device, non_blocking=True) for part in (self.ids, self.mask, self.labels)))


class ReviewTable:
    """Tokens and labels of a split, in memory."""

    def __init__(self, tokens: Tokens, labels: npt.NDArray[np.int8], pad_id: int) -> None:
        self.lengths = torch.from_numpy(tokens.lengths)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.labels, self.pad_id = torch.from_numpy(labels), pad_id
        self.ids = torch.from_numpy(np.append(tokens.ids, np.int32(pad_id)))  # the last id is used for padding

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Rows) -> ReviewBatch:
        """Gather rows in the given order, padded to the length of the longest."""
        index = torch.from_numpy(rows)
        lengths = self.lengths[index]
        position = torch.arange(int(lengths.max()))
        mask = position < lengths.unsqueeze(1)
        source = torch.where(mask, self.starts[index].unsqueeze(1) + position, len(self.ids) - 1)
        return ReviewBatch(self.ids[source], mask, self.labels[index])


def length_buckets(
    lengths: Ints,
    batch_size: int,
    batch_tokens: int,
    generator: np.random.Generator | None = None,
    repeats: Floats | None = None,
) -> list[Rows]:
    """Divide rows into batches of similar length, of at most `batch_size` rows and `batch_tokens` tokens.

    Padding counts as tokens. A review with more tokens is a batch of its own.

    `generator`: for training; rows are shuffled and sorted by slightly jittered length, so that batches contain reviews
    of similar length, but different ones every epoch; then the batches are shuffled. None = all rows sorted by length,
    for evaluation.

    `repeats`: [N], average number of times that each row is drawn in training: the integer part, plus one more with
    the probability of the fractional part.
    """
    rows = np.arange(len(lengths))
    if generator is None:
        order = rows[np.argsort(lengths, kind="stable")]
    else:
        if repeats is not None:
            rows = np.repeat(rows, (repeats + generator.random(len(rows))).astype(np.int64))
        shuffled = generator.permutation(rows)
        jittered = lengths[shuffled] * (1 + LENGTH_JITTER * generator.random(len(shuffled)))
        order = shuffled[np.argsort(jittered, kind="stable")]
    batches = [order[first:last] for first, last in pairwise(_bounds(lengths[order], batch_size, batch_tokens))]
    if generator is None:
        return batches
    return [batches[index] for index in generator.permutation(len(batches))]


def _bounds(lengths: Ints, batch_size: int, batch_tokens: int) -> list[int]:
    """Boundaries of consecutive batches, each as large as both limits allow."""
    bounds = [0]
    while bounds[-1] < len(lengths):
        first = bounds[-1]
        window = lengths[first : first + batch_size]
        padded = np.maximum.accumulate(window) * np.arange(1, len(window) + 1)
        bounds.append(first + max(1, int(np.searchsorted(padded, batch_tokens, side="right"))))
    return bounds


def capped_repeats(labels: npt.NDArray[np.int8], ratio: float) -> Floats:
    """Average number of times that oversampling draws each review in an epoch. labels: [N, A] -> [N]

    It is the count of the most frequent sentiment divided by that of the review's rarest sentiment, but at most
    `ratio`. Reviews without a sentiment are drawn once.
    """
    counts = np.array([(labels == sentiment).sum() for sentiment in range(len(SENTIMENTS))])
    times = np.minimum(ratio, counts.max() / np.maximum(1, counts))
    repeats = np.ones(len(labels))
    for sentiment in range(len(SENTIMENTS)):
        repeats = np.where((labels == sentiment).any(1), np.maximum(repeats, times[sentiment]), repeats)
    return repeats


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, cache: Path) -> Tokens:
    """Tokenise texts, or read their tokens from `cache`, where they are stored by a digest of tokenizer and texts."""
    digest = hashlib.sha256(f"{tokenizer.digest} {max_tokens}".encode())
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    file = cache / "tokens" / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Tokens(arrays["ids"], arrays["lengths"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass  # missing or damaged: tokenise again
    tokens = tokenizer.encode(texts, max_tokens)
    with os_errors(f"data.cache {cache}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, str(os.getpid())) as work, work.open("wb") as stream:
            np.savez(stream, ids=tokens.ids, lengths=tokens.lengths)
    return tokens
