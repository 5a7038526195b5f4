"""A split of impressions as batches, gathered without Python loops over rows or features."""

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
    """The impressions of a split; `batch(rows)` gathers arbitrary rows."""

    def __init__(self, streams: Streams, truth_file: Path | None = None) -> None:
        """truth_file: the split's file, if it contains the true probabilities."""
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

    def batch(self, rows: Rows, *, groups: bool = False) -> Impressions:
        """Gather rows in the given order. groups: add the groups, with which the CPU computes the table's gradient."""
        gathered = self.streams.gather(np.asarray(rows, dtype=np.int64))
        return Impressions(
            torch.from_numpy(gathered.click),
            torch.from_numpy(gathered.conversion),
            torch.from_numpy(gathered.numeric),
            torch.from_numpy(gathered.ids),
            torch.from_numpy(gathered.weights),
            torch.from_numpy(gathered.starts),
            grouped(gathered.ids, gathered.bags, gathered.weights) if groups else None,
            torch.from_numpy(gathered.sample_weight) if self.streams.sample_weight else None,
        )

    def batches(self, size: int, first: int = 0, last: int | None = None) -> Sequence[Rows]:
        """Divide the rows `first` to `last - 1` (default: all rows) into batches of at most `size`."""
        last = len(self) if last is None else last
        return np.array_split(np.arange(first, last), max(1, -(-(last - first) // size)))


def read_split(folder: Path, schema: DataSchema, split: str) -> ImpressionTable:
    """Open a split of a prepared folder.

    Raises:
        UserError: a Parquet file is missing, truncated or different from the schema.
    """
    streams = open_streams(folder, schema, split)
    return ImpressionTable(streams, folder / schema.splits[split].file if schema.truth else None)
