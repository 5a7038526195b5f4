"""What `prepare_ctr` writes, written by Ray Data on any number of machines: the same files, byte by byte.

    python docs/examples/prepare_ctr_ray.py DATA SCHEMA.yaml OUTPUT_DIR [--parts] [--address HOST:PORT]

With `--parts` every split is a folder of Parquet files that the workers write; without it one process writes a file a
split, in the order of the rows. DATA and, with `--parts`, OUTPUT_DIR are the same folders on every machine.

The rows are cut into pieces (some row groups of a Parquet file; a whole CSV) that are read three times: to know which
training row a piece begins with, to count and sample training rows, and to encode all rows. What is counted where is
written here; what a row means is said by functions that `prepare_ctr` calls, too.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from pipeline.errors import UserError
from pipeline.folders import published
from pipeline.tasks.mmoe.encoding import Encoder
from pipeline.tasks.mmoe.plan import Plan
from pipeline.tasks.mmoe.prepare import (
    FILES,
    SplitWriter,
    Tally,
    TrainingSplit,
    described,
    encoded,
    opened,
    refuse_own_data,
    with_splits,
)
from pipeline.tasks.mmoe.reading import Batch, Piece, Source
from pipeline.tasks.mmoe.schema import (
    SCHEMA_FILE,
    SPLITS,
    VOCABULARY_FILE,
    DataSchema,
    Split,
    sha256_of,
    sha256_of_parts,
)
from pipeline.tasks.mmoe.statistics import sample_limit

BATCH_ROWS = 65_536
WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
Written = dict[str, tuple[Split, Tally]]  # of each split


@dataclass(frozen=True)
class Raw:
    """The raw rows in pieces, and what the YAML asks of them."""

    source: Source
    plan: Plan
    pieces: Sequence[Piece]
    before: Sequence[int]  # training rows ahead of each piece; one more: all of them

    def batches(self, piece: int) -> Iterator[Batch]:
        return self.source.read(self.pieces[piece], self.plan.columns, BATCH_ROWS)


def prepare(data: Path, schema_file: Path, output_dir: Path, *, piece_rows: int, parts: bool) -> DataSchema:
    """Splits, vocabulary and `schema.json`: all of them, or nothing.

    Raises:
        UserError: anything is wrong with the files; names file, row and column.
    """
    source, plan = opened(data, schema_file)
    refuse_own_data(output_dir, data, source.files)
    digests = each(source.files, sha256_of)
    raw = numbered(source, plan, source.pieces(piece_rows))
    with published(output_dir, [*SPLITS, VOCABULARY_FILE, SCHEMA_FILE] if parts else FILES) as folder:
        training = training_split(raw)
        schema, vocabularies = described(training, data, source.description(digests), folder)
        known = ray.put((raw, schema, vocabularies, folder))
        schema = with_splits(schema, (write_parts if parts else write_files)(raw, schema, folder, known))
        if sum(split.rows for split in schema.splits.values()) != training.all_rows:
            raise UserError(f"{data}: changed while it was read")
        schema.write(folder)
    return schema


# ---------------------------------------------------------------- first: which rows a piece begins with


def numbered(source: Source, plan: Plan, pieces: Sequence[Piece]) -> Raw:
    by = plan.declared.split.by
    columns = plan.columns[:1] if by is None else [by]

    def rows(piece: Piece) -> int:
        return sum(batch.rows for batch in source.read(piece, columns, BATCH_ROWS))

    def training_rows(piece: Piece) -> int:
        return sum(int((plan.split(batch) == 0).sum()) for batch in source.read(piece, columns, BATCH_ROWS))

    if not source.parquet:  # how many rows a CSV has is known when it has been read
        starts = accumulate(each(pieces, rows), initial=0)
        pieces = [replace(piece, start=start) for piece, start in zip(pieces, starts, strict=False)]
    return Raw(source, plan, pieces, list(accumulate(each(pieces, training_rows), initial=0)))


# ---------------------------------------------------------------- second: what the training rows say


def training_split(raw: Raw) -> TrainingSplit:
    limit = sample_limit(raw.before[-1])

    def read(numbers: pa.Table) -> Iterator[pa.Table]:
        """Of a piece: how often each value comes; then all else, which is small, in one row more."""
        for piece in numbers["id"].to_pylist():
            part = TrainingSplit(raw.plan, before=raw.before[piece], limit=limit)
            for batch in raw.batches(piece):
                part.add(batch)
            counts = part.counted()
            yield counts.append_column("rest", pa.nulls(counts.num_rows, pa.binary()))
            rest = pa.array([pickle.dumps((part.rows, part.all_rows, part.numbers))], pa.binary())
            yield pa.table([*(pa.nulls(1, kind) for kind in counts.schema.types), rest], [*counts.column_names, "rest"])

    found = pieces_of(raw).map_batches(read, **WHOLE_BLOCKS).materialize()
    whole = TrainingSplit(raw.plan)
    for table in tables(found.map_batches(lambda part: part.filter(pc.field("rest").is_valid()), **WHOLE_BLOCKS)):
        for rest in table["rest"].to_pylist():
            whole.merge(*pickle.loads(rest))  # noqa: S301 (our own workers wrote it)
    counts = found.map_batches(lambda part: part.filter(pc.field("rest").is_null()), **WHOLE_BLOCKS)
    sums = counts.groupby(["feature", "value"], num_partitions=min(512, len(raw.pieces))).sum("count")
    features = raw.plan.declared.features
    names, least = pa.array(features), pa.array([feature.min_count for feature in features.values()])

    def frequent(part: pa.Table) -> pa.Table:
        part = part.rename_columns(["feature", "value", "count"])
        return part.filter(pc.greater_equal(part["count"], least.take(pc.index_in(part["feature"], names))))

    for table in tables(sums.map_batches(frequent, **WHOLE_BLOCKS)):
        whole.add_counted(table)
    return whole


# ---------------------------------------------------------------- third: all rows, encoded and written


class Encoding:
    """A worker process that encodes pieces: its vocabularies are in memory once."""

    def __init__(self, known: ray.ObjectRef) -> None:
        self.raw, self.schema, vocabularies, self.folder = ray.get(known)
        self.encoder = Encoder(self.schema, {name: table["value"].to_pylist() for name, table in vocabularies.items()})

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        for piece in numbers["id"].to_pylist():
            batches = (encoded(self.raw.plan, self.encoder, batch) for batch in self.raw.batches(piece))
            yield from self.of_piece(piece, batches)

    def of_piece(self, _: int, batches: Iterable[list[pa.Table]]) -> Iterator[pa.Table]:
        """The rows, with the number of their split."""
        for splits in batches:
            for number, table in enumerate(splits):
                yield table.append_column("split", pa.repeat(pa.scalar(number, pa.int8()), table.num_rows))


class Writing(Encoding):
    """One that writes them, too: a file for each split and piece."""

    def of_piece(self, piece: int, batches: Iterable[list[pa.Table]]) -> Iterator[pa.Table]:
        """The tallies and digests of what was written."""
        name = f"part-{piece:06}.parquet"
        # a task that is tried again may have a twin that still runs: a file is there whole or not at all
        own = os.urandom(8).hex()
        work = [self.folder / f"{split}-{own}-{name}" for split in SPLITS]
        with ExitStack() as stack:
            writers = [stack.enter_context(SplitWriter(file, self.schema)) for file in work]
            for splits in batches:
                for writer, table in zip(writers, splits, strict=True):
                    writer.add(table)
        done = {
            split: (sha256_of(file), writer.tally) for split, file, writer in zip(SPLITS, work, writers, strict=True)
        }
        for split, file in zip(SPLITS, work, strict=True):
            file.replace(self.folder / split / name)
        yield pa.table({"piece": [piece], "done": pa.array([pickle.dumps(done)], pa.binary())})


def write_files(raw: Raw, schema: DataSchema, folder: Path, known: ray.ObjectRef) -> Written:
    """A file a split, written here."""
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(folder / f"{split}.parquet", schema)) for split in SPLITS]
        for table in tables(pieces_of(raw).map_batches(Encoding, **workers(known, len(raw.pieces)))):
            for number, writer in enumerate(writers):
                writer.add(table.filter(pc.field("split") == number).drop_columns("split"))
    return {split: writer.described() for split, writer in zip(SPLITS, writers, strict=True)}


def write_parts(raw: Raw, schema: DataSchema, folder: Path, known: ray.ObjectRef) -> Written:
    """A folder a split, written by the workers."""
    for split in SPLITS:
        (folder / split).mkdir()
    tallies = {split: Tally.of(schema.features) for split in SPLITS}
    digests: dict[str, list[str]] = {split: [] for split in SPLITS}
    for table in tables(pieces_of(raw).map_batches(Writing, **workers(known, len(raw.pieces)))):
        for done in table["done"].to_pylist():
            for split, (sha256, tally) in pickle.loads(done).items():  # noqa: S301 (our own workers wrote it)
                digests[split].append(sha256)
                tallies[split].merge(tally)
    return {split: (tally.split(split, sha256_of_parts(digests[split])), tally) for split, tally in tallies.items()}


# ---------------------------------------------------------------- Ray


def each(items: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
    """A task an item; what they answer, in the order of the items."""
    task = ray.remote(function)
    answers: list[Any] = ray.get([task.remote(item) for item in items])
    return answers


def pieces_of(raw: Raw) -> ray.data.Dataset:
    """A block a piece, that holds its number in the column id."""
    return ray.data.range(len(raw.pieces), override_num_blocks=len(raw.pieces))


def tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The blocks in their order, here."""
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def workers(known: ray.ObjectRef, pieces: int) -> dict[str, Any]:
    """For `map_batches`: a process for every processor."""
    size = min(pieces, int(ray.cluster_resources()["CPU"]))
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=size)
    return {"compute": pool, "fn_constructor_args": [known], **WHOLE_BLOCKS}


@click.command()
@click.argument("data", type=Path)
@click.argument("schema_file", type=Path)
@click.argument("output_dir", type=Path)
@click.option("--parts", is_flag=True, help="every split a folder of files that the workers write")
@click.option("--piece-rows", default=1_000_000, show_default=True, help="rows that one task reads")
@click.option("--address", default="local", show_default=True, help="a cluster's; local = one on this machine")
def main(*, data: Path, schema_file: Path, output_dir: Path, parts: bool, piece_rows: int, address: str) -> None:
    ray.init(address, log_to_driver=False, ignore_reinit_error=True)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    try:
        schema = prepare(
            data.absolute(), schema_file.absolute(), output_dir.absolute(), piece_rows=piece_rows, parts=parts
        )
    except UserError as error:
        told = getattr(error, "cause", error)  # a worker's has its traceback around it, and below it what Ray adds
        print(f"error: {str(told.args[0]).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)
    for name, split in schema.splits.items():
        print(f"{name}: {split.rows} rows, {split.clicks} clicks, {split.conversions} conversions")
    print(f"digest {schema.digest}")


if __name__ == "__main__":
    main()
