"""Prepared folders that another program wrote: `describe` writes their schema.json, `verify` holds files to it.

Both read all rows once; memory grows with the vocabulary alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.tasks.mmoe.impression_table import check_files, record_batches, told
from pipeline.tasks.mmoe.schema import (
    FIRST_ID,
    LABELS,
    SPLITS,
    VOCABULARY_FILE,
    BaseRates,
    DataSchema,
    Feature,
    Split,
    parts,
    sha256_of,
    sha256_of_parts,
)


def describe(folder: Path, features: Sequence[Feature], source: str = "") -> DataSchema:
    """Write `schema.json` beside a vocabulary and splits that are there: with rows, labels and digests as they are.

    A split is the file `<split>.parquet`, or the folder `<split>` of Parquet files. features: what they cannot tell
    themselves, kind and size of each, edges of numeric ones.

    Raises:
        UserError: a file is missing or damaged, or not as the features say.
    """
    splits = {split: _split(folder, split if (folder / split).is_dir() else f"{split}.parquet") for split in SPLITS}
    schema = DataSchema(
        features=tuple(features),
        splits=splits,
        base_rates=_base_rates(splits["train"]),
        vocabulary_sha256=_digest(folder / VOCABULARY_FILE),
        source=source,
    )
    _check(folder, schema)
    schema.write(folder)
    return schema


def verify(folder: Path) -> DataSchema:
    """Is every file of a prepared folder what its schema.json says?

    Raises:
        UserError: one is not; names it, what was found and what is allowed.
    """
    schema = DataSchema.read(folder)
    check_files(folder, schema)
    for name, split in schema.splits.items():
        _equal(folder / split.file, f"splits.{name}", _split(folder, split.file), split)
    _equal(folder / VOCABULARY_FILE, "vocabulary_sha256", _digest(folder / VOCABULARY_FILE), schema.vocabulary_sha256)
    if "train" in schema.splits:
        _equal(folder, "base_rates", _base_rates(schema.splits["train"]), schema.base_rates)
    _check(folder, schema)
    return schema


def _equal(file: Path, key: str, found: object, allowed: object) -> None:
    if found != allowed:
        raise UserError(f"{file}: found {found}, allowed: {key} of schema.json, {allowed}")


def _split(folder: Path, name: str) -> Split:
    rows, sums = 0, dict.fromkeys(LABELS, 0)
    for part, table in _tables(folder / name, LABELS):
        labels = {label: table[label].to_numpy() for label in LABELS}
        for label, values in labels.items():
            _hold(np.isin(values, (0, 1)), part, label, "0 or 1 in every row")
            sums[label] += int(values.sum())
        _hold(labels["conversion"] <= labels["click"], part, "conversion", "conversions of clicked rows")
        rows += table.num_rows
    return Split(
        file=name, rows=rows, clicks=sums["click"], conversions=sums["conversion"], sha256=_digest(folder / name)
    )


def _base_rates(train: Split) -> BaseRates:
    return BaseRates(ctr=train.clicks / max(1, train.rows), cvr=train.conversions / max(1, train.clicks))


def _digest(file: Path) -> str:
    with told(file):
        digests = [sha256_of(part) for part in parts(file)]
        return sha256_of_parts(digests) if file.is_dir() else digests[0]


def _check(folder: Path, schema: DataSchema) -> None:
    """Kinds, ids and numbers of the columns; the vocabulary's ids."""
    floats = [feature.name for feature in schema.features if feature.kind == "numeric"]
    floats += [f"{feature.name}.weights" for feature in schema.features if feature.weighted]
    for name, split in schema.splits.items():
        file = folder / split.file
        with told(file):
            for _ in record_batches(file, schema, name):  # which is what training reads
                pass
        for part, table in _tables(file, floats) if floats else ():
            for column in floats:
                values = table[column].combine_chunks()
                flat = values.flatten() if pa.types.is_list(values.type) else values
                _hold(np.isfinite(flat.to_numpy(zero_copy_only=False)), part, column, "finite numbers")
    file = folder / VOCABULARY_FILE
    with told(file):
        vocabulary = pq.read_table(file)
    for column, kind in (("feature", pa.string()), ("value", pa.string()), ("id", pa.int32()), ("count", pa.int64())):
        if column not in vocabulary.column_names or vocabulary[column].type != kind:
            raise UserError(f"{file}: column {column} is not there as {kind}")
    for feature in schema.features:
        if feature.kind != "numeric":
            own = vocabulary.filter(pc.field("feature") == feature.name)
            rows = feature.size - FIRST_ID - feature.hash_buckets
            numbered = np.array_equal(own["id"].to_numpy(), np.arange(FIRST_ID, FIRST_ID + rows))
            if not numbered or own["value"].null_count or len(own["value"].unique()) != rows:
                raise UserError(
                    f"{file}: feature {feature.name}: found {own.num_rows} rows, allowed: its {rows} values (size "
                    f"{feature.size} less {FIRST_ID} and {feature.hash_buckets} hashed), each once, with the ids "
                    f"{FIRST_ID} to {FIRST_ID + rows - 1} in this order"
                )


def _tables(file: Path, columns: Sequence[str]) -> Iterator[tuple[Path, pa.Table]]:
    """The columns of a split, by part, some rows at a time."""
    with told(file):
        found = parts(file)
    for part in found:
        with told(part):
            reader = pq.ParquetFile(part, pre_buffer=False)
            for column in columns:
                if column not in reader.schema_arrow.names:
                    raise UserError(f"{part}: no column {column}")
            for batch in reader.iter_batches(columns=list(columns)):
                yield part, pa.Table.from_batches([batch])


def _hold(holds: np.ndarray[Any, np.dtype[np.bool_]], part: Path, column: str, allowed: str) -> None:
    if not holds.all():
        raise UserError(f"{part}: column {column} is not as the contract says, allowed: {allowed}")
