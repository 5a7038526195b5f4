"""Errors of the tracking store: which calls to repeat, and one-line messages."""

import enum
import errno
import re

from pipeline.errors import UserError
from pipeline.tracking.redaction import without_secrets
from pipeline.tracking.store import tracking_uri

REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "NOT_IMPLEMENTED",
}
HTTP_UNAVAILABLE = {408, 425, 429, 502, 503, 504}
HTTP_UNAUTHORIZED, HTTP_SERVER_ERROR, HTTP_CLIENT_ERRORS = 401, 500, range(400, 500)
STATUS_IN_TEXT = re.compile(r"failed with error code (\d{3}) ")
REFUSED_BY_DATABASE = re.compile("DataError|IntegrityError|StringDataRightTruncation|out of range|out-of-date database")
DUPLICATE = re.compile("UNIQUE constraint|unique constraint|Duplicate entry")  # SQLite, PostgreSQL, MySQL
FILE_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
OWN_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError, NotImplementedError)


class Answer(enum.Enum):
    """Classes of errors, by how the failed call is treated; see the table in docs/resume.md."""

    UNAVAILABLE = "unavailable"  # repeat the call
    FAILED = "failed"  # HTTP 500: repeat the call; refused if it keeps failing while other calls succeed
    NOT_ALLOWED = "not allowed"  # HTTP 401: repeat the call until the login is corrected
    REFUSED = "refused"  # this call will never succeed


def classify(error: Exception) -> Answer:
    """Classify an error that MLflow's client raised."""
    if isinstance(error, UserError):  # raised by this project: the user has to repair the store
        return Answer.REFUSED
    code, status = getattr(error, "error_code", None), http_status(error)
    if code in REFUSALS or REFUSED_BY_DATABASE.search(str(error)):
        return Answer.REFUSED
    if status is None:
        return Answer.UNAVAILABLE if _is_temporary(error) else Answer.REFUSED
    if status == HTTP_UNAUTHORIZED:
        return Answer.NOT_ALLOWED
    is_database = code == "BAD_REQUEST" and not STATUS_IN_TEXT.search(str(error))  # the server's database failed
    if status == HTTP_SERVER_ERROR or is_database:
        return Answer.FAILED
    return Answer.REFUSED if status in HTTP_CLIENT_ERRORS and status not in HTTP_UNAVAILABLE else Answer.UNAVAILABLE


def http_status(error: Exception) -> int | None:
    """HTTP status of a server's response; None for errors without one, such as those of a database.

    MLflow puts the status into the message if the body was not JSON; otherwise it has its own error code.
    """
    response = getattr(error, "response", None)  # errors of `requests` and of object store clients
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(response) if response else None
    if response is not None:
        return int(response.status_code)
    if match := STATUS_IN_TEXT.search(str(error)):
        return int(match[1])
    is_rest = getattr(error, "json", None) is not None  # MLflow's RestException
    return int(error.get_http_status_code()) if is_rest else None  # type: ignore[attr-defined]


def is_duplicate(error: Exception) -> bool:
    """Whether the error means that another process has inserted the same row."""
    return bool(DUPLICATE.search(str(error)))


def one_line(error: Exception) -> str:
    """The error as one line without secrets."""
    text = str(error) or type(error).__name__
    text = text.split("[SQL:")[0].split("(Background on")[0]
    text = re.split(r"\((?:\w+\.)+\w*Error\) ", text)[-1]  # drop SQLAlchemy's prefix of the database's message
    return without_secrets(" ".join(text.split()))[:300]


def refusal(error: Exception) -> str:
    """One-line message with the store's URI and the error."""
    return str(error) if isinstance(error, UserError) else f"tracking store {tracking_uri()}: {one_line(error)}"


def _is_temporary(error: Exception) -> bool:
    """Whether a call without HTTP response may succeed later, because the store is locked, full or unreachable."""
    if getattr(error, "error_code", None) is not None:
        return True
    if isinstance(error, OSError):  # includes the errors of `requests`
        return not isinstance(error, FILE_ERRORS) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP)
    return not isinstance(error, OWN_ERRORS)
