"""Prepared folders written by other programs: `describe` writes schema.json, `verify` checks the files against it.

Both read all rows once. Memory use grows only with the vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.digests import combined_sha256
from pipeline.data.prepared_folder import VOCABULARY_SCHEMA, weight_sums
from pipeline.data.schema import (
    FIRST_ID,
    LABELS,
    SAMPLE_WEIGHT,
    SPLITS,
    VOCABULARY_FILE,
    BaseRates,
    DataSchema,
    Feature,
    Split,
    split_parts,
)
from pipeline.data.split_files import check_files, record_batches, split_errors
from pipeline.errors import UserError
from pipeline.storage.files import file_sha256


def describe(
    folder: Path,
    features: Sequence[Feature],
    source: str = "",
    *,
    sample_weight: bool = False,
    click_only: bool = False,
) -> DataSchema:
    """Compute and write `schema.json` for a folder that already has splits and vocabulary.

    Each split is a file `<split>.parquet` or a folder `<split>` of Parquet files. features: kind and size of each
    feature, and the edges of numeric ones, which the files do not contain. sample_weight: the splits have a column
    `sample_weight`. click_only: the data have no conversion labels; the column `conversion` is 0.

    Raises:
        UserError: a file is missing or damaged, or contradicts the features.
    """
    counted = {
        split: _counted(folder, split if (folder / split).is_dir() else f"{split}.parquet", sample_weight, click_only)
        for split in SPLITS
    }
    schema = DataSchema(
        features=tuple(features),
        splits={name: split for name, (split, _) in counted.items()},
        base_rates=counted["train"][1],
        sample_weight=sample_weight,
        click_only=click_only,
        vocabulary_sha256=_digest(folder / VOCABULARY_FILE),
        source=source,
    )
    _check(folder, schema)
    schema.write(folder)
    return schema


def verify(folder: Path) -> DataSchema:
    """Check every file of a prepared folder against its schema.json.

    Raises:
        UserError: a file differs. The message names the file, what was found and what is allowed.
    """
    schema = DataSchema.read(folder)
    check_files(folder, schema)
    for name, split in schema.splits.items():
        counted, rates = _counted(folder, split.file, schema.sample_weight, schema.click_only)
        _check_equal(folder / split.file, f"splits.{name}", counted, split)
        given = schema.base_rates
        if name == "train" and not np.allclose([rates.ctr, rates.cvr], [given.ctr, given.cvr], rtol=1e-9, atol=0):
            _check_equal(folder, "base_rates", rates, given)  # sums of weights may round differently
    vocabulary = folder / VOCABULARY_FILE
    _check_equal(vocabulary, "vocabulary_sha256", _digest(vocabulary), schema.vocabulary_sha256)
    _check(folder, schema)
    return schema


def _check_equal(file: Path, key: str, value: object, allowed: object) -> None:
    if value != allowed:
        raise UserError(f"{file}: found {value}, allowed: {key} of schema.json, {allowed}")


def _counted(folder: Path, name: str, sample_weight: bool, click_only: bool) -> tuple[Split, BaseRates]:
    """Count and check rows, labels and weights of a split."""
    rows, sums, weights = 0, dict.fromkeys(LABELS, 0), np.zeros(3)
    for part, table in _tables(folder / name, [*LABELS, *([SAMPLE_WEIGHT] if sample_weight else [])]):
        labels = {label: table[label].to_numpy() for label in LABELS}
        for label, values in labels.items():
            _check_all(np.isin(values, (0, 1)), part, label, "0 or 1 in every row")
            _check_all((values == 0) | (label != "conversion") | (not click_only), part, label, "0 in click-only data")
            sums[label] += int(values.sum())
        _check_all(labels["conversion"] <= labels["click"], part, "conversion", "conversions of clicked rows")
        if sample_weight:
            weight = table[SAMPLE_WEIGHT].to_numpy()
            _check_all((weight > 0) & np.isfinite(weight), part, SAMPLE_WEIGHT, "a finite number above 0 in every row")
            weights += weight_sums(table)
        rows += table.num_rows
    split = Split(
        file=name, rows=rows, clicks=sums["click"], conversions=sums["conversion"], sha256=_digest(folder / name)
    )
    return split, BaseRates.of_counts(*weights.tolist()) if sample_weight else split.base_rates


def _digest(file: Path) -> str:
    with split_errors(file):
        parts = split_parts(file)
        return combined_sha256(parts) if file.is_dir() else file_sha256(file)


def _check(folder: Path, schema: DataSchema) -> None:
    """Check the types, ids and numbers of all columns, and the ids of the vocabulary."""
    floats = [feature.name for feature in schema.features if feature.kind == "numeric"]
    floats += [f"{feature.name}.weights" for feature in schema.features if feature.weighted]
    for name, split in schema.splits.items():
        file = folder / split.file
        with split_errors(file):
            for _ in record_batches(file, schema, name):  # runs the same checks as training
                pass
        for part, table in _tables(file, floats) if floats else ():
            for column in floats:
                values = table[column].combine_chunks()
                flat = values.flatten() if pa.types.is_list(values.type) else values
                _check_all(np.isfinite(flat.to_numpy(zero_copy_only=False)), part, column, "finite numbers")
    file = folder / VOCABULARY_FILE
    with split_errors(file):
        vocabulary = pq.read_table(file)
    for field in VOCABULARY_SCHEMA:
        if field.name not in vocabulary.column_names or vocabulary[field.name].type != field.type:
            raise UserError(f"{file}: column {field.name} is not there as {field.type}")
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
    """Read columns of a split in batches; yields each batch with the path of its part."""
    with split_errors(file):
        parts = split_parts(file)
    for part in parts:
        with split_errors(part):
            reader = pq.ParquetFile(part, pre_buffer=False)
            for column in columns:
                if column not in reader.schema_arrow.names:
                    raise UserError(f"{part}: no column {column}")
            for batch in reader.iter_batches(columns=list(columns)):
                yield part, pa.Table.from_batches([batch])


def _check_all(valid: np.ndarray[Any, np.dtype[np.bool_]], part: Path, column: str, allowed: str) -> None:
    if not valid.all():
        raise UserError(f"{part}: column {column} is not as the contract says, allowed: {allowed}")
