"""Labels of reviews, and their reading from one column per aspect."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import ReviewFormatConfig
from pipeline.tasks.visobert.reviews.columns import UNNAMED, Columns, cell_text, clean_name, no_such, quoted
from pipeline.tasks.visobert.reviews.dialects import Dialect
from pipeline.tasks.visobert.reviews.sentiments import CODES, NOT_MENTIONED, SENTIMENTS, UNKNOWN, Labels, labelled

WORDS = tuple(sentiment.capitalize() for sentiment in SENTIMENTS)


@dataclass(frozen=True)
class BadLabel:
    """A cell, or a part of a cell, that is not a valid label."""

    row: int  # data record, from 1
    column: str
    value: str


@dataclass(frozen=True)
class LabelTable:
    """The labels of all rows; UNKNOWN for bad labels."""

    labels: Labels  # [rows, A]
    aspects: tuple[str, ...]
    cells: int  # number of label cells that are not empty
    bad: list[BadLabel]  # sorted by row
    notes: list[str]  # warnings
    explain: Callable[[BadLabel], str]  # gives the error message of a bad label


def label_code(dialect: Dialect, text: str) -> int:
    """Code of a label; UNKNOWN if the dialect does not know it."""
    meaning = dialect.meaning(text)
    return UNKNOWN if meaning is None else CODES[meaning]


def read_aspect_columns(
    file: Path, columns: Columns, text_column: str, form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> LabelTable:
    """Read one column per aspect, whose cells are a label or empty.

    `training`: aspects of the training file; None if this is the training file.
    """
    dialect = Dialect.of(form.labels)
    aspects, notes = _aspect_columns(file, columns, text_column, form, training)
    labels = np.stack([_codes(dialect, columns[aspect]) for aspect in aspects], axis=1)
    bad = [
        BadLabel(int(row) + 1, aspects[column], cell_text(columns[aspects[column]][row]))
        for row, column in np.argwhere(labels == UNKNOWN)
    ]
    used = labels != NOT_MENTIONED
    if training is None:
        notes += [f"{file}: no review mentions {aspects[column]}" for column in np.flatnonzero(~used.any(axis=0))]
        if form.aspects is None:
            polar = labelled(labels).any(axis=0)
            _refuse_other_columns(file, dialect, bad, {aspects[column] for column in np.flatnonzero(polar)})
    return LabelTable(labels, aspects, int(used.sum()), bad, notes, partial(_explain_cell, dialect))


def _aspect_columns(
    file: Path, columns: Columns, text_column: str, form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the columns to read, and warnings.

    In other files than the training file, columns that are not its aspects must be empty, unless `data.aspects` is set.
    """
    configured = configured_aspects(form)
    others = [name for name in columns if name != text_column and not UNNAMED.fullmatch(name)]
    aspects = training or configured or tuple(others)
    missing = [aspect for aspect in aspects if aspect not in columns]
    if text_column in aspects:
        raise UserError(f"{file}: column {text_column} holds the texts, it cannot be an aspect too")
    if configured is not None:
        if missing:
            raise UserError(f"{file}: data.aspects: {no_such('column', missing[0], others)}")
        return aspects, []
    if training is None:
        if not aspects:
            raise UserError(f"{file}: no aspect: column {text_column} is the only one")
        unnamed = len(columns) - 1 - len(others)
        return aspects, [f"{file}: a column without a name is left out"] * bool(unnamed)
    extra = [name for name in others if name not in aspects and any(cell_text(cell).strip() for cell in columns[name])]
    if missing:
        found = f"column {extra[0]}, which is no aspect there" if extra else f"columns {', '.join(others) or 'none'}"
        raise UserError(f"{file}: no column {missing[0]}, an aspect of the training file; found {found}")
    if extra:
        raise UserError(
            f"{file}: column {extra[0]} is no aspect of the training file, allowed: {', '.join(aspects)} "
            "(data.aspects names those to read)"
        )
    return aspects, []


def configured_aspects(form: ReviewFormatConfig) -> tuple[str, ...] | None:
    """Return `data.aspects`, and raise UserError for duplicates."""
    if form.aspects is None:
        return None
    names = [clean_name(name) for name in form.aspects]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"data.aspects: {name} appears twice")
    return tuple(names)


def _codes(dialect: Dialect, cells: Sequence[object]) -> Labels:
    """Label code of each cell of a column; UNKNOWN for a bad label."""
    texts = list(map(cell_text, cells))
    codes = {text: label_code(dialect, text) for text in set(texts)}
    return np.fromiter(map(codes.__getitem__, texts), np.int8, len(texts))


def _refuse_other_columns(file: Path, dialect: Dialect, bad: Sequence[BadLabel], with_sentiment: set[str]) -> None:
    """Raise UserError for a column that is no aspect, because dropping its labels would hide that.

    It is one in which all labels are bad, or one of numbers of which some are no labels, such as a number of stars.
    """
    aspects = with_sentiment | {label.column for label in bad if dialect.closest(label.value)}
    for label in bad:
        if label.column not in aspects or dialect.is_foreign_number(label.value):
            hint = f"if {label.column} is no aspect, name the aspects with data.aspects"
            raise UserError(f"{file}: row {label.row}, column {label.column}: {_explain_cell(dialect, label)}; {hint}")


def _explain_cell(dialect: Dialect, label: BadLabel) -> str:
    return f"found {quoted(label.value)}, allowed: {dialect.allowed}{dialect.hint(label.value)}"
