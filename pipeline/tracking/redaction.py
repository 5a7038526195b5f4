"""Remove passwords and tokens from texts and URIs."""

import os
import re
from urllib.parse import unquote

SECRET_SETTINGS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def without_secrets(text: str) -> str:
    """Remove configured secrets, logins in URIs, and values like that of `token=...` from a text."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"://[^/\s@]*@", "://", text)
    return re.sub(r"(?i)\b(\w*(?:password|passwd|token|secret|pwd))=[^&\s\"']+", r"\1=***", text)


def shown_uri(uri: str) -> str:
    """Remove credentials and the query string from a URI.

    >>> shown_uri("postgresql://user:secret@host/base?password=other")
    'postgresql://host/base'
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri.partition("?")[0]
    if "@" in rest.partition("?")[2]:  # ambiguous: a password with a question mark, or a query with an @
        return f"{scheme}://***"
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def _secrets() -> set[str]:
    secrets = {os.environ.get(name, "") for name in SECRET_SETTINGS}
    rest = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")[2]
    for login in (rest.rpartition("@")[0], rest.partition("@")[0] if "@" in rest else ""):
        secrets.add(login.partition(":")[2])
    return {form for secret in secrets for form in (secret, unquote(secret)) if len(form) > 2}
