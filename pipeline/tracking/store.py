"""The tracking store: where it is, whether it is there, what it says when it refuses, and how it is made quiet."""

import enum
import errno
import os
import re
import socket
import tempfile
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from pipeline.errors import UserError

PROBE_SECONDS = 5.0  # how long a server may take to say anything at all
DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
CLIENT_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we retry ourselves, without losing the order
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "NOT_IMPLEMENTED",
}
HTTP_AWAY = {408, 425, 429, 502, 503, 504}
HTTP_UNAUTHORIZED, HTTP_SERVER_ERROR, HTTP_CLIENT_ERRORS = 401, 500, (400, 500)
STATUS_TOLD = re.compile(r"failed with error code (\d{3}) ")
REFUSED_BY_DATABASE = re.compile("DataError|IntegrityError|StringDataRightTruncation|out of range|out-of-date database")
TWICE = re.compile("UNIQUE constraint|unique constraint|Duplicate entry")  # SQLite, PostgreSQL, MySQL
FILE_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
OWN_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError, NotImplementedError)
SECRET_SETTINGS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


class Answer(enum.Enum):
    """What an error of the store means for the call that got it; docs/resume.md has the table."""

    AWAY = "away"  # the same call is tried again
    FAILED = "failed"  # HTTP 500: tried again, but one call that goes on to fail while others succeed is refused
    NOT_ALLOWED = "not allowed"  # HTTP 401: waits for a login that is right
    REFUSED = "refused"  # this call, for good


def answer_of(error: Exception) -> Answer:
    """What the store means by an error that MLflow's client has raised."""
    if isinstance(error, UserError):  # our own word on a store that has to be mended first
        return Answer.REFUSED
    code, status = getattr(error, "error_code", None), http_status(error)
    if code in REFUSALS or REFUSED_BY_DATABASE.search(str(error)):
        return Answer.REFUSED
    if status is None:
        return Answer.AWAY if _is_temporary(error) else Answer.REFUSED
    if status == HTTP_UNAUTHORIZED:
        return Answer.NOT_ALLOWED
    of_database = code == "BAD_REQUEST" and not STATUS_TOLD.search(str(error))  # MLflow's server cannot reach its own
    if status == HTTP_SERVER_ERROR or of_database:
        return Answer.FAILED
    return Answer.REFUSED if status in range(*HTTP_CLIENT_ERRORS) and status not in HTTP_AWAY else Answer.AWAY


def http_status(error: Exception) -> int | None:
    """The HTTP status that a server answered with; None for an error of another kind, as a database's.

    MLflow keeps it in the text alone where the body is no JSON; else it has its own code for it.
    """
    response = getattr(error, "response", None)  # of requests, and of the clients of object stores
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(response) if response else None
    if response is not None:
        return int(response.status_code)
    if told := STATUS_TOLD.search(str(error)):
        return int(told[1])
    is_rest = getattr(error, "json", None) is not None  # MLflow's RestException
    return int(error.get_http_status_code()) if is_rest else None  # type: ignore[attr-defined]


def _is_temporary(error: Exception) -> bool:
    """Asked again, a store that is no server may take it: it is locked, full, or cannot be reached."""
    if getattr(error, "error_code", None) is not None:
        return True
    if isinstance(error, OSError):  # the errors of `requests` are such, too
        return not isinstance(error, FILE_ERRORS) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP)
    return not isinstance(error, OWN_ERRORS)


def was_just_made(error: Exception) -> bool:
    """Between MLflow's look for a row and its own, another process has made it."""
    return bool(TWICE.search(str(error)))


def check_artifacts(client: Any, run: Any) -> None:
    """Refuse now what would be refused once the training is done: an artifact folder that is closed to us, or remote
    and without the library that reaches it.

    Raises:
        OSError: the folder cannot be written.
        UserError: the library is not there.
    """
    parts = urlsplit(run.info.artifact_uri)
    if parts.scheme in ("", "file"):
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return
    try:
        client.list_artifacts(run.info.run_id)
    except ImportError as error:
        raise UserError(f"artifact folder {shown_uri(run.info.artifact_uri)}: {error}") from None


def one_line(error: Exception) -> str:
    """What the store said, without its secrets."""
    text = str(error) or type(error).__name__
    text = text.split("[SQL:")[0].split("(Background on")[0]
    text = re.split(r"\((?:\w+\.)+\w*Error\) ", text)[-1]  # what the database said, without what SQLAlchemy said of it
    return without_secrets(" ".join(text.split()))[:300]


def refusal(error: Exception) -> str:
    """One line that names the store and what it said."""
    return str(error) if isinstance(error, UserError) else f"tracking store {tracking_uri()}: {one_line(error)}"


def without_secrets(text: str) -> str:
    """The text without passwords and tokens: those of the settings, and whatever stands where a URI has them."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"://[^/\s@]*@", "://", text)
    return re.sub(r"(?i)\b(\w*(?:password|passwd|token|secret|pwd))=[^&\s\"']+", r"\1=***", text)


def _secrets() -> set[str]:
    found = {os.environ.get(name, "") for name in SECRET_SETTINGS}
    rest = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")[2]
    for login in (rest.rpartition("@")[0], rest.partition("@")[0] if "@" in rest else ""):
        found.add(login.partition(":")[2])
    return {form for secret in found for form in (secret, unquote(secret)) if len(form) > 2}


def tracking_uri() -> str:
    """Where runs go, without what may be secret: login and query."""
    import mlflow

    return shown_uri(str(mlflow.get_tracking_uri()))


def shown_uri(uri: str) -> str:
    """A URI without login and query.

    >>> shown_uri("postgresql://user:secret@host/base?password=other")
    'postgresql://host/base'
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri.partition("?")[0]
    if "@" in rest.partition("?")[2]:  # a password with a question mark, or a query with an address: cannot be told
        return f"{scheme}://***"
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def check_uri(uri: str | None = None) -> None:
    """See that a tracking URI is one, before anything is started on it; None = that of the environment.

    Raises:
        UserError: it cannot be taken apart.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") if uri is None else uri
    try:
        urlsplit(uri)
    except ValueError as error:
        raise UserError(f"MLFLOW_TRACKING_URI: found {shown_uri(uri)!r}, allowed: the URI of a tracking store "
                        f"({without_secrets(str(error))})") from None  # fmt: skip


def store_key() -> str:
    """Names the store: as it is shown, a database file by its whole path."""
    shown = tracking_uri()
    file = shown.removeprefix("sqlite:///")
    return f"sqlite:///{Path(file).absolute()}" if file != shown and file else shown


def probe() -> None:
    """See within seconds, and without mlflow, whether somebody answers where the store should be.

    Raises:
        ConnectionError: nobody does; one line without secrets.
        UserError: it is no URI.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    check_uri(uri)
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in DEFAULT_PORTS or not parts.hostname:
        return
    if scheme in ("http", "https") and _goes_by_proxy(scheme, parts.hostname):
        return
    try:
        address = (parts.hostname, parts.port or DEFAULT_PORTS[scheme])
        socket.create_connection(address, PROBE_SECONDS).close()
        if scheme in ("http", "https"):
            _ask(f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"does not answer: {without_secrets(str(reason))}") from None


def _goes_by_proxy(scheme: str, host: str) -> bool:
    return scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)


def _ask(address: str) -> None:
    """Whatever is answered will do, a refusal too. A certificate of one's own is for MLflow to judge."""
    try:
        urllib.request.urlopen(address, timeout=PROBE_SECONDS).close()  # noqa: S310
    except HTTPError:
        pass
    except URLError as error:
        import ssl

        if not isinstance(error.reason, ssl.SSLError):
            raise


def context_tags() -> dict[str, str]:
    """User, source and git commit, as `mlflow run` sets them."""
    from mlflow.tracking.context import registry

    return dict(registry.resolve_tags()) | {"mlflow.source.name": "python -m pipeline"}


def is_random(name: str) -> bool:
    """A name that MLflow made up (`legendary-gnat-695`)."""
    first, _, number = name.rpartition("-")
    return number.isdigit() and first.replace("-", "").isalpha()


def settle() -> None:
    """MLflow neither prints nor insists: what fails is told by us, in one line and within seconds.

    Raises:
        UserError: the tracking URI is none.
    """
    import logging

    import mlflow
    from mlflow.store.db.db_types import DATABASE_ENGINES

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    uri = str(mlflow.get_tracking_uri())
    check_uri(uri)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in DATABASE_ENGINES:  # a server needs none of it
        import mlflow.store.tracking.sqlalchemy_store

        mlflow.store.db.utils.MAX_RETRY_COUNT = 5  # 10 would take 100 s to say that a database cannot be opened
