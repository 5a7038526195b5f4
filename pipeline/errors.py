"""Errors that are reported in one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A usage, config or data error; exit code 2."""

    exit_code = 2

    def __str__(self) -> str:
        return " ".join(super().__str__().split())

    def _render_traceback_(self) -> list[str]:
        """Suppress the traceback in IPython."""
        return [str(self)]


class TrainingError(UserError):
    """Training failed (a loss became NaN, the store refused a write); exit code 1."""

    exit_code = 1


class RankLost(TrainingError):  # noqa: N818 (a state, not an error)
    """Another process of the distributed training has exited."""


class Undelivered(TrainingError):  # noqa: N818 (a state, not an error)
    """Training finished, but part of the journal has not been delivered to the tracking store; exit code 3."""

    exit_code = 3


@contextmanager
def os_errors(where: object, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn an OSError into a one-line error that begins with `where`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{where}: {error.strerror or error}") from None
