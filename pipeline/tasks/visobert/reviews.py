"""Reviews and their labels, from any of the forms that people keep them in.

A file is a CSV (UTF-8, with or without BOM), JSONL or Parquet file. Its labels stand either in a column an aspect, each
cell a sentiment or nothing, or all in one column, as `{ASPECT#Polarity};{ASPECT};`.
"""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.tasks.visobert.columns import UNNAMED, Columns, absent, as_text, read_columns, shown, tidy
from pipeline.tasks.visobert.config import ReviewFormatConfig

SENTIMENTS = ("positive", "negative", "neutral")  # the order of alpha and of all that has three entries
NOT_MENTIONED, MENTIONED, UNKNOWN = -1, 3, -2  # labels beside the indices of SENTIMENTS

TEXT_COLUMNS = ("data", "text", "comment", "review", "content", "sentence")
LABEL_COLUMNS = ("label", "labels")

_WORDS = tuple(sentiment.capitalize() for sentiment in SENTIMENTS)
_CODES = {sentiment: code for code, sentiment in enumerate(SENTIMENTS)}
_BAD = -9  # while reading: a cell that holds no label
_PIECE = re.compile(r"\{\s*(?P<aspect>[^{}#;]*[^{}#;\s])\s*(?P<polarity>#[^{}#;]*)?\}")

Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class BadLabel:
    """A cell that was dropped, or a row without a text."""

    row: int  # data record, from 1
    column: str
    value: str


@dataclass(frozen=True)
class Reviews:
    """A file of reviews. N = reviews, A = aspects.

    A label is an index of SENTIMENTS, NOT_MENTIONED, MENTIONED (without polarity) or UNKNOWN (a bad label that was
    dropped: the cell takes no part in any loss or score).
    """

    source: str  # path of the file, or "embedded"
    digest: str  # SHA-256 of the file's bytes, hex
    texts: tuple[str, ...]  # [N], NFC
    labels: npt.NDArray[np.int8]  # [N, A]
    aspects: tuple[str, ...]
    rows: npt.NDArray[np.int64]  # [N], the file's data record of each review, from 1
    dropped: tuple[BadLabel, ...] = ()
    notes: tuple[str, ...] = ()  # what the user should know of how the file was read, a line each

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, which: npt.NDArray[np.generic]) -> "Reviews":
        """Some of the reviews, by flags [N] or by positions (which may repeat)."""
        positions = np.arange(len(self))[which]
        texts = tuple(self.texts[position] for position in positions.tolist())
        return replace(self, texts=texts, labels=self.labels[positions], rows=self.rows[positions])

    def labels_text(self, review: int) -> str:
        """The labels of one review as `{ASPECT#Polarity};{ASPECT}`; unknown ones are left out."""
        return ";".join(
            f"{{{aspect}}}" if code == MENTIONED else f"{{{aspect}#{_WORDS[code]}}}"
            for aspect, code in zip(self.aspects, self.labels[review].tolist(), strict=True)
            if code >= 0
        )


def read_reviews(file: Path, form: ReviewFormatConfig, aspects: tuple[str, ...] | None = None) -> Reviews:
    """Read a CSV, JSONL or Parquet file. `aspects`: those of the training file, which this one must share.

    A row without a text and a label that is none are errors, or are dropped and listed with `on_bad_label: drop`.

    Raises:
        UserError: names the file, and row and column where there is one.
    """
    digest, columns = read_columns(file)
    rows = len(next(iter(columns.values()), ()))
    if not rows:
        raise UserError(f"{file}: no reviews, only a header")
    text_column = _text_column(file, columns, form)
    texts, blank = _texts(file, text_column, columns[text_column], form)
    kept = np.ones(rows, dtype=bool)
    kept[[row - 1 for row in blank]] = False
    if blank:  # nor do their labels count
        columns = {name: [cell if keep else None for cell, keep in zip(cells, kept, strict=True)]
                   for name, cells in columns.items()}  # fmt: skip
    label_column = _label_column(file, columns, form, text_column)
    if label_column is None:
        labelled = _wide(file, columns, text_column, form, aspects)
    else:
        labelled = _in_one_column(file, label_column, columns[label_column], form, aspects)
    bad = labelled.bad
    if bad and form.on_bad_label == "error":
        raise UserError(f"{file}: row {bad[0].row}, column {bad[0].column}: {labelled.explain(bad[0])}")
    return Reviews(
        source=str(file),
        digest=digest,
        texts=tuple(text for text, keep in zip(texts, kept, strict=True) if keep),
        labels=labelled.labels[kept],
        aspects=labelled.aspects,
        dropped=tuple(sorted([*(BadLabel(row, text_column, "") for row in blank), *bad], key=lambda label: label.row)),
        rows=np.flatnonzero(kept) + 1,
        notes=tuple(labelled.notes),
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


def labelled(labels: Labels) -> npt.NDArray[np.bool_]:
    """Cells with a polarity."""
    return (labels >= 0) & (labels < len(SENTIMENTS))


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


def _wanted(form: ReviewFormatConfig) -> tuple[str, ...] | None:
    """`data.aspects`, each once."""
    if form.aspects is None:
        return None
    names = [tidy(name) for name in form.aspects]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"data.aspects: {twice[0]} is there twice")
    return tuple(names)


# ---------------------------------------------------------------- texts


def _texts(
    file: Path, column: str, cells: Sequence[object], form: ReviewFormatConfig
) -> tuple[list[str], tuple[int, ...]]:
    """All texts in NFC, and the rows (from 1) that have none."""
    texts, blank = [], []
    for row, cell in enumerate(cells, 1):
        text = "" if cell is None or cell != cell else cell  # noqa: PLR0124 (NaN alone differs from itself)
        if not isinstance(text, str):
            raise UserError(f"{file}: row {row}, column {column}: found {shown(as_text(cell))}, allowed: text")
        if not text.strip():
            blank.append(row)
        texts.append(unicodedata.normalize("NFC", text))
    if len(blank) == len(texts):
        raise UserError(f"{file}: column {column}: found no text in any of {len(texts)} rows")
    if blank and form.on_bad_label == "error":
        raise UserError(
            f"{file}: row {blank[0]}, column {column}: found no text, allowed: a review "
            "(data.on_bad_label=drop leaves such rows out)"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        row = 1 + int(np.searchsorted(np.cumsum([len(text) for text in texts]), error.start, side="right"))
        raise UserError(f"{file}: row {row}, column {column}: found half a character ({error.reason})") from None
    return texts, tuple(blank)


# ---------------------------------------------------------------- labels


@dataclass(frozen=True)
class _Labelled:
    """The labels of all rows; bad ones are UNKNOWN."""

    labels: Labels  # [rows, A]
    aspects: tuple[str, ...]
    bad: list[BadLabel]  # by row
    notes: list[str]
    explain: Callable[[BadLabel], str]


def _codes(cells: Sequence[object]) -> npt.NDArray[np.int8]:
    """The label of each cell of a column; _BAD where it is none."""
    texts = list(map(as_text, cells))
    known = _CODES | {"": NOT_MENTIONED}
    codes = {text: known.get(text.strip().casefold(), _BAD) for text in set(texts)}
    return np.fromiter(map(codes.__getitem__, texts), np.int8, len(texts))


def _wide(
    file: Path, columns: Columns, text_column: str, form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> _Labelled:
    """A column an aspect."""
    aspects, notes = _aspect_columns(file, columns, text_column, form, training)
    labels = np.stack([_codes(columns[aspect]) for aspect in aspects], axis=1)
    bad = [
        BadLabel(int(row) + 1, aspects[column], as_text(columns[aspects[column]][row]))
        for row, column in np.argwhere(labels == _BAD)
    ]
    if training is None:
        used = (labels != NOT_MENTIONED).any(axis=0)
        notes += [f"{file}: no review mentions {aspects[column]}" for column in np.flatnonzero(~used)]
        if form.aspects is None:
            polar = labelled(labels).any(axis=0)
            _refuse_strangers(file, bad, {aspects[column] for column in np.flatnonzero(polar)})
    labels[labels == _BAD] = UNKNOWN
    return _Labelled(labels, aspects, bad, notes, _explain_cell)


def _explain_cell(label: BadLabel) -> str:
    close = _close(label.value)
    meant = f"; did you mean {close}?" if close else ""
    return f"found {shown(label.value)}, allowed: {', '.join(_WORDS)} or nothing{meant}"


def _close(text: str) -> str | None:
    """The sentiment that was probably meant."""
    return next(iter(difflib.get_close_matches(text.strip().capitalize(), _WORDS, 1, 0.6)), None)


def _refuse_strangers(file: Path, bad: Sequence[BadLabel], used: set[str]) -> None:
    """A column without any sentiment is something else, and dropping its every cell would hide that."""
    meant = used | {label.column for label in bad if _close(label.value)}
    for label in bad:
        if label.column not in meant:
            hint = f"if {label.column} is no aspect, name the aspects with data.aspects"
            raise UserError(f"{file}: row {label.row}, column {label.column}: {_explain_cell(label)}; {hint}")


def _aspect_columns(
    file: Path, columns: Columns, text_column: str, form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[str]]:
    """The columns to read, and notes.

    With the training file's aspects, no other column may hold labels, unless `data.aspects` says what to read.
    """
    wanted = _wanted(form)
    others = [name for name in columns if name != text_column and not UNNAMED.fullmatch(name)]
    aspects = training or wanted or tuple(others)
    missing = [aspect for aspect in aspects if aspect not in columns]
    if text_column in aspects:
        raise UserError(f"{file}: column {text_column} holds the texts, it cannot be an aspect too")
    if wanted is not None:
        if missing:
            raise UserError(f"{file}: data.aspects: {absent('column', missing[0], others)}")
        return aspects, []
    if training is None:
        if not aspects:
            raise UserError(f"{file}: no aspect: column {text_column} is the only one")
        unnamed = len(columns) - 1 - len(others)
        return aspects, [f"{file}: a column without a name is left out"] * bool(unnamed)
    extra = [name for name in others if name not in aspects and any(as_text(cell).strip() for cell in columns[name])]
    if missing:
        found = f"column {extra[0]}, which is no aspect there" if extra else f"columns {', '.join(others) or 'none'}"
        raise UserError(f"{file}: no column {missing[0]}, an aspect of the training file; found {found}")
    if extra:
        raise UserError(
            f"{file}: column {extra[0]} is no aspect of the training file, allowed: {', '.join(aspects)} "
            "(data.aspects names those to read)"
        )
    return aspects, []


@dataclass(frozen=True)
class _Cell:
    """What one cell of the label column says."""

    labels: Mapping[str, int]  # aspect -> label; UNKNOWN where it is bad
    bad: tuple[str, ...]
    vague: bool  # a bad part does not even tell its aspect


def _parse(cell: str) -> _Cell:
    found: dict[str, set[int]] = {}
    bad, vague = list[str](), False
    for piece in filter(None, map(str.strip, cell.split(";"))):
        match = _PIECE.fullmatch(piece)
        if match is None:
            bad.append(piece)
            vague = True
            continue
        polarity = match["polarity"]
        code = MENTIONED if polarity is None else _CODES.get(polarity[1:].strip().casefold(), UNKNOWN)
        found.setdefault(tidy(match["aspect"]), set()).add(code)
        if code == UNKNOWN:
            bad.append(piece)
    labels = {}
    for aspect, codes in found.items():
        polarities = sorted(codes - {MENTIONED})
        labels[aspect] = polarities[0] if polarities else MENTIONED
        if len(polarities) > 1:
            labels[aspect] = UNKNOWN
            if UNKNOWN not in polarities:
                bad.append(";".join(f"{{{aspect}#{_WORDS[code]}}}" for code in polarities))
    return _Cell(labels, tuple(bad), vague)


def _in_one_column(
    file: Path, column: str, cells: Sequence[object], form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> _Labelled:
    """All labels in one column, as `{ASPECT#Polarity};{ASPECT};`."""
    wanted, notes = _wanted(form), list[str]()
    texts = list(map(as_text, cells))
    parsed = {text: _parse(text) for text in dict.fromkeys(texts)}
    counts = Counter(text for text in texts)
    named = Counter[str]()
    for text, cell in parsed.items():
        named.update({aspect: counts[text] for aspect, code in cell.labels.items() if code != UNKNOWN})
    aspects = training or wanted or tuple(sorted(named))
    others = sorted(set(named) - set(aspects))
    if wanted:
        notes += [f"{file}: {named[name]} labels of {name} are left out: not in data.aspects" for name in others]
    elif others:
        row = next(row for row, text in enumerate(texts, 1) if others[0] in parsed[text].labels)
        raise UserError(f"{file}: row {row}, column {column}: {absent('aspect', others[0], aspects)} (training file)")
    if training is None:
        for aspect in aspects:
            if aspect not in named:
                raise UserError(f"{file}: data.aspects: {absent('aspect', aspect, sorted(named))}")
        notes += _alike(file, aspects)

    position = {text: number for number, text in enumerate(parsed)}
    distinct = np.full((len(parsed), len(aspects)), NOT_MENTIONED, dtype=np.int8)
    for number, cell in enumerate(parsed.values()):
        if cell.vague:
            distinct[number] = UNKNOWN  # the bad part may have been any aspect that the others do not name
        for at, aspect in enumerate(aspects):
            distinct[number, at] = cell.labels.get(aspect, distinct[number, at])
    labels = distinct[np.fromiter(map(position.__getitem__, texts), np.int64, len(texts))]
    bad = [BadLabel(row, column, part) for row, text in enumerate(texts, 1) for part in parsed[text].bad]
    if not aspects and not bad:
        raise UserError(f"{file}: column {column}: found no label in any of {len(texts)} rows")
    return _Labelled(labels, aspects, bad, notes, _explain_part)


def _alike(file: Path, aspects: Sequence[str]) -> list[str]:
    """Aspects whose names differ in case or spaces alone."""
    seen: dict[str, str] = {}
    notes = []
    for aspect in aspects:
        first = seen.setdefault("".join(aspect.casefold().split()), aspect)
        if first != aspect:
            notes.append(f"{file}: {first} and {aspect} are read as two aspects")
    return notes


def _explain_part(label: BadLabel) -> str:
    if "};{" in label.value:
        return f"found {shown(label.value)}, allowed: one sentiment an aspect"
    match = _PIECE.fullmatch(label.value)
    close = _close(match["polarity"][1:]) if match and match["polarity"] else None
    meant = f"; did you mean {{{match['aspect']}#{close}}}?" if match and close else ""
    allowed = ", ".join(f"{{ASPECT#{word}}}" for word in _WORDS)
    return f"found {shown(label.value)}, allowed: {allowed} or {{ASPECT}}, joined by ;{meant}"
