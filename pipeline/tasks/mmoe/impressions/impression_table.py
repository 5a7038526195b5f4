"""A split of impressions as batches, gathered without Python per row or per feature."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.schema import DataSchema
from pipeline.data.split_files import open_streams, read_truth
from pipeline.data.streams import Streams
from pipeline.tasks.base import Rows
from pipeline.tasks.mmoe.impressions.embedding import grouped
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions


class ImpressionTable:
    """A split: `batch(rows)` gathers any rows."""

    def __init__(self, streams: Streams, truth_file: Path | None = None) -> None:
        """truth_file: a split with the true probabilities."""
        self.streams, self._truth_file = streams, truth_file

    def __len__(self) -> int:
        return self.streams.rows

    @cached_property
    def truth(self) -> Mapping[str, npt.NDArray[np.float64]] | None:
        """The true probabilities `p_ctr` and `p_cvr`, if they are known."""
        return read_truth(self._truth_file) if self._truth_file else None

    @cached_property
    def labels(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
        """click and conversion of every row."""
        return self.streams.labels()

    def batch(self, rows: Rows, *, training: bool = False) -> Impressions:
        """The rows, in their order; training: with the groups that the table's gradient needs."""
        gathered = self.streams.gather(np.asarray(rows, dtype=np.int64))
        return Impressions(
            torch.from_numpy(gathered.click),
            torch.from_numpy(gathered.conversion),
            torch.from_numpy(gathered.numeric),
            torch.from_numpy(gathered.ids),
            torch.from_numpy(gathered.weights),
            torch.from_numpy(gathered.starts),
            grouped(gathered.ids, gathered.bags, gathered.weights) if training else None,
        )

    def batches(self, size: int, first: int = 0, last: int | None = None) -> Sequence[Rows]:
        """The rows `first` to `last - 1`, by default all, in batches of at most `size`."""
        last = len(self) if last is None else last
        return np.array_split(np.arange(first, last), max(1, -(-(last - first) // size)))


def read_split(folder: Path, schema: DataSchema, split: str) -> ImpressionTable:
    """A split of a prepared folder.

    Raises:
        UserError: its Parquet is missing, cut, or differs from the schema.
    """
    streams = open_streams(folder, schema, split)
    return ImpressionTable(streams, folder / schema.splits[split].file if schema.truth else None)
