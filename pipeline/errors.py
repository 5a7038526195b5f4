"""What can go wrong by the user's hand, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A usage, config or data error: one line that says what was found, where, and what is allowed.

    The command line prints it on standard error without a traceback and exits with 2.
    """

    exit_code = 2

    def __str__(self) -> str:
        return " ".join(super().__str__().split())

    def _render_traceback_(self) -> list[str]:
        """In a notebook, too, the line alone."""
        return [str(self)]


class TrainingError(UserError):
    """Training could not go on (a loss became NaN, the store refused a write): exit code 1."""

    exit_code = 1


class RankLost(TrainingError):  # noqa: N818 (it says what is so)
    """Of several processes that train together, another one is gone."""


class Undelivered(TrainingError):  # noqa: N818 (it says what is so)
    """All is trained, but part of it waits in the journal for the tracking store: exit code 3."""

    exit_code = 3


@contextmanager
def os_errors(where: object, kind: type[UserError] = UserError) -> Iterator[None]:
    """An error of the system's becomes the user's: where, and the system's words."""
    try:
        yield
    except OSError as error:
        raise kind(f"{where}: {error.strerror or error}") from None
