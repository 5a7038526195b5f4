"""Parse the labels of reviews, from one column per aspect or from one column with all labels."""

import ast
import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import ReviewFormatConfig
from pipeline.tasks.visobert.reviews.columns import (
    HALF_CHARACTER,
    UNNAMED,
    Columns,
    cell_text,
    clean_name,
    no_such,
    quoted,
)
from pipeline.tasks.visobert.reviews.sentiments import (
    MENTIONED,
    NOT_MENTIONED,
    SENTIMENTS,
    UNKNOWN,
    Labels,
    labelled,
)

WORDS = tuple(sentiment.capitalize() for sentiment in SENTIMENTS)
_CODES = {sentiment: code for code, sentiment in enumerate(SENTIMENTS)}
_CODES_OR_EMPTY = _CODES | {"": NOT_MENTIONED}

_BRACES = re.compile(r"\{([^{}]+)\}")
_OBJECT = re.compile(r"""\s*\{\s*["'}]""")
# Patterns that no aspect name contains. Pieces such as `{A:Positive}` or `{A#Positive, B#Negative}` are labels in the
# format of another program.
_NO_NAME = re.compile(r"""["“”«»`]|(?<!\w)['‘’]|['‘’](?!\w)|(?<![^\W_])(?:positive|negative|neutral)(?![^\W_])""")
# More patterns that are not allowed in a piece without a polarity: `{A:good}`, `{A=1}`, `{A, B}`, `{A neg}`, `{A+}`
_NO_MENTION = re.compile(
    r"[:=,|<>\[\]\\→]|[\W_](?:pos|neg|neut?)$|(?:tích|tiêu) cực|trung (?:tính|lập)|\+\s*\d*$|-$|(?<!\w)-\s*\d+$"
)


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


# ---------------------------------------------------------------- one column per aspect


def read_aspect_columns(
    file: Path, columns: Columns, text_column: str, form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> LabelTable:
    """Read one column per aspect, whose cells are a sentiment or empty.

    `training`: aspects of the training file; None if this is the training file.
    """
    aspects, notes = _aspect_columns(file, columns, text_column, form, training)
    labels = np.stack([_codes(columns[aspect]) for aspect in aspects], axis=1)
    bad = [
        BadLabel(int(row) + 1, aspects[column], cell_text(columns[aspects[column]][row]))
        for row, column in np.argwhere(labels == UNKNOWN)
    ]
    used = labels != NOT_MENTIONED
    if training is None:
        notes += [f"{file}: no review mentions {aspects[column]}" for column in np.flatnonzero(~used.any(axis=0))]
        if form.aspects is None:
            polar = labelled(labels).any(axis=0)
            _refuse_other_columns(file, bad, {aspects[column] for column in np.flatnonzero(polar)})
    return LabelTable(labels, aspects, int(used.sum()), bad, notes, _explain_cell)


def _aspect_columns(
    file: Path, columns: Columns, text_column: str, form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the columns to read, and warnings.

    In other files than the training file, columns that are not its aspects must be empty, unless `data.aspects` is set.
    """
    configured = _configured_aspects(form)
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


def _configured_aspects(form: ReviewFormatConfig) -> tuple[str, ...] | None:
    """Return `data.aspects`, and raise UserError for duplicates."""
    if form.aspects is None:
        return None
    names = [clean_name(name) for name in form.aspects]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"data.aspects: {name} is there twice")
    return tuple(names)


def _codes(cells: Sequence[object]) -> Labels:
    """Label code of each cell of a column; UNKNOWN for a bad label."""
    texts = list(map(cell_text, cells))
    codes = {text: _CODES_OR_EMPTY.get(text.strip().casefold(), UNKNOWN) for text in set(texts)}
    return np.fromiter(map(codes.__getitem__, texts), np.int8, len(texts))


def _refuse_other_columns(file: Path, bad: Sequence[BadLabel], with_sentiment: set[str]) -> None:
    """Raise UserError if all labels of a column are bad: it is no aspect, and dropping its labels would hide that."""
    aspects = with_sentiment | {label.column for label in bad if _closest(label.value)}
    for label in bad:
        if label.column not in aspects:
            hint = f"if {label.column} is no aspect, name the aspects with data.aspects"
            raise UserError(f"{file}: row {label.row}, column {label.column}: {_explain_cell(label)}; {hint}")


def _explain_cell(label: BadLabel) -> str:
    word = _closest(label.value)
    hint = f"; did you mean {word}?" if word else ""
    return f"found {quoted(label.value)}, allowed: {', '.join(WORDS)} or nothing{hint}"


def _closest(text: str) -> str | None:
    """Return the sentiment that was probably meant, or None."""
    return next(iter(difflib.get_close_matches(text.strip().capitalize(), WORDS, 1, 0.6)), None)


# ---------------------------------------------------------------- all labels in one column


@dataclass(frozen=True)
class _Cell:
    """Content of one cell of the label column."""

    labels: Mapping[str, int]  # aspect -> label; UNKNOWN if it is bad
    bad: tuple[str, ...]  # bad pieces
    unclear: bool  # the aspect of a bad piece is not known


def read_label_column(
    file: Path, column: str, cells: Sequence[object], form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> LabelTable:
    """Read all labels from one column, whose cells are like `{ASPECT#Polarity};{ASPECT};` or JSON objects.

    `training`: aspects of the training file; None if this is the training file.
    """
    texts = list(map(cell_text, cells))
    parsed = {text: _parse(text) for text in dict.fromkeys(texts)}
    aspects, notes = _aspects_of(file, column, [parsed[text] for text in texts], form, training)
    distinct = np.full((len(parsed), len(aspects)), NOT_MENTIONED, dtype=np.int8)
    for number, cell in enumerate(parsed.values()):
        if cell.unclear:
            distinct[number] = UNKNOWN  # the bad piece may be about any aspect that the other pieces do not name
        for position, aspect in enumerate(aspects):
            distinct[number, position] = cell.labels.get(aspect, distinct[number, position])
    numbers = {text: number for number, text in enumerate(parsed)}
    labels: Labels = distinct[np.fromiter(map(numbers.__getitem__, texts), np.int64, len(texts))]
    bad = [BadLabel(row, column, piece) for row, text in enumerate(texts, 1) for piece in parsed[text].bad]
    if not aspects and not bad:
        raise UserError(f"{file}: column {column}: found no label in any of {len(texts)} rows")
    return LabelTable(labels, aspects, sum(map(bool, map(str.strip, texts))), bad, notes, _explain_piece)


def _aspects_of(
    file: Path, column: str, rows: Sequence[_Cell], form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the aspects to read, and warnings."""
    configured, notes = _configured_aspects(form), list[str]()
    counts = Counter(aspect for cell in rows for aspect, code in cell.labels.items() if code != UNKNOWN)
    aspects = training or configured or tuple(sorted(counts))
    others = sorted(set(counts) - set(aspects))
    if configured:
        notes += [f"{file}: {counts[name]} labels of {name} are left out: not in data.aspects" for name in others]
    elif others:
        row = next(row for row, cell in enumerate(rows, 1) if cell.labels.get(others[0], UNKNOWN) != UNKNOWN)
        raise UserError(f"{file}: row {row}, column {column}: {no_such('aspect', others[0], aspects)} (training file)")
    if training is None:
        by_spelling: dict[str, str] = {}  # lower case without spaces -> aspect
        for aspect in aspects:
            if aspect not in counts:
                raise UserError(f"{file}: data.aspects: {no_such('aspect', aspect, sorted(counts))}")
            first = by_spelling.setdefault("".join(aspect.casefold().split()), aspect)
            if first != aspect:
                notes.append(f"{file}: {first} and {aspect} are read as two aspects")
    return aspects, notes


def _parse(cell: str) -> _Cell:
    codes_of: dict[str, set[int]] = {}
    bad, unclear = list[str](), False
    for aspects, code, piece in _pieces(cell):
        for aspect in aspects:
            codes_of.setdefault(aspect, set()).add(code)
        if code == UNKNOWN:
            bad.append(piece)
            unclear |= not aspects
    labels = {}
    for aspect, codes in codes_of.items():
        polarities = sorted(codes - {MENTIONED})
        labels[aspect] = polarities[0] if polarities else MENTIONED
        if len(polarities) > 1:
            labels[aspect] = UNKNOWN
            if UNKNOWN not in polarities:
                bad.append(";".join(f"{{{aspect}#{WORDS[code]}}}" for code in polarities))
    return _Cell(labels, tuple(bad), unclear)


def _pieces(cell: str) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """Yield each annotation of a cell: its candidate aspects (none if unrecognised), label code and source text."""
    pairs = _object(cell)
    if pairs is None:
        for piece in filter(None, map(str.strip, cell.split(";"))):
            yield *_in_braces(piece), piece
        return
    labels = [_CODES_OR_EMPTY.get(cell_text(value).strip().casefold(), UNKNOWN) for _, value in pairs]
    if not all(
        isinstance(name, str) and name.strip() and not HALF_CHARACTER.search(name)
        and (code != UNKNOWN or _closest(cell_text(value)))
        for (name, value), code in zip(pairs, labels, strict=True)
    ):  # fmt: skip
        yield (), UNKNOWN, cell  # the object does not contain labels
        return
    for (name, value), code in zip(pairs, labels, strict=True):
        if code != NOT_MENTIONED:
            yield (clean_name(str(name)),), code, f"{{{name!r}: {value!r}}}"


def _object(cell: str) -> list[tuple[object, object]] | None:
    """The key-value pairs of a JSON object or a Python dict literal; None if the cell is neither."""
    if not _OBJECT.match(cell):
        return None
    try:
        pairs: list[tuple[object, object]] = json.loads(cell, object_pairs_hook=list)
        return pairs
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(cell.strip(), mode="eval").body
        if isinstance(tree, ast.Dict):
            return [(ast.literal_eval(key or ""), ast.literal_eval(value))
                    for key, value in zip(tree.keys, tree.values, strict=True)]  # fmt: skip
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    return None


def _in_braces(piece: str) -> tuple[tuple[str, ...], int]:
    """Possible aspects and label of `{ASPECT#Polarity}` or `{ASPECT}`; the polarity follows the last `#`."""
    match = _BRACES.fullmatch(piece)
    parts = [clean_name(part) for part in match[1].split("#")] if match else [""]
    names = parts[:-1] or parts
    plain = unicodedata.normalize("NFKC", "#".join(names)).casefold()
    if not all(names) or _NO_NAME.search(plain) or (len(parts) == 1 and _NO_MENTION.search(plain)):
        return (), UNKNOWN
    code = MENTIONED if len(parts) == 1 else _CODES.get(parts[-1].casefold(), UNKNOWN)
    # an unknown polarity may be a part of the name: {ROOMS#DESIGN}
    return ("#".join(names), "#".join(parts))[: 1 + (code == UNKNOWN)], code


def _explain_piece(label: BadLabel) -> str:
    if "};{" in label.value:
        return f"found {quoted(label.value)}, allowed: one sentiment an aspect"
    aspects, _ = _in_braces(label.value)
    word = _closest(label.value.rstrip("}").rpartition("#")[2]) if aspects else None
    hint = f"; did you mean {{{aspects[0]}#{word}}}?" if word else ""
    forms = ", ".join(f"{{ASPECT#{word}}}" for word in WORDS)
    allowed = f'{forms} or {{ASPECT}}, joined by ;, or a JSON object {{"ASPECT": "{WORDS[0]}"}}'
    return f"found {quoted(label.value)}, allowed: {allowed}{hint}"
