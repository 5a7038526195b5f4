"""What the user sees while training: messages on standard error, steps on standard output.

In a terminal a step is a progress bar; elsewhere it is one JSON object a line, for programs to read.
"""

import json
import sys
from collections.abc import Iterable, Mapping

from tqdm import tqdm


def say(message: str) -> None:
    """A line on standard error."""
    tqdm.write(message, file=sys.stderr)


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

    def flush(self) -> None:
        if self.lines:
            sys.stdout.write("\n".join(self.lines) + "\n")
            sys.stdout.flush()
            self.lines.clear()

    def close(self) -> None:
        self.flush()
        if self.bar is not None:
            self.bar.close()


def table(rows: Iterable[tuple[str, Mapping[str, float | None]]]) -> str:
    """Rows of named numbers as aligned text, a column a name."""
    listed = list(rows)
    names = list(dict.fromkeys(name for _, values in listed for name in values))
    cells = [["", *names]]
    for label, values in listed:
        numbers = [values.get(name) for name in names]
        cells.append([label, *("-" if number is None else f"{number:.4f}" for number in numbers)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(names) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    )  # fmt: skip
