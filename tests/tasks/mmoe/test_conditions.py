"""The condition language of labels, against truth tables written by hand and against Python itself."""

import re
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare.conditions import parse


class Table:
    """Columns as Python lists; None = missing."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns

    def text(self, column: str) -> pa.Array:
        values = [None if value is None else str(value) for value in self.columns[column]]
        return pa.array(values, pa.string())

    def number(self, column: str) -> pa.Array:
        values = [float("nan") if value is None else float(value) for value in self.columns[column]]
        return pa.array(values, pa.float64())

    def label(self, column: str) -> pa.Array:
        return pa.array([bool(value) for value in self.columns[column]])


PEOPLE = Table(
    status=["new", "old", None, "gone"],
    age=[17, 18, 30, None],
    paid=[1, 0, 1, 0],
    **{"birth place": ["Huế", "Đà Nẵng", "Huế", None], "class": ["a", "b", "a", "b"], "ﬁeld": ["x", "y", "x", "y"]},
)


def holds(condition: str) -> list[bool]:
    truth: list[bool] = parse(condition).evaluate(PEOPLE).to_pylist()
    return truth


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("status == 'new'", [1, 0, 0, 0]),
        ('status != "new"', [0, 1, 1, 1]),  # a missing value equals nothing
        ('not (status == "new")', [0, 1, 1, 1]),
        ('status not in ["new", "gone"]', [0, 1, 1, 0]),
        ('status in ("new",)', [1, 0, 0, 0]),
        ('status < "new"', [0, 0, 0, 1]),
        ("age != 18", [1, 0, 1, 1]),
        ("age <= 18.0", [1, 1, 0, 0]),
        ("age > 1.8e1", [0, 0, 1, 0]),
        ("age > -1", [1, 1, 1, 0]),
        ("age not in [17, 30]", [0, 1, 0, 1]),
        ("17 < age <= 30", [0, 1, 1, 0]),
        ('age == "18"', [0, 1, 0, 0]),
        ("paid", [1, 0, 1, 0]),
        ("not paid", [0, 1, 0, 1]),
        ("paid or age == 18 and not paid", [1, 1, 1, 0]),  # and binds tighter than or
        ("(paid or age == 18) and not paid", [0, 1, 0, 0]),
        ('paid\n  and status == "new"', [1, 0, 0, 0]),
        ('`birth place` == "Huế"', [1, 0, 1, 0]),
        ('`birth place` != "Huế" and `class` == "b"', [0, 1, 0, 1]),
        ('"Đ" < `birth place` and age == 18', [0, 1, 0, 0]),
        ('ﬁeld == "x"', [1, 0, 1, 0]),  # Python itself would look for "field"
        ('status == "`new`"', [0, 0, 0, 0]),  # a backtick inside a text is a letter
        ('status == " new "', [1, 0, 0, 0]),  # cells are compared stripped, so is the text
        ('age == "18.0"', [0, 1, 0, 0]),  # cells of whole numbers are compared without a fraction, so is the text
        ('age in ["17.", "30"]', [1, 0, 1, 0]),
        ('age >= "018"', [1, 1, 1, 0]),  # a text that begins with 0 is a code, and "17" comes after "018"
    ],
)
def test_truth(condition: str, expected: list[int]) -> None:
    assert holds(condition) == [bool(value) for value in expected]


def test_columns() -> None:
    assert parse("b == 1 and (a or not `c d` in ['x']) and 2 < b").columns == ("b", "a", "c d")


@pytest.mark.parametrize(
    ("condition", "position", "problem"),
    [
        ("", 1, ""),
        ("age >", 6, ""),
        ("age ==", 7, ""),
        ("(paid", 1, "never closed"),
        ("age = 3", 5, ""),
        ('paid and "x"', 10, 'found "x"'),
        ("paid & paid", 1, "found paid & paid"),
        ("age == status", 8, "found status where a text or a number is due"),
        ("age == True", 8, "found True"),
        ("age == None", 8, "found None"),
        ("age == -'x'", 9, "found 'x'"),
        ("age == 1e999", 8, "found 1e999"),
        ("age is 3", 8, "found 3 after is"),
        ("age == 9007199254740993", 8, 'write == or in with "9007199254740993", in quotes'),
        ("age > '8'", 7, "found '8', whose order would be that of texts; write it without quotes"),
        ('"1e5" >= age', 1, "write it without quotes"),
        ("age < '-0.50'", 7, "write it without quotes"),
        ('age < "9007199254740993"', 7, "so large a number can only be compared by ==, != and in"),
        ("Purchase Time > 3", 10, "a column whose name is no plain word stands in backticks: `Purchase Time`"),
        ("2nd_price > 3", 1, "stands in backticks"),
        ("event-type == 'x'", 1, "stands in backticks"),
        ("user.age > 3", 1, "stands in backticks"),
        ("age == 08", 8, "a number begins with 0; write a date or a code in quotes, or a number without the zero"),
        ("age >= 2024-05-08", 13, "write a date or a code in quotes"),
        ("age >= 2024-10-18", 8, "found 2024-10-18 where a text or a number is due"),
        ('age < ""', 7, "found an empty text, which means: missing"),
        ("age in 3", 8, "found 3 after in"),
        ("age in []", 8, "found [] after in"),
        ('age in [3, "x"]', 8, "found texts and numbers in one list"),
        ('3 in [3, "x"]', 1, "found 3 where a column is due"),
        ('"a" == "b"', 8, 'found "b" where a column is due'),
        ("len(status) == 3", 1, "found len(status) where a column is due"),
        ("age + 1 == 3", 1, "found age + 1"),
        ("status.upper() == 'X'", 1, "found status.upper()"),
        ("__import__('os').remove('x')", 1, "found __import__"),
        ("[x for x in status]", 1, "found [x"),
        ("(lambda: 1)()", 1, "found (lambda"),
        ("paid if paid else paid", 1, "found paid if"),
        ("f'{paid}' == status", 1, "found f'{paid}'"),
        ("(paid := 1)", 2, "found paid := 1"),
        ("đói and 1", 9, "found 1"),  # positions count letters, not bytes
        ("`a b` and `c", 11, "invalid"),
        ("class == 'x'", 1, ""),
        ("paid; paid", 5, ""),
        ("not " * 5000 + "paid", 1, "cannot be read"),
    ],
)
def test_refused(condition: str, position: int, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(condition)
    message = str(caught.value)
    assert "allowed: a column compared" in message
    assert " ".join(condition.split())[:40] in message
    assert f"position {position}: " in message
    assert problem in message


# Any expression of the language that Python can read too, over rows without missing values.
columns = st.sampled_from(["s", "t"])
numbers = st.integers(-2, 3)
letters = st.sampled_from(["a", "b", "é", "x y"])
comparisons = st.one_of(
    st.tuples(st.sampled_from(["n", "m"]), st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), numbers.map(str)),
    st.tuples(columns, st.sampled_from(["==", "!=", "<", ">="]), letters.map(repr)),
    st.tuples(columns, st.sampled_from(["in", "not in"]), st.lists(letters, min_size=1, max_size=3).map(repr)),
    st.tuples(numbers.map(str), st.sampled_from(["==", "<", ">="]), st.just("n")),
).map(" ".join)
expressions = st.recursive(
    st.one_of(comparisons, st.just("flag")),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join),
        inner.map(lambda text: f"not ({text})"),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=8,
)
rows = st.fixed_dictionaries({"n": numbers, "m": numbers, "s": letters, "t": letters, "flag": st.integers(0, 1)})


@given(expressions, st.lists(rows, min_size=1, max_size=6))
def test_means_what_python_means(condition: str, table: list[dict[str, Any]]) -> None:
    parsed = parse(condition)
    truth = parsed.evaluate(Table(**{name: [row[name] for row in table] for name in table[0]})).to_pylist()
    assert truth == [bool(eval(condition, {}, row)) for row in table]  # noqa: S307
    named = re.findall(r"\b(?:n|m|s|t|flag)\b", re.sub(r"'[^']*'", "", condition))
    assert set(parsed.columns) == set(named)
