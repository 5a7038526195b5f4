"""What the user sees while training: messages on standard error, steps on standard output.

In a terminal a step is a progress bar; elsewhere it is one JSON object a line, for programs to read.
"""

import contextlib
import json
import os
import select
import sys
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import TextIO

from tqdm import tqdm

from pipeline.errors import TrainingError
from pipeline.names import ROWS_PER_SECOND
from pipeline.runtime.process_rank import leads
from pipeline.runtime.text import visible

CLOSE_SECONDS = 1.0  # that the last lines may wait for a reader
SAY_SECONDS = 1.0  # that a message may
KEPT_BYTES = 1 << 20  # of steps that nobody reads
LONGEST_REASON = 300  # characters of an error


def say(message: str) -> None:
    """A line on standard error; of several processes that train together, the first one's.

    Where it is closed, full or not read for a second, the line is lost.
    """
    if leads() and _takes(sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(visible(message), file=sys.stderr)


def warn(message: str) -> None:
    say(f"warning: {message}")


@contextmanager
def optional(what: str) -> Iterator[None]:
    """A block that a training can do without, as a picture: an error in it is one line, with where it arose.

    Raises:
        TrainingError: the run itself cannot go on.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of letters that a font lacks, a line each
            yield
    except TrainingError:
        raise
    except Exception as error:  # whatever it is, the training is done
        place = extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        warn(f"{what} is left out: {type(error).__name__}: {reason} ({Path(place.filename).name}, line {place.lineno})")


def _takes(stream: TextIO) -> bool:
    try:
        return bool(select.select([], [stream.fileno()], [], SAY_SECONDS)[1])
    except (OSError, ValueError, AttributeError):  # a notebook's, or a test's
        return True


class Console:
    """Shows logged steps; `total` optimizer steps make a full bar. `quiet` shows none.

    Standard output that is closed, full or read by nobody costs no training: what is logged is in the run's journal.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.quiet, self.bar, self.waiting, self.left_out = quiet, None, bytearray(), 0
        if quiet:
            return
        try:
            if sys.stdout.isatty():
                self.bar = tqdm(total=total, unit="step", file=sys.stdout, dynamic_ncols=True)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def step(self, metrics: Mapping[str, float | bool]) -> None:
        if self.quiet:
            return
        if self.bar is None:
            if len(self.waiting) < KEPT_BYTES:
                self.waiting += json.dumps(metrics).encode() + b"\n"
            else:
                self.left_out += 1
            return
        shown = {name.removeprefix("loss_"): f"{value:.4g}" for name, value in metrics.items()
                 if name.startswith("loss_")}  # fmt: skip
        self.bar.set_postfix({"rows/s": f"{metrics[ROWS_PER_SECOND]:,.0f}"} | shown, refresh=False)
        try:
            self.bar.update(int(metrics["global_step"]) + 1 - self.bar.n)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def flush(self, seconds: float = 0.0) -> None:
        """Write as much of what waits as somebody takes, within `seconds` from one piece to the next."""
        if not self.waiting:
            return
        try:
            del self.waiting[: _write(self.waiting, seconds)]
        except (OSError, ValueError) as error:
            self._give_up(error)

    def close(self) -> None:
        self.flush(CLOSE_SECONDS)
        unread = self.left_out + self.waiting.count(b"\n")
        if unread:
            warn(f"standard output: nobody read the last {unread} steps there; they are logged")
        if self.bar is not None:
            self.bar.close()

    def _give_up(self, error: Exception) -> None:
        """Show nothing more; told once."""
        self.quiet, self.bar, self.left_out = True, None, 0
        self.waiting.clear()
        warn(f"standard output: {getattr(error, 'strerror', None) or error}; the training goes on, and logs as before")


def _write(data: bytearray, seconds: float) -> int:
    """To standard output, past Python's buffer, which would wait for a reader; returns how many bytes it took.

    Raises:
        OSError, ValueError: it is closed, full, or its reader is gone.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, AttributeError):  # a notebook's, or a test's
        sys.stdout.write(data.decode())
        sys.stdout.flush()
        return len(data)
    sys.stdout.flush()
    taken = 0
    while taken < len(data) and select.select([], [descriptor], [], seconds)[1]:
        taken += os.write(descriptor, data[taken : taken + select.PIPE_BUF])
    return taken


def open_standard_streams() -> None:
    """Let a standard stream that the parent has closed lead nowhere: a file that is opened would take its place."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def table(rows: Iterable[tuple[str, Mapping[str, float | None]]]) -> str:
    """Rows of named numbers as aligned text, a column a name."""
    listed = list(rows)
    names = list(dict.fromkeys(name for _, values in listed for name in values))
    cells = [["", *names]]
    for label, values in listed:
        numbers = [values.get(name) for name in names]
        cells.append([label, *("-" if number is None else f"{number:.4f}" for number in numbers)])
    return aligned(cells)


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Columns of text, those in `left` to the left, the others to the right.

    A cell may have several lines; shorter ones of its row stand at the bottom.
    """
    lines = list[tuple[str, ...]]()
    for row in rows:
        cells = [visible(cell).split("\n") for cell in row]
        height = max(map(len, cells))
        lines += zip(*([""] * (height - len(cell)) + cell for cell in cells), strict=True)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
