"""Read the text layout of VLSP 2018 (Nguyen et al. 2018, "VLSP shared task: sentiment analysis").

    #1
    Phòng sạch, giá hơi cao
    {ROOMS#CLEANLINESS, positive}, {HOTEL#PRICES, negative}

Reviews are separated by their numbers; blank lines have no meaning.
"""

import re
from pathlib import Path

from pipeline.errors import UserError

LAYOUT = "the layout of VLSP 2018: #1, a line of text, a line of {ASPECT, polarity}, ..."

_NUMBER = re.compile(r"#[0-9]+")
_LABEL = re.compile(r"\{([^{}]*),([^{},]*)\}")
_LABELS = re.compile(rf"{_LABEL.pattern}(?:\s*[,;]?\s*{_LABEL.pattern})*\s*[,;]?")


def read_vlsp(file: Path, content: str) -> tuple[list[str], list[list[list[str]]]]:
    """Return the texts and, for each, its labels as pairs of aspect and polarity. A review may have no labels.

    Raises:
        UserError: the file has another layout; names the line.
    """
    texts, labels = list[str](), list[list[list[str]]]()
    for number, line in enumerate(map(str.strip, content.split("\n")), 1):
        if _NUMBER.fullmatch(line):
            texts.append("")
            labels.append([])
        elif line and not texts:
            raise UserError(f"{file}: line {number}: found {line[:60]!r}, allowed: {LAYOUT}; or data.delimiter")
        elif line and labels[-1]:
            raise UserError(f"{file}: line {number}: found {line[:60]!r} after a review's labels, allowed: {LAYOUT}")
        elif line.startswith("{"):
            if not _LABELS.fullmatch(line):
                raise UserError(f"{file}: line {number}: found {line[:60]!r}, allowed: {LAYOUT}")
            labels[-1] = [[aspect.strip(), polarity.strip()] for aspect, polarity in _LABEL.findall(line)]
        elif line:
            texts[-1] = f"{texts[-1]}\n{line}".strip()
    return texts, labels
