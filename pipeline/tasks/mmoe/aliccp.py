"""`prepare_ctr` on the original Ali-CCP files: samples joined with the common features of their users.

Every file is read once. Arrow parses a block of lines, a dictionary numbers the ids (the code of an id), and what the
lines hold goes to two files without a name, rows and users. Then the codes of training rows are counted, vocabularies
are made of them, and the rows are written. Memory grows with the distinct ids and the users, not with the rows.
"""

import codecs
import gzip
import itertools
import re
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.errors import UserError
from pipeline.runtime.console import say
from pipeline.storage.folders import published
from pipeline.tasks.mmoe import prepared_folder, schema
from pipeline.tasks.mmoe.aliccp_config import TEST, RawFeature, RawSource, find
from pipeline.tasks.mmoe.encoding import split_positions, text_hashes
from pipeline.tasks.mmoe.prepared_folder import SplitWriter, with_splits
from pipeline.tasks.mmoe.schema import FIRST_ID, MISSING, MISSING_TEXT, SPLITS, DataSchema, Feature

BLOCK_BYTES = 8 << 20  # of lines that are parsed at once
CHUNK_IDS = 1 << 20  # of rows that are encoded at once
GROUP_IDS = 1 << 23  # of a row group, about
SEPARATOR, WEIGHT_SEPARATOR = "|", ":"  # in raw frames that a logged model is asked with
COUNTED = (
    "lines", "users", "conversions_without_click", "without_common_features", "cut_lines", "malformed_lines",
    "repeated_common_features", "repeated_fields", "other_feat_num", "empty_ids",
)  # fmt: skip

COMMON = "index,feat_num,feat_list"
SKELETON = "sample_id,click,buy,common_feature_index,feat_num,feat_list"
_TEXT = r"[ -+\--~]"  # printable ASCII but a comma
_FEATURE = rf"{_TEXT}+\x02{_TEXT}*\x03[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_REST = rf"[0-9]{{1,10}},(?:{_FEATURE}(?:\x01{_FEATURE})*)?\r?\n?\z"
_LINES = {COMMON: rf"\A{_TEXT}+,{_REST}", SKELETON: rf"\A{_TEXT}+,[01],[01],{_TEXT}*,{_REST}"}
_MAYBE_LARGE = r"[0-9.][eE]\+?[0-9]|[0-9]{39}"  # what a number beyond float32 has
_INFINITE = 3.4028235677973362e38  # from there on, it is infinite as float32
_KEY = pa.dictionary(pa.int32(), pa.binary())  # field\x02id
_CODED = np.dtype([("code", np.int32), ("value", np.float32)])

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Coded = npt.NDArray[Any]  # _CODED
Progress = Callable[[str, int, float], None]  # what is being done, rows of it so far, the share that is done


class Rows(NamedTuple):
    """Samples; users are numbered over all files, -1 = none."""

    click: Bools
    conversion: Bools
    splits: npt.NDArray[np.int8]
    users: Ints
    lengths: Ints  # how many features of its own
    features: Coded


class Users(NamedTuple):
    """Common features; the last user has none, and stands for one that is not there."""

    lengths: Ints  # [users + 1] how many features
    starts: Ints  # [users + 1] where they begin
    features: Coded  # mapped


class Target(NamedTuple):
    """What becomes of the codes."""

    features: list[Feature]
    positions: npt.NDArray[Any]  # [codes] of its feature
    ids: npt.NDArray[np.int32]  # [codes]


def prepare_raw(
    data: Path, source: RawSource, schema_file: Path, output_dir: Path, *, progress: Progress | None = None
) -> DataSchema:
    """Write splits, vocabulary and `schema.json` into `output_dir`: all of them, or nothing.

    `progress` is called with what is being done, the rows of it so far and the share that is done.

    Raises:
        UserError: anything is wrong with the files; names file and line, what was found and what is allowed.
    """
    progress = progress or (lambda *_: None)
    groups = source.files(data)
    name, shares = groups[0][0].name, [source.split.train, source.split.validation]
    if len(groups) > 1:
        say(f"test: all of {groups[1][0].name}; split.train and split.validation divide {name}, split.test does not")
    else:
        shares.append(source.split.test)
        unread = source.test is None and find(data, TEST.skeleton)
        say(f"test: {f'{unread.name} is not read' if unread else 'no test files'}; split divides {name} in three")
    with published(output_dir, prepared_folder.FILES) as folder, ExitStack() as stack:
        row_file, user_file = (stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(2))
        scan = Scan(source, shares, row_file, user_file, progress)
        for number, (skeleton, common) in enumerate(groups):
            scan.read(skeleton, common, test=number > 0)
        rows, total = dict(zip(SPLITS, scan.rows.tolist(), strict=True)), int(scan.rows.sum())
        if not rows["train"]:
            found = f"{total} rows, none of them in the training split" if total else "no rows"
            raise UserError(f"{data}: {found}, allowed: at least one training row")
        users, vocabulary_file = scan.users(), folder / schema.VOCABULARY_FILE
        counts, ids = _counted(scan, users)
        target, vocabularies = _vocabularies(scan, _fields(scan, schema_file), counts)
        prepared_folder.write_vocabularies(vocabularies.items(), vocabulary_file)
        files = [file for skeleton, common in groups for file in (common, skeleton)]
        digest = schema.sha256_of_parts([schema.sha256_of(file) for file in files])
        described = DataSchema(
            features=tuple(target.features),
            splits={},
            base_rates=schema.BaseRates(ctr=0, cvr=0),  # known when the splits are
            vocabulary_sha256=schema.sha256_of(vocabulary_file),
            strip=False,
            source=f"{', '.join(file.name for file in files)}, SHA-256 {digest}",
            counts={f"rows/{split}": count for split, count in rows.items()} | scan.counts,
        )
        # fewer rows where they hold very many ids: a row group of each split is in memory
        group_rows = min(prepared_folder.ROW_GROUP_ROWS, max(64, GROUP_IDS * total // max(1, ids)))
        with ExitStack() as closing:
            writers = {
                split: closing.enter_context(SplitWriter(folder / f"{split}.parquet", described, group_rows))
                for split in SPLITS
            }
            done = 0
            for table, splits in _tables(scan, users, target):
                for number, writer in enumerate(writers.values()):
                    writer.add(table.filter(pa.array(splits == number)))
                done += table.num_rows
                progress("splits", done, done / total)
        described = with_splits(described, {split: writer.described() for split, writer in writers.items()})
        described.write(folder)
    return described


# ---------------------------------------------------------------- what the files hold


class Scan:
    """The files in codes; what they have by the way."""

    def __init__(
        self, source: RawSource, shares: list[float], rows: IO[bytes], users: IO[bytes], progress: Progress
    ) -> None:
        self.source, self.progress = source, progress
        self.counts = dict.fromkeys(COUNTED, 0)
        self.rows = np.zeros(len(SPLITS), dtype=np.int64)
        self.codes = defaultdict[bytes, int](itertools.count().__next__)  # field\x02id -> its number
        self.code_fields = list[Ints]()  # [codes] in pieces
        self.fields = {name: number for number, name in enumerate(source.features)}
        self.of_users, self.of_rows, self.several = set[int](), set[int](), set[int]()  # fields
        self._shares, self._row_file, self._user_file = shares, rows, users
        self._user_lengths = list[Ints]()  # [users] in pieces

    def read(self, skeleton: Path, common: Path, *, test: bool) -> None:
        """Both files of the training rows, or of those that are the test split."""
        before = self.counts["users"]
        users = defaultdict[bytes, int](itertools.count(before).__next__)
        for cells in self._lines(common, COMMON):
            last, indices = before + len(users) - 1, cells[0].to_pylist()
            numbers = np.fromiter(map(users.__getitem__, indices), np.int64, len(indices))
            new = np.diff(np.maximum(np.maximum.accumulate(numbers), last), prepend=last) > 0
            self.counts["repeated_common_features"] += int((~new).sum())
            lengths, features = self._coded(cells[-1].filter(pa.array(new)), self.of_users)
            self._user_lengths.append(lengths)
            self._user_file.write(features.tobytes())
        self.counts["users"] += len(users)
        for cells in self._lines(skeleton, SKELETON):
            indices = cells[3].to_pylist()
            numbers = np.fromiter(map(users.get, indices, itertools.repeat(-1)), np.int64, len(indices))
            for array in self._sampled(cells, numbers, test=test):
                np.save(self._row_file, array)

    def stored_rows(self) -> Iterator[Rows]:
        """The rows in their order, some at a time."""
        end = self._row_file.seek(0, 2)
        self._row_file.seek(0)
        while self._row_file.tell() < end:
            yield Rows(*(np.load(self._row_file, allow_pickle=False) for _ in Rows._fields))

    def users(self) -> Users:
        lengths = np.concatenate([*self._user_lengths, np.zeros(1, dtype=np.int64)])
        self._user_file.flush()
        count = int(lengths.sum())
        features = np.memmap(self._user_file, _CODED, "r", shape=count) if count else np.empty(0, dtype=_CODED)
        return Users(lengths, np.cumsum(lengths) - lengths, features)

    def _lines(self, file: Path, form: str) -> Iterator[list[Any]]:
        """The cells of a file's lines, [columns][lines], some megabytes at a time.

        A last line that was cut is left out, and so are malformed ones, as many as are allowed.
        """
        number = malformed = 0
        for lines, share in _blocks(file):
            self.counts["lines"] += len(lines) * (form == SKELETON)
            if number == 0:
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
                if lines[0].strip() == form.encode():
                    number = 1
                    del lines[0]
            texts = pa.array(lines, pa.large_binary())
            fits, large = (_bools(pc.match_substring_regex(texts, one)) for one in (_LINES[form], _MAYBE_LARGE))
            for row in np.flatnonzero(fits & large):
                values = [abs(float(value)) for value in re.findall(rb"\x03([^\x01\r\n]*)", lines[row])]
                fits[row] = max(values, default=0) < _INFINITE
            cut = bool(lines) and not lines[-1].endswith(b"\n")
            if cut and fits[-1]:  # the features that are there may be whole and not be all
                fits[-1] = int(lines[-1].split(b",")[-2]) <= lines[-1].count(b"\x03")
            for row in np.flatnonzero(~fits):
                text = lines[row].strip(b"\r\n")
                if text and cut and row + 1 == len(lines):
                    self.counts["cut_lines"] += 1
                elif text:
                    malformed += 1
                    self.counts["malformed_lines"] += 1
                if malformed > self.source.malformed_lines:
                    found = f"{text[:60].decode(errors='backslashreplace')!r}{'...' if len(text) > 60 else ''}"
                    allowed = form.replace("click,buy", "click (0 or 1),buy (0 or 1)")
                    raise UserError(
                        f"{file}: line {number + row + 1}: found {found}, allowed: {allowed}, "
                        "the features as field\\x02id\\x03number joined by \\x01"
                    )
            number += len(lines)
            columns = form.count(",") + 1
            flat = pc.split_pattern(texts.filter(pa.array(fits)), b",").flatten()
            cells = [flat[column::columns] for column in range(columns)]
            claimed, there = cells[-2].cast(pa.string()).cast(pa.int64()), pc.count_substring(cells[-1], b"\x03")
            self.counts["other_feat_num"] += int(_bools(pc.not_equal(claimed, there)).sum())
            self.progress(file.name, number, share)
            yield cells

    def _sampled(self, cells: list[Any], users: Ints, *, test: bool) -> Rows:
        """The lines of a skeleton."""
        click, buy = (_bools(pc.equal(cell, b"1")) for cell in cells[1:3])
        orphans, kept = buy & ~click, np.ones(len(users), dtype=np.bool_)
        self.counts["conversions_without_click"] += int(orphans.sum())
        self.counts["without_common_features"] += int((users < 0).sum())
        if self.source.conversion_without_click == "drop":
            kept &= ~orphans
        elif self.source.conversion_without_click == "click":
            click |= orphans
        else:
            buy &= ~orphans
        if self.source.without_common_features == "drop":
            kept &= users >= 0
        keys = text_hashes(cells[0 if self.source.split.by == "sample_id" else 3])
        splits = split_positions(keys, self.source.split.seed, self._shares).astype(np.int8)
        if test:
            splits[:] = SPLITS.index("test")
        self.rows += np.bincount(splits[kept], minlength=len(SPLITS))
        own = self._coded(cells[-1].filter(pa.array(kept)), self.of_rows)
        return Rows(click[kept], buy[kept], splits[kept], users[kept], *own)

    def _coded(self, lists: pa.Array, side: set[int]) -> tuple[Ints, Coded]:
        """(how many features each feat_list has, the features), without those that are ignored or have no id."""
        owners, keys, values = _parsed(lists)
        parts, numbers = pc.split_pattern(keys.dictionary, b"\x02").flatten(), keys.indices.to_numpy()
        names = parts[0::2].dictionary_encode()
        texts = [name.decode() for name in names.dictionary.to_pylist()]
        known = np.array([self.fields.setdefault(text, len(self.fields)) for text in texts], dtype=np.int64)
        others = RawFeature(kind=self.source.other_fields)
        kinds = np.array([self.source.features.get(name, others).kind for name in self.fields], dtype="U11")
        fields = known[names.indices.to_numpy()]  # [distinct keys], as these:
        named = kinds[fields] != "ignore"
        empty = named & _bools(pc.is_in(parts[1::2], pa.array(MISSING_TEXT).cast(pa.binary())))
        wanted = named & ~empty
        entered = keys.dictionary.filter(pa.array(wanted)).to_pylist()
        before, codes = len(self.codes), np.full(len(wanted), -1, dtype=np.int32)
        codes[wanted] = np.fromiter(map(self.codes.__getitem__, entered), np.int32, len(entered))
        self.code_fields.append(fields[codes >= before])
        self.counts["empty_ids"] += int(empty[numbers].sum())

        there = wanted[numbers]
        owners, numbers, values = owners[there], numbers[there], values[there]
        own = fields[numbers]  # [features]
        places = owners * len(self.fields) + own
        order = np.argsort(places, kind="stable")
        again = np.zeros(len(places), dtype=np.bool_)
        again[order[1:]] = places[order[1:]] == places[order[:-1]]
        side.update(np.flatnonzero(np.bincount(own)).tolist())
        self.several.update(np.flatnonzero(np.bincount(own[again | (values != 1)])).tolist())
        kept = ~(again & (kinds[own] == "categorical"))
        self.counts["repeated_fields"] += int((~kept).sum())
        features = np.empty(int(kept.sum()), dtype=_CODED)
        features["code"], features["value"] = codes[numbers[kept]], values[kept]
        return np.bincount(owners[kept], minlength=len(lists)), features


def _blocks(file: Path) -> Iterator[tuple[list[bytes], float]]:
    """Lines of a plain or gzip file, and the share of the file that is read."""
    try:
        with file.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            size = max(1, file.stat().st_size)
            while lines := stream.readlines(BLOCK_BYTES):
                yield lines, raw.tell() / size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _parsed(lists: pa.Array) -> tuple[Ints, pa.DictionaryArray, npt.NDArray[np.float64]]:
    """The features of feat_lists: of which list each is, its key, its value."""
    lengths = pc.count_substring(lists, b"\x03").to_numpy()
    text = b"\x01".join(lists.filter(pa.array(lengths > 0)).to_pylist())
    text = text.translate(bytes.maketrans(b"\x01", b"\n"), delete=b"\r\n")  # which is CSV
    if not text:
        return np.zeros(0, dtype=np.int64), pa.array([], _KEY), np.zeros(0)
    table = pa.csv.read_csv(
        pa.BufferReader(text),
        pa.csv.ReadOptions(column_names=["key", "value"], block_size=len(text) + 1, use_threads=False),
        pa.csv.ParseOptions(delimiter="\x03", quote_char=False),
        pa.csv.ConvertOptions(column_types={"key": _KEY, "value": pa.float64()}, null_values=[]),
    )
    return np.repeat(np.arange(len(lists)), lengths), table["key"].combine_chunks(), table["value"].to_numpy()


def _bools(array: pa.Array) -> Bools:
    return np.array(array, dtype=np.bool_)


# ---------------------------------------------------------------- vocabularies


def _counted(scan: Scan, users: Users) -> tuple[Ints, int]:
    """([codes] how often the training rows have it, how many ids all rows have)."""
    counts, ids = np.zeros(len(scan.codes), dtype=np.int64), 0
    weights = np.zeros(len(users.lengths), dtype=np.int64)  # training rows of each user
    for rows in scan.stored_rows():
        training = rows.splits == SPLITS.index("train")
        np.add.at(counts, rows.features["code"][np.repeat(training, rows.lengths)], 1)
        np.add.at(weights, rows.users[training], 1)
        ids += len(rows.features) + int(users.lengths[rows.users].sum())
    for part in _cuts(users.lengths, CHUNK_IDS):
        lengths, start = users.lengths[part], users.starts[part.start]
        np.add.at(counts, users.features["code"][start : start + lengths.sum()], np.repeat(weights[part], lengths))
    return counts, ids


def _fields(scan: Scan, schema_file: Path) -> dict[int, Feature]:
    """The features by the number of their field: the declared ones first, then the others by name.

    Raises:
        UserError: a declared field is not there or is declared as what it is not; names that would clash.
    """
    declared, there, both = scan.source.features, scan.of_users | scan.of_rows, scan.of_users & scan.of_rows
    names = sorted(name for name, number in scan.fields.items() if number in there)
    features: dict[int, Feature] = {}
    for name in dict.fromkeys([*declared, *names]):
        wish, number, key = declared.get(name, RawFeature()), scan.fields[name], f"{schema_file}: features.{name}"
        if wish.kind == "ignore":
            continue
        if number not in there:
            raise UserError(f"{key}: no such field in the files; there are: {', '.join(names)}")
        several = "multi" if number in scan.several | both else "categorical"
        kind = several if wish.kind == "auto" else wish.kind
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
    for name, times in Counter(prepared_folder.arrow_schema([*features.values()]).names).items():
        if times > 1:
            key = f"{schema_file}: features.{name}"
            raise UserError(f"{key}: the prepared files have such a column; allowed: kind ignore")
    return features


def _vocabularies(scan: Scan, fields: dict[int, Feature], counts: Ints) -> tuple[Target, prepared_folder.Vocabularies]:
    """What becomes of the codes, and the vocabulary of each feature: the most frequent ids first, then by text."""
    keys, ids = pa.array(list(scan.codes), pa.large_binary()), np.full(len(counts), schema.OUT_OF_VOCABULARY, np.int32)
    scan.codes.clear()  # it is large
    of_fields = np.zeros(len(scan.fields), dtype=np.min_scalar_type(len(fields)))  # narrow, so that sorting is quick
    of_fields[list(fields)] = np.arange(len(fields))
    positions = of_fields[np.concatenate(scan.code_fields)]
    features, vocabularies = list[Feature](), dict[str, pa.Table]()
    for feature, codes in zip(fields.values(), _grouped(positions, len(fields)), strict=True):
        wish = scan.source.features.get(feature.name, RawFeature())
        values = pc.utf8_slice_codeunits(keys.take(pa.array(codes)).cast(pa.string()), len(feature.name) + 1)
        table = pa.table({"value": values, "count": counts[codes], "code": codes})
        common = pa.array(counts[codes] >= (wish.min_count or scan.source.min_count))
        known = table.filter(common).sort_by([("count", "descending"), ("value", "ascending")])
        ids[known["code"].to_numpy()] = np.arange(FIRST_ID, FIRST_ID + known.num_rows)
        if feature.hash_buckets:
            rare = table.filter(pc.invert(common))
            buckets = text_hashes(rare["value"].combine_chunks()) % np.uint64(feature.hash_buckets)
            ids[rare["code"].to_numpy()] = FIRST_ID + known.num_rows + buckets.astype(np.int32)
        size = FIRST_ID + known.num_rows + feature.hash_buckets
        features.append(feature.model_copy(update={"size": size}))
        vocabularies[feature.name] = known
    return Target(features, positions, ids), vocabularies


# ---------------------------------------------------------------- splits


def _tables(scan: Scan, users: Users, target: Target) -> Iterator[tuple[pa.Table, npt.NDArray[np.int8]]]:
    """The rows as the splits hold them, and which split each is of."""
    columns = prepared_folder.arrow_schema(target.features)
    for rows in scan.stored_rows():
        theirs, ends = users.lengths[rows.users], np.cumsum(rows.lengths)
        for part in _cuts(theirs + rows.lengths, CHUNK_IDS):
            own, of_users = rows.lengths[part], theirs[part]
            places = np.arange(of_users.sum()) - np.repeat(np.cumsum(of_users) - of_users, of_users)
            places += np.repeat(users.starts[rows.users[part]], of_users)
            start, numbers = ends[part.start] - own[0], np.arange(len(own))
            owners = np.concatenate([np.repeat(numbers, of_users), np.repeat(numbers, own)])
            coded = np.concatenate([users.features[places], rows.features[start : ends[part.stop - 1]]])
            labels = {"click": rows.click[part].astype(np.int8), "conversion": rows.conversion[part].astype(np.int8)}
            yield pa.table(labels | _columns(target, len(own), owners, coded), schema=columns), rows.splits[part]


def _columns(target: Target, rows: int, owners: Ints, coded: Coded) -> dict[str, pa.Array]:
    """The feature columns of some rows. owners: of which row each is; those of users come first."""
    columns: dict[str, pa.Array] = {}
    grouped = _grouped(target.positions[coded["code"]], len(target.features))
    for feature, places in zip(target.features, grouped, strict=True):
        own = places[np.argsort(owners[places], kind="stable")]
        ids = target.ids[coded["code"][own]]
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
    """Of each number below `groups`, where it stands, in order."""
    ends = np.cumsum(np.bincount(numbers, minlength=groups))
    return np.split(np.argsort(numbers, kind="stable"), ends[:-1])


def _cuts(lengths: Ints, most: int) -> Iterator[slice]:
    """Slices of what has these lengths, each of about `most` in all."""
    ends, start = np.cumsum(lengths), 0
    while start < len(lengths):
        stop = int(np.searchsorted(ends, ends[start] - lengths[start] + most, side="right"))
        yield slice(start, start := max(start + 1, stop))
