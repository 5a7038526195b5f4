"""The first start: a new embedded store appears whole, however many start at once and whenever one is killed.

MLflow makes a SQLite store by its whole history of migrations, in the file itself: two at once fail, and a kill leaves
a file that no later start accepts. Here one process at a time makes it in a file beside, which then gets the name.
"""

import contextlib
import errno
import fcntl
import glob
import importlib.util
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.console import say
from pipeline.errors import UserError
from pipeline.tracking.store import one_line, settle

SIDE_FILES = ("-journal", "-wal", "-shm")  # SQLite's own, beside the database
QUIET_SECONDS = 2.0  # a half-made store that stands still for so long is nobody's
HELD_SECONDS = 30.0  # how long one that stands still, but is open in another process, is waited for
BUSY_SECONDS = 20.0  # how long a lock on the database is waited for, as MLflow does
FIRST_TABLES = {"experiments", "runs", "tags", "metrics", "params", "alembic_version"}  # those MLflow begins with
SEEDED = {"alembic_version", "workspaces"}  # have rows in a store that was never used


class State(Enum):
    """What lies where a store should be."""

    FINE = "a store, or something that is not ours to judge"
    ABSENT = "nothing"
    EMPTY = "a file without a byte"
    HALF = "a store whose making was cut short, with nothing in it"


def ensure_store(uri: str) -> None:
    """Make the SQLite store of a tracking URI where there is none; other stores are not touched.

    Raises:
        UserError: it cannot be made, or another process has a half-made one open and does not go on.
    """
    file = _sqlite_file(uri)
    if file is None or (_state(file) is State.FINE and not _work_file(file).exists()):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_name(f"{file.name}.lock")):
            _remove_work(file)
            while (state := _state(file)) is not State.FINE:
                if state is not State.ABSENT and not _stands_still(file):
                    continue
                if state is State.HALF:
                    aside = _set_aside(file)
                    say(f"tracking store {file} was half made, without a run: set aside as {aside.name}, made anew")
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


def _work_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.new")


def _remove_work(file: Path) -> None:
    """What an earlier maker left; the lock is held, so there is none at work."""
    work = _work_file(file)
    for rest in (work, *(work.with_name(work.name + end) for end in SIDE_FILES)):
        rest.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(lock_file: Path) -> Iterator[None]:
    """Hold the lock; its file is gone afterwards."""
    while True:
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(lock), lock_file.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(lock)  # the one before us removed it: ours is no longer the one that others find
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        os.close(lock)


def _state(file: Path) -> State:
    try:
        with file.open("rb") as stream:
            first = stream.read(16)
    except (FileNotFoundError, NotADirectoryError):
        return State.ABSENT
    except OSError:
        return State.FINE  # a folder, or closed to us: MLflow says so
    if not first:
        return State.FINE if file.with_name(f"{file.name}-wal").exists() else State.EMPTY
    if first != b"SQLite format 3\0":
        return State.FINE
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)) as base:
            return State.HALF if _is_half_made(base) else State.FINE
    except sqlite3.Error:
        return State.FINE  # damaged, locked for long, read-only: MLflow says so


def _is_half_made(base: sqlite3.Connection) -> bool:
    """The schema is not MLflow's newest, and there is nothing in it that anybody could miss."""
    tables = {str(name) for (name,) in base.execute("select name from sqlite_master where type = 'table'")}
    if "runs" in tables and base.execute("select 1 from runs limit 1").fetchone():
        return False  # used, and the common case: MLflow itself says where it is too old
    versions = [row[0] for row in base.execute("select * from alembic_version")] if "alembic_version" in tables else []
    if versions:
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        package = importlib.util.find_spec("mlflow")
        assert package is not None
        assert package.origin is not None
        script = ScriptDirectory(str(Path(package.origin).parent / "store" / "db_migrations"))
        try:
            known = [script.get_revision(version) for version in versions]
        except CommandError:
            return False  # of a newer MLflow
        if [revision.revision for revision in known if revision] == script.get_heads():
            return False
    elif not {table.removeprefix("_alembic_tmp_") for table in tables} <= FIRST_TABLES:
        return False  # another program's
    return not any(_has_rows(base, table) for table in tables)


def _has_rows(base: sqlite3.Connection, table: str) -> bool:
    """Whether somebody has put something in the table."""
    plain = table.removeprefix("_alembic_tmp_")  # a migration copies a table, drops it and renames the copy
    if plain in SEEDED:
        return False
    made = " where experiment_id != 0" if plain == "experiments" else ""
    return base.execute(f'select 1 from "{table}"{made} limit 1').fetchone() is not None  # noqa: S608


def _stands_still(file: Path) -> bool:
    """Whether nobody is making the store just now; False as soon as it changes.

    Raises:
        UserError: it does not change, but another process has it open for long.
    """
    before, start = _signature(file), time.monotonic()
    while True:
        time.sleep(0.1)
        if _signature(file) != before:
            return False
        waited = time.monotonic() - start
        holder = _holder(file) if waited >= QUIET_SECONDS else None
        if waited >= QUIET_SECONDS and holder is None:
            return True
        if waited >= HELD_SECONDS:
            raise UserError(f"tracking store {file} is half made, and process {holder} has it open: end that process")


def _signature(file: Path) -> list[tuple[int, int, int]]:
    found = []
    for part in (file, *(file.with_name(file.name + end) for end in SIDE_FILES)):
        with contextlib.suppress(FileNotFoundError):
            status = part.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _holder(file: Path) -> int | None:
    """A process of this host that has the file open, as far as we may see."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.path.samestat(status, entry.stat()):
                        return int(process.name)
    return None


def _set_aside(file: Path) -> Path:
    """Give the store, and what SQLite keeps beside it, another name."""
    number = 1
    while list(file.parent.glob(f"{glob.escape(file.name)}.broken-{number}*")):
        number += 1
    aside = file.with_name(f"{file.name}.broken-{number}")
    for end in (*SIDE_FILES, ""):
        with contextlib.suppress(FileNotFoundError):
            file.with_name(file.name + end).rename(aside.with_name(aside.name + end))
    return aside


def _make(uri: str, file: Path) -> None:
    """Make a store beside, and give it the name; nothing where another process (MLflow itself) was first."""
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
    _sync(work)
    _name(work, file)
    _sync(file.parent)


def _without_syncs(connection: Any, record: Any) -> None:  # noqa: ARG001 (a listener)
    """Hundreds of commits to a file that counts for nothing yet: it is synced once, when it is whole."""
    connection.execute("PRAGMA synchronous = OFF")


def _name(work: Path, file: Path) -> None:
    """Rename, never over a file that is more than empty."""
    if file.exists():
        if file.stat().st_size or _holder(file) is not None:
            work.unlink()
            return
        shutil.copymode(file, work)
        work.replace(file)
        return
    if any(file.with_name(file.name + end).exists() for end in SIDE_FILES):
        _set_aside(file)  # of a database that was deleted: SQLite would play it back into the new one
    try:
        os.link(work, file)
        work.unlink()
    except FileExistsError:
        work.unlink()
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        work.rename(file)  # a file system without hard links


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
