"""Where a search keeps its study: a SQLite file for one process, PostgreSQL for any number of them.

Optuna does what several processes need of each other inside of `Study.optimize`: there it records signs of life and
fails the trials of the dead. With ask and tell nobody does, so it is done here, by the storage's own methods. Asking is
done by one process after the other: else two could see one trial left and both take it.
"""

import copy
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from pipeline.console import warn
from pipeline.errors import TrainingError, UserError
from pipeline.interrupts import check
from pipeline.tracking.store import one_line

ALLOWED = "null, or postgresql://user@host:5432/database (what is special in a password is %-quoted)"
RETRIES = 3  # of a trial whose process died: it may be what kills them
BEGUN = "begun"  # of a trial: its number, once it is asked for in whole (a retry has the number of another)
FAILED = "failed"  # of a trial: why its training failed; one without is failed because its process died
PATIENCE_SECONDS = 300.0  # that a server which is away is waited for
LOCK_SECONDS = 30  # after which the server takes the lock from a process that stands still with it
LOCK = 0x6F7074756E61  # PostgreSQL's name of the lock, the same for all searches in a database
CONNECTION = {"connect_timeout": "10", "keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3",
              "tcp_user_timeout": "30000"}  # fmt: skip
Away = (StorageInternalError, SQLAlchemyError)
T = TypeVar("T")


class Storage(Protocol):
    """What a search asks of the place where its study lies."""

    shared: bool  # by several processes
    base: RDBStorage

    def asking(self) -> Any:
        """A block that one process at a time is in."""
        ...

    def insist(self, act: Callable[[], T]) -> T:
        """What `act` returns; it is done again as long as the server is away."""
        ...

    def end_dead(self, study: Study) -> None:
        """Fail the trials that nobody is at. To be called inside of `asking`."""
        ...

    def keep(self, study: Study, number: int) -> None:
        """From now on until `drop` the trial is ours, and alive."""
        ...

    def drop(self, number: int) -> None: ...

    def close(self) -> None: ...


class FileStorage:
    """A SQLite file. Two processes on it are handed the same trial: there must be one."""

    shared = False

    def __init__(self, folder: Path) -> None:
        self.base = RDBStorage(f"sqlite:///{_braced(str(folder.resolve() / 'search.db'))}")
        self._seen = False

    @contextmanager
    def asking(self) -> Iterator[None]:
        yield

    def insist(self, act: Callable[[], T]) -> T:
        return act()

    def end_dead(self, study: Study) -> None:
        """At the start that is every running one."""
        if not self._seen:
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                study.tell(trial.number, state=TrialState.FAIL)
        self._seen = True

    def keep(self, study: Study, number: int) -> None:
        """No other process asks."""

    def drop(self, number: int) -> None:
        """No other process asks."""

    def close(self) -> None:
        """Nothing is open."""


class ServerStorage:
    """A PostgreSQL database."""

    shared = True

    def __init__(self, url: str, grace_seconds: int) -> None:
        """Connect, and make Optuna's tables where there are none.

        Raises:
            UserError: not such a URL, psycopg is missing, or the server does not let us in; without the password.
        """
        _quiet()
        self.url, self.shown = parsed(url)
        self.grace_seconds, self.interval = grace_seconds, max(1, grace_seconds // 6)
        connection = {name: value for name, value in CONNECTION.items() if name not in self.url.query}
        settings: dict[str, Any] = {"connect_args": connection}
        try:
            self._engine = sqlalchemy.create_engine(self.url, poolclass=sqlalchemy.NullPool, **settings)
            with self.asking() as asking:
                _refuse_mlflows(asking, self.shown)
                self.base = RDBStorage(
                    _braced(self.url.render_as_string(hide_password=False)),
                    settings | {"pool_pre_ping": True},
                    heartbeat_interval=self.interval,
                    grace_period=grace_seconds,
                )
        except ImportError:
            raise UserError(f"search.storage {self.shown}: psycopg is not installed; pip install -e '.[server]' has "
                            "it") from None  # fmt: skip
        except (*Away, RuntimeError) as error:
            raise UserError(f"search.storage {self.shown}: {self._said(error)}") from None
        self._kept: dict[int, int] = {}  # number of a trial -> its id in the database
        self._over, self._away_at = threading.Event(), float("-inf")
        threading.Thread(target=self._live, name="signs of life", daemon=True).start()

    @contextmanager
    def asking(self) -> "Iterator[sqlalchemy.Connection]":
        """The lock is the transaction's: it ends with the process, and with one that stands still."""
        with self._engine.connect() as connection, connection.begin():
            connection.execute(sqlalchemy.text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCK_SECONDS}s'"))
            taken = sqlalchemy.text("SELECT pg_try_advisory_xact_lock(:lock)")
            while not connection.scalar(taken, {"lock": LOCK}):
                _wait(0.05)
            yield connection

    def insist(self, act: Callable[[], T]) -> T:
        """
        Raises:
            TrainingError: the server is away for 5 minutes.
        """
        end = None
        while True:
            try:
                return act()
            except Away as error:
                self._away_at = time.monotonic()
                if end is None:
                    end = self._away_at + PATIENCE_SECONDS
                    warn(f"search.storage {self.shown}: {self._said(error)}; waiting for it")
                if self._away_at > end:
                    raise TrainingError(f"search.storage {self.shown}: {self._said(error)}; the same command goes on "
                                        "with the search") from None  # fmt: skip
            _wait(1.0)

    def end_dead(self, study: Study) -> None:
        """Those whose process has given no sign of life, or died while it asked: we have the lock, so it does not."""
        # after the server was away the others have not been able to give a sign of life either
        if time.monotonic() > self._away_at + 2 * self.interval:
            fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get(BEGUN) != trial.number:
                with suppress(UpdateFinishedTrialError):
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def keep(self, study: Study, number: int) -> None:
        study_id = self.base.get_study_id_from_name(study.study_name)
        trial_id = self.base.get_trial_id_from_study_id_trial_number(study_id, number)
        self.base.record_heartbeat(trial_id)
        self._kept[number] = trial_id

    def drop(self, number: int) -> None:
        self._kept.pop(number, None)

    def close(self) -> None:
        self._over.set()

    def _live(self) -> None:
        while not self._over.wait(self.interval):
            for trial_id in list(self._kept.values()):
                try:
                    self.base.record_heartbeat(trial_id)
                except Away:  # who asks the server for something tells it
                    self._away_at = time.monotonic()

    def _said(self, error: BaseException) -> str:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        text = one_line(cause if isinstance(cause, Exception) else StorageInternalError(str(error)))
        return text.replace(self.url.password, "***") if self.url.password else text


def storage_of(url: str | None, grace_seconds: int, folder: Path) -> Storage:
    """The server's if there is a URL, else the file in the folder."""
    _quiet()
    return FileStorage(folder) if url is None else ServerStorage(url, grace_seconds)


def check_server(url: str, written: object) -> None:
    """See that the server lets us in. written: the URL in the sweep's file.

    Raises:
        UserError: it does not; or a password was typed.
    """
    if parsed(url)[0].password and url != written:
        raise UserError("search.storage: found a password on the command line, where `ps` and MLflow's params show it, "
                        "allowed: PGPASSWORD, ~/.pgpass, or the sweep file")  # fmt: skip
    ServerStorage(url, 60).close()


def parsed(url: str) -> tuple[sqlalchemy.URL, str]:
    """The URL for SQLAlchemy with psycopg 3, and as it may be shown: without login and query.

    Raises:
        UserError: it is none of PostgreSQL.
    """
    kind, separator, _ = url.partition("://")
    if kind not in ("postgresql", "postgresql+psycopg") or not separator:
        found = f"found {kind}://..." if separator and re.fullmatch(r"[\w+]+", kind) else "found something else"
        raise UserError(f"search.storage: {found}, allowed: {ALLOWED}")
    try:
        found_url = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
    except (SQLAlchemyError, ValueError):  # what they say may hold part of the password
        raise UserError(f"search.storage: found a URL that cannot be read, allowed: {ALLOWED}") from None
    host = found_url.host or ""
    if not re.fullmatch(r"[\w.:-]*", host):
        raise UserError(f"search.storage: found a URL that cannot be read, allowed: {ALLOWED}")
    port = f":{found_url.port}" if found_url.port else ""
    return found_url, f"postgresql://{host}{port}/{found_url.database or ''}"


def try_again(study: Study) -> list[FrozenTrial]:
    """Queue the trials that were failed because their process died; returns those that have died too often.

    To be called inside of `asking`. What a kill leaves undone here the next call does.
    """
    again = RetryHeartbeatStaleTrialCallback()
    trials = study.get_trials(deepcopy=False)
    retried = {number for trial in trials for number in again.retry_history(trial)}
    hopeless = []
    for trial in trials:
        lost = trial.state == TrialState.FAIL and BEGUN in trial.user_attrs and FAILED not in trial.user_attrs
        if not lost or trial.number in retried:
            continue
        if len(again.retry_history(trial)) < RETRIES:
            again(study, copy.deepcopy(trial))  # it writes into what it is given, which is Optuna's own copy here
        else:
            hopeless.append(trial)
    return hopeless


def is_retry(study: Study, number: int) -> bool:
    """An earlier trial of the same run was begun, and its process died."""
    (trial,) = (trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
    return bool(RetryHeartbeatStaleTrialCallback.retry_history(trial))


def _refuse_mlflows(connection: sqlalchemy.Connection, shown: str) -> None:
    """Optuna would put its tables beside MLflow's, and take MLflow's version table for its own."""
    tables = sqlalchemy.inspect(connection).get_table_names()
    if "alembic_version" in tables and "studies" not in tables:
        raise UserError(f"search.storage {shown}: found another program's tables there (MLflow's?), allowed: a "
                        "database of its own")  # fmt: skip


def _braced(url: str) -> str:
    """Optuna fills in what stands in braces."""
    return url.replace("{", "{{").replace("}", "}}")


def _quiet() -> None:
    """Optuna warns that signs of life are for `Study.optimize`, and that they may change."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")


def _wait(seconds: float) -> None:
    """Sleep; a request to end interrupts it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(0.2, left))
