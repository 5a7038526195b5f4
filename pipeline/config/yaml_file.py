"""Strict YAML reader: plain values only, no duplicate keys, no tags, and a limited number of values."""

import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

MOST_BYTES = 1 << 20  # size limit of a file
MOST_VALUES = 50_000  # limit of values in a document, with all aliases expanded
PLAIN = "text, numbers, true, false, null, dates, lists and mappings"


class _NotPlainError(yaml.YAMLError):
    """Valid YAML that contains a value of a type that no setting accepts."""


class _StrictLoader(yaml.SafeLoader):
    """Loader that refuses duplicate keys; PyYAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value} is written twice", problem_mark=key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        UserError: the file is missing, unreadable, too large, not UTF-8, not YAML, or not a mapping.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{file}: found over {MOST_BYTES >> 20} MiB, allowed: a YAML file of settings")
        tree = parse_yaml(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except _NotPlainError as error:
        raise UserError(f"{file}: {error}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{file}:{where} not valid YAML: {problem or error}") from None
    except ValueError as error:  # a null character in the path
        raise UserError(f"{str(file)!r}: {error}") from None
    if tree is None:
        raise UserError(f"{file}: the file is empty")
    if not isinstance(tree, dict):
        raise UserError(f"{file}: found a {type(tree).__name__}, allowed: a mapping of keys")
    return tree


def parse_yaml(text: str) -> Any:
    """Parse YAML to plain values. The limit on values keeps memory and time bounded.

    Raises:
        yaml.YAMLError: the text is not YAML, has values that are not plain, or more than MOST_VALUES values.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        tree = loader.construct_document(node)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # raised by PyYAML's constructors: month 13, `!!int x`, a number of 5,000 digits, a list as a key
        raise yaml.YAMLError(f"an invalid value ({' '.join(str(error).split())[:100]})") from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()
    _check_plain(tree)
    return tree


def canonical(value: Any) -> str:
    """Format a value so that equal values have equal text: 1e-1, 0.10 and 0.1 all become `0.1`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return repr(value) if isinstance(value, float) else str(value)


def why_not_plain(value: Any) -> str | None:
    """Return the reason why no setting accepts a value; None if the value is plain."""
    if isinstance(value, str):
        if "\0" in value:
            return "a null character, allowed: text without"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "half a character, allowed: UTF-8 text"
    elif isinstance(value, int) and abs(value) > sys.float_info.max:
        return f"a whole number of {value.bit_length()} bits, allowed: up to {sys.float_info.max:.3g}"
    elif not isinstance(value, int | float | date | None):
        kinds: dict[type, str] = {bytes: "binary data", set: "a set", tuple: "an ordered pair"}
        return f"{kinds.get(type(value), 'something else')}, allowed: {PLAIN}"
    return None


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Count the values of a node with all aliases expanded.

    counts: node id -> count, or None while the node is being counted, which detects values that contain themselves.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in counts:
        if (count := counts[id(node)]) is None:
            raise yaml.MarkedYAMLError(problem="a value that contains itself", problem_mark=node.start_mark)
        return count
    counts[id(node)] = None
    count = 1 + sum(_count(part, counts) for part in _children(node))
    if count > MOST_VALUES:
        problem = f"found over {MOST_VALUES:,} values with every alias written out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    counts[id(node)] = count
    return count


def _children(node: yaml.CollectionNode) -> Iterator[yaml.Node]:
    for entry in node.value:
        yield from entry if isinstance(entry, tuple) else (entry,)


def _check_plain(value: Any, place: str = "") -> None:
    where = f"{place}: " if place else ""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise _NotPlainError(f"{where}found key {canonical(key):.80}, allowed: text; write it in quotes")
            _check_plain(key, place)
            _check_plain(entry, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for entry in value:
            _check_plain(entry, place)
    elif reason := why_not_plain(value):
        raise _NotPlainError(f"{where}found {reason}")
