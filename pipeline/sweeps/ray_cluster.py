"""Connection to a Ray cluster, and the environment that every node needs."""

import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.runtime.interrupts import Interrupted, check
from pipeline.storage.journal import Record

PROBE_SECONDS = 5.0  # time limit for the cluster to accept a connection
START_ATTEMPTS = 3  # for starting a cluster: Ray's own time limit is too short on a busy machine
OBJECT_STORE_BYTES = 100_000_000  # for a cluster started here: replies are a few hundred bytes
MLFLOW_PREFIX = "MLFLOW_"  # common prefix of MLflow's environment variables


@dataclass(frozen=True)
class LauncherEnvironment:
    """The launcher's working folder and MLflow settings, which every task applies."""

    folder: str
    sweep_folder: str
    settings: Mapping[str, str] = field(repr=False)  # may contain credentials

    @classmethod
    def current(cls, sweep_folder: Path) -> "LauncherEnvironment":
        settings = {name: value for name, value in os.environ.items() if name.startswith(MLFLOW_PREFIX)}
        settings.pop("MLFLOW_RUN_ID", None)
        return cls(str(Path.cwd()), str(sweep_folder.resolve()), settings)

    def apply(self) -> None:
        """Change to the working folder and set the environment variables.

        Raises:
            UserError: a folder does not exist on this node.
        """
        for folder in (self.folder, self.sweep_folder):
            if not Path(folder).is_dir():
                raise UserError(f"Ray node {socket.gethostname()} has no folder {folder}; allowed: working folder and "
                                "output_dir on storage that every node has at the same path")  # fmt: skip
        os.chdir(self.folder)
        for name in [name for name in os.environ if name.startswith(MLFLOW_PREFIX)]:
            del os.environ[name]
        os.environ.update(self.settings)


def connect(address: str | None) -> Any:
    """Connect to the cluster at `address` or RAY_ADDRESS, or start one on this machine. Returns the module `ray`.

    Raises:
        UserError: Ray is not installed, or the cluster is unreachable or has another version.
    """
    try:
        import ray
        import ray.exceptions  # noqa: F401 (used as an attribute of ray)
        import ray.util.scheduling_strategies  # noqa: F401
    except ImportError:
        raise UserError("engine ray: Ray is not installed; install it with `pip install --editable '.[ray]'`, or use "
                        "engine local") from None  # fmt: skip
    where = f"ray_address {address}" if address else f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "/" in address:
        raise UserError(f"{where}: allowed: host:port of the cluster that this machine is in, auto or local")
    if address not in ("auto", "local"):
        _probe(address, where)
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **own)
            break
        except Exception as error:  # Ray raises a plain Exception when a node starts too slowly
            ray.shutdown()
            if attempt == START_ATTEMPTS or "timed out during startup" not in str(error):
                raise UserError(f"{where if address != 'local' else 'engine ray'}: {str(error).strip()}") from None
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray replaces this handler
    return ray


def _probe(address: str, where: str) -> None:
    """Check that the cluster accepts connections; Ray itself would retry for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PROBE_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: the cluster does not answer: {error}") from None


def refuse_local_store(uri: str, nodes: list[Record]) -> None:
    """Refuse a tracking store in a local file if the cluster has several machines.

    uri: the store's URI; empty for MLflow's default. nodes: the entries of `ray.nodes()` that are alive.

    Raises:
        UserError: the store is in a local file and the cluster has several machines.
    """
    machines = sorted({f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes})
    scheme, separator, _ = uri.partition("://")
    if len(machines) > 1 and (not separator or scheme.partition("+")[0] in ("sqlite", "file")):
        raise UserError(f"MLFLOW_TRACKING_URI is {f'a {scheme} store' if separator else 'not that of a server'}, and "
                        f"the Ray cluster has machines {', '.join(machines)}; allowed: a server that all of them reach "
                        "(http:// or https://) or its database (postgresql://, mysql://)")  # fmt: skip


@contextmanager
def named_interrupts() -> Iterator[None]:
    """Raise the original `Interrupted` where a Ray call replaced it with a bare KeyboardInterrupt."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        check()
        raise
