"""Writer processes without their two seconds of imports: forked from a process that has imported mlflow.

For writers that tests start from Python; whatever is started as a user starts it imports for itself, and with
`FAULTS=full` all do. Each is a process of its own, in a session of its own, as `pipeline.run` asks for it.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

WRITER = [sys.executable, "-m", "pipeline.tracking"]
REQUEST_BYTES = 1 << 20
POLL_SECONDS = 0.05


class Forked:
    """What is used of a `subprocess.Popen`, for a process that the server has forked."""

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        takes, stdin = os.pipe()
        stdout, gives = os.pipe()
        self._status, status = os.pipe()
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(address)
            request = json.dumps({"environment": dict(environment), "folder": os.getcwd()}).encode()
            socket.send_fds(asked, [len(request).to_bytes(4, "big") + request], [takes, gives, 2, status])
            self.pid = int(asked.recv(20))
        for descriptor in (takes, gives, status):
            os.close(descriptor)
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        found = self._ended(timeout)
        if found is None:
            raise subprocess.TimeoutExpired(WRITER, timeout or 0)
        return found

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(os.read(self._status, 20) or -signal.SIGKILL)  # nothing: the server is gone
            os.close(self._status)
        return self.returncode


def use(address: str | None = None) -> None:
    """From now on this process starts its writers that way. address: of a server that is there; else one is made."""
    from pipeline import run

    def start(command: Sequence[str], *, env: Mapping[str, str], **_: Any) -> Forked:
        assert list(command) == WRITER
        return Forked(address or server(), env)

    run.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=start, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )


@cache
def server() -> str:
    """The address of this process' server, which ends with it."""
    address = str(Path(tempfile.mkdtemp(prefix="writers-")) / "socket")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    process = subprocess.Popen(
        [sys.executable, __file__, address], stdin=subprocess.PIPE, env=environment, start_new_session=True
    )
    _kept.append(process)  # its standard input closes when this process ends, however it ends
    while not Path(address).exists():
        assert process.poll() is None, "the server of writers has ended"
        time.sleep(0.02)
    return address


_kept: list[Any] = []


def main(address: str) -> None:
    """Fork a writer for each request that comes."""
    from pipeline.tracking.__main__ import _warm
    from pipeline.tracking.store import CLIENT_SETTINGS

    os.environ.update(CLIENT_SETTINGS)
    _warm()
    waiting: dict[int, int] = {}  # process -> where its exit code is written
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        os.rename(f"{address}.new", address)  # there when it listens
        while True:
            ready = select.select([listener, sys.stdin], [], [], POLL_SECONDS if waiting else None)[0]
            _tell(waiting)
            if sys.stdin in ready:
                shutil.rmtree(Path(address).parent)
                return
            if listener in ready:
                _serve(listener, waiting)


def _tell(waiting: dict[int, int]) -> None:
    """Write the exit codes of those that have ended."""
    while waiting and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        descriptor = waiting.pop(ended[0])
        with suppress(BrokenPipeError):  # who asked for it was killed
            os.write(descriptor, str(os.waitstatus_to_exitcode(ended[1])).encode())
        os.close(descriptor)


def _serve(listener: socket.socket, waiting: dict[int, int]) -> None:
    with listener.accept()[0] as asked:
        received, descriptors, _, _ = socket.recv_fds(asked, REQUEST_BYTES, 4)
        size = int.from_bytes(received[:4], "big")
        while len(received) < max(5, size + 4):
            more = asked.recv(REQUEST_BYTES)
            if not more:  # who asked was killed while it did
                for descriptor in descriptors:
                    os.close(descriptor)
                return
            received += more
        pid = os.fork()
        if not pid:
            for descriptor in waiting.values():
                os.close(descriptor)
            listener.close()
            asked.close()
            _become(json.loads(received[4:]), descriptors)
        waiting[pid] = descriptors.pop()
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(BrokenPipeError):
            asked.send(str(pid).encode())


def _become(request: Mapping[str, Any], descriptors: list[int]) -> NoReturn:
    """The writer."""
    try:
        os.setsid()
        os.close(descriptors.pop())  # where the exit code is written: not by us
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = os.fdopen(0, closefd=False)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        from pipeline.tracking.__main__ import main as write

        write()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
