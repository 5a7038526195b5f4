"""Convert the original Ali-CCP files to a prepared folder, joining samples with the common features of their users.

The files are read once (aliccp_scan.py). Then the ids in the training rows are counted to build the vocabularies, and
the rows are written.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data import prepared_folder
from pipeline.data.cells import Ints
from pipeline.data.digests import combined_sha256, text_hashes
from pipeline.data.layout import consecutive
from pipeline.data.prepared_folder import Vocabularies, arrow_schema, check_training_rows, write_folder
from pipeline.data.schema import FIRST_ID, MISSING, OUT_OF_VOCABULARY, SPLITS, DataSchema, Feature
from pipeline.errors import UserError
from pipeline.runtime.console import info
from pipeline.storage.folders import published
from pipeline.tasks.mmoe.prepare.aliccp_config import TEST, AliccpFeature, AliccpSource, find
from pipeline.tasks.mmoe.prepare.aliccp_scan import Coded, Progress, Scan, Users

CHUNK_IDS = 1 << 20  # ids that are encoded at once
GROUP_IDS = 1 << 23  # approximate number of ids per row group
SEPARATOR, WEIGHT_SEPARATOR = "|", ":"  # for raw frames passed to a logged model


class IdTable(NamedTuple):
    """Feature and id of each code."""

    features: list[Feature]
    positions: npt.NDArray[Any]  # [codes] index in `features`
    ids: npt.NDArray[np.int32]  # [codes]


def prepare_aliccp(
    data: Path, source: AliccpSource, schema_file: Path, output_dir: Path, progress: Progress
) -> DataSchema:
    """Write splits, vocabulary and `schema.json` into `output_dir`; write nothing if there is an error.

    Raises:
        UserError: the files are invalid. The message names file and line, what was found and what is allowed.
    """
    groups = source.files(data)
    name, shares = groups[0][0].name, [source.split.train, source.split.validation]
    if len(groups) > 1:
        info(f"test: all of {groups[1][0].name}; split.train and split.validation divide {name}, split.test does not")
    else:
        shares.append(source.split.test)
        unread = source.test is None and find(data, TEST.skeleton)
        info(f"test: {f'{unread.name} is not read' if unread else 'no test files'}; split divides {name} in three")
    with published(output_dir, prepared_folder.FILES) as folder, ExitStack() as stack:
        row_file, user_file = (stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(2))
        scan = Scan(source, shares, row_file, user_file, progress)
        for number, (skeleton, common) in enumerate(groups):
            scan.read(skeleton, common, test=number > 0)
        total = int(scan.split_rows.sum())
        check_training_rows(data, scan.split_rows[0], total)
        users = scan.users()
        counts, ids = _counted(scan, users)
        table, vocabularies = _vocabularies(scan, _features(scan, schema_file), counts)
        files = [file for skeleton, common in groups for file in (common, skeleton)]

        def tables() -> Iterator[tuple[pa.Table, npt.NDArray[np.int8]]]:
            done = 0
            for rows, splits in _encoded(scan, users, table):
                yield rows, splits
                done += rows.num_rows
                progress("splits", done, done / total)

        return write_folder(
            folder, table.features, vocabularies, tables(),
            # fewer rows if they have very many ids, because one row group per split is held in memory
            group_rows=min(prepared_folder.ROW_GROUP_ROWS, max(64, GROUP_IDS * total // max(1, ids))),
            strip=False,
            source=f"{', '.join(file.name for file in files)}, SHA-256 {combined_sha256(files)}",
            counts={f"rows/{split}": int(rows) for split, rows in zip(SPLITS, scan.split_rows, strict=True)}
            | scan.counts,
        )  # fmt: skip


def _counted(scan: Scan, users: Users) -> tuple[Ints, int]:
    """Count the occurrences of each code in the training rows, [codes], and the ids of all rows."""
    counts, ids = np.zeros(len(scan.codes), dtype=np.int64), 0
    training_rows = np.zeros(len(users.lengths), dtype=np.int64)  # per user
    for rows in scan.rows():
        training = rows.splits == SPLITS.index("train")
        np.add.at(counts, rows.features["code"][np.repeat(training, rows.lengths)], 1)
        np.add.at(training_rows, rows.users[training], 1)
        ids += len(rows.features) + int(users.lengths[rows.users].sum())
    for part in _slices(users.lengths, CHUNK_IDS):
        lengths, start = users.lengths[part], users.starts[part.start]
        codes = users.features["code"][start : start + lengths.sum()]
        np.add.at(counts, codes, np.repeat(training_rows[part], lengths))
    return counts, ids


def _features(scan: Scan, schema_file: Path) -> dict[int, Feature]:
    """Map field numbers to features: the declared ones first, then the others by name.

    Raises:
        UserError: a declared field is absent or cannot be categorical, no field is a feature, or column names clash.
    """
    declared, present, both = (
        scan.source.features, scan.user_fields | scan.row_fields, scan.user_fields & scan.row_fields
    )  # fmt: skip
    names = sorted(name for name, number in scan.fields.items() if number in present)
    features: dict[int, Feature] = {}
    for name in dict.fromkeys([*declared, *names]):
        wish, number, key = declared.get(name, AliccpFeature()), scan.fields[name], f"{schema_file}: features.{name}"
        if wish.kind == "ignore":
            continue
        if number not in present:
            raise UserError(f"{key}: no such field in the files; there are: {', '.join(names)}")
        kind = wish.kind
        if kind == "auto":
            kind = "multi" if number in scan.multi_fields | both else "categorical"
        if kind == "categorical" and number in both:
            raise UserError(f"{key}: found in the common features and in the skeleton, allowed: kind multi")
        weighted = kind == "multi" and wish.weighted
        features[number] = Feature(
            name=name, kind=kind, weighted=weighted, separator=SEPARATOR,
            weight_separator=WEIGHT_SEPARATOR if weighted else None,
            hash_buckets=scan.source.hash_buckets if wish.hash_buckets is None else wish.hash_buckets,
        )  # fmt: skip
    if not features:
        raise UserError(f"{schema_file}: no field of the files is a feature")
    for name, times in Counter(arrow_schema([*features.values()]).names).items():
        if times > 1:
            key = f"{schema_file}: features.{name}"
            raise UserError(f"{key}: the prepared files have such a column; allowed: kind ignore")
    return features


def _vocabularies(scan: Scan, features: dict[int, Feature], counts: Ints) -> tuple[IdTable, Vocabularies]:
    """Assign ids to codes, and build each feature's vocabulary, sorted by descending count and then by text."""
    keys, ids = pa.array(list(scan.codes), pa.large_binary()), np.full(len(counts), OUT_OF_VOCABULARY, np.int32)
    scan.codes.clear()  # frees much memory
    field_positions = np.zeros(len(scan.fields), dtype=np.min_scalar_type(len(features)))  # a narrow type sorts faster
    field_positions[list(features)] = np.arange(len(features))
    positions = field_positions[np.concatenate(scan.code_fields)]
    sized, vocabularies = list[Feature](), dict[str, pa.Table]()
    for feature, codes in zip(features.values(), _grouped(positions, len(features)), strict=True):
        wish = scan.source.features.get(feature.name, AliccpFeature())
        values = pc.utf8_slice_codeunits(keys.take(pa.array(codes)).cast(pa.string()), len(feature.name) + 1)
        table = pa.table({"value": values, "count": counts[codes], "code": codes})
        frequent = pa.array(counts[codes] >= (wish.min_count or scan.source.min_count))
        vocabulary = table.filter(frequent).sort_by([("count", "descending"), ("value", "ascending")])
        ids[vocabulary["code"].to_numpy()] = np.arange(FIRST_ID, FIRST_ID + vocabulary.num_rows)
        if feature.hash_buckets:
            rare = table.filter(pc.invert(frequent))
            buckets = text_hashes(rare["value"].combine_chunks()) % np.uint64(feature.hash_buckets)
            ids[rare["code"].to_numpy()] = FIRST_ID + vocabulary.num_rows + buckets.astype(np.int32)
        size = FIRST_ID + vocabulary.num_rows + feature.hash_buckets
        sized.append(feature.model_copy(update={"size": size}))
        vocabularies[feature.name] = vocabulary
    return IdTable(sized, positions, ids), vocabularies


def _encoded(scan: Scan, users: Users, table: IdTable) -> Iterator[tuple[pa.Table, npt.NDArray[np.int8]]]:
    """Yield encoded rows, with the index in SPLITS of each row's split."""
    schema = arrow_schema(table.features)
    for rows in scan.rows():
        user_lengths, ends = users.lengths[rows.users], np.cumsum(rows.lengths)
        for part in _slices(user_lengths + rows.lengths, CHUNK_IDS):
            own, common = rows.lengths[part], user_lengths[part]
            places = consecutive(users.starts[rows.users[part]], common)
            start, numbers = ends[part.start] - own[0], np.arange(len(own))
            owners = np.concatenate([np.repeat(numbers, common), np.repeat(numbers, own)])
            coded = np.concatenate([users.features[places], rows.features[start : ends[part.stop - 1]]])
            labels = {"click": rows.click[part].astype(np.int8), "conversion": rows.conversion[part].astype(np.int8)}
            yield pa.table(labels | _columns(table, len(own), owners, coded), schema=schema), rows.splits[part]


def _columns(table: IdTable, rows: int, owners: Ints, coded: Coded) -> dict[str, pa.Array]:
    """Build the feature columns of some rows. owners: row of each id in `coded`; ids of users come first."""
    columns: dict[str, pa.Array] = {}
    grouped = _grouped(table.positions[coded["code"]], len(table.features))
    for feature, places in zip(table.features, grouped, strict=True):
        own = places[np.argsort(owners[places], kind="stable")]
        ids = table.ids[coded["code"][own]]
        if feature.kind == "categorical":
            cells = np.full(rows, MISSING, dtype=np.int32)
            cells[owners[own]] = ids
            columns[feature.name] = pa.array(cells)
            continue
        ends = np.cumsum(np.bincount(owners[own], minlength=rows))
        offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
        columns[feature.name] = pa.ListArray.from_arrays(offsets, pa.array(ids))
        if feature.weighted:
            weights = pa.array(coded["value"][own])
            columns[f"{feature.name}.weights"] = pa.ListArray.from_arrays(offsets, weights)
    return columns


def _grouped(numbers: npt.NDArray[Any], groups: int) -> list[Ints]:
    """For each number below `groups`, the positions where it occurs, in ascending order."""
    ends = np.cumsum(np.bincount(numbers, minlength=groups))
    return np.split(np.argsort(numbers, kind="stable"), ends[:-1])


def _slices(lengths: Ints, most: int) -> Iterator[slice]:
    """Divide items with these lengths into consecutive slices, each with a total length of about `most`."""
    ends, start = np.cumsum(lengths), 0
    while start < len(lengths):
        stop = int(np.searchsorted(ends, ends[start] - lengths[start] + most, side="right"))
        yield slice(start, start := max(start + 1, stop))
