"""What the store's errors mean, as docs/resume.md says, and that no message shows a secret."""

import errno

import pytest

from pipeline.errors import UserError
from pipeline.tracking.redaction import shown_uri, without_secrets
from pipeline.tracking.store_errors import Answer, classify, one_line


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://user:secret@host/base", "postgresql://host/base"),
        ("postgresql://user:se@cret@host:5432/base?password=secret", "postgresql://host:5432/base"),
        ("postgresql://host/base?user=me&password=secret", "postgresql://host/base"),
        ("postgresql://user:se?cret@host/base", "postgresql://***"),
        ("https://me:secret@host:5000/prefix", "https://host:5000/prefix"),
        ("sqlite:////a/b/mlflow.db", "sqlite:////a/b/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_a_shown_uri_has_no_secret(uri: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_uri(uri) == shown
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    message = one_line(ValueError(f"connection to {uri} failed, password=secret; login secret"))
    assert "secret" not in message.replace("login secret", "") or "secret" not in uri


def test_a_secret_of_the_environment_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:p%40ss%2Fw@host/base")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abcdef0123")
    message = without_secrets(
        "wrong password p@ss/w or p%40ss%2Fw, Bearer abcdef0123, at x://a:b@c, ?api_token=xyz&a=b"
    )
    assert message == "wrong password *** or ***, Bearer ***, at x://c, ?api_token=***&a=b"


def test_temporary_errors_are_repeated() -> None:
    """Errors of stores that are no servers."""
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2 as codes

    again = [
        requests.exceptions.ConnectionError("x"), requests.exceptions.ReadTimeout("x"), TimeoutError(),
        OSError(errno.ENOSPC, "full"), MlflowException("x"), MlflowException("x", codes.TEMPORARILY_UNAVAILABLE),
        MlflowException("connection already closed", codes.BAD_REQUEST), RuntimeError("botocore's, say"),
    ]  # fmt: skip
    never = [
        MlflowException("x", codes.INVALID_PARAMETER_VALUE), MlflowException("x", codes.RESOURCE_DOES_NOT_EXIST),
        MlflowException("(psycopg.errors.DataError) x", codes.BAD_REQUEST), FileNotFoundError(2, "x"),
        PermissionError(13, "x"), ValueError("x"), KeyError("x"), UserError("x"),
    ]  # fmt: skip
    assert [classify(error) for error in again] == [Answer.UNAVAILABLE] * len(again)
    assert [classify(error) for error in never] == [Answer.REFUSED] * len(never)


ANSWERS = {
    400: Answer.REFUSED, 401: Answer.NOT_ALLOWED, 403: Answer.REFUSED, 404: Answer.REFUSED, 408: Answer.UNAVAILABLE,
    413: Answer.REFUSED, 422: Answer.REFUSED, 425: Answer.UNAVAILABLE, 429: Answer.UNAVAILABLE, 500: Answer.FAILED,
    502: Answer.UNAVAILABLE, 503: Answer.UNAVAILABLE, 504: Answer.UNAVAILABLE,
}  # fmt: skip


@pytest.mark.parametrize("status", ANSWERS)
def test_http_answers_are_classified_as_documented(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MLflow's client raises them: for its API behind a proxy that answers in HTML, and for artifacts."""
    import requests
    from mlflow import MlflowClient
    from mlflow.utils.rest_utils import augmented_raise_for_status

    answer = requests.Response()
    answer.status_code, answer._content, answer.url = status, b"<html>no</html>", "http://proxy/"
    monkeypatch.setattr("mlflow.utils.rest_utils.http_request", lambda *_, **__: answer)
    with pytest.raises(Exception, match=str(status)) as caught:
        MlflowClient("http://127.0.0.1:1").get_run("0")
    assert classify(caught.value) is ANSWERS[status]
    with pytest.raises(requests.HTTPError) as raised:
        augmented_raise_for_status(answer)
    assert classify(raised.value) is ANSWERS[status]


@pytest.mark.parametrize(
    ("code", "answer"),
    [("REQUEST_LIMIT_EXCEEDED", Answer.UNAVAILABLE), ("TEMPORARILY_UNAVAILABLE", Answer.UNAVAILABLE),
     ("INTERNAL_ERROR", Answer.FAILED), ("BAD_REQUEST", Answer.FAILED), ("UNAUTHENTICATED", Answer.NOT_ALLOWED),
     ("PERMISSION_DENIED", Answer.REFUSED), ("INVALID_PARAMETER_VALUE", Answer.REFUSED),
     ("RESOURCE_DOES_NOT_EXIST", Answer.REFUSED), ("INVALID_STATE", Answer.REFUSED)],
)  # fmt: skip
def test_answers_of_mlflows_server_are_classified_as_documented(code: str, answer: Answer) -> None:
    from mlflow.exceptions import RestException

    assert classify(RestException({"error_code": code, "message": "x"})) is answer
