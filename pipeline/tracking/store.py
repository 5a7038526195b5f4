"""The tracking store: where it is, what it says when it refuses, and how it is made quiet."""

import re
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit


def is_temporary(error: Exception) -> bool:
    """The store may be back later: no connection, a time-out, a locked database, a server error."""
    code = getattr(error, "error_code", "")
    return isinstance(error, ConnectionError | TimeoutError) or code in (
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
    )


def check_artifacts(uri: str) -> None:
    """Refuse now what would be refused once the training is done: a local artifact folder that is closed to us."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    text = text.split("[SQL:")[0].split("(Background on")[0]
    text = re.split(r"\((?:\w+\.)+\w*Error\) ", text)[-1]  # what the database said, without what SQLAlchemy said of it
    return " ".join(text.split())[:300]


def tracking_uri() -> str:
    """Where runs go, without a password."""
    import mlflow

    scheme, separator, rest = str(mlflow.get_tracking_uri()).partition("://")
    return f"{scheme}{separator}{rest.rsplit('@', 1)[-1]}"


def context_tags() -> dict[str, str]:
    """User, source and git commit, as `mlflow run` sets them."""
    from mlflow.tracking.context import registry

    return dict(registry.resolve_tags()) | {"mlflow.source.name": "python -m pipeline"}


def is_random(name: str) -> bool:
    """A name that MLflow made up (`legendary-gnat-695`)."""
    first, _, number = name.rpartition("-")
    return number.isdigit() and first.replace("-", "").isalpha()


def settle() -> None:
    """MLflow neither prints nor insists: what fails is told by us, in one line and within seconds."""
    import logging

    import mlflow.store.db.utils

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    mlflow.store.db.utils.MAX_RETRY_COUNT = 5  # 10 would take 100 s to say that a database cannot be opened
