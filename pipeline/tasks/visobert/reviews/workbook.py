"""Read the first sheet of an Excel workbook, with the optional package openpyxl."""

import io
from pathlib import Path

from pipeline.errors import UserError


def read_workbook(file: Path, content: bytes) -> tuple[list[list[object]], list[str]]:
    """Return the rows of the first sheet, all equally long and without blank ones, and notes.

    Raises:
        UserError: openpyxl is not installed, or the file is not a workbook.
    """
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise UserError(
            f"{file}: .xlsx needs openpyxl; install it with `pip install --editable '.[xlsx]'`, or use CSV"
        ) from None
    try:
        book = load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        sheet, *others = book.worksheets
        rows = [list(row) for row in sheet.iter_rows(values_only=True)]
    except Exception as error:  # a damaged file raises whatever its XML and ZIP readers raise
        raise UserError(f"{file}: not a readable workbook ({' '.join(str(error).split())[:200]})") from None
    rows = [row for row in rows if any(cell is not None for cell in row)]
    width = max((1 + max(n for n, cell in enumerate(row) if cell is not None) for row in rows), default=0)
    rows = [(row + [None] * width)[:width] for row in rows]
    names = ", ".join(other.title for other in others)
    return rows, [f"{file}: only sheet {sheet.title} is read, not {names}"] * bool(others)
