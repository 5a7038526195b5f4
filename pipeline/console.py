"""What the user sees while training: messages on standard error, steps on standard output.

In a terminal a step is a progress bar; elsewhere it is one JSON object a line, for programs to read.
"""

import json
import os
import select
import sys
from collections.abc import Container, Iterable, Mapping, Sequence

from tqdm import tqdm

from pipeline.ranks import leads
from pipeline.runtime.text import visible

CLOSE_SECONDS = 1.0  # that the last lines may wait for a reader, when the training ends early


def say(message: str) -> None:
    """A line on standard error; of several processes that train together, the first one's."""
    if leads():
        tqdm.write(visible(message), file=sys.stderr)


def warn(message: str) -> None:
    say(f"warning: {message}")


class Console:
    """Shows logged steps; `total` optimizer steps make a full bar. `quiet` shows none."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.quiet, self.bar, self.lines = quiet, None, list[str]()
        if sys.stdout.isatty() and not quiet:
            self.bar = tqdm(total=total, unit="step", file=sys.stdout, dynamic_ncols=True)

    def step(self, metrics: Mapping[str, float | bool]) -> None:
        if self.quiet:
            return
        if self.bar is None:
            self.lines.append(json.dumps(metrics))
            return
        self.bar.update(int(metrics["global_step"]) + 1 - self.bar.n)
        shown = {name.removeprefix("loss_"): f"{value:.4g}" for name, value in metrics.items()
                 if name.startswith("loss_")}  # fmt: skip
        self.bar.set_postfix({"rows/s": f"{metrics['throughput/rows_per_second']:,.0f}"} | shown, refresh=False)

    def flush(self, seconds: float | None = None) -> None:
        """Write what waits. Where nobody reads (a paused pager) this waits, too: None = until somebody does."""
        if self.lines:
            text = "\n".join(self.lines) + "\n"
            self.lines.clear()
            _write(text, seconds)

    def close(self) -> None:
        self.flush(CLOSE_SECONDS)
        if self.bar is not None:
            self.bar.close()


def _write(text: str, seconds: float | None) -> None:
    """To standard output, past Python's buffer: what a signal leaves there is waited for when the process ends."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, AttributeError):  # a notebook's, or a test's
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    sys.stdout.flush()
    left = memoryview(text.encode())
    while left and select.select([], [descriptor], [], seconds)[1]:
        left = left[os.write(descriptor, left[: select.PIPE_BUF]) :]


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
