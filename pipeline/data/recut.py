"""Regroup a stream of tables into tables with a fixed number of rows."""

from collections.abc import Iterator

import pyarrow as pa


class Recut:
    """Cut a stream of tables into tables of `rows` rows each; the last one may be shorter."""

    def __init__(self, rows: int) -> None:
        self.rows, self._pending, self._count = rows, list[pa.Table](), 0

    def add(self, table: pa.Table) -> Iterator[pa.Table]:
        self._pending.append(table)
        self._count += table.num_rows
        if self._count < self.rows:
            return
        whole = pa.concat_tables(self._pending)
        cut = self._count - self._count % self.rows
        self._pending, self._count = [whole.slice(cut)], self._count - cut
        for start in range(0, cut, self.rows):
            yield whole.slice(start, self.rows).combine_chunks()

    def rest(self) -> Iterator[pa.Table]:
        if self._count:
            yield pa.concat_tables(self._pending).combine_chunks()
        self._pending, self._count = [], 0
