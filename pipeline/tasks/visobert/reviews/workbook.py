"""Read the first sheet of an Excel workbook, with the optional package openpyxl."""

import io
from pathlib import Path
from zipfile import ZipFile

from pipeline.errors import UserError


def read_workbook(file: Path, content: bytes) -> tuple[list[list[object]], list[str]]:
    """Return the rows of the first sheet, all equally long and without blank ones, and notes.

    Raises:
        UserError: openpyxl is not installed, the file is not a workbook, or a formula in it has no value.
    """
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.escape import unescape
    except ImportError:
        raise UserError(
            f"{file}: .xlsx needs openpyxl; install it with `pip install --editable '.[xlsx]'`, or use CSV"
        ) from None
    try:
        book = load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        sheet, *others = book.worksheets
        cells = list(sheet.iter_rows())
        # programs that do not compute formulas write no value, or 0 and fullCalcOnLoad (XlsxWriter)
        computed = b"fullCalcOnLoad" not in ZipFile(io.BytesIO(content)).read("xl/workbook.xml")
        formulas = load_workbook(io.BytesIO(content), read_only=True).worksheets[0].iter_rows()
        uncomputed = [
            cell.coordinate
            for row, values in zip(formulas, cells, strict=True)
            for cell, value in zip(row, values, strict=True)
            if cell.data_type == "f"
            and value.data_type != "str"  # the value may be an empty text
            and (value.value is None or (value.value == 0 and not computed))
        ]
    except Exception as error:  # a damaged file raises whatever its XML and ZIP readers raise
        raise UserError(f"{file}: not a readable workbook ({' '.join(str(error).split())[:200]})") from None
    if uncomputed:
        found = f"cell {uncomputed[0]}: found a formula without a value"
        raise UserError(f"{file}: {found}, allowed: text, or a workbook saved by a program that computes formulas")
    # Excel writes control characters as _xHHHH_
    rows = [[unescape(cell.value) if isinstance(cell.value, str) else cell.value for cell in row] for row in cells]
    rows = [row for row in rows if any(cell is not None for cell in row)]
    width = max((1 + max(n for n, cell in enumerate(row) if cell is not None) for row in rows), default=0)
    rows = [(row + [None] * width)[:width] for row in rows]
    names = ", ".join(other.title for other in others)
    return rows, [f"{file}: only sheet {sheet.title} is read, not {names}"] * bool(others)
