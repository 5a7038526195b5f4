"""Writers and a sweep's workers without seconds of imports: forked from a process that has imported mlflow or torch.

For those that tests start from Python; whatever is started as a user starts it imports for itself, and with
`FAULTS=full` all do. Each is a process of its own, in a session of its own.
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
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

WRITER, WORKER = "pipeline.tracking", "pipeline.worker"
WRITERS = "WRITERS_OF_TESTS"  # in the environment: the address of the server of writers
REQUEST_BYTES = 1 << 20
POLL_SECONDS = 0.05


class Forked:
    """What is used of a `subprocess.Popen`, for a process that the server has forked."""

    def __init__(self, address: str, environment: Mapping[str, str], stderr: int) -> None:
        takes, stdin = os.pipe()
        stdout, gives = os.pipe()
        ended, status = os.pipe()
        self._ended = os.fdopen(ended, "rb", buffering=0)
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(address)
            request = json.dumps({"environment": dict(environment), "folder": os.getcwd()}).encode()
            socket.send_fds(asked, [len(request).to_bytes(4, "big") + request], [takes, gives, stderr, status])
            self.pid = int(asked.recv(20))
        for descriptor in (takes, gives, status):
            os.close(descriptor)
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._code(0)

    def wait(self, timeout: float | None = None) -> int:
        found = self._code(timeout)
        if found is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return found

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _code(self, seconds: float | None) -> int | None:
        """The exit code, once it is told; threads may wait for it side by side."""
        if self.returncode is None and select.select([self._ended], [], [], seconds)[0]:
            with self._lock:
                if self.returncode is None:
                    self.returncode = int(self._ended.read(20) or -signal.SIGKILL)  # nothing: the server is gone
        return self.returncode


def use(address: str | None = None) -> None:
    """From now on this process starts its writers and workers so. address: of a server of writers, if there is one."""
    from pipeline.runtime import processes

    real = processes.start

    def start(module: str, environment: Mapping[str, str], stderr: IO[bytes] | None, own_session: bool) -> Any:
        if module not in (WRITER, WORKER):
            return real(module, environment, stderr, own_session)
        writers = address or server(WRITER)
        if module == WRITER:
            return Forked(writers, environment, 2)
        assert stderr
        return Forked(server(WORKER), {**environment, WRITERS: writers}, stderr.fileno())

    processes.start = start


@cache
def server(module: str) -> str:
    """The address of this process' server of writers or workers, which ends with it."""
    address = str(Path(tempfile.mkdtemp(prefix="forked-")) / "socket")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    process = subprocess.Popen(
        [sys.executable, __file__, module, address], stdin=subprocess.PIPE, env=environment, start_new_session=True,
        cwd=Path(address).parent,  # not a test's folder, which may end who works there
    )  # fmt: skip
    _kept.append(process)  # its standard input closes when this process ends, however it ends
    while not Path(address).exists():
        assert process.poll() is None, f"the server of {module} has ended"
        time.sleep(0.02)
    return address


_kept: list[Any] = []


def main(module: str, address: str) -> None:
    """Fork a process for each request that comes; it goes on as `python -m module`."""
    if module == WRITER:
        from pipeline.tracking.__main__ import _warm
        from pipeline.tracking.store import CLIENT_SETTINGS

        os.environ.update(CLIENT_SETTINGS)
        _warm()
    else:
        for name in ("launch", "branching", "tasks.mmoe.task", "tasks.visobert.task"):
            import_module(f"pipeline.{name}")
    become = import_module(module if module == WORKER else f"{module}.__main__").main
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
                _serve(listener, waiting, become)


def _tell(waiting: dict[int, int]) -> None:
    """Write the exit codes of those that have ended."""
    while waiting and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        descriptor = waiting.pop(ended[0])
        with suppress(BrokenPipeError):  # who asked for it was killed
            os.write(descriptor, str(os.waitstatus_to_exitcode(ended[1])).encode())
        os.close(descriptor)


def _serve(listener: socket.socket, waiting: dict[int, int], become: Callable[[], None]) -> None:
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
            _become(become, json.loads(received[4:]), descriptors)
        waiting[pid] = descriptors.pop()
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(BrokenPipeError):
            asked.send(str(pid).encode())


def _become(main: Callable[[], None], request: Mapping[str, Any], descriptors: list[int]) -> NoReturn:
    """The process that was asked for."""
    code = 1
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
        if WRITERS in os.environ:
            use(os.environ.pop(WRITERS))
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
