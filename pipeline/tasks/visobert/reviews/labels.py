"""Labels of reviews, from a column an aspect or from one column of all labels."""

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
    UNNAMED,
    Columns,
    absent,
    as_text,
    half_character,
    shown,
    tidy,
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
_CODES_OR_NOTHING = _CODES | {"": NOT_MENTIONED}
_BAD = -9  # while reading: a cell that holds no label

_BRACES = re.compile(r"\{([^{}]+)\}")
_OBJECT = re.compile(r"""\s*\{\s*["'}]""")
# What no name holds: `{A:Positive}`, `{A#Positive, B#Negative}` and their kind are labels in another program's form.
_NO_NAME = re.compile(r"""["“”«»`]|(?<!\w)['‘’]|['‘’](?!\w)|(?<![^\W_])(?:positive|negative|neutral)(?![^\W_])""")
# Nor one without a polarity: `{A:good}`, `{A=1}`, `{A, B}`, `{A neg}`, `{A+}`
_NO_MENTION = re.compile(
    r"[:=,|<>\[\]\\→]|[\W_](?:pos|neg|neut?)$|(?:tích|tiêu) cực|trung (?:tính|lập)|\+\s*\d*$|-$|(?<!\w)-\s*\d+$"
)


@dataclass(frozen=True)
class BadLabel:
    """A cell, or a piece of one, that holds no label."""

    row: int  # data record, from 1
    column: str
    value: str


@dataclass(frozen=True)
class LabelTable:
    """The labels of all rows; bad ones are UNKNOWN."""

    labels: Labels  # [rows, A]
    aspects: tuple[str, ...]
    cells: int  # that hold something
    bad: list[BadLabel]  # by row
    notes: list[str]
    explain: Callable[[BadLabel], str]


def _wanted(form: ReviewFormatConfig) -> tuple[str, ...] | None:
    """`data.aspects`, each once."""
    if form.aspects is None:
        return None
    names = [tidy(name) for name in form.aspects]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"data.aspects: {twice[0]} is there twice")
    return tuple(names)


def _close(text: str) -> str | None:
    """The sentiment that was probably meant."""
    return next(iter(difflib.get_close_matches(text.strip().capitalize(), WORDS, 1, 0.6)), None)


# ---------------------------------------------------------------- a column an aspect


def labels_of_columns(
    file: Path, columns: Columns, text_column: str, form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> LabelTable:
    """A column an aspect, each cell a sentiment or nothing. `training`: aspects of the training file."""
    aspects, notes = _aspect_columns(file, columns, text_column, form, training)
    labels = np.stack([_codes(columns[aspect]) for aspect in aspects], axis=1)
    bad = [
        BadLabel(int(row) + 1, aspects[column], as_text(columns[aspects[column]][row]))
        for row, column in np.argwhere(labels == _BAD)
    ]
    used = labels != NOT_MENTIONED
    if training is None:
        notes += [f"{file}: no review mentions {aspects[column]}" for column in np.flatnonzero(~used.any(axis=0))]
        if form.aspects is None:
            polar = labelled(labels).any(axis=0)
            _refuse_strangers(file, bad, {aspects[column] for column in np.flatnonzero(polar)})
    labels[labels == _BAD] = UNKNOWN
    return LabelTable(labels, aspects, int(used.sum()), bad, notes, _explain_cell)


def _codes(cells: Sequence[object]) -> Labels:
    """The label of each cell of a column; _BAD where it is none."""
    texts = list(map(as_text, cells))
    codes = {text: _CODES_OR_NOTHING.get(text.strip().casefold(), _BAD) for text in set(texts)}
    return np.fromiter(map(codes.__getitem__, texts), np.int8, len(texts))


def _explain_cell(label: BadLabel) -> str:
    close = _close(label.value)
    meant = f"; did you mean {close}?" if close else ""
    return f"found {shown(label.value)}, allowed: {', '.join(WORDS)} or nothing{meant}"


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


# ---------------------------------------------------------------- all labels in one column


@dataclass(frozen=True)
class _Cell:
    """What one cell of the label column says."""

    labels: Mapping[str, int]  # aspect -> label; UNKNOWN where it is bad
    bad: tuple[str, ...]
    vague: bool  # a bad part does not even tell its aspect


def labels_of_column(
    file: Path, column: str, cells: Sequence[object], form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> LabelTable:
    """All labels in one column, each cell as `{ASPECT#Polarity};{ASPECT};` or a JSON object of aspects."""
    wanted, notes = _wanted(form), list[str]()
    texts = list(map(as_text, cells))
    parsed = {text: _parse(text) for text in dict.fromkeys(texts)}
    counts = Counter(texts)
    named = Counter[str]()
    for text, cell in parsed.items():
        named.update({aspect: counts[text] for aspect, code in cell.labels.items() if code != UNKNOWN})
    aspects = training or wanted or tuple(sorted(named))
    others = sorted(set(named) - set(aspects))
    if wanted:
        notes += [f"{file}: {named[name]} labels of {name} are left out: not in data.aspects" for name in others]
    elif others:
        row = next(row for row, text in enumerate(texts, 1) if parsed[text].labels.get(others[0], UNKNOWN) != UNKNOWN)
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
    labels: Labels = distinct[np.fromiter(map(position.__getitem__, texts), np.int64, len(texts))]
    bad = [BadLabel(row, column, part) for row, text in enumerate(texts, 1) for part in parsed[text].bad]
    if not aspects and not bad:
        raise UserError(f"{file}: column {column}: found no label in any of {len(texts)} rows")
    return LabelTable(labels, aspects, sum(map(bool, map(str.strip, texts))), bad, notes, _explain_piece)


def _parse(cell: str) -> _Cell:
    found: dict[str, set[int]] = {}
    bad, vague = list[str](), False
    for aspects, code, piece in _pieces(cell):
        for aspect in aspects:
            found.setdefault(aspect, set()).add(code)
        if code == UNKNOWN:
            bad.append(piece)
            vague |= not aspects
    labels = {}
    for aspect, codes in found.items():
        polarities = sorted(codes - {MENTIONED})
        labels[aspect] = polarities[0] if polarities else MENTIONED
        if len(polarities) > 1:
            labels[aspect] = UNKNOWN
            if UNKNOWN not in polarities:
                bad.append(";".join(f"{{{aspect}#{WORDS[code]}}}" for code in polarities))
    return _Cell(labels, tuple(bad), vague)


def _pieces(cell: str) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """The label of each piece of a cell: the aspects that it may be of (none where it does not tell), and its text."""
    pairs = _object(cell)
    if pairs is None:
        for piece in filter(None, map(str.strip, cell.split(";"))):
            yield *_in_braces(piece), piece
        return
    labels = [_CODES_OR_NOTHING.get(as_text(value).strip().casefold(), UNKNOWN) for _, value in pairs]
    if not all(
        isinstance(name, str) and name.strip() and not half_character(name)
        and (code != UNKNOWN or _close(as_text(value)))
        for (name, value), code in zip(pairs, labels, strict=True)
    ):  # fmt: skip
        yield (), UNKNOWN, cell  # an object of something else
        return
    for (name, value), code in zip(pairs, labels, strict=True):
        if code != NOT_MENTIONED:
            yield (tidy(str(name)),), code, f"{{{name!r}: {value!r}}}"


def _object(cell: str) -> list[tuple[object, object]] | None:
    """The pairs of a JSON object, or of a dict as Python prints it; None where the cell is neither."""
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
    """Aspect and label of `{ASPECT#Polarity}` or `{ASPECT}`; the polarity is what follows the last `#`."""
    match = _BRACES.fullmatch(piece)
    parts = [tidy(part) for part in match[1].split("#")] if match else [""]
    names = parts[:-1] or parts
    plain = unicodedata.normalize("NFKC", "#".join(names)).casefold()
    if not all(names) or _NO_NAME.search(plain) or (len(parts) == 1 and _NO_MENTION.search(plain)):
        return (), UNKNOWN
    code = MENTIONED if len(parts) == 1 else _CODES.get(parts[-1].casefold(), UNKNOWN)
    # a polarity that is none may belong to the name: {ROOMS#DESIGN}
    return ("#".join(names), "#".join(parts))[: 1 + (code == UNKNOWN)], code


def _alike(file: Path, aspects: Sequence[str]) -> list[str]:
    """Aspects whose names differ in case or spaces alone."""
    seen: dict[str, str] = {}
    notes = []
    for aspect in aspects:
        first = seen.setdefault("".join(aspect.casefold().split()), aspect)
        if first != aspect:
            notes.append(f"{file}: {first} and {aspect} are read as two aspects")
    return notes


def _explain_piece(label: BadLabel) -> str:
    if "};{" in label.value:
        return f"found {shown(label.value)}, allowed: one sentiment an aspect"
    aspects, _ = _in_braces(label.value)
    close = _close(label.value.rstrip("}").rpartition("#")[2]) if aspects else None
    meant = f"; did you mean {{{aspects[0]}#{close}}}?" if close else ""
    forms = ", ".join(f"{{ASPECT#{word}}}" for word in WORDS)
    allowed = f'{forms} or {{ASPECT}}, joined by ;, or a JSON object {{"ASPECT": "{WORDS[0]}"}}'
    return f"found {shown(label.value)}, allowed: {allowed}{meant}"
