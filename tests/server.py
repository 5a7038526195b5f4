"""Servers that the tests start, stop, hang and kill: MLflow's own, and PostgreSQL under it."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from pipeline.tracking.ui import QUIET

HOST = "127.0.0.1"
START_SECONDS = 600  # how long a server may take until it answers, on the busiest machine
STOP_SECONDS = 15  # how long it may take to end by itself


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def postgres_programs() -> Path | None:
    """The folder of `initdb` and `postgres`; Debian keeps them out of the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def need_postgres() -> None:
    """Skip where there is no PostgreSQL; fail instead where CI_POSTGRES promises one."""
    if postgres_programs() is None:
        (pytest.fail if os.environ.get("CI_POSTGRES") == "1" else pytest.skip)("PostgreSQL is not installed")


def _end(process: "subprocess.Popen[bytes] | None", number: int) -> None:
    """Send the signal to the process and all that it started, and wait until it is gone."""
    if process is None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # what it started and did not end
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class MlflowServer:
    """`mlflow server` on a port that it keeps over restarts; nothing runs before `start`.

    Args:
        folder: its own; the database of `backend=None` (SQLite), the artifacts and `server.log` are there.
        backend: URI of its database.
        artifacts: where it keeps the artifacts that clients send through it.
        options: more options of `mlflow server`, as `--app-name basic-auth`.
        environment: more environment, as MLflow's settings of basic-auth.
    """

    def __init__(
        self,
        folder: Path,
        backend: str | None = None,
        *,
        artifacts: Path | None = None,
        port: int | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.options = folder, list(options)
        self.backend = backend or f"sqlite:///{folder / 'server.db'}"
        self.artifacts = artifacts or folder / "artifacts"
        self.port = port or free_port()
        self.uri = f"http://{HOST}:{self.port}"
        self.log = folder / "server.log"
        self.environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, and return when it answers."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= QUIET | {"MLFLOW_BACKEND_STORE_URI": self.backend} | self.environment
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.port), "--workers", "1",
                   "--artifacts-destination", str(self.artifacts), *self.options]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.wait()
        return self

    def wait(self) -> None:
        """Return when it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with suppress(URLError, ConnectionError, TimeoutError), urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.1)
        raise AssertionError(f"no answer within {START_SECONDS} s: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End it in order."""
        _end(self.process, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, it and its workers: connections are refused from now on."""
        _end(self.process, signal.SIGKILL)

    def pause(self) -> None:
        """It hangs: connections are accepted and never answered."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on where `pause` stopped it."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()


class Door:
    """A port before a server. Shut, it cuts its connections and refuses others, as while the server is gone.

    To start a server again takes seconds of a core.
    """

    def __init__(self, server: MlflowServer) -> None:
        self.server, self.port = server, free_port()
        self.uri = f"http://{HOST}:{self.port}"
        self.is_open, self.carried = False, 0  # bytes

    def open(self) -> None:
        """Let connections through."""
        self.listener = socket.create_server((HOST, self.port))
        self.listener.settimeout(0.1)
        self.ends, self.is_open, self.carried = list[socket.socket](), True, 0
        self.accepting = threading.Thread(target=self._accept, daemon=True)
        self.accepting.start()

    def shut(self) -> None:
        """From now on nobody is behind the port."""
        self.is_open = False
        self.accepting.join()
        self.listener.close()
        for end in self.ends:
            _cut(end)

    def _accept(self) -> None:
        while self.is_open:
            with suppress(TimeoutError):
                inside, _ = self.listener.accept()
                outside = socket.create_connection((HOST, self.server.port))
                self.ends += [inside, outside]
                for way in ((inside, outside), (outside, inside)):
                    threading.Thread(target=self._carry, args=way, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        """Send on what comes, until one of the two ends."""
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.carried += len(data)
                target.sendall(data)
        _cut(source)
        _cut(target)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shut()


def _cut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class Postgres:
    """A PostgreSQL cluster in a folder of its own, without the machine's settings; nothing runs before `start`.

    Over TCP an account needs its password; the superuser `postgres` comes in by the socket in `folder`.
    """

    def __init__(self) -> None:
        programs = postgres_programs()
        assert programs is not None
        self.programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # not below pytest's, which only its owner may enter
        self.port = free_port()
        self.password = "made/for:tests@only"  # noqa: S105 (with what must be quoted in a URI)
        self.user: int | None = None
        if os.geteuid() == 0:  # the server refuses to be root
            account = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
            self.user = account.pw_uid
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self.process: subprocess.Popen[bytes] | None = None
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        if self.user is not None:
            os.chown(password_file, self.user, -1)
        accounts = ["--username", "postgres", "--auth-local", "trust", "--auth-host", "scram-sha-256"]
        text = ["--encoding", "UTF8", "--locale", "C.UTF-8"]
        self._run("initdb", "--pgdata", self.data, "--pwfile", str(password_file), "--no-sync", *accounts, *text)

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    @property
    def environment(self) -> dict[str, str]:
        """How libpq's programs come in as the superuser."""
        return {"PGHOST": str(self.folder), "PGPORT": str(self.port), "PGUSER": "postgres"}

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.programs / program), *arguments], user=self.user, cwd=self.folder, timeout=300,
            env=os.environ | self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def database(self, name: str) -> str:
        """Make a database; its URI with the superuser's password."""
        self._run("createdb", name)
        quoted = self.password.replace("/", "%2F").replace(":", "%3A").replace("@", "%40")
        return f"postgresql://postgres:{quoted}@{HOST}:{self.port}/{name}"

    def start(self) -> Self:
        """Start it, and return when it answers."""
        command = [str(self.programs / "postgres"), "-D", self.data, "-p", str(self.port), "-k", str(self.folder),
                   "-c", f"listen_addresses={HOST}", "-c", "fsync=off"]  # fmt: skip
        end = time.monotonic() + START_SECONDS
        log = self.folder / "server.log"
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                command, user=self.user, cwd=self.folder, stdout=stream, stderr=stream, start_new_session=True
            )
        ready = [str(self.programs / "pg_isready"), "--quiet"]
        while subprocess.run(ready, env=os.environ | self.environment, check=False).returncode != 0:
            assert self.process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.05)
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _end(self.process, signal.SIGQUIT)  # at once: nothing of it is kept
        shutil.rmtree(self.folder, ignore_errors=True)
