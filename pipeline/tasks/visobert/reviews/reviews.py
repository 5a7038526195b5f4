"""Reviews and their labels, from any of the forms that people keep them in.

A file is a CSV (UTF-8, with or without BOM), JSONL or Parquet file. Its labels stand either in a column an aspect, each
cell a sentiment or nothing, or all in one column, as `{ASPECT#Polarity};{ASPECT};` or as a JSON object.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import ReviewFormatConfig
from pipeline.tasks.visobert.reviews.columns import Columns, absent, as_text, read_columns, shown, tidy
from pipeline.tasks.visobert.reviews.labels import WORDS, BadLabel, labels_of_column, labels_of_columns
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, labelled

TEXT_COLUMNS = ("data", "text", "comment", "review", "content", "sentence")
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class Reviews:
    """A file of reviews. N = reviews, A = aspects.

    A label is an index of SENTIMENTS, NOT_MENTIONED, MENTIONED (without polarity) or UNKNOWN (a bad label that was
    dropped: the cell takes no part in any loss or score).
    """

    source: str  # path of the file, or "embedded"
    digest: str  # SHA-256 of the file's bytes, hex
    texts: tuple[str, ...]  # [N], NFC; of a review without one only its labels are known
    labels: npt.NDArray[np.int8]  # [N, A]
    aspects: tuple[str, ...]
    rows: npt.NDArray[np.int64]  # [N], the file's data record of each review, from 1
    dropped: tuple[BadLabel, ...] = ()
    notes: tuple[str, ...] = ()  # what the user should know of how the file was read, a line each
    cells: int = 0  # of the file's label cells, those that hold something
    text_column: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, which: npt.NDArray[np.generic]) -> "Reviews":
        """Some of the reviews, by flags [N] or by positions (which may repeat)."""
        positions = np.arange(len(self))[which]
        texts = tuple(self.texts[position] for position in positions.tolist())
        return replace(self, texts=texts, labels=self.labels[positions], rows=self.rows[positions])

    def with_text(self) -> "Reviews":
        """The reviews that have a text."""
        has_text = np.array([bool(text.strip()) for text in self.texts], dtype=bool)
        return self if has_text.all() else self.part(has_text)

    def dropped_cells(self) -> str:
        """How many label cells were dropped, and the first one; empty where none was."""
        if not self.dropped:
            return ""
        first = self.dropped[0]
        count = len({(label.row, label.column) for label in self.dropped})
        where = f"row {first.row}, column {first.column}: {shown(first.value)}"
        return f"{count} of {self.cells} cells are no labels (first: {where})"

    def labels_text(self, review: int) -> str:
        """The labels of one review as `{ASPECT#Polarity};{ASPECT}`; unknown ones are left out."""
        return ";".join(
            f"{{{aspect}}}" if code == MENTIONED else f"{{{aspect}#{WORDS[code]}}}"
            for aspect, code in zip(self.aspects, self.labels[review].tolist(), strict=True)
            if code >= 0
        )


def read_reviews(file: Path, form: ReviewFormatConfig, aspects: tuple[str, ...] | None = None) -> Reviews:
    """Read a CSV, JSONL or Parquet file. `aspects`: those of the training file, which this one must share.

    A label that is none is an error, or is dropped and listed with `on_bad_label: drop`. A row without a text is kept
    for its labels, and left out where it has none.

    Raises:
        UserError: names the file, and row and column where there is one.
    """
    digest, columns = read_columns(file)
    if not len(next(iter(columns.values()), ())):
        raise UserError(f"{file}: no reviews, only a header")
    text_column = _text_column(file, columns, form)
    texts = _texts(file, text_column, columns[text_column])
    label_column = _label_column(file, columns, form, text_column)
    if label_column is None:
        table = labels_of_columns(file, columns, text_column, form, aspects)
    else:
        table = labels_of_column(file, label_column, columns[label_column], form, aspects)
    bad, notes = table.bad, list(table.notes)
    if bad and form.on_bad_label == "error":
        raise UserError(f"{file}: row {bad[0].row}, column {bad[0].column}: {table.explain(bad[0])}")
    blank = np.array([not text.strip() for text in texts])
    empty = blank & (table.labels < 0).all(axis=1)
    if count := int((blank & ~empty).sum()):
        notes.append(f"{file}: {count} labelled reviews have no text: data_prep counts them, training leaves them out")
    if count := int(empty.sum()):
        notes.append(f"{file}: {count} rows without a text and a label are left out")
    return Reviews(
        source=str(file),
        digest=digest,
        texts=tuple(text for text, left_out in zip(texts, empty, strict=True) if not left_out),
        labels=table.labels[~empty],
        aspects=table.aspects,
        rows=np.flatnonzero(~empty) + 1,
        dropped=tuple(bad),
        notes=tuple(notes),
        cells=table.cells,
        text_column=text_column,
    )


def detection_only(training: Reviews, named: Sequence[str]) -> tuple[str, ...]:
    """Aspects of which only the mention counts: mentioned, but never with a polarity, or named by the user.

    An aspect that no review mentions is not among them: nothing is known of how it is labelled.

    Raises:
        UserError: a named aspect does not exist.
    """
    for name in named:
        if name not in training.aspects:
            raise UserError(f"data.detection_only: {absent('aspect', name, training.aspects)}")
    mentioned = (training.labels == MENTIONED).any(axis=0)
    polar = labelled(training.labels).any(axis=0)
    return tuple(
        aspect
        for aspect, only in zip(training.aspects, mentioned & ~polar, strict=True)
        if only or aspect in named
    )  # fmt: skip


def without_polarity(reviews: Reviews, aspects: Sequence[str]) -> Reviews:
    """The same reviews, where a sentiment of these aspects is a mention and no more."""
    chosen = np.isin(reviews.aspects, list(aspects))
    labels = np.where(chosen & labelled(reviews.labels), np.int8(MENTIONED), reviews.labels)
    return replace(reviews, labels=labels)


# ---------------------------------------------------------------- which column is what


def _text_column(file: Path, columns: Columns, form: ReviewFormatConfig) -> str:
    if form.text_column is not None:
        name = tidy(form.text_column)
        if name not in columns:
            raise UserError(f"{file}: data.text_column: {absent('column', name, list(columns))}")
        return name
    folded = {name.casefold(): name for name in reversed(list(columns))}
    found = next((folded[name] for name in TEXT_COLUMNS if name in folded), None)
    if found is None:
        raise UserError(
            f"{file}: no text column ({', '.join(TEXT_COLUMNS)}) among {', '.join(list(columns)[:12])}; "
            "name it with data.text_column"
        )
    return found


def _label_column(file: Path, columns: Columns, form: ReviewFormatConfig, text_column: str) -> str | None:
    """The column of all labels: the one that is named, or else `label`, unless `data.aspects` are columns."""
    if form.label_column is not None:
        name = tidy(form.label_column)
        if name not in columns:
            raise UserError(f"{file}: data.label_column: {absent('column', name, list(columns))}")
        if name == text_column:
            raise UserError(f"{file}: column {name} cannot be both data.text_column and data.label_column")
        return name
    if form.aspects and all(tidy(aspect) in columns for aspect in form.aspects):
        return None
    folded = {name.casefold(): name for name in reversed(list(columns)) if name != text_column}
    return next((folded[name] for name in LABEL_COLUMNS if name in folded), None)


# ---------------------------------------------------------------- texts


def _texts(file: Path, column: str, cells: Sequence[object]) -> list[str]:
    """All texts in NFC; blank where there is none."""
    texts = []
    for row, cell in enumerate(cells, 1):
        text = "" if cell is None or cell != cell else cell  # noqa: PLR0124 (NaN alone differs from itself)
        if not isinstance(text, str):
            raise UserError(f"{file}: row {row}, column {column}: found {shown(as_text(cell))}, allowed: text")
        texts.append(unicodedata.normalize("NFC", text))
    if not any(map(str.strip, texts)):
        raise UserError(f"{file}: column {column}: found no text in any of {len(texts)} rows")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        row = 1 + int(np.searchsorted(np.cumsum([len(text) for text in texts]), error.start, side="right"))
        raise UserError(f"{file}: row {row}, column {column}: found half a character ({error.reason})") from None
    return texts
