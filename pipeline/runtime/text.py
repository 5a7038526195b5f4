"""Text that is safe to show in a terminal."""

import re
from collections.abc import Iterable

CONTROLS = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""Escape control characters other than tabs and line ends.

    A name may come from another user's store or file; unescaped, it could clear a terminal or set its title.

    >>> visible("\x1b[2Jname")
    '\\x1b[2Jname'
    """
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def listed(names: Iterable[object], limit: int = 5) -> str:
    """Join the first `limit` names by commas, and add the number of the others."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")
