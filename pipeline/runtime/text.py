"""Text as a terminal may show it."""

import re

CONTROLS = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""The text with its control characters escaped, all but tabs and the ends of lines.

    A name may come from another user's store or file; as it is, it could clear a terminal or set its title.

    >>> visible("\x1b[2Jname")
    '\\x1b[2Jname'
    """
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
