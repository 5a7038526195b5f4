"""Convert raw impressions to a prepared folder, according to a YAML that declares the columns.

CSV, JSON Lines and Parquet files are read twice, and memory use does not grow with the rows. The first pass reads
labels and the features of the training split; the second one writes the splits. For Ali-CCP files see aliccp.py.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config.strict_config import read_yaml, validate
from pipeline.data.cells import Floats
from pipeline.data.encoding import Encoder, filled
from pipeline.data.feature_statistics import Counts, Numbers, bin_edges
from pipeline.data.prepared_folder import (
    FILES,
    Vocabularies,
    check_not_overwritten,
    check_training_rows,
    write_folder,
)
from pipeline.data.raw_table import Batch, RawTable
from pipeline.data.schema import FIRST_ID, DataSchema, Feature
from pipeline.errors import UserError
from pipeline.storage.folders import published
from pipeline.tasks.mmoe.prepare.aliccp import prepare_aliccp
from pipeline.tasks.mmoe.prepare.aliccp_config import AliccpSource
from pipeline.tasks.mmoe.prepare.aliccp_scan import Progress
from pipeline.tasks.mmoe.prepare.labels_and_splits import LabelsAndSplits
from pipeline.tasks.mmoe.prepare.source_schema import SourceSchema


def prepare(
    data: Path,
    schema_file: Path,
    output_dir: Path,
    *,
    own: Mapping[str, Path] | None = None,
    batch_rows: int = 65_536,
    progress: Progress = lambda *_: None,
) -> DataSchema:
    """Write splits, vocabulary and `schema.json` into `output_dir`; write nothing if there is an error.

    Args:
        data: a file, or a folder whose files (of one format) are read in sorted order.
        own: split -> file or folder that is the whole split; the schema divides `data` among the other splits.
        progress: called with the stage, the rows done, and the share of the stage that is done (0 = unknown).

    Raises:
        UserError: the files are invalid. The message names file, row and column, what was found and what is allowed.
    """
    tree = read_yaml(schema_file)
    if tree.get("format") == "aliccp":
        if own:
            raise UserError(f"data.{next(iter(own))}: {schema_file} names the files of Ali-CCP itself (train, test)")
        return prepare_aliccp(data, validate(AliccpSource, tree, schema_file), schema_file, output_dir, progress)
    declared = validate(SourceSchema, tree, schema_file)
    source = RawTable(data, own or {}, declared.columns, declared.csv)
    plan = LabelsAndSplits(declared, schema_file, source)
    check_not_overwritten(output_dir, data, [file.path for file in source.files])
    with published(output_dir, FILES) as folder:
        training = TrainingSplit(plan)
        for batch in source.batches(plan.columns, batch_rows):
            training.add(batch)
            progress(data.name, training.all_rows, 0)
        check_training_rows(data, training.rows, training.all_rows)
        vocabularies = training.vocabularies()
        features = training.described(vocabularies)
        encoder = Encoder(
            features, plan.cells, {name: table["value"].to_pylist() for name, table in vocabularies.items()}
        )

        def tables() -> Iterator[tuple[pa.Table, np.ndarray]]:
            for batch in source.batches(plan.columns, batch_rows):
                columns = encoder.encode_columns(batch.columns, batch.place)
                yield pa.table(plan.row_columns(batch) | columns), plan.split(batch)
                done = batch.start + batch.rows
                progress("splits", done, done / training.all_rows)

        schema = write_folder(
            folder, features, vocabularies, tables(), sample_weight=declared.sample_weight is not None,
            click_only=declared.labels.conversion is None,
            missing_values=declared.missing_values, strip=declared.csv.strip, decimal=declared.csv.decimal,
            thousands=declared.csv.thousands, source=source.description(),
        )  # fmt: skip
        if sum(split.rows for split in schema.splits.values()) != training.all_rows:
            raise UserError(f"{data}: changed while it was read")
    return schema


class TrainingSplit:
    """Feature statistics of the training split. Collecting them also checks the cells of all splits."""

    def __init__(self, plan: LabelsAndSplits) -> None:
        self.plan, self.features = plan, plan.declared.features
        self.rows = self.all_rows = 0
        self._numeric = [name for name, feature in self.features.items() if feature.kind == "numeric"]
        self._numbers = Numbers(len(self._numeric))
        self._counts = {name: Counts() for name in self.features if name not in self._numeric}

    def add(self, batch: Batch) -> None:
        self.plan.row_columns(batch)  # checks labels and weights
        training = self.plan.split(batch) == 0
        self.all_rows += batch.rows
        self.rows += int(training.sum())
        for name, counts in self._counts.items():
            feature, column = self.features[name], batch.columns[name]
            if feature.kind == "categorical":
                counts.add(self.plan.cells.texts(column, name, batch.place), training)
            else:
                weights = batch.columns[feature.weights] if feature.weights else None
                bags = self.plan.cells.bags(name, column, weights, feature, batch.place)
                counts.add(bags.texts, training[bags.owners])
        if self._numeric:
            values = np.column_stack([self._values(name, batch) for name in self._numeric])
            self._numbers.add(batch.start + np.flatnonzero(training), values[training])

    def vocabularies(self) -> Vocabularies:
        return {name: counts.vocabulary(self.features[name].min_count) for name, counts in self._counts.items()}

    def described(self, vocabularies: Vocabularies) -> list[Feature]:
        """Features of the prepared folder.

        Raises:
            UserError: missing values should become the mean, but no training row has a value.
        """
        columns = zip(self._numbers.means(), self._numbers.sample().T, strict=True)
        numeric = dict(zip(self._numeric, columns, strict=True))
        features = []
        for name, declared in self.features.items():
            if name in numeric:
                mean, sample = numeric[name]
                fill = None if declared.missing == "error" else declared.missing
                if fill == "mean":
                    if np.isnan(mean):
                        key = f"{self.plan.schema_file}: features.{name}.missing"
                        raise UserError(f"{key}: found mean, but no training row has a value; allowed: a number")
                    fill = float(mean)
                values = sample if fill is None else np.where(np.isnan(sample), fill, sample)
                features.append(Feature(name=name, kind="numeric", fill=fill, edges=bin_edges(values, declared.bins)))
            else:
                size = FIRST_ID + vocabularies[name].num_rows + declared.hash_buckets
                keys = declared.model_dump(include={"separator", "weight_separator", "weights", "hash_buckets"})
                keys |= {"weighted": declared.weighted, "spelling": self._counts[name].spelling}
                features.append(Feature(name=name, kind=declared.kind, size=size, **keys))
        return features

    def _values(self, name: str, batch: Batch) -> Floats:
        """Numbers of a column. Missing values that will be replaced by the mean stay NaN."""
        values = self.plan.cells.numbers(batch.columns[name], name, batch.place)
        missing = self.features[name].missing
        fill = missing if isinstance(missing, float) else None if missing == "error" else 0.0
        filled(values, fill, name, batch.place)  # checks the values
        return np.where(np.isnan(values), missing, values) if isinstance(missing, float) else values
