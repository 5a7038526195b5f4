"""The first start: a new embedded store appears whole, however many start at once and whenever one is killed.

MLflow makes a SQLite store by its whole history of migrations, in the file itself: two at once fail, and a kill leaves
a file that no later start accepts. Here one process at a time makes it in a temporary file, which then gets the name.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.errors import UserError
from pipeline.storage.files import sync
from pipeline.tracking.store import one_line, settle

SIDE_FILES = ("-journal", "-wal", "-shm")  # SQLite's own, beside the database


def ensure_store(uri: str) -> None:
    """Make the SQLite store of a tracking URI where there is no file or an empty one; MLflow judges anything else.

    Raises:
        UserError: it cannot be made.
    """
    file = _sqlite_file(uri)
    if file is None or not _is_missing(file):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_name(f"{file.name}.lock")):
            if _is_missing(file):
                _refuse_left(file)
                _make(uri, file)
    except FileExistsError:
        raise UserError(f"tracking store {file}: {file.parent} is not a folder") from None
    except OSError as error:
        raise UserError(f"tracking store {file}: {error.strerror or error}") from None


def _sqlite_file(uri: str) -> Path | None:
    """The database file of the URI, where it is one."""
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


def _parts(file: Path) -> list[Path]:
    """A database, and what SQLite may keep beside it."""
    return [file, *(file.with_name(file.name + end) for end in SIDE_FILES)]


def _refuse_left(file: Path) -> None:
    """Raise a UserError where SQLite would read what it kept beside an earlier store into the new one."""
    if left := [part.name for part in _parts(file)[1:] if part.exists()]:
        raise UserError(f"tracking store {file}: found none, but {' and '.join(left)} of an earlier one, which SQLite "
                        "would read into a new one; delete or rename what is left, then start again")  # fmt: skip


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock; its file is gone afterwards (filelock sends whoever waits at a removed file to the new one)."""
    with FileLock(file, fallback_to_soft=False):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _make(uri: str, file: Path) -> None:
    """Make a store in a temporary file, and give it the name; nothing where MLflow itself was first."""
    import sqlalchemy
    from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store

    settle()
    work = file.with_name(f"{file.name}.new")
    _remove(work)  # of an earlier maker, which is gone: the lock is ours
    url = sqlalchemy.make_url(uri).set(database=str(work))
    sqlalchemy.event.listen(sqlalchemy.pool.Pool, "connect", _without_syncs)
    try:
        # As MLflow does it for the URI itself; where artifacts go does not depend on the file's name.
        store = _get_sqlalchemy_store(str(url), None)  # type: ignore[no-untyped-call]
        store.engine.dispose()
    except Exception as error:  # whatever SQLite says becomes the user's one line
        _remove(work)
        raise UserError(f"tracking store {file}: {one_line(error)}") from None
    finally:
        sqlalchemy.event.remove(sqlalchemy.pool.Pool, "connect", _without_syncs)
    sync(work)
    _name(work, file)
    sync(file.parent)


def _remove(database: Path) -> None:
    for part in _parts(database):
        part.unlink(missing_ok=True)


def _without_syncs(connection: Any, record: Any) -> None:  # noqa: ARG001 (a listener)
    """Skip the syncs of hundreds of commits: the file counts for nothing until it is whole, and is synced then."""
    connection.execute("PRAGMA synchronous = OFF")


def _name(work: Path, file: Path) -> None:
    """Rename the store, never over a file with something in it."""
    if file.exists() and not file.stat().st_size:
        shutil.copymode(file, work)
        work.replace(file)
        return
    try:
        os.link(work, file)  # a rename would replace what MLflow itself has made meanwhile
    except FileExistsError:
        work.unlink()
    except OSError:
        work.rename(file)  # a file system without hard links
    else:
        work.unlink()
