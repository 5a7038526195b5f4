"""Create a new SQLite store safely, even if several processes do so at once or one is killed.

MLflow creates a SQLite store in place by running all its migrations: two processes at once fail, and a killed process
leaves an unusable file. Here, one process at a time creates the store in a temporary file, which is then renamed.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.errors import UserError
from pipeline.runtime.platform_support import sync_path
from pipeline.tracking.store import configure_mlflow
from pipeline.tracking.store_errors import one_line

SQLITE_SUFFIXES = ("-journal", "-wal", "-shm")  # suffixes of SQLite's files beside the database


def ensure_store(uri: str) -> None:
    """Create the SQLite store of a tracking URI if its file is missing or empty.

    Raises:
        UserError: the store cannot be created.
    """
    file = _sqlite_file(uri)
    if file is None or not _is_missing(file):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_name(f"{file.name}.lock")):
            if _is_missing(file):
                _refuse_leftovers(file)
                _create(uri, file)
    except FileExistsError:
        raise UserError(f"tracking store {file}: {file.parent} is not a folder") from None
    except OSError as error:
        raise UserError(f"tracking store {file}: {error.strerror or error}") from None


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite"):
        return None
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    if not url.database or url.database.startswith((":memory:", "file:")):
        return None
    return Path(os.path.realpath(url.database))


def _is_missing(file: Path) -> bool:
    try:
        return file.stat().st_size == 0
    except (FileNotFoundError, NotADirectoryError):
        return True


def _side_files(database: Path) -> list[Path]:
    return [database.with_name(database.name + suffix) for suffix in SQLITE_SUFFIXES]


def _refuse_leftovers(file: Path) -> None:
    if leftovers := [side.name for side in _side_files(file) if side.exists()]:
        raise UserError(
            f"tracking store {file}: found none, but {' and '.join(leftovers)} of an earlier one, which "
            "SQLite would read into a new one; delete or rename what is left, then start again"
        )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a file lock, then remove its file; filelock makes waiting processes lock a new file."""
    with FileLock(file, fallback_to_soft=False):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _create(uri: str, file: Path) -> None:
    """Create a store in a temporary file and rename it."""
    import sqlalchemy
    from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store

    configure_mlflow()
    work = file.with_name(f"{file.name}.new")
    _remove(work)  # left by a killed process
    url = sqlalchemy.make_url(uri).set(database=str(work))
    sqlalchemy.event.listen(sqlalchemy.pool.Pool, "connect", _without_syncs)
    try:
        # As MLflow creates it for a tracking URI; the artifact location does not depend on the file name.
        store = _get_sqlalchemy_store(str(url), None)  # type: ignore[no-untyped-call]
        store.engine.dispose()
    except Exception as error:  # report any error of SQLite in one line
        _remove(work)
        raise UserError(f"tracking store {file}: {one_line(error)}") from None
    finally:
        sqlalchemy.event.remove(sqlalchemy.pool.Pool, "connect", _without_syncs)
    sync_path(work)
    _rename(work, file)
    sync_path(file.parent)


def _remove(database: Path) -> None:
    for file in (database, *_side_files(database)):
        file.unlink(missing_ok=True)


def _without_syncs(connection: Any, record: Any) -> None:  # noqa: ARG001 (a listener)
    """Turn off the sync of each of hundreds of commits; the file is synced once, before it is renamed."""
    connection.execute("PRAGMA synchronous = OFF")


def _rename(work: Path, file: Path) -> None:
    """Rename the store to its final name, unless MLflow itself has created one there in the meantime."""
    if not _is_missing(file):
        _remove(work)
        return
    if file.exists():
        shutil.copymode(file, work)
    work.replace(file)
