"""Lists written into a text cell, as JSON or Python writes them."""

import ast
import json
import re

_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[-+.\w]+"""
_LIST = re.compile(rf"\[\s*(?:(?:{_ITEM})\s*(?:,\s*(?:{_ITEM})\s*)*)?\]")


def listed_items(text: str) -> list[str | None] | None:
    """Elements of a list as JSON or Python writes it, numbers as they are written; None if it is no such list."""
    try:
        try:
            items = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        except ValueError:
            if not _LIST.fullmatch(text):
                return None
            written = [None if item == "None" else item for item in re.findall(_ITEM, text)]
            items = [ast.literal_eval(item) if item and item[0] in "'\"" else item for item in written]
        texts = [str(item).lower() if isinstance(item, bool) else item for item in items]
        for item in texts:
            if not (item is None or isinstance(item, str)):
                return None
            (item or "").encode()  # fails for half of a character, such as "\ud83d"
    except (ValueError, RecursionError):
        return None
    return texts
