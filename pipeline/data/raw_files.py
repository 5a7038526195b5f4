"""List raw data files, assign them to splits, and report errors in them."""

import gzip
import zlib
from collections.abc import Iterator, Mapping
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
# files and folders with these names are splits, if all entries of their folder have such names
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
    """List (split or None, file or folder) in reading order. Splits may be recognised by their names."""
    if data.is_dir() and not own:
        entries = [
            path for path in sorted(data.iterdir()) if path.name[0] not in "._" and (path.is_dir() or _is_data(path))
        ]
        splits = {SPLIT_NAMES.get(path.name.split(".")[0].lower()): path for path in entries}
        if "train" in splits and len(splits) > 1:
            if None not in splits and len(splits) == len(entries):
                own = {split: splits[split] for split in SPLITS[1:] if split in splits}
                for split, path in own.items():
                    info(f"{split}: {path}, by its name")
                data = splits["train"]
            else:
                names = ", ".join(path.name for split, path in splits.items() if split)
                warn(
                    f"{data}: {names} are read as one with the others; data.train, data.validation and data.test "
                    "name files of their own"
                )
    return [(None, data), *own.items()]


def _partition(file: Path, data: Path) -> dict[str, str | None]:
    folders = [part.split("=", 1) for part in file.relative_to(data).parts[:-1] if "=" in part]
    return {unquote(key): None if value == NO_PARTITION else unquote(value) for key, value in folders}


def _data_files(data: Path) -> list[Path]:
    if not data.is_dir():
        if data.exists() and not data.is_file():
            raise UserError(f"{data}: neither a file nor a folder")
        return [data]
    partitioned = any("=" in path.name for path in data.iterdir() if path.is_dir())
    files = sorted(filter(_is_data, data.rglob("*") if partitioned else data.iterdir()))
    if not files:
        raise UserError(f"{data}: no data file in this folder, allowed: {', '.join(FORMATS)}")
    return files


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(tuple(FORMATS)) and path.name[0] not in "._" and path.is_file()
