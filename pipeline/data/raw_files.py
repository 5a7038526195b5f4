"""List raw data files, assign them to splits, and report errors in them."""

import gzip
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa

from pipeline.data.schema import SPLITS
from pipeline.errors import UserError
from pipeline.runtime.console import info, warn

FORMATS = {".csv": "CSV", ".csv.gz": "CSV", ".jsonl": "JSON Lines", ".jsonl.gz": "JSON Lines", ".parquet": "Parquet"}
BLOCK_BYTES = 16 << 20  # size of a parsed block; a CSV row must fit into one block
# files and folders with one of these words in their names are splits, if all entries of their folder are
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
               "val": "validation", "dev": "validation", "test": "test"}  # fmt: skip
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class RawFile:
    path: Path
    split: str | None = None
    """split of all its rows; None if the schema divides them"""
    partition: Mapping[str, str | None] = field(default_factory=dict)
    """columns given by the names of its folders (`day=7`)"""


def list_files(data: Path, own: Mapping[str, Path]) -> list[RawFile]:
    """List the files of `data`, whose rows the schema divides, followed by the files that are a whole split.

    own: split -> file or folder. The files of a folder are sorted by name.

    Raises:
        UserError: a path is missing, unreadable or empty.
    """
    try:
        files = [
            RawFile(file, split, _partition(file, path))
            for split, path in _split_paths(data, own) for file in _data_files(path)
        ]  # fmt: skip
        for file in files:
            with file.path.open("rb") as stream:
                if not stream.read(1):
                    raise UserError(f"{file.path}: the file is empty")
    except OSError as error:
        raise UserError(f"{error.filename or data}: {error.strerror or error}") from None
    return files


def file_format(file: Path) -> str:
    return next((kind for suffix, kind in FORMATS.items() if file.name.lower().endswith(suffix)), "CSV")


def is_gzip(file: Path) -> bool:
    return file.name.lower().endswith(".gz")


@contextmanager
def read_errors(file: Path) -> Iterator[None]:
    """Report an error in a raw file as a one-line UserError."""
    try:
        yield
    except UnicodeError:
        raise UserError(f"{file}: the header is not UTF-8 text; csv.encoding names another encoding") from None
    except (EOFError, zlib.error, pa.ArrowException, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).split("\n")[0]
        gzip_reason = "gzip" in reason or "zlib" in reason or "compressed stream" in reason
        if "straddling" in reason or "out of sync" in reason:
            reason = f"a row over {BLOCK_BYTES >> 20} MiB, or a quote that is never closed"
        elif gzip_reason or isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            reason = f"not a whole gzip file ({reason})"
        elif file_format(file) == "Parquet":
            reason = f"not a {'whole' if 'magic bytes' in reason else 'readable'} Parquet file ({reason})"
        raise UserError(f"{file}: {reason[:300]}") from None


def _split_paths(data: Path, own: Mapping[str, Path]) -> list[tuple[str | None, Path]]:
    """List (split or None, file or folder) in reading order. Splits may be recognised by their names.

    Raises:
        UserError: folders have the names of splits, but cannot be read as splits.
    """
    if not data.is_dir():
        return [(None, data), *own.items()]
    entries = [path for path in sorted(data.iterdir()) if path.name[0] not in "._"]
    partitioned = any(map(_is_partition, entries))
    named = {path: _named_split(path) for path in entries}
    folders = [path for path in entries if path.is_dir() and any(_files_below(path))]
    read = [path for path in entries if _is_data(path) or (path in folders and (partitioned or named[path]))]
    unread = [path for path in entries if path not in read and (path in folders or (path.is_file() and named[path]))]
    splits = {named[path] for path in read}
    if not own and len(splits) > 1 and "train" in splits and None not in splits:
        _warn_of_unread(data, unread)
        for split in SPLITS[1:]:
            if paths := [path for path in read if named[path] == split]:
                info(f"{split}: {data / _listed(paths)}, by its name")
        ordered = sorted(read, key=lambda path: SPLITS.index(str(named[path])))
        return [(None if named[path] == "train" else named[path], path) for path in ordered]
    split_folders = [path for path in folders if named[path]]
    if split_folders and not own and not partitioned:
        allowed = "train beside validation or test and nothing else, or data.train, data.validation and data.test"
        raise UserError(f"{data}: found {_listed(split_folders)}, allowed: {allowed}, which name files or folders")
    if len(splits) > 1:
        names = _listed([path for path in read if named[path]])
        warn(f"{data}: read as one with the others: {names}; data.train, data.validation and data.test name files of "
             "their own")  # fmt: skip
    _warn_of_unread(data, [path for path in unread if path.is_file()])  # _data_files warns of folders
    return [(None, data), *own.items()]


def _named_split(path: Path) -> str | None:
    """Split that one part of the name means, as in `X_test.csv` or `test-00000.csv`; None if no part or several do."""
    splits = [SPLIT_NAMES[part] for part in re.split(r"[-_.\s]", path.name.lower()) if part in SPLIT_NAMES]
    return splits[0] if len(splits) == 1 and not _is_partition(path) else None


def _partition(file: Path, data: Path) -> dict[str, str | None]:
    folders = [part.split("=", 1) for part in file.relative_to(data).parts[:-1] if "=" in part]
    return {
        unicodedata.normalize("NFC", unquote(key)): None if value == NO_PARTITION else unquote(value)
        for key, value in folders
    }


def _data_files(data: Path) -> list[Path]:
    if not data.is_dir():
        if data.exists() and not data.is_file():
            raise UserError(f"{data}: neither a file nor a folder")
        if data.name.lower().removesuffix(".gz").endswith((".json", ".ndjson")):
            raise UserError(f"{data}: found JSON by its name, allowed: one object per line in a file called .jsonl")
        return [data]
    folders = [path for path in data.iterdir() if path.is_dir() and path.name[0] not in "._"]
    partitioned = any(map(_is_partition, folders))
    files = sorted(_files_below(data) if partitioned else filter(_is_data, data.iterdir()))
    if not files:
        raise UserError(f"{data}: no data file in this folder, allowed: {', '.join(FORMATS)}")
    if not partitioned:
        _warn_of_unread(data, sorted(path for path in folders if any(_files_below(path))))
    return files


def _warn_of_unread(folder: Path, paths: Sequence[Path]) -> None:
    if paths:
        allowed = f"files called {', '.join(FORMATS)}, and folders such as day=7"
        warn(f"{folder}: not read: {_listed(paths)}; allowed: {allowed}")


def _is_partition(path: Path) -> bool:
    return "=" in path.name and path.is_dir()


def _files_below(folder: Path) -> Iterator[Path]:
    """Data files in a folder and the folders in it, except where a name begins with `.` or `_`."""
    for path in folder.rglob("*"):
        if _is_data(path) and not any(part[0] in "._" for part in path.relative_to(folder).parts):
            yield path


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(tuple(FORMATS)) and path.name[0] not in "._" and path.is_file()


def _listed(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(path.name for path in paths[:4]) + more
