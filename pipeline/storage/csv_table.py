"""CSV tables that are safe to open in a spreadsheet."""

import re
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from pipeline.runtime.text import visible

FORMULA = re.compile(r"[=+\-@\t\r].", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def cell(value: object) -> object:
    r"""Escape control characters, and prefix an apostrophe to a text that a spreadsheet would treat as a formula.

    >>> [cell(value) for value in ("=1+1", "-1e-4", "-", -0.5, None)]
    ["'=1+1", '-1e-4', '-', -0.5, None]
    """
    if not isinstance(value, str):
        return value
    is_formula = FORMULA.match(value) and not NUMBER.fullmatch(value)
    return f"'{visible(value)}" if is_formula else visible(value)


def write_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write a frame without its index; texts and column names are escaped with `cell`."""
    columns = [column if is_numeric_dtype(column) else column.map(cell) for _, column in frame.items()]
    pd.concat(columns, axis=1).set_axis([cell(name) for name in frame], axis=1).to_csv(file, index=False)
