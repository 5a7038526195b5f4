"""Read the original Ali-CCP files: check and parse their lines, and number their ids.

Arrow parses blocks of lines, and a dictionary assigns a number (code) to each id. The content is written to two unnamed
temporary files, one for rows and one for users. Memory use grows with distinct ids and users, not with rows.
"""

import codecs
import gzip
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.data.digests import split_positions, text_hashes
from pipeline.data.raw_files import is_gzip, read_errors
from pipeline.data.schema import MISSING_TEXT, SPLITS
from pipeline.errors import UserError
from pipeline.maths.arrays import Flags, Floats, Ints
from pipeline.tasks.mmoe.prepare.aliccp_config import AliccpFeature, AliccpSource

BLOCK_BYTES = 8 << 20  # size of the blocks of lines that are parsed at once
COUNTED = (
    "lines", "users", "conversions_without_click", "without_common_features", "cut_lines", "malformed_lines",
    "repeated_common_features", "repeated_fields", "other_feat_num", "empty_ids",
)  # fmt: skip

COMMON = "index,feat_num,feat_list"
SKELETON = "sample_id,click,buy,common_feature_index,feat_num,feat_list"
_TEXT = r"[ -+\--~]"  # printable ASCII except the comma
_FEATURE = rf"{_TEXT}+\x02{_TEXT}*\x03[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_REST = rf"[0-9]{{1,10}},(?:{_FEATURE}(?:\x01{_FEATURE})*)?\r?\n?\z"
_LINES = {COMMON: rf"\A{_TEXT}+,{_REST}", SKELETON: rf"\A{_TEXT}+,[01],[01],{_TEXT}*,{_REST}"}
_MAYBE_LARGE = r"[0-9.][eE]\+?[0-9]|[0-9]{39}"  # matches every number beyond float32
_INFINITE = 3.4028235677973362e38  # the smallest double that is infinite as float32
_KEY = pa.dictionary(pa.int32(), pa.binary())  # field\x02id
_CODED = np.dtype([("code", np.int32), ("value", np.float32)])

Coded = npt.NDArray[Any]  # _CODED
Progress = Callable[[str, int, float], None]  # stage, rows done, share of the stage that is done (0 = unknown)


class Rows(NamedTuple):
    """Samples. `users` are numbered across all files; -1 if there is none."""

    click: Flags
    conversion: Flags
    splits: npt.NDArray[np.int8]
    users: Ints
    lengths: Ints  # number of the sample's own features
    features: Coded


class Users(NamedTuple):
    """Common features of users. The last user has no features and stands for missing users (-1)."""

    lengths: Ints  # [users + 1] number of features
    starts: Ints  # [users + 1] position of the first feature
    features: Coded  # memory-mapped


class Scan:
    """Content of the files, with codes instead of ids, and counts of irregularities."""

    def __init__(
        self, source: AliccpSource, shares: list[float], rows: IO[bytes], users: IO[bytes], progress: Progress
    ) -> None:
        self.source, self.progress = source, progress
        self.counts = dict.fromkeys(COUNTED, 0)
        self.split_rows = np.zeros(len(SPLITS), dtype=np.int64)
        self.codes = defaultdict[bytes, int](itertools.count().__next__)  # field\x02id -> code
        self.code_fields = list[Ints]()  # field of each code, in pieces
        self.fields = {name: number for number, name in enumerate(source.features)}
        self.user_fields, self.row_fields, self.multi_fields = set[int](), set[int](), set[int]()
        self._shares, self._row_file, self._user_file = shares, rows, users
        self._user_lengths = list[Ints]()  # number of features of each user, in pieces

    def read(self, skeleton: Path, common: Path, *, test: bool) -> None:
        """Read a pair of files. test: all of their rows are the test split."""
        before = self.counts["users"]
        users = defaultdict[bytes, int](itertools.count(before).__next__)
        for cells in self._lines(common, COMMON):
            last, indices = before + len(users) - 1, cells[0].to_pylist()
            numbers = np.fromiter(map(users.__getitem__, indices), np.int64, len(indices))
            new = np.diff(np.maximum(np.maximum.accumulate(numbers), last), prepend=last) > 0
            self.counts["repeated_common_features"] += int((~new).sum())
            lengths, features = self._coded(cells[-1].filter(pa.array(new)), self.user_fields)
            self._user_lengths.append(lengths)
            self._user_file.write(features.tobytes())
        self.counts["users"] += len(users)
        for cells in self._lines(skeleton, SKELETON):
            indices = cells[3].to_pylist()
            numbers = np.fromiter(map(users.get, indices, itertools.repeat(-1)), np.int64, len(indices))
            for array in self._samples(cells, numbers, test=test):
                np.save(self._row_file, array)

    def rows(self) -> Iterator[Rows]:
        """Yield the rows in order, one block at a time."""
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
        """Yield the cells of a file's valid lines, [columns][lines], some megabytes at a time.

        Raises:
            UserError: more lines are malformed than allowed. A truncated last line is not an error.
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
            valid, large = (_bools(pc.match_substring_regex(texts, regex)) for regex in (_LINES[form], _MAYBE_LARGE))
            for row in np.flatnonzero(valid & large):
                values = [abs(float(value)) for value in re.findall(rb"\x03([^\x01\r\n]*)", lines[row])]
                valid[row] = max(values, default=0) < _INFINITE
            cut = bool(lines) and not lines[-1].endswith(b"\n")
            if cut and valid[-1]:  # it may end after a complete feature, with others missing
                valid[-1] = int(lines[-1].split(b",")[-2]) <= lines[-1].count(b"\x03")
            for row in np.flatnonzero(~valid):
                text = lines[row].strip(b"\r\n")
                if text and cut and row + 1 == len(lines):
                    self.counts["cut_lines"] += 1
                elif text:
                    malformed += 1
                    self.counts["malformed_lines"] += 1
                if malformed > self.source.malformed_lines:
                    shown = f"{text[:60].decode(errors='backslashreplace')!r}{'...' if len(text) > 60 else ''}"
                    allowed = form.replace("click,buy", "click (0 or 1),buy (0 or 1)")
                    raise UserError(
                        f"{file}: line {number + row + 1}: found {shown}, allowed: {allowed}, "
                        "the features as field\\x02id\\x03number joined by \\x01"
                    )
            number += len(lines)
            columns = form.count(",") + 1
            flat = pc.split_pattern(texts.filter(pa.array(valid)), b",").flatten()
            cells = [flat[column::columns] for column in range(columns)]
            claimed, counted = cells[-2].cast(pa.string()).cast(pa.int64()), pc.count_substring(cells[-1], b"\x03")
            self.counts["other_feat_num"] += int(_bools(pc.not_equal(claimed, counted)).sum())
            self.progress(file.name, number, share)
            yield cells

    def _samples(self, cells: list[Any], users: Ints, *, test: bool) -> Rows:
        """Convert lines of a skeleton file to rows."""
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
        self.split_rows += np.bincount(splits[kept], minlength=len(SPLITS))
        lengths, features = self._coded(cells[-1].filter(pa.array(kept)), self.row_fields)
        return Rows(click[kept], buy[kept], splits[kept], users[kept], lengths, features)

    def _coded(self, lists: pa.Array, fields_of_file: set[int]) -> tuple[Ints, Coded]:
        """Convert feat_lists to (features per list, coded features), without ignored fields and empty ids."""
        owners, keys, values = _parsed(lists)
        parts, numbers = pc.split_pattern(keys.dictionary, b"\x02").flatten(), keys.indices.to_numpy()
        names = parts[0::2].dictionary_encode()
        field_numbers = np.array([
            self.fields.setdefault(name.decode(), len(self.fields)) for name in names.dictionary.to_pylist()
        ], dtype=np.int64)  # fmt: skip
        others = AliccpFeature(kind=self.source.other_fields)
        kinds = np.array([self.source.features.get(name, others).kind for name in self.fields], dtype="U11")
        key_fields = field_numbers[names.indices.to_numpy()]  # [distinct keys]
        not_ignored = kinds[key_fields] != "ignore"
        empty = not_ignored & _bools(pc.is_in(parts[1::2], pa.array(MISSING_TEXT).cast(pa.binary())))
        wanted = not_ignored & ~empty
        wanted_keys = keys.dictionary.filter(pa.array(wanted)).to_pylist()
        before, codes = len(self.codes), np.full(len(wanted), -1, dtype=np.int32)
        codes[wanted] = np.fromiter(map(self.codes.__getitem__, wanted_keys), np.int32, len(wanted_keys))
        self.code_fields.append(key_fields[codes >= before])
        self.counts["empty_ids"] += int(empty[numbers].sum())

        selected = wanted[numbers]
        owners, numbers, values = owners[selected], numbers[selected], values[selected]
        fields = key_fields[numbers]  # [features]
        places = owners * len(self.fields) + fields
        order = np.argsort(places, kind="stable")
        repeated = np.zeros(len(places), dtype=np.bool_)
        repeated[order[1:]] = places[order[1:]] == places[order[:-1]]
        fields_of_file.update(np.flatnonzero(np.bincount(fields)).tolist())
        self.multi_fields.update(np.flatnonzero(np.bincount(fields[repeated | (values != 1)])).tolist())
        kept = ~(repeated & (kinds[fields] == "categorical"))
        self.counts["repeated_fields"] += int((~kept).sum())
        features = np.empty(int(kept.sum()), dtype=_CODED)
        features["code"], features["value"] = codes[numbers[kept]], values[kept]
        return np.bincount(owners[kept], minlength=len(lists)), features


def _blocks(file: Path) -> Iterator[tuple[list[bytes], float]]:
    """Yield blocks of lines of a plain or gzip file, and the share of the file that has been read."""
    with read_errors(file), file.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if is_gzip(file) else raw
        size = max(1, file.stat().st_size)
        while lines := stream.readlines(BLOCK_BYTES):
            yield lines, raw.tell() / size


def _parsed(lists: pa.Array) -> tuple[Ints, pa.DictionaryArray, Floats]:
    """Parse feat_lists. Returns the list index, key and value of each feature."""
    lengths = pc.count_substring(lists, b"\x03").to_numpy()
    text = b"\x01".join(lists.filter(pa.array(lengths > 0)).to_pylist())
    text = text.translate(bytes.maketrans(b"\x01", b"\n"), delete=b"\r\n")  # one feature per line, as CSV
    if not text:
        return np.zeros(0, dtype=np.int64), pa.array([], _KEY), np.zeros(0)
    table = pa.csv.read_csv(
        pa.BufferReader(text),
        pa.csv.ReadOptions(column_names=["key", "value"], block_size=len(text) + 1, use_threads=False),
        pa.csv.ParseOptions(delimiter="\x03", quote_char=False),
        pa.csv.ConvertOptions(column_types={"key": _KEY, "value": pa.float64()}, null_values=[]),
    )
    return np.repeat(np.arange(len(lists)), lengths), table["key"].combine_chunks(), table["value"].to_numpy()


def _bools(array: pa.Array) -> Flags:
    return np.array(array, dtype=np.bool_)
