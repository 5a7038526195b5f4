"""One-line messages for config errors."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import ValidationError

from pipeline.config.config_block import Config, Key, block_of, is_union, keys, without_none
from pipeline.config.yaml_file import canonical

MOST_ERRORS = 12  # listed in one message
LONGEST_KEY, LONGEST_VALUE = 120, 80  # characters shown


def nearest(name: str, candidates: list[str]) -> str:
    """Return `; did you mean X?`, or the list of candidates if none is similar and the list is short."""
    if match := closest(name, candidates):
        return f"; did you mean {match}?"
    return f"; allowed: {', '.join(candidates)}" if len(candidates) <= 12 else "; --help lists the keys"


def closest(name: str, candidates: list[str]) -> str | None:
    """Return the candidate with the most similar spelling, compared as a whole, then by the part after the last dot."""
    if matches := difflib.get_close_matches(name, candidates, 1, 0.7):
        return matches[0]
    leaves = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(candidates)}
    matches = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), 1, 0.6)
    return leaves[matches[0]] if matches else None


def unknown_key(path: str, candidates: Sequence[str]) -> str:
    return f"unknown key {cut(path)}{nearest(path[:LONGEST_KEY], list(candidates))}"


def cut(text: str, longest: int = LONGEST_KEY) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


class _Problem(NamedTuple):
    """An error reported by pydantic."""

    path: str  # dotted key
    parts: list[str]  # pydantic's full location, which may continue inside the key's value
    details: Any

    @property
    def kind(self) -> str:
        return str(self.details["type"])

    @property
    def reason(self) -> str:
        return str(self.details["ctx"]["error"] if self.kind == "value_error" else self.details["msg"])

    @property
    def shown(self) -> str:
        value = self.details["input"]
        return cut(repr(value) if isinstance(value, str) else canonical(value), LONGEST_VALUE)


def explain(
    error: ValidationError, model: type[Config], file: Path | None = None, typed: Mapping[str, str] | None = None
) -> str:
    """Describe pydantic's errors in one line. typed: dotted keys of overrides -> their names on the command line."""
    known, typed = {key.path: key for key in keys(model)}, typed or {}
    lines = []
    for problem in _problems(error, known):
        source = f"--{typed[problem.path]}" if problem.path in typed else str(file or "config")
        name = "" if typed.get(problem.path) == problem.path else problem.path
        lines.append(_word_inside(problem, known, source) or _word(problem, known, source, name))
    lines = list(dict.fromkeys(lines))
    more = [f"and {len(lines) - MOST_ERRORS} more"] if len(lines) > MOST_ERRORS else []
    return "; ".join(lines[:MOST_ERRORS] + more)


def _problems(error: ValidationError, known: Mapping[str, Key]) -> list[_Problem]:
    """List the errors with the keys that they belong to.

    pydantic reports one error for each member of a union. Only one is kept: the error of this project's own validator
    if there is one for the same value, else the first, which contains the whole value.
    """
    problems: list[_Problem] = []
    unions: dict[str, int] = {}
    for details in error.errors():
        parts = [str(part) for part in details["loc"]]
        # the name of a union member or the index in a list may follow the key: use the longest prefix that is a key
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in known), ".".join(parts))
        problem = _Problem(path, parts, details)
        if path in known and is_union(without_none(known[path].field.annotation)):
            index = unions.setdefault(path, len(problems))
            if index < len(problems):
                if problem.kind == "value_error" and details["input"] == problems[index].details["input"]:
                    problems[index] = problem
                continue
        problems.append(problem)
    return problems


def _word(problem: _Problem, known: Mapping[str, Key], source: str, name: str) -> str:
    path, place = problem.path, f"{source}: {name}" if name else source
    if problem.kind == "extra_forbidden":
        blocks = {key[:at] for key in known for at, letter in enumerate(key) if letter == "."}
        return f"{source}: {unknown_key(path, [*known, *sorted(blocks)])}"
    if path not in known:
        return f"{place} is required" if problem.kind == "missing" else f"{cut(place)}: {problem.reason}"
    if problem.kind == "missing" and problem.parts == path.split("."):
        return f"{place} is required"
    shown = "a list that is too short" if problem.kind == "missing" else problem.shown
    own = f" ({problem.reason})" if problem.kind == "value_error" else ""
    return f"{place}: found {shown}, allowed: {known[path].allowed}{own}"


def _word_inside(problem: _Problem, known: Mapping[str, Key], source: str) -> str | None:
    """Describe an error inside the value of a key (an optional block, a list of blocks, or a dict), else None."""
    path, parts = problem.path, problem.parts
    inside = parts[path.count(".") + 1 :]
    if path not in known or not inside:
        return None
    annotation, place = without_none(known[path].field.annotation), f"{source}: {cut('.'.join(parts))}"
    block, prefix = block_of(annotation), f"{path}."
    if not block and get_origin(annotation) is tuple:
        block, prefix, inside = block_of(get_args(annotation)[0]), "", inside[1:]
    if block:
        own = {f"{prefix}{key.path}": key for key in keys(block)}
        name = prefix + ".".join(inside)
        if problem.kind == "missing":
            return f"{place} is required"
        if problem.kind == "extra_forbidden":
            return f"{source}: unknown key {cut('.'.join(parts))}{nearest(name[:LONGEST_KEY], list(own))}"
        allowed = f"allowed: {own[name].allowed}" if name in own else problem.reason
        return f"{place}: found {problem.shown}, {allowed}"
    return f"{place}: found {problem.shown}, {problem.reason}" if get_origin(annotation) is dict else None
