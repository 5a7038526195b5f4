"""The tracking store named by MLFLOW_TRACKING_URI: address, check that it answers, settings of MLflow's client."""

import os
import socket
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.tracking.redaction import shown_uri, without_secrets

PROBE_SECONDS = 5.0  # timeout of each step of the check
DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
CLIENT_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the writer does its own retries, in order
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri() -> str:
    """The store's URI without credentials and query string, which may be secret."""
    import mlflow

    return shown_uri(str(mlflow.get_tracking_uri()))


def store_key() -> str:
    """Identifier of the store: its URI without secrets, with an absolute path for a SQLite file."""
    shown = tracking_uri()
    file = shown.removeprefix("sqlite:///")
    return f"sqlite:///{Path(file).absolute()}" if file != shown and file else shown


def check_uri(uri: str | None = None) -> None:
    """Check a tracking URI, by default the environment's.

    Raises:
        UserError: the URI cannot be parsed.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") if uri is None else uri
    try:
        urlsplit(uri)
    except ValueError as error:
        raise UserError(f"MLFLOW_TRACKING_URI: found {shown_uri(uri)!r}, allowed: the URI of a tracking store "
                        f"({without_secrets(str(error))})") from None  # fmt: skip


def check_reachable() -> None:
    """Check within seconds, and without importing mlflow, that the store's server answers.

    Raises:
        ConnectionError: it does not answer; the message is one line without secrets.
        UserError: the URI cannot be parsed.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    check_uri(uri)
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    is_http = scheme in ("http", "https")
    if scheme not in DEFAULT_PORTS or not parts.hostname:
        return
    if is_http and scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return  # the proxy may reach a server that this host cannot
    try:
        address = (parts.hostname, parts.port or DEFAULT_PORTS[scheme])
        socket.create_connection(address, PROBE_SECONDS).close()
        if is_http:
            _request(f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"does not answer: {without_secrets(str(reason))}") from None


def _request(address: str) -> None:
    """Send a request; any answer counts, even an HTTP error. Certificate errors are left to MLflow."""
    try:
        urllib.request.urlopen(address, timeout=PROBE_SECONDS).close()  # noqa: S310
    except HTTPError:
        pass
    except URLError as error:
        import ssl

        if not isinstance(error.reason, ssl.SSLError):
            raise


def configure_mlflow() -> None:
    """Silence MLflow's logging and shorten its retries, so that errors are reported once and within seconds.

    Raises:
        UserError: the tracking URI cannot be parsed.
    """
    import logging

    import mlflow
    from mlflow.store.db.db_types import DATABASE_ENGINES

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    uri = str(mlflow.get_tracking_uri())
    check_uri(uri)
    if urlsplit(uri).scheme.partition("+")[0] in DATABASE_ENGINES:
        import mlflow.store.tracking.sqlalchemy_store

        mlflow.store.db.utils.MAX_RETRY_COUNT = 5  # 10 would take 100 s if a database cannot be opened
