"""Reviews and their labels, read from files.

Labels are either in one column per aspect, whose cells are a label or empty, or all in one column, as
`{ASPECT#Polarity};{ASPECT};`, a JSON object or a JSON array.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config.strict_config import canonical
from pipeline.errors import UserError
from pipeline.tasks.visobert.config import ReviewFormatConfig
from pipeline.tasks.visobert.reviews.columns import (
    UNNAMED,
    Columns,
    cell_text,
    clean_name,
    no_such,
    quoted,
    read_columns,
)
from pipeline.tasks.visobert.reviews.dialects import Dialect
from pipeline.tasks.visobert.reviews.label_column import ASPECT_KEYS, LABEL_KEYS, read_label_column
from pipeline.tasks.visobert.reviews.labels import WORDS, BadLabel, label_code, read_aspect_columns
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, UNKNOWN, labelled
from pipeline.tasks.visobert.spelling import one_spelling

TEXT_COLUMNS = ("data", "text", "comment", "review", "content", "sentence")
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class Reviews:
    """Reviews of a file. N = reviews, A = aspects.

    A label is an index of SENTIMENTS, NOT_MENTIONED, MENTIONED (without polarity) or UNKNOWN (a bad label that was
    dropped; losses and scores ignore the cell).
    """

    source: str  # path of the file, or "embedded"
    digest: str  # SHA-256 of the file's bytes, hex
    texts: tuple[str, ...]  # [N], NFC; blank for labelled reviews without a text
    labels: npt.NDArray[np.int8]  # [N, A]
    aspects: tuple[str, ...]
    rows: npt.NDArray[np.int64]  # [N], number of the data record in the file, from 1
    dropped: tuple[BadLabel, ...] = ()
    notes: tuple[str, ...] = ()  # warnings about how the file was read, one line each
    cells: int = 0  # number of label cells that are not empty
    text_column: str = ""
    dialect: str = ""  # data.labels in canonical text; empty if it is null

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, which: npt.NDArray[np.generic]) -> "Reviews":
        """Select reviews by flags [N] or by positions, which may be repeated."""
        positions = np.arange(len(self))[which]
        texts = tuple(self.texts[position] for position in positions.tolist())
        return replace(self, texts=texts, labels=self.labels[positions], rows=self.rows[positions])

    def with_text(self) -> "Reviews":
        """The reviews that have a text."""
        has_text = np.array([bool(text.strip()) for text in self.texts], dtype=bool)
        return self if has_text.all() else self.select(has_text)

    def without_polarity(self, aspects: Sequence[str]) -> "Reviews":
        """The same reviews, with MENTIONED in place of the sentiments of these aspects."""
        chosen = np.isin(self.aspects, list(aspects))
        labels = np.where(chosen & labelled(self.labels), np.int8(MENTIONED), self.labels)
        return replace(self, labels=labels)

    def labels_text(self, review: int) -> str:
        """The labels of one review as `{ASPECT#Polarity};{ASPECT}`; unknown labels are left out."""
        return ";".join(
            f"{{{aspect}}}" if code == MENTIONED else f"{{{aspect}#{WORDS[code]}}}"
            for aspect, code in zip(self.aspects, self.labels[review].tolist(), strict=True)
            if code >= 0
        )


def folded(text: str) -> str:
    """Normalise a text so that exact copies are equal: one spelling, lower case, single spaces."""
    return " ".join(one_spelling(text).lower().split())


def read_reviews(file: Path, form: ReviewFormatConfig, aspects: tuple[str, ...] | None = None) -> Reviews:
    """Read a file of reviews.

    `aspects`: aspects of the training file, which this file must have too; None if this is the training file. With
    `on_bad_label: drop`, bad labels are dropped and listed in `dropped`. Rows without a text are kept if they have
    labels.

    Raises:
        UserError: the file cannot be read, or has bad labels that are not dropped; names the file, row and column.
    """
    digest, columns, file_notes = read_columns(file, form.delimiter)
    if not len(next(iter(columns.values()), ())):
        raise UserError(f"{file}: no reviews, only a header")
    text_column = _text_column(file, columns, form)
    texts = _texts(file, text_column, columns[text_column])
    label_column = _label_column(file, columns, form, text_column)
    _check_one_row_per_review(file, columns, form, text_column, label_column)
    if label_column is None:
        table = read_aspect_columns(file, columns, text_column, form, aspects)
    else:
        table = read_label_column(file, label_column, columns[label_column], form, aspects)
    if table.bad and form.on_bad_label == "error":
        first = table.bad[0]
        raise UserError(f"{file}: row {first.row}, column {first.column}: {table.explain(first)}")
    notes = [*file_notes, *table.notes]
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
        dropped=tuple(table.bad),
        notes=tuple(notes),
        cells=table.cells,
        text_column=text_column,
        dialect="" if form.labels is None else canonical(form.labels),
    )


def detection_only_aspects(training: Reviews, configured: Sequence[str]) -> tuple[str, ...]:
    """Aspects that are only detected: those mentioned but never with a polarity, and the configured ones.

    An aspect that no review mentions is not included, unless it is configured.

    Raises:
        UserError: a configured aspect does not exist.
    """
    for name in configured:
        if name not in training.aspects:
            raise UserError(f"data.detection_only: {no_such('aspect', name, training.aspects)}")
    mentioned = (training.labels == MENTIONED).any(axis=0)
    polar = labelled(training.labels).any(axis=0)
    only = (mentioned & ~polar) | np.isin(training.aspects, list(configured))
    return tuple(aspect for aspect, flag in zip(training.aspects, only, strict=True) if flag)


def _text_column(file: Path, columns: Columns, form: ReviewFormatConfig) -> str:
    if form.text_column is not None:
        return _configured_column(file, columns, "text_column", form.text_column)
    column = _only_one_of(file, TEXT_COLUMNS, columns, form, "text_column")
    if column is None:
        raise UserError(
            f"{file}: no text column ({', '.join(TEXT_COLUMNS)}) among {', '.join(list(columns)[:12])}; "
            "name it with data.text_column"
        )
    return column


def _label_column(file: Path, columns: Columns, form: ReviewFormatConfig, text_column: str) -> str | None:
    """The column with all labels; None if there is none.

    It is the configured label column. Without one: None if each configured aspect has its own column, else the one
    of LABEL_COLUMNS that exists.
    """
    if form.label_column is not None:
        name = _configured_column(file, columns, "label_column", form.label_column)
        if name == text_column:
            raise UserError(f"{file}: column {name} cannot be both data.text_column and data.label_column")
        return name
    if form.aspects and all(clean_name(aspect) in columns for aspect in form.aspects):
        return None
    return _only_one_of(file, LABEL_COLUMNS, [name for name in columns if name != text_column], form, "label_column")


def _check_one_row_per_review(
    file: Path, columns: Columns, form: ReviewFormatConfig, text_column: str, label_column: str | None
) -> None:
    """Refuse a file with one row per aspect: a column with the names of aspects, and one with their labels.

    Columns of aspects may have such names too, so the former must have no label, and no other column may be an aspect.
    """
    aspect = next(iter(_columns_named(ASPECT_KEYS, columns)), None)
    label = next(iter(_columns_named((*LABEL_KEYS, *LABEL_COLUMNS), columns)), None)
    if aspect is None or label is None or label_column not in (None, label):
        return
    dialect = Dialect.of(form.labels)
    texts = {name: {text for text in map(cell_text, cells) if text.strip()} for name, cells in columns.items()}
    with_label = {name for name in columns if any(label_code(dialect, text) != UNKNOWN for text in texts[name])}
    possible = with_label if form.aspects is None else columns.keys() & set(map(clean_name, form.aspects))
    others = {name for name in possible if not UNNAMED.fullmatch(name)} - {text_column, aspect, label}
    if label in with_label and texts[aspect] and aspect not in with_label and not others:
        found = f"found one row per aspect (columns {aspect} and {label})"
        example = "such as a column labels with {ASPECT#Polarity};{ASPECT#Polarity}"
        raise UserError(f"{file}: {found}, allowed: one row per review, {example}")


def _configured_column(file: Path, columns: Columns, key: str, value: str) -> str:
    name = clean_name(value)
    if name not in columns:
        raise UserError(f"{file}: data.{key}: {no_such('column', name, list(columns))}")
    return name


def _columns_named(names: Sequence[str], columns: Iterable[str]) -> list[str]:
    """The columns with one of these names, ignoring case, in the order of `names`."""
    return [column for name in names for column in columns if column.casefold() == name]


def _only_one_of(
    file: Path, names: Sequence[str], columns: Iterable[str], form: ReviewFormatConfig, key: str
) -> str | None:
    """The column with one of these names; None if there is none. Columns that other keys name are the last choice.

    Raises:
        UserError: there are several.
    """
    candidates = _columns_named(names, columns)
    configured = {clean_name(name) for name in (*(form.aspects or ()), form.label_column or "")}
    candidates = [column for column in candidates if column not in configured] or candidates
    if len(candidates) > 1:
        raise UserError(
            f"{file}: found columns {' and '.join(candidates)}, allowed: one of them, or data.{key} names it"
        )
    return next(iter(candidates), None)


def _texts(file: Path, column: str, cells: Sequence[object]) -> list[str]:
    """The texts of a column in NFC; empty for empty cells. A number is a text, as it is in CSV."""
    texts = []
    for row, cell in enumerate(cells, 1):
        if isinstance(cell, bool) or not (cell is None or isinstance(cell, str | int | float | Decimal)):
            raise UserError(f"{file}: row {row}, column {column}: found {quoted(cell_text(cell))}, allowed: text")
        texts.append(unicodedata.normalize("NFC", cell_text(cell)))
    if not any(map(str.strip, texts)):
        raise UserError(f"{file}: column {column}: found no text in any of {len(texts)} rows")
    return texts
