"""Counts, means and quantiles of the training split's columns, in bounded memory and independent of batches."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.canonical_text import respelt, spellings
from pipeline.data.cells import Floats, Ints, Texts
from pipeline.data.digests import splitmix64

SAMPLE_ROWS = 200_000
BLOCK_ROWS = 65_536


class Counts:
    """Counts the occurrences of each text. Memory use grows only with the number of distinct texts."""

    def __init__(self) -> None:
        self._parts = [pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())})]
        self._rows = self._merged_rows = 0
        self._spellings = {"whole", "truth"}
        self._any = False

    def add(self, texts: Texts, rows: npt.NDArray[np.bool_]) -> None:
        """Count the texts of the rows where `rows` is true. The spelling is derived from all rows."""
        if self._spellings and texts.values.null_count < len(texts.values):
            self._any = True
            self._spellings &= spellings(texts.values)
        counts = np.bincount(texts.codes[rows], minlength=len(texts.values))
        present = pa.array(counts > 0)
        part = pa.table({"value": texts.values.filter(present), "count": pa.array(counts).filter(present)})
        self._parts.append(part)
        self._rows += part.num_rows
        if self._rows > 2 * self._merged_rows + 1_000_000:
            self._merge()

    @property
    def spelling(self) -> str:
        """Spelling of the column; see `Feature.spelling`."""
        return next(iter(self._spellings), "text") if self._any else "text"

    def vocabulary(self, min_count: int) -> pa.Table:
        """Columns value and count, sorted by descending count and then by text, without missing and rare texts."""
        self._merge()
        self._parts = [self._parts[0].set_column(
            0, "value", respelt(self._parts[0]["value"].combine_chunks(), self.spelling)
        )]  # fmt: skip
        self._merge()
        table = self._parts[0]
        table = table.filter(pc.and_(pc.is_valid(table["value"]), pc.greater_equal(table["count"], min_count)))
        return table.sort_by([("count", "descending"), ("value", "ascending")])

    def _merge(self) -> None:
        whole = pa.concat_tables(self._parts).group_by("value").aggregate([("count", "sum")])
        self._parts = [whole.rename_columns(["value", "count"])]
        self._rows = self._merged_rows = whole.num_rows


class Numbers:
    """Means and a uniform sample of rows of numeric columns; NaN means missing.

    The sample consists of the rows whose row numbers have the smallest hashes, so it does not depend on batches.
    """

    def __init__(self, columns: int, sample_rows: int = SAMPLE_ROWS) -> None:
        self.sample_rows = sample_rows
        self._sums, self._counts = np.zeros(columns), np.zeros(columns, dtype=np.int64)
        self._block = np.empty((0, columns))
        self._keys = np.empty(0, dtype=np.uint64)
        self._sample = np.empty((0, columns))
        self._limit = np.uint64(2**64 - 1)  # rows with larger hashes are excluded

    def add(self, numbers: Ints, values: Floats) -> None:
        """Add rows. numbers: [rows] number of each row among all rows. values: [rows, columns]."""
        # rounding of a sum depends on its blocks, so always cut at the same rows
        self._block = np.concatenate([self._block, values])
        whole = len(self._block) - len(self._block) % BLOCK_ROWS
        for start in range(0, whole, BLOCK_ROWS):
            self._add_block(self._block[start : start + BLOCK_ROWS])
        self._block = self._block[whole:]

        keys = splitmix64(numbers.astype(np.uint64))
        kept = keys <= self._limit
        self._keys = np.concatenate([self._keys, keys[kept]])
        self._sample = np.concatenate([self._sample, values[kept]])
        if len(self._keys) > 2 * self.sample_rows:
            self._shrink()

    def means(self) -> Floats:
        """Means of the values that are not missing, [columns]; NaN if all are missing."""
        self._add_block(self._block)
        self._block = self._block[:0]
        with np.errstate(invalid="ignore"):
            return self._sums / self._counts

    def sample(self) -> Floats:
        """The sample, [at most sample_rows, columns]."""
        self._shrink()
        return self._sample

    def _add_block(self, block: Floats) -> None:
        self._sums += np.nansum(np.ascontiguousarray(block.T), axis=1)
        self._counts += np.isfinite(block).sum(axis=0)

    def _shrink(self) -> None:
        if len(self._keys) > self.sample_rows:
            kept = np.argpartition(self._keys, self.sample_rows - 1)[: self.sample_rows]
            self._keys, self._sample = self._keys[kept], self._sample[kept]
            self._limit = self._keys.max()


def bin_edges(values: Sequence[float] | Floats, bins: int) -> tuple[float, ...]:
    """Bin edges of a piecewise-linear encoding: at most `bins` + 1, increasing, and distinct in float32.

    The edges are all distinct values if there are at most `bins` + 1. Otherwise they are the distinct quantiles of all
    values, plus as many quantiles of the values other than the most frequent one as fit. This matters if most values
    are equal: if 96% are 0, nearly all plain quantiles are 0.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float32))
    distinct, counts = np.unique(ordered, return_counts=True)
    if len(distinct) == 1:
        value = distinct[0]  # 1e9 + 1 equals 1e9 in float32: use the next float, or for the largest the previous
        with np.errstate(over="ignore"):
            above = max(value + np.float32(1), np.nextafter(value, np.float32(np.inf)))
        distinct = np.array([value, above] if np.isfinite(above) else [np.nextafter(value, np.float32(0)), value])
    if len(distinct) <= bins + 1:
        return _floats(distinct)
    edges = _quantiles(ordered, bins + 1)
    others = ordered[ordered != distinct[counts.argmax()]]
    for points in range(bins + 1, 1, -1):
        united = np.union1d(edges, _quantiles(others, points))
        if len(united) <= bins + 1:
            return _floats(united)
    return _floats(edges)


def _quantiles(ordered: npt.NDArray[np.float32], points: int) -> npt.NDArray[np.float32]:
    """Observed values at equally spaced ranks, including the smallest and the largest."""
    return np.unique(ordered[np.linspace(0, len(ordered) - 1, points).round().astype(np.int64)])


def _floats(edges: npt.NDArray[np.float32]) -> tuple[float, ...]:
    """Shortest decimals that round to the same float32."""
    return tuple(float(str(edge)) for edge in edges)
