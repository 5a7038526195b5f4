"""Write a prepared folder: Parquet splits, vocabulary, and their description in `schema.json`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.recut import Recut
from pipeline.data.schema import (
    FIRST_ID,
    LABELS,
    MISSING,
    OUT_OF_VOCABULARY,
    SAMPLE_WEIGHT,
    SCHEMA_FILE,
    SPLITS,
    VOCABULARY_FILE,
    BaseRates,
    DataSchema,
    Feature,
    Split,
)
from pipeline.errors import UserError
from pipeline.storage.files import file_sha256

Vocabularies = Mapping[str, pa.Table]  # feature -> columns value and count, in the order of the ids

ROW_GROUP_ROWS = 65_536
# the schema comes last: a folder without it is incomplete
FILES = (*(f"{split}.parquet" for split in SPLITS), VOCABULARY_FILE, SCHEMA_FILE)
VOCABULARY_SCHEMA = pa.schema(
    [("feature", pa.string()), ("value", pa.string()), ("id", pa.int32()), ("count", pa.int64())]
)


def write_folder(
    folder: Path,
    features: Sequence[Feature],
    vocabularies: Vocabularies,
    tables: Iterable[tuple[pa.Table, npt.NDArray[np.integer[Any]]]],
    group_rows: int | None = None,
    sample_weight: bool = False,
    **described: Any,
) -> DataSchema:
    """Write vocabulary, splits and schema.

    tables: encoded rows, with the index in SPLITS of each row's split. group_rows: rows per Parquet row group.
    sample_weight: the rows have a column `sample_weight`. described: other fields of `DataSchema`.
    """
    _write_vocabularies(vocabularies, folder / VOCABULARY_FILE)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                SplitWriter(folder / f"{split}.parquet", features, group_rows or ROW_GROUP_ROWS, sample_weight)
            )
            for split in SPLITS
        }
        for table, positions in tables:
            for number, writer in enumerate(writers.values()):
                writer.add(table.filter(pa.array(positions == number)))
    splits = {split: writer.described() for split, writer in writers.items()}
    schema = DataSchema(
        features=tuple(
            feature if feature.kind == "numeric" else feature.model_copy(update={
                "out_of_vocabulary": {split: each.out_of_vocabulary(feature.name) for split, each in writers.items()}
            })
            for feature in features
        ),
        splits=splits,
        base_rates=writers["train"].base_rates(),
        sample_weight=sample_weight,
        vocabulary_sha256=file_sha256(folder / VOCABULARY_FILE),
        **described,
    )  # fmt: skip
    schema.write(folder)
    return schema


class SplitWriter:
    """Writer of one Parquet split. Its row groups, and therefore its bytes, do not depend on the batches."""

    def __init__(self, file: Path, features: Sequence[Feature], group_rows: int, sample_weight: bool) -> None:
        self.file, self.rows = file, 0
        self._weights = np.zeros(3) if sample_weight else None  # sums: of all rows, of clicks, of conversions
        self._sums = Counter(dict.fromkeys(LABELS, 0))
        self._unknown = Counter({feature.name: 0 for feature in features if feature.kind != "numeric"})
        self._known = self._unknown.copy()
        self._group_rows, self._recut = group_rows, Recut(group_rows)
        self._writer = pq.ParquetWriter(file, arrow_schema(features, sample_weight), compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._writer:
            for piece in self._recut.rest() if failed is None else ():
                self._write(piece)

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        for label in LABELS:
            self._sums[label] += int(table[label].to_numpy().sum())
        for name in self._unknown:
            ids = table[name].combine_chunks()
            ids = (ids.flatten() if pa.types.is_list(ids.type) else ids).to_numpy(zero_copy_only=False)
            self._unknown[name] += int((ids == OUT_OF_VOCABULARY).sum())
            self._known[name] += int((ids > MISSING).sum())
        for piece in self._recut.add(table):
            self._write(piece)

    def base_rates(self) -> BaseRates:
        if self._weights is None:
            return self.described().base_rates
        return BaseRates.of_counts(*self._weights.tolist())

    def described(self) -> Split:
        clicks, conversions = (self._sums[label] for label in LABELS)
        return Split(
            file=self.file.name, rows=self.rows, clicks=clicks, conversions=conversions, sha256=file_sha256(self.file)
        )

    def out_of_vocabulary(self, name: str) -> float:
        """Share of ids that are out of vocabulary; missing values are not counted."""
        return self._unknown[name] / max(1, self._unknown[name] + self._known[name])

    def _write(self, piece: pa.Table) -> None:
        if self._weights is not None:
            self._weights += weight_sums(piece)
        self._writer.write_table(piece, row_group_size=self._group_rows)


def weight_sums(table: pa.Table) -> npt.NDArray[np.float64]:
    """Sums of the weights of all rows, of the clicks and of the conversions."""
    weight = table[SAMPLE_WEIGHT].to_numpy().astype(np.float64)
    return np.array([weight.sum(), *(weight[table[label].to_numpy() != 0].sum() for label in LABELS)])


def arrow_schema(features: Sequence[Feature], sample_weight: bool = False) -> pa.Schema:
    """Arrow schema of the Parquet splits."""
    fields = [(label, pa.int8()) for label in LABELS]
    if sample_weight:
        fields.append((SAMPLE_WEIGHT, pa.float32()))
    for feature in features:
        kinds = {"categorical": pa.int32(), "multi": pa.list_(pa.int32()), "numeric": pa.float32()}
        fields.append((feature.name, kinds[feature.kind]))
        if feature.weighted:
            fields.append((f"{feature.name}.weights", pa.list_(pa.float32())))
    return pa.schema(fields)


def check_not_overwritten(folder: Path, data: Path, files: Iterable[Path]) -> None:
    """Refuse an output folder whose files would overwrite the data."""
    outputs = {(folder / name).resolve() for name in FILES}
    if data.resolve() == folder.resolve() or any(file.resolve() in outputs for file in files):
        raise UserError(f"output_dir {folder}: would write over the data, allowed: another folder")


def check_training_rows(data: Path, training: int, rows: int) -> None:
    if not training:
        problem = f"{rows} rows, none of them in the training split" if rows else "no rows"
        raise UserError(f"{data}: {problem}, allowed: at least one training row")


def _write_vocabularies(vocabularies: Vocabularies, file: Path) -> None:
    with pq.ParquetWriter(file, VOCABULARY_SCHEMA, compression="zstd") as writer:
        for name, table in vocabularies.items():
            ids = np.arange(FIRST_ID, FIRST_ID + table.num_rows, dtype=np.int32)
            columns = [pa.repeat(name, table.num_rows), table["value"], pa.array(ids), table["count"]]
            writer.write_table(pa.table(columns, schema=VOCABULARY_SCHEMA), row_group_size=131_072)
