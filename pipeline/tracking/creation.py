"""The first start: a new embedded store appears whole, however many start at once and whenever one is killed.

MLflow makes a SQLite store by its whole history of migrations, in the file itself: two at once fail, and a kill leaves
a file that no later start accepts. Here one process at a time makes it in a temporary file, which then gets the name.
"""

import contextlib
import importlib.util
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.errors import UserError
from pipeline.storage.files import sync
from pipeline.tracking.store import one_line, settle

SIDE_FILES = ("-journal", "-wal", "-shm")  # SQLite's own, beside the database
QUIET_SECONDS = 10.0  # MLflow, making a store, changes the file many times a second
BUSY_SECONDS = 20.0  # how long a lock on the database is waited for, as MLflow does
FIRST_TABLES = {"experiments", "runs", "tags", "metrics", "params", "alembic_version"}  # those MLflow begins with
SEEDED = {"alembic_version", "workspaces"}  # have rows in a store that was never used


class State(Enum):
    """What lies where a store should be."""

    WHOLE = "a store, or something else that MLflow itself has to judge"
    MISSING = "nothing, or an empty file"
    PARTIAL = "a store whose making was cut short, or what SQLite kept beside one that is gone"


def ensure_store(uri: str) -> None:
    """Make the SQLite store of a tracking URI where there is none; other stores are not touched.

    Raises:
        UserError: it cannot be made, or MLflow was stopped while making it.
    """
    file = _sqlite_file(uri)
    if file is None or (_state(file) is State.WHOLE and not _work_file(file).exists()):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_name(f"{file.name}.lock")):
            _remove_work(file)
            while (state := _settled(file)) is State.MISSING:
                _make(uri, file)
    except FileExistsError:
        raise UserError(f"tracking store {file}: {file.parent} is not a folder") from None
    except OSError as error:
        raise UserError(f"tracking store {file}: {error.strerror or error}") from None
    if state is State.PARTIAL:
        names = " and ".join(path.name for path in _parts(file) if path.exists())
        raise UserError(f"tracking store {file}: found a part of a store, from which no run can be read (MLflow was "
                        f"stopped while making it?); delete or rename {names}, then start again")  # fmt: skip


def _sqlite_file(uri: str) -> Path | None:
    """The database file of the URI, where it is one."""
    if not uri.startswith("sqlite"):
        return None
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    if not url.database or url.database.startswith((":memory:", "file:")):
        return None
    return Path(os.path.realpath(url.database))


def _parts(file: Path) -> list[Path]:
    """A database, and what SQLite may keep beside it."""
    return [file, *(file.with_name(file.name + end) for end in SIDE_FILES)]


def _work_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.new")


def _remove_work(file: Path) -> None:
    """Remove what an earlier maker left; the lock is held, so there is none at work."""
    for part in _parts(_work_file(file)):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock; its file is gone afterwards (filelock sends whoever waits at a removed file to the new one)."""
    with FileLock(file, fallback_to_soft=False):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _state(file: Path) -> State:
    try:
        with file.open("rb") as stream:
            first = stream.read(16)
    except (FileNotFoundError, NotADirectoryError):
        first = b""
    except OSError:
        return State.WHOLE  # a folder, or closed to us: MLflow says so
    if not first:  # SQLite would play a journal that is left into a new database of that name
        return State.PARTIAL if any(part.exists() for part in _parts(file)[1:]) else State.MISSING
    if first != b"SQLite format 3\0":
        return State.WHOLE
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)) as base:
            return State.PARTIAL if _is_half_made(base) else State.WHOLE
    except sqlite3.Error:
        return State.WHOLE  # damaged, locked for long, read-only: MLflow says so


def _settled(file: Path) -> State:
    """The file's state: at once where there is none or a whole one, else once nobody has changed it for a while.

    MLflow itself (`mlflow run`, `mlflow ui`) may be making the store.
    """
    before, since = None, time.monotonic()
    while (state := _state(file)) is not State.WHOLE and any(part.exists() for part in _parts(file)):
        now = _signature(file)
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > QUIET_SECONDS:
            break
        time.sleep(0.1)
    return state


def _signature(file: Path) -> list[tuple[int, int, int]]:
    found = []
    for part in _parts(file):
        with contextlib.suppress(FileNotFoundError):
            status = part.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _is_half_made(base: sqlite3.Connection) -> bool:
    """The schema is not MLflow's newest, and there is nothing in it that anybody could miss."""
    tables = {str(name) for (name,) in base.execute("select name from sqlite_master where type = 'table'")}
    if "runs" in tables and base.execute("select 1 from runs limit 1").fetchone():
        return False  # used, and the common case: MLflow itself says where it is too old
    versions = [row[0] for row in base.execute("select * from alembic_version")] if "alembic_version" in tables else []
    if versions:
        from alembic.util import CommandError

        try:
            known = [_migrations().get_revision(version) for version in versions]
        except CommandError:
            return False  # of a newer MLflow
        if [revision.revision for revision in known if revision] == _migrations().get_heads():
            return False
    elif not {table.removeprefix("_alembic_tmp_") for table in tables} <= FIRST_TABLES:
        return False  # another program's
    return not any(_has_rows(base, table) for table in tables)


@cache
def _migrations() -> Any:
    """MLflow's history of schemas."""
    from alembic.script import ScriptDirectory

    package = importlib.util.find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    return ScriptDirectory(str(Path(package.origin).parent / "store" / "db_migrations"))


def _has_rows(base: sqlite3.Connection, table: str) -> bool:
    """Whether somebody has put something in the table."""
    plain = table.removeprefix("_alembic_tmp_")  # a migration copies a table, drops it and renames the copy
    if plain in SEEDED:
        return False
    made = " where experiment_id != 0" if plain == "experiments" else ""
    return base.execute(f'select 1 from "{table}"{made} limit 1').fetchone() is not None  # noqa: S608


def _make(uri: str, file: Path) -> None:
    """Make a store in a temporary file, and give it the name; nothing where MLflow itself was first."""
    import sqlalchemy
    from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store

    settle()
    work = _work_file(file)
    url = sqlalchemy.make_url(uri).set(database=str(work))
    sqlalchemy.event.listen(sqlalchemy.pool.Pool, "connect", _without_syncs)
    try:
        # As MLflow does it for the URI itself; where artifacts go does not depend on the file's name.
        store = _get_sqlalchemy_store(str(url), None)  # type: ignore[no-untyped-call]
        store.engine.dispose()
    except Exception as error:  # whatever SQLite says becomes the user's one line
        _remove_work(file)
        raise UserError(f"tracking store {file}: {one_line(error)}") from None
    finally:
        sqlalchemy.event.remove(sqlalchemy.pool.Pool, "connect", _without_syncs)
    sync(work)
    _name(work, file)
    sync(file.parent)


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
