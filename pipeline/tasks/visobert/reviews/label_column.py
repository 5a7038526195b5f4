"""Labels of reviews, all in one column: in braces, as an object, or as an array of pairs, texts or spans."""

import ast
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import ReviewFormatConfig
from pipeline.tasks.visobert.reviews.columns import NO_TEXT, cell_text, clean_name, no_such, quoted
from pipeline.tasks.visobert.reviews.dialects import Dialect
from pipeline.tasks.visobert.reviews.labels import WORDS, BadLabel, LabelTable, configured_aspects, label_code
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, UNKNOWN, Labels

_BRACES = re.compile(r"\{([^{}]+)\}")
_OBJECT = re.compile(r"""\s*\{\s*["'}]""")
ASPECT_KEYS, LABEL_KEYS = ("aspect", "category"), ("polarity", "sentiment")  # of an object in an array
# Patterns that no aspect name contains. Pieces such as `{A:Positive}` or `{A#Positive, B#Negative}` are labels in the
# format of another program.
_NO_NAME = re.compile(
    r"""["“”«»`\0\ud800-\udfff]|(?<!\w)['‘’]|['‘’](?!\w)|(?<![^\W_])(?:positive|negative|neutral)(?![^\W_])"""
)
# More patterns that are not allowed in a piece without a polarity: `{A:good}`, `{A=1}`, `{A, B}`, `{A neg}`, `{A+}`
_NO_MENTION = re.compile(
    r"[:=,|<>\[\]\\→]|[\W_](?:pos|neg|neut?)$|(?:tích|tiêu) cực|trung (?:tính|lập)|\+\s*\d*$|-$|(?<!\w)-\s*\d+$"
)
_POLARITY = re.compile(r"""[#"'][\s,:]*([^#"',:\[\]{}]+)["'\]}]*$""")  # the last part of a bad piece


@dataclass(frozen=True)
class _Cell:
    """Content of one cell of the label column."""

    labels: Mapping[str, int]  # aspect -> label; UNKNOWN if it is bad
    bad: tuple[str, ...]  # bad pieces
    unclear: bool  # the aspect of a bad piece is not known


def read_label_column(
    file: Path, column: str, cells: Sequence[object], form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> LabelTable:
    """Read all labels from one column, whose cells are like `{ASPECT#Polarity};{ASPECT};`, JSON objects or arrays.

    `training`: aspects of the training file; None if this is the training file.
    """
    dialect = Dialect.of(form.labels)
    texts = list(map(cell_text, cells))
    parsed = {text: _parse(dialect, text) for text in dict.fromkeys(texts)}
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
    filled = sum(map(bool, map(str.strip, texts)))
    return LabelTable(labels, aspects, filled, bad, notes, partial(_explain_piece, dialect))


def _aspects_of(
    file: Path, column: str, rows: Sequence[_Cell], form: ReviewFormatConfig, training: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the aspects to read, and warnings."""
    configured, notes = configured_aspects(form), list[str]()
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


def _parse(dialect: Dialect, cell: str) -> _Cell:
    codes_of: dict[str, set[int]] = {}
    bad, unclear = list[str](), False
    for aspects, code, piece in _pieces(dialect, cell):
        if code == NOT_MENTIONED:
            continue
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


Piece = tuple[tuple[str, ...], int, str]  # candidate aspects (none if unrecognised), label code, source text


def _pieces(dialect: Dialect, cell: str) -> Iterator[Piece]:
    """Yield each annotation of a cell."""
    pairs, items = _object(cell), _array(cell)
    if pairs is not None:
        yield from _pieces_of_object(dialect, cell, pairs)
    elif items is not None:
        found = [(*_in_array(dialect, item), json.dumps(item, ensure_ascii=False, default=str)) for item in items]
        yield from found if all(aspects for aspects, _, _ in found) else [((), UNKNOWN, cell)]
    else:
        for piece in filter(None, map(str.strip, cell.split(";"))):
            yield *_in_braces(dialect, piece), piece


def _pieces_of_object(dialect: Dialect, cell: str, pairs: Sequence[tuple[object, object]]) -> Iterator[Piece]:
    labels = [label_code(dialect, cell_text(value)) for _, value in pairs]
    if not all(
        isinstance(name, str) and name.strip() and not NO_TEXT.search(name)
        and (code != UNKNOWN or dialect.closest(cell_text(value)))
        for (name, value), code in zip(pairs, labels, strict=True)
    ):  # fmt: skip
        yield (), UNKNOWN, cell  # the object does not contain labels
        return
    for (name, value), code in zip(pairs, labels, strict=True):
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


def _array(cell: str) -> list[object] | None:
    """The items of a JSON array or a Python list literal; None if the cell is neither."""
    if not cell.lstrip().startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            items = parse(cell.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return items if isinstance(items, list) else None
    return None


def _in_array(dialect: Dialect, item: object) -> tuple[tuple[str, ...], int]:
    """Possible aspects and label of an item of an array.

    It is `"ASPECT#Polarity"`, `["ASPECT", "Polarity"]`, `[start, end, "ASPECT#Polarity"]`, or an object with a key of
    ASPECT_KEYS and one of LABEL_KEYS.
    """
    match item:
        case str(text) if label_code(dialect, text) == UNKNOWN:  # a label alone is no aspect
            return _in_braces(dialect, f"{{{text}}}")
        case [int() | float() as start, int() | float() as end, str(text)]:
            names, code = _in_braces(dialect, f"{{{text}}}")
            return names, code if 0 <= start < end else UNKNOWN
        case [str(aspect), label]:
            return _pair(dialect, aspect, label)
        case dict():
            aspects = [item[key] for key in ASPECT_KEYS if isinstance(item.get(key), str)]
            labels = [item[key] for key in LABEL_KEYS if key in item]
            if len(aspects) == len(labels) == 1:
                return _pair(dialect, aspects[0], labels[0])
    return (), UNKNOWN


def _pair(dialect: Dialect, aspect: str, label: object) -> tuple[tuple[str, ...], int]:
    name = clean_name(aspect)
    if not name or _NO_NAME.search(unicodedata.normalize("NFKC", name).casefold()):
        return (), UNKNOWN
    text = cell_text(label)
    return (name,), label_code(dialect, text) if text.strip() else UNKNOWN


def _in_braces(dialect: Dialect, piece: str) -> tuple[tuple[str, ...], int]:
    """Possible aspects and label of `{ASPECT#Polarity}` or `{ASPECT}`; the polarity follows the last `#`."""
    match = _BRACES.fullmatch(piece)
    parts = [clean_name(part) for part in match[1].split("#")] if match else [""]
    names = parts[:-1] or parts
    plain = unicodedata.normalize("NFKC", "#".join(names)).casefold()
    if not all(names) or _NO_NAME.search(plain):
        return (), UNKNOWN
    if len(parts) == 1:
        _, *words = plain.split()
        if _NO_MENTION.search(plain) or (words and dialect.meaning(words[-1])):  # {A 2}, where 2 is a label
            return (), UNKNOWN
        return ("#".join(names),), MENTIONED
    code = label_code(dialect, parts[-1]) if parts[-1] else UNKNOWN
    # an unknown polarity may be a part of the name: {ROOMS#DESIGN}
    return ("#".join(names), "#".join(parts))[: 1 + (code == UNKNOWN)], code


def _explain_piece(dialect: Dialect, label: BadLabel) -> str:
    if "};{" in label.value:
        return f"found {quoted(label.value)}, allowed: one sentiment an aspect; data.on_bad_label: drop leaves it out"
    first = dialect.examples[0]
    match _array(label.value):
        case [int() | float() as start, int() | float() as end, str()] if not 0 <= start < end:
            return f'found {quoted(label.value)}, allowed: [start, end, "ASPECT#{first}"] with 0 <= start < end'
    aspects, _ = _in_braces(dialect, label.value)
    polarity = _POLARITY.search(label.value)
    word = dialect.closest(polarity[1]) if polarity else None
    hint = ""
    if polarity and label_code(dialect, polarity[1]) == UNKNOWN:
        hint = f"; did you mean {{{aspects[0]}#{word}}}?" if aspects and word else dialect.hint(polarity[1])
    forms = ", ".join(f"{{ASPECT#{word}}}" for word in dialect.examples)
    allowed = f'{forms} or {{ASPECT}}, joined by ;, or a JSON object {{"ASPECT": "{first}"}}'
    return f'found {quoted(label.value)}, allowed: {allowed} or array [["ASPECT", "{first}"]]{hint}'
