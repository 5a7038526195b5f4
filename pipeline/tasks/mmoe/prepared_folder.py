"""What `prepare_ctr` writes: Parquet splits, vocabulary and what `schema.json` says of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.tasks.mmoe.raw_files import Recut
from pipeline.tasks.mmoe.schema import (
    FIRST_ID,
    LABELS,
    MISSING,
    OUT_OF_VOCABULARY,
    SCHEMA_FILE,
    SPLITS,
    VOCABULARY_FILE,
    BaseRates,
    DataSchema,
    Feature,
    Split,
    sha256_of,
)

Vocabularies = dict[str, pa.Table]

ROW_GROUP_ROWS = 65_536
# the schema last: a folder without one is not ready
FILES = (*(f"{split}.parquet" for split in SPLITS), VOCABULARY_FILE, SCHEMA_FILE)


@dataclass
class Tally:
    """What `schema.json` counts in a split."""

    rows: int
    sums: Counter[str]  # of the labels
    unknown: Counter[str]  # ids out of vocabulary, by feature
    known: Counter[str]  # ids in it

    @classmethod
    def of(cls, features: Sequence[Feature]) -> Self:
        """Nothing yet."""
        names = [feature.name for feature in features if feature.kind != "numeric"]
        return cls(0, *(Counter(dict.fromkeys(keys, 0)) for keys in (LABELS, names, names)))

    def add(self, table: pa.Table) -> None:
        """Rows as the splits hold them."""
        self.rows += table.num_rows
        for label in self.sums:
            self.sums[label] += int(table[label].to_numpy().sum())
        for name in self.unknown:
            ids = table[name].combine_chunks()
            ids = (ids.flatten() if pa.types.is_list(ids.type) else ids).to_numpy(zero_copy_only=False)
            self.unknown[name] += int((ids == OUT_OF_VOCABULARY).sum())
            self.known[name] += int((ids > MISSING).sum())

    def split(self, file: str, sha256: str) -> Split:
        clicks, conversions = (self.sums[label] for label in LABELS)
        return Split(file=file, rows=self.rows, clicks=clicks, conversions=conversions, sha256=sha256)

    def out_of_vocabulary(self, name: str) -> float:
        """Of the ids that are there, the share that is out of vocabulary; a missing value is no id."""
        return self.unknown[name] / max(1, self.unknown[name] + self.known[name])


class SplitWriter:
    """One Parquet split: row groups of one size, whatever the batches, so that its bytes depend on the data alone."""

    def __init__(self, file: Path, schema: DataSchema, group_rows: int | None = None) -> None:
        self.file, self.tally = file, Tally.of(schema.features)
        self._rows = group_rows or ROW_GROUP_ROWS
        self._recut = Recut(self._rows)
        self._writer = pq.ParquetWriter(file, arrow_schema(schema.features), compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._writer:
            for piece in self._recut.rest() if failed is None else ():
                self._writer.write_table(piece, row_group_size=self._rows)

    def add(self, table: pa.Table) -> None:
        self.tally.add(table)
        for piece in self._recut.add(table):
            self._writer.write_table(piece, row_group_size=self._rows)

    def described(self) -> tuple[Split, Tally]:
        return self.tally.split(self.file.name, sha256_of(self.file)), self.tally


def with_splits(schema: DataSchema, found: Mapping[str, tuple[Split, Tally]]) -> DataSchema:
    """The whole schema, when the splits are written."""
    features = tuple(
        feature if feature.kind == "numeric" else feature.model_copy(update={
            "out_of_vocabulary": {split: tally.out_of_vocabulary(feature.name) for split, (_, tally) in found.items()}
        })
        for feature in schema.features
    )  # fmt: skip
    splits = {split: described for split, (described, _) in found.items()}
    train = splits["train"]
    rates = BaseRates(ctr=train.clicks / train.rows, cvr=train.conversions / max(1, train.clicks))
    return schema.model_copy(update={"features": features, "splits": splits, "base_rates": rates})


def arrow_schema(features: Sequence[Feature]) -> pa.Schema:
    """Of the Parquet splits."""
    fields = [(label, pa.int8()) for label in LABELS]
    for feature in features:
        kinds = {"categorical": pa.int32(), "multi": pa.list_(pa.int32()), "numeric": pa.float32()}
        fields.append((feature.name, kinds[feature.kind]))
        if feature.weighted:
            fields.append((f"{feature.name}.weights", pa.list_(pa.float32())))
    return pa.schema(fields)


def write_vocabularies(vocabularies: Iterable[tuple[str, pa.Table]], file: Path) -> None:
    schema = pa.schema([("feature", pa.string()), ("value", pa.string()), ("id", pa.int32()), ("count", pa.int64())])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for name, table in vocabularies:
            ids = np.arange(FIRST_ID, FIRST_ID + table.num_rows, dtype=np.int32)
            columns = [pa.repeat(name, table.num_rows), table["value"], pa.array(ids), table["count"]]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=131_072)


def refuse_own_data(folder: Path, data: Path, files: Sequence[Path]) -> None:
    outputs = {(folder / name).resolve() for name in FILES}
    if data.resolve() == folder.resolve() or any(file.resolve() in outputs for file in files):
        raise UserError(f"output_dir {folder}: would write over the data, allowed: another folder")
