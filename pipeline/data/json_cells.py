"""JSON values as the texts of cells, and lists written into a text cell, as JSON or Python writes them."""

import ast
import json
import re
from collections import Counter
from typing import Any

_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[-+.\w]+"""
_LIST = re.compile(rf"\[\s*(?:(?:{_ITEM})\s*(?:,\s*(?:{_ITEM})\s*)*)?\]")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse duplicate keys, of which json would keep the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {repeated!r} appears twice")
    return record


def parsed(text: str | bytes) -> Any:
    """Parse JSON, with numbers as texts as they are written.

    Raises:
        ValueError, RecursionError: it is not JSON, or an object has a key twice.
    """
    constants = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}.get
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=constants, object_pairs_hook=unique_keys)


def text_of(value: Any) -> str | None:
    """Text of a parsed value.

    Raises:
        ValueError: it is a list or an object, or holds half a character, such as "\\ud83d".
    """
    if isinstance(value, list | dict):
        raise ValueError("not one value")
    text = None if value is None else str(value)
    (text or "").encode()
    return text


def listed_items(text: str) -> list[str | None] | None:
    """Elements of a list as JSON or Python writes it, numbers as they are written; None if it is no such list."""
    try:
        try:
            items = parsed(text)
        except ValueError:
            if not _LIST.fullmatch(text):
                return None
            written = [None if item in ("None", "nan") else item for item in re.findall(_ITEM, text)]
            items = [ast.literal_eval(item) if item and item[0] in "'\"" else item for item in written]
        return list(map(text_of, items)) if isinstance(items, list) else None
    except (ValueError, RecursionError):
        return None
