"""Label conditions such as `click and income == "50000+."`: a small language that is never executed as Python.

A condition consists of comparisons (`== != < <= > >=`, `in [..]`, `not in [..]`) of a column with texts or numbers,
`is missing`, `is not missing`, columns of 0/1 labels, `and`, `or`, `not` and parentheses. A column whose name is not a
Python name is written in backticks. Texts are read as cells are, so that times, whole numbers and booleans have one
spelling. The empty text means a missing value. With any other text or number, a missing value makes `!=` and `not in`
true and all other comparisons false.
"""

import ast
import math
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.canonical_text import canonical_times, number_text, respelt
from pipeline.data.cells import Cells, cell_error
from pipeline.data.raw_table import Batch
from pipeline.errors import UserError

ALLOWED = (
    "a column compared (==, !=, <, <=, >, >=, in [..], not in [..]) with a number, or with a text or date in quotes, "
    "`is missing`, `is not missing`, a column of 0/1 labels, and, or, not, (..); a column whose name is no plain word "
    "stands in backticks: `Purchase Time`"
)
_COMPARE: dict[type[ast.cmpop], tuple[str, str]] = {  # Arrow function, and the one for swapped sides
    ast.Eq: ("equal", "equal"),
    ast.NotEq: ("not_equal", "not_equal"),
    ast.Lt: ("less", "greater"),
    ast.LtE: ("less_equal", "greater_equal"),
    ast.Gt: ("greater", "less"),
    ast.GtE: ("greater_equal", "less_equal"),
}
_LABELS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
EXACT = 2**53  # doubles represent every whole number up to this one
_PADDED = re.compile(r"0[0-9]+")  # texts of one length, whose order is that of their numbers
_QUOTED = re.compile(rb"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`[^`]*`""")


class BatchColumns:
    """The columns of a batch that conditions read. If `click` is not None, that name means the label.

    Raises:
        UserError: a value is not a number, or not a label.
    """

    def __init__(self, cells: Cells, batch: Batch, click: pa.Array | None) -> None:
        self.cells, self.batch, self.click = cells, batch, click

    def text(self, column: str) -> pa.Array:
        """Column as canonical texts; null if missing."""
        values, codes = self.cells.texts(self._raw(column), column, self.batch.place)
        return respelt(values, "whole", "truth").take(pa.array(codes))

    def number(self, column: str) -> pa.Array:
        """Column as doubles; NaN if missing."""
        return pa.array(self.cells.numbers(self._raw(column), column, self.batch.place))

    def label(self, column: str) -> pa.Array:
        """Column as booleans; 0 and 1 are never missing values."""
        raw = self._raw(column)
        values, codes = replace(self.cells, missing=()).texts(raw, column, self.batch.place)
        truth = [_LABELS.get(text.lower()) if text is not None else None for text in values.to_pylist()]
        unknown = np.flatnonzero(np.array([value is None for value in truth])[codes])
        if len(unknown):
            row = int(unknown[0])
            raise cell_error(self.batch.place, row, column, raw[row].as_py(), "0 or 1")
        return pa.array(np.array(truth, dtype=bool)[codes])

    def _raw(self, column: str) -> pa.Array:
        return self.click if self.click is not None and column == "click" else self.batch.columns[column]


Evaluate = Callable[[BatchColumns], pa.Array]


@dataclass(frozen=True)
class Condition:
    text: str
    columns: tuple[str, ...]
    """columns that the condition reads, in order of appearance"""
    texts: tuple[str, ...]
    """texts with which it compares columns"""
    evaluate: Evaluate = field(repr=False, compare=False)
    """columns of a batch -> booleans without missing values"""


def parse(text: str) -> Condition:
    """Compile a condition.

    Raises:
        UserError: it is invalid. The message gives the condition, the character position from 1, and what is allowed.
    """
    parser = _Parser(text)
    evaluate = parser.compiled()
    return Condition(text, tuple(dict.fromkeys(parser.columns)), tuple(parser.texts), evaluate)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split("\n")).strip()
        self.source = self.text.encode()
        self.columns: list[str] = []
        self.texts: list[str] = []

    def compiled(self) -> Evaluate:
        # replace a name in backticks by underscores of the same length, which keeps the positions
        plain = _QUOTED.sub(lambda match: b"_" * len(match[0]) if match[0][:1] == b"`" else match[0], self.source)
        try:
            with warnings.catch_warnings(action="ignore"):  # SyntaxWarning for odd expressions
                tree = ast.parse(plain.decode(), mode="eval")
            return self.truth(tree.body)
        except SyntaxError as error:
            position = error.offset - 1 if error.offset else len(self.text)  # 0 or None: at the end
            problem = error.msg
            if problem.startswith("leading zeros"):
                problem = "a number begins with 0; write a date or a code in quotes, or a number without the zero"
            raise self.error(position, problem) from None
        except (RecursionError, MemoryError, ValueError, OverflowError):
            raise self.error(0, "cannot be read") from None

    def error(self, position: int, problem: str) -> UserError:
        shown = self.text if len(self.text) <= 200 else self.text[:197] + "..."
        return UserError(f"condition `{shown}`, position {position + 1}: {problem}; allowed: {ALLOWED}")

    def node_error(self, node: ast.AST, problem: str = "") -> UserError:
        start = len(self.source[: getattr(node, "col_offset", 0)].decode())
        return self.error(start, problem or f"found {self.written(node)}")

    def written(self, node: ast.AST) -> str:
        """Source text of the node."""
        return self.source[getattr(node, "col_offset", 0) : getattr(node, "end_col_offset", None)].decode()

    def truth(self, node: ast.expr) -> Evaluate:
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(value) for value in node.values]
            join = pc.and_ if isinstance(node.op, ast.And) else pc.or_
            return lambda columns: reduce(join, [part(columns) for part in parts])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            part = self.truth(node.operand)
            return lambda columns: pc.invert(part(columns))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [self.comparison(*each) for each in zip(sides, node.ops, sides[1:], strict=False)]
            return lambda columns: reduce(pc.and_, [part(columns) for part in parts])  # 18 <= age < 30
        if isinstance(node, ast.Name):
            column = self.column(node)
            return lambda columns: columns.label(column)
        raise self.node_error(node)

    def comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Evaluate:
        if isinstance(operator, ast.In | ast.NotIn):
            return self.membership(self.column(left), right, isinstance(operator, ast.NotIn))
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Name) and self.written(right) == "missing"):
                raise self.node_error(right, f"found {self.written(right)} after is")
            name, valid = self.column(left), isinstance(operator, ast.IsNot)
            return lambda columns: _is_valid(columns, name) if valid else pc.invert(_is_valid(columns, name))
        function, swapped = _COMPARE[type(operator)]
        if isinstance(left, ast.Constant | ast.UnaryOp):  # 18 < age
            left, right, function = right, left, swapped
        column, constant = self.column(left), self.constant(right)
        compare, equal = getattr(pc, function), function == "equal"
        if isinstance(constant, str) and function not in ("equal", "not_equal"):
            self.check_order(constant, right)
        if constant == "":
            return lambda columns: pc.invert(_is_valid(columns, column)) if equal else _is_valid(columns, column)
        # a comparison with a missing value gives null
        return lambda columns: compare(_read(columns, column, constant), constant).fill_null(function == "not_equal")

    def membership(self, column: str, node: ast.expr, negated: bool) -> Evaluate:
        if not isinstance(node, ast.List | ast.Tuple | ast.Set) or not node.elts:
            raise self.node_error(node, f"found {self.written(node)} after in")
        constants = [self.constant(element) for element in node.elts]
        if len({type(constant) for constant in constants}) > 1:
            raise self.node_error(node, "found texts and numbers in one list")
        allowed = pa.array([None if constant == "" else constant for constant in constants])

        def evaluate(columns: BatchColumns) -> pa.Array:
            within = pc.is_in(_read(columns, column, constants[0]), value_set=allowed)
            return pc.invert(within) if negated else within

        return evaluate

    def check_order(self, text: str, node: ast.expr) -> None:
        """Refuse an order of texts where an order of numbers is meant: "10" comes before "8", but "08" before "10"."""
        if text == "":
            raise self.node_error(node, "found an empty text, which means: missing")
        if number_text(text) in (None, "True", "False") or _PADDED.fullmatch(text):
            return
        exact = abs(float(text)) < EXACT
        advice = "write it without quotes" if exact else "so large a number can only be compared by ==, != and in"
        raise self.node_error(node, f"found {self.written(node)}, whose order would be that of texts; {advice}")

    def column(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name):
            raise self.node_error(node, f"found {self.written(node)} where a column is due")
        name = self.written(node)  # not node.id, because Python normalises identifiers
        if name.startswith("`"):
            name = name[1:-1]
        self.columns.append(name)
        return name

    def constant(self, node: ast.expr) -> str | float:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            sign, node = -1 if isinstance(node.op, ast.USub) else 1, node.operand
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                raise self.node_error(node)
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str):
            self.texts.append(value.strip())
            return _canonical(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            if isinstance(value, int) and value >= EXACT:
                raise self.node_error(node, f"found {value}, which has neighbours that are the same as a double; "
                                        f'write == or in with "{sign * value}", in quotes')  # fmt: skip
            return float(sign * value)
        raise self.node_error(node, f"found {self.written(node)} where a text or a number is due")


def _canonical(text: str) -> str:
    """The text as `BatchColumns.text` has it in a column."""
    stripped = pa.array([unicodedata.normalize("NFC", text.strip())])
    return str(respelt(canonical_times(stripped), "whole", "truth")[0])


def _is_valid(columns: BatchColumns, column: str) -> pa.Array:
    return columns.text(column).is_valid()


def _read(columns: BatchColumns, column: str, constant: str | float) -> pa.Array:
    return columns.text(column) if isinstance(constant, str) else columns.number(column)
