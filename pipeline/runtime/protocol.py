"""Messages between processes: frozen dataclasses, each encoded as a line of JSON with the name of its type."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

M = TypeVar("M")

TYPE = "type"  # JSON field with the message's class name


class MessageError(ValueError):
    """A line is not a message of the protocol."""


def encode(message: Any) -> str:
    """Encode a dataclass as a line of JSON."""
    return json.dumps({TYPE: type(message).__name__} | asdict(message)) + "\n"


def decode(line: str, kinds: Iterable[type[M]]) -> M:
    """Decode a line as a message of one of the types `kinds`.

    Raises:
        MessageError: the line is not JSON, has another type, or has a missing or unknown field.
    """
    try:
        values = json.loads(line)
    except ValueError as error:
        raise MessageError(f"found a line that is not JSON: {error}") from None
    types = {kind.__name__: kind for kind in kinds}
    name = values.pop(TYPE, None) if isinstance(values, dict) else None
    if not isinstance(name, str) or name not in types:
        raise MessageError(f"found message type {name!r}, allowed: {', '.join(types)}")
    return _build(types[name], values)


def read_messages(stream: Iterable[str], kinds: Iterable[type[M]]) -> Iterator[M]:
    """Decode the messages of a stream; skip an incomplete last line, left by a killed process.

    Raises:
        MessageError: a line is not a message of one of the types `kinds`.
    """
    return (decode(line, kinds) for line in stream if line.endswith("\n"))


def _build(kind: type[M], values: Any) -> M:
    hints = get_type_hints(kind)
    if not isinstance(values, dict):
        raise MessageError(f"{kind.__name__}: found {type(values).__name__}, allowed: its fields")
    if unknown := values.keys() - hints.keys():
        raise MessageError(f"{kind.__name__}: found field {min(unknown)}, allowed: {', '.join(hints)}")
    try:
        return kind(**{name: _value(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise MessageError(f"{kind.__name__}: {error}") from None


def _value(hint: Any, value: Any) -> Any:
    """Restore dataclasses and tuples, which JSON does not have."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value)
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], entry) for entry in value)
    return value
