"""`prepare_ctr`: a raw CSV or Parquet file, and a YAML that says what it holds, to training-ready columns.

Two passes over the rows, in memory that does not grow with them. The first reads the labels and, of the training
split, ids and numbers; the second writes the splits. (The original Ali-CCP files have their own way: aliccp.py.)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config.strict_config import read_yaml, validate
from pipeline.errors import UserError
from pipeline.storage.folders import published
from pipeline.tasks.mmoe.cells import Floats
from pipeline.tasks.mmoe.encoding import Encoder, refuse_missing, to_float32
from pipeline.tasks.mmoe.feature_statistics import Counts, Numbers, bin_edges
from pipeline.tasks.mmoe.labels_and_splits import Plan
from pipeline.tasks.mmoe.prepared_folder import (
    FILES,
    SplitWriter,
    Vocabularies,
    refuse_own_data,
    with_splits,
    write_vocabularies,
)
from pipeline.tasks.mmoe.raw_files import Batch, Source
from pipeline.tasks.mmoe.schema import (
    FIRST_ID,
    SPLITS,
    VOCABULARY_FILE,
    BaseRates,
    DataSchema,
    Feature,
    SourceSchema,
    sha256_of,
)


def prepare(
    data: Path,
    schema_file: Path,
    output_dir: Path,
    *,
    own: Mapping[str, Path] | None = None,
    batch_rows: int = 65_536,
    progress: Callable[[int], None] | None = None,
    stages: Callable[[str, int, float], None] | None = None,
) -> DataSchema:
    """Write splits, vocabulary and `schema.json` into `output_dir`: all of them, or nothing.

    `data`: a file, or a folder whose files (.csv, .csv.gz, .parquet; one format) are read in sorted order. `own`:
    files or folders that are a split as a whole, by the split's name; the schema divides `data` among the others.
    `progress` is called with the number of rows of each batch, in both passes; `stages`, of raw Ali-CCP files
    (`format: aliccp` in the YAML), with what is being done, the rows of it so far and the share that is done.

    Raises:
        UserError: anything is wrong with the files; names file, row and column, what was found and what is allowed.
    """
    tree = read_yaml(schema_file)
    if tree.get("format") == "aliccp":
        if own:
            raise UserError(f"data.{next(iter(own))}: {schema_file} names the files of Ali-CCP itself (train, test)")
        from pipeline.tasks.mmoe.aliccp import prepare_raw  # which writes with what is here
        from pipeline.tasks.mmoe.aliccp_config import RawSource

        return prepare_raw(data, validate(RawSource, tree, schema_file), schema_file, output_dir, progress=stages)
    declared = validate(SourceSchema, tree, schema_file)
    source = Source(data, declared.columns, declared.csv, own)
    plan = Plan(declared, schema_file, source)

    def batches() -> Iterator[Batch]:
        for batch in source.batches(plan.columns, batch_rows):
            yield batch
            if progress:
                progress(batch.rows)

    refuse_own_data(output_dir, data, [file.path for file in source.files])
    with published(output_dir, FILES) as folder:
        training = TrainingSplit(plan)
        for batch in batches():
            training.add(batch)
        schema, vocabularies = described(training, data, source.description(), folder)
        encoder = Encoder(schema, {name: table["value"].to_pylist() for name, table in vocabularies.items()})
        with ExitStack() as stack:
            writers = [stack.enter_context(SplitWriter(folder / f"{split}.parquet", schema)) for split in SPLITS]
            for batch in batches():
                for writer, table in zip(writers, encoded(plan, encoder, batch), strict=True):
                    writer.add(table)
        schema = with_splits(schema, {split: writer.described() for split, writer in zip(SPLITS, writers, strict=True)})
        if sum(split.rows for split in schema.splits.values()) != training.all_rows:
            raise UserError(f"{data}: changed while it was read")
        schema.write(folder)
    return schema


def described(training: "TrainingSplit", data: Path, source: str, folder: Path) -> tuple[DataSchema, Vocabularies]:
    """What is known when the training split has been read: a schema without splits, and the vocabulary, written.

    Raises:
        UserError: no row is in the training split.
    """
    if not training.rows:
        found = f"{training.all_rows} rows, none of them in the training split" if training.all_rows else "no rows"
        raise UserError(f"{data}: {found}, allowed: at least one training row")
    vocabularies = training.vocabularies()
    write_vocabularies(vocabularies.items(), folder / VOCABULARY_FILE)
    declared = training.plan.declared
    schema = DataSchema(
        features=training.described(vocabularies),
        splits={},
        base_rates=BaseRates(ctr=0, cvr=0),  # known when the splits are
        vocabulary_sha256=sha256_of(folder / VOCABULARY_FILE),
        missing_values=declared.missing_values,
        strip=declared.csv.strip,
        source=source,
    )
    return schema, vocabularies


def encoded(plan: Plan, encoder: Encoder, batch: Batch) -> list[pa.Table]:
    """A batch as the rows of each split, in the order of SPLITS."""
    table = pa.table(plan.labels(batch) | encoder.encode_columns(batch.columns, batch.place))
    splits = plan.split(batch)
    return [table.filter(pa.array(splits == number)) for number in range(len(SPLITS))]


class TrainingSplit:
    """What the training split says of the features; the cells of all splits are checked on the way."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.features = plan, plan.declared.features
        self.rows = self.all_rows = 0
        self._numeric = [name for name, feature in self.features.items() if feature.kind == "numeric"]
        self.numbers = Numbers(len(self._numeric))
        self._counts = {name: Counts() for name in self.features if name not in self._numeric}

    def add(self, batch: Batch) -> None:
        self.plan.labels(batch)  # for its errors
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
            self.numbers.add(batch.start + np.flatnonzero(training), values[training])

    def vocabularies(self) -> Vocabularies:
        """Of each id feature: value and count, in the order of the ids."""
        return {name: counts.vocabulary(self.features[name].min_count) for name, counts in self._counts.items()}

    def described(self, vocabularies: Mapping[str, pa.Table]) -> tuple[Feature, ...]:
        """The features as training reads them."""
        numeric = dict(zip(self._numeric, zip(self.numbers.means(), self.numbers.sample().T, strict=True), strict=True))
        features = []
        for name, declared in self.features.items():
            if name in numeric:
                mean, sample = numeric[name]
                fill = None if declared.missing == "error" else declared.missing
                if fill == "mean":
                    fill = self._mean(name, float(mean))
                read = sample if fill is None else np.where(np.isnan(sample), fill, sample)
                features.append(Feature(name=name, kind="numeric", fill=fill, edges=bin_edges(read, declared.bins)))
            else:
                size = FIRST_ID + vocabularies[name].num_rows + declared.hash_buckets
                how = declared.model_dump(include={"separator", "weight_separator", "weights", "hash_buckets"})
                how |= {"weighted": declared.weighted, "spelling": self._counts[name].spelling}
                features.append(Feature(name=name, kind=declared.kind, size=size, **how))
        return tuple(features)

    def _mean(self, name: str, mean: float) -> float:
        if np.isnan(mean):
            key = f"{self.plan.schema_file}: features.{name}.missing"
            raise UserError(f"{key}: found mean, but no training row has a value; allowed: a number")
        return mean

    def _values(self, name: str, batch: Batch) -> Floats:
        """As training will read them, but for a mean that is not known yet."""
        values = self.plan.cells.numbers(batch.columns[name], name, batch.place)
        missing = self.features[name].missing
        if missing == "error":
            refuse_missing(values, name, batch.place)
        elif missing != "mean":
            values = np.where(np.isnan(values), missing, values)
        to_float32(values, name, batch.place)  # for its errors
        return values
