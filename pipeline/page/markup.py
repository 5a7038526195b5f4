"""HTML and SVG as text, safe by construction: what is not `Html` is escaped. Numbers as the page shows them."""

import math
from collections.abc import Iterable, Sequence
from html import escape

VOID = frozenset({"br", "input", "meta"})
MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EM DASH}"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(content: str) -> Html:
    """Plain text as markup; `Html` stays what it is."""
    return content if isinstance(content, Html) else Html(escape(content))


def join(parts: Iterable[str]) -> Html:
    """Pieces one after the other."""
    return Html("".join(text(part) for part in parts))


def tag(element: str, *children: str, **attributes: str | float | bool | None) -> Html:
    """An element. Attributes: `class_` is class, `stroke_width` is stroke-width; True has no value, None is absent."""
    written = ""
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        plain = name.rstrip("_").replace("_", "-")
        written += f" {plain}" if value is True else f' {plain}="{escape(_attribute(value))}"'
    opening = f"<{element}{written}>"
    return Html(opening) if element in VOID else Html(f"{opening}{join(children)}</{element}>")


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, class_: str = "") -> Html:
    """A table that scrolls within its own box. A row's first cell names the row; `Html` cells may be whole `<td>`."""
    cells = join(tag("th", name, scope="col") for name in head)
    body = join(
        tag("tr", tag("th", row[0], scope="row"), *(c if c.startswith("<td") else tag("td", c) for c in row[1:]))
        for row in rows
    )
    whole = tag("table", tag("thead", tag("tr", cells)), tag("tbody", body), class_=class_ or None)
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def number(value: float | None) -> str:
    """Four significant digits; a dash where there is no number.

    >>> number(0.61234), number(0.0012), number(123456), number(0)
    ('0.6123', '0.001200', '123,500', '0')
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    rounded = float(f"{value:.4g}")
    size = abs(rounded)
    if size == 0:
        written = "0"
    elif 1e4 <= size < 1e7:
        written = f"{rounded:,.0f}"
    elif 1e-5 <= size < 1e4:
        written = f"{rounded:.{3 - math.floor(math.log10(size))}f}"
    else:
        digits, _, power = f"{value:.3e}".partition("e")
        written = f"{digits}e{int(power)}"
    return written.replace("-", MINUS)


def signed(value: float | None) -> str:
    """A difference: `number` with its sign; zero has none."""
    written = number(value)
    return f"+{written}" if value is not None and value > 0 else written


def interval(low: float | None, high: float | None) -> str:
    """`-0.003 to +0.005`, or a dash."""
    return NOTHING if low is None or high is None else f"{signed(low)} to {signed(high)}"


def plus_minus(mean: float | None, spread: float | None) -> str:
    """`0.6123 ± 0.0012`; the mean alone where there is no spread."""
    return number(mean) if spread is None else f"{number(mean)} ± {number(spread)}"


def probability(p: float | None) -> str:
    """A p value; below 0.0001 it says so and no more."""
    return "< 0.0001" if p is not None and p < 1e-4 else number(p)
