"""Line styles of the page's arms: colours that stand out from the background, and dashes."""

from collections.abc import Sequence
from typing import NamedTuple

LIGHT, DARK = "#ffffff", "#14171b"  # the page's two backgrounds
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "12 3", "4 2", "7 2 2 2 2 2", "1 3")  # in pixels; the first line is solid


class LineStyle(NamedTuple):
    """Colours and dashes of an arm's lines."""

    light: str  # colour on the light background
    dark: str
    dash: str  # in pixels
    fine_dash: str  # in tenths of pixels


def line_styles(colors: Sequence[str]) -> list[LineStyle]:
    """Line style of each arm. colors: as #rrggbb."""
    return [
        LineStyle(readable(color, LIGHT), readable(color, DARK), _dash(index, 1), _dash(index, 10))
        for index, color in enumerate(colors)
    ]


def readable(color: str, background: str, least: float = 3.0) -> str:
    """Mix a colour with black or white until its contrast reaches `least`; WCAG 2 requires 3 for graphics."""
    target = 0 if luminance(background) > 0.18 else 255
    mixed = color
    for share in range(21):
        mixed = "#" + "".join(f"{round(c + (target - c) * share / 20):02x}" for c in _channels(color))
        if contrast(mixed, background) >= least:
            break
    return mixed


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    channels = [channel / 255 for channel in _channels(color)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _channels(color: str) -> bytes:
    return bytes.fromhex(color.removeprefix("#"))


def _dash(index: int, unit: int) -> str:
    lengths = DASHES[index % len(DASHES)].split()
    return " ".join(f"{float(length) * unit:g}" for length in lengths) or "none"
