"""Colours that can be told from the page's background."""

import re
from collections.abc import Sequence
from typing import NamedTuple

LIGHT, DARK = "#ffffff", "#14171b"  # the page's two backgrounds
SPARE = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4ab5")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "12 3", "4 2", "7 2 2 2 2 2", "1 3")  # in pixels; the first line is solid


def settle(colors: Sequence[str]) -> list[str]:
    """Each as #rrggbb; one that is not a hex colour becomes a spare one."""
    found = []
    for index, color in enumerate(colors):
        plain = color.lower() if isinstance(color, str) else ""
        if re.fullmatch(r"#[0-9a-f]{3}", plain):
            plain = "#" + "".join(2 * digit for digit in plain[1:])
        found.append(plain if re.fullmatch(r"#[0-9a-f]{6}", plain) else SPARE[index % len(SPARE)])
    return found


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, 0 to 1 (WCAG 2)."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable(color: str, background: str, least: float = 3.0) -> str:
    """The colour, mixed with black or white as far as the contrast that WCAG 2 asks of graphics needs."""
    target = 0 if luminance(background) > 0.18 else 255
    mixed = color
    for share in range(21):
        channels = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        mixed = "#" + "".join(f"{round(c + (target - c) * share / 20):02x}" for c in channels)
        if contrast(mixed, background) >= least:
            break
    return mixed


class LineStyle(NamedTuple):
    """How an arm's lines look: colours on the two backgrounds, dashes in pixels and in tenths of them."""

    light: str
    dark: str
    dash: str
    fine_dash: str


def line_styles(colors: Sequence[str]) -> list[LineStyle]:
    """One for each arm."""
    return [
        LineStyle(readable(color, LIGHT), readable(color, DARK), _dash(index, 1), _dash(index, 10))
        for index, color in enumerate(settle(colors))
    ]


def _dash(index: int, unit: int) -> str:
    lengths = DASHES[index % len(DASHES)].split()
    return " ".join(f"{float(length) * unit:g}" for length in lengths) or "none"
