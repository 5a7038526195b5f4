"""Console output of a training: messages on standard error, steps on standard output.

In a terminal, a progress bar shows the steps; otherwise each step is written as one line of JSON.
"""

import contextlib
import json
import os
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
from pipeline.runtime.platform_support import ATOMIC_BYTES, wait_writable
from pipeline.runtime.process_rank import is_main_process
from pipeline.runtime.text import visible

CLOSE_SECONDS = 1.0  # how long to wait for a reader of the last steps
MESSAGE_SECONDS = 1.0  # how long to wait for a reader of a message
BUFFER_BYTES = 1 << 20  # size limit for steps that are not read yet
LONGEST_REASON = 300  # characters of an error message


def info(message: str) -> None:
    """Print a line on standard error; processes other than the main process print nothing.

    The line is lost if standard error is closed, full or not read for a second.
    """
    if is_main_process() and _is_writable(sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(visible(message), file=sys.stderr)


def warn(message: str) -> None:
    info(f"warning: {message}")


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Convert errors in an optional block, such as a plot, to warnings that name the line of code.

    Raises:
        TrainingError: raised within the block; the run cannot continue.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # such as one for each character that a font lacks
            yield
    except TrainingError:
        raise
    except Exception as error:  # no error in an optional block may fail the training
        place = extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        warn(f"{what} is left out: {type(error).__name__}: {reason} ({Path(place.filename).name}, line {place.lineno})")


def _is_writable(stream: TextIO) -> bool:
    try:
        return wait_writable(stream.fileno(), MESSAGE_SECONDS)
    except (OSError, ValueError, AttributeError):  # not a real file, as in notebooks and tests
        return True


class Console:
    """Shows logged steps on standard output.

    If standard output is closed, full or not read, training continues; the journal has every step.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        """total: number of optimizer steps for the progress bar. quiet: show nothing."""
        self.quiet, self.bar, self.buffer, self.dropped = quiet, None, bytearray(), 0
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
            if len(self.buffer) < BUFFER_BYTES:
                self.buffer += json.dumps(metrics).encode() + b"\n"
            else:
                self.dropped += 1
            return
        losses = {name.removeprefix("loss_"): f"{value:.4g}" for name, value in metrics.items()
                  if name.startswith("loss_")}  # fmt: skip
        self.bar.set_postfix({"rows/s": f"{metrics[ROWS_PER_SECOND]:,.0f}"} | losses, refresh=False)
        try:
            self.bar.update(int(metrics["global_step"]) + 1 - self.bar.n)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def flush(self, seconds: float = 0.0) -> None:
        """Write the buffer as far as it is read, waiting at most `seconds` for each chunk."""
        if not self.buffer:
            return
        try:
            del self.buffer[: _write(self.buffer, seconds)]
        except (OSError, ValueError) as error:
            self._give_up(error)

    def close(self) -> None:
        self.flush(CLOSE_SECONDS)
        unread = self.dropped + self.buffer.count(b"\n")
        if unread:
            warn(f"standard output: nobody read the last {unread} steps there; they are logged")
        if self.bar is not None:
            self.bar.close()

    def _give_up(self, error: Exception) -> None:
        """Warn, and show no more steps."""
        self.quiet, self.bar, self.dropped = True, None, 0
        self.buffer.clear()
        warn(f"standard output: {getattr(error, 'strerror', None) or error}; the training goes on, and logs as before")


def _write(data: bytearray, seconds: float) -> int:
    """Write to standard output unbuffered, waiting at most `seconds` for each chunk.

    Returns the number of bytes written.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, AttributeError):  # not a real file, as in notebooks and tests
        sys.stdout.write(data.decode())
        sys.stdout.flush()
        return len(data)
    sys.stdout.flush()
    count = 0
    while count < len(data) and wait_writable(descriptor, seconds):
        count += os.write(descriptor, data[count : count + ATOMIC_BYTES])
    return count


def open_standard_streams() -> None:
    """Open the null device for standard streams that are closed; other files would get their descriptors."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free descriptor
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def table(rows: Iterable[tuple[str, Mapping[str, float | None]]]) -> str:
    """Format rows of named numbers as aligned text, one column per name."""
    labelled = list(rows)
    names = list(dict.fromkeys(name for _, numbers in labelled for name in numbers))
    cells = [["", *names]]
    for label, numbers in labelled:
        row = [numbers.get(name) for name in names]
        cells.append([label, *("-" if number is None else f"{number:.4f}" for number in row)])
    return aligned(cells)


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Format rows of cells as aligned text. left: indices of left-aligned columns; the others are right-aligned.

    A cell may have several lines; the cells of a row are aligned at the bottom.
    """
    lines = list[tuple[str, ...]]()
    for row in rows:
        cells = [visible(cell).split("\n") for cell in row]
        height = max(map(len, cells))
        lines += zip(*([""] * (height - len(cell)) + cell for cell in cells), strict=True)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
