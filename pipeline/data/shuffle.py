"""Order of training rows: one permutation per epoch, with random access to its batches."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


class Shuffle(Sequence[Rows]):
    """Batches of one epoch: a permutation of the rows that depends only on seed and epoch, cut into batches."""

    def __init__(self, rows: int, batch_size: int, seed: int, epoch: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, [seed, epoch]

    @cached_property
    def order(self) -> Rows:
        return np.random.Generator(np.random.PCG64(self.seed)).permutation(self.rows)

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.order[index * self.batch_size : (index + 1) * self.batch_size]
