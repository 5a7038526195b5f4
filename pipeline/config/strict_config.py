"""Strict, frozen configuration: YAML plus overrides, validated once, before torch is imported.

A config is a tree of `Config` classes. Its leaves have dotted keys (`loss.aux_focal.lambda`), which are used on the
command line, in MLflow's params and in error messages.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.config_block import (
    Config,
    Key,
    Positive,
    Probability,
    flatten,
    keys,
    keys_in_unions,
    to_yaml,
    without_none,
)
from pipeline.config.error_texts import closest, explain, nearest, unknown_key
from pipeline.config.yaml_file import canonical, parse_yaml, read_yaml, why_not_plain
from pipeline.errors import UserError

__all__ = [
    "Config", "Key", "Positive", "Probability", "canonical", "closest", "flatten", "keys", "keys_in_unions", "load",
    "nearest", "read_yaml", "to_yaml", "validate", "with_default",
]  # fmt: skip

NULLS = ("null", "None")  # texts of an override that mean null
YAML_NULLS = ("null", "Null", "NULL", "~")

C = TypeVar("C", bound=Config)


def load(
    model: type[C],
    file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    shown_as: Mapping[str, str] | None = None,
) -> C:
    """Read `file`, apply `overrides` (dotted key -> text), and validate the result.

    `shown_as`: dotted keys -> the shorter names that the user typed, for error messages.

    Raises:
        UserError: a key is unknown (the message suggests the nearest), or a value is not allowed.
    """
    tree = read_yaml(file) if file else {}
    known = {key.path: key for key in (*keys(model), *keys_in_unions(model))}
    typed: dict[str, str] = {}
    for path, text in (overrides or {}).items():
        if path not in known:
            raise UserError(unknown_key(path, list(known)))
        typed[path] = (shown_as or {}).get(path, path)
        if reason := why_not_plain(text):
            raise UserError(f"--{typed[path]}: found {reason}")
        if not text.strip():  # for example from an unset shell variable
            raise UserError(f"--{typed[path]}: found {text!r}, allowed: {known[path].allowed}")
        _set(tree, path, _parse(text, known[path].field))
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, model, file, typed)) from None


def validate(model: type[C], tree: Mapping[str, Any], file: Path | None) -> C:
    """Validate `tree`, which was read from `file`.

    Raises:
        UserError: a key is unknown or a value is not allowed; the message names the file and the key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, model, file)) from None


def with_default(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy `tree` and set the dotted key if it is missing. Used for defaults that depend on another key."""
    name, _, rest = path.partition(".")
    if not rest:
        return {name: value} | dict(tree)
    block = tree.get(name) or {}
    return {**tree, name: with_default(block, rest, value)} if isinstance(block, Mapping) else dict(tree)


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *blocks, leaf = path.split(".")
    for block in blocks:
        if not isinstance(tree.get(block), dict):
            tree[block] = {}
        tree = tree[block]
    tree[leaf] = value


def _parse(text: str, field: FieldInfo) -> Any:
    """Parse an override: text for a string key as it is, everything else as YAML."""
    plain = without_none(field.annotation)
    if plain is not field.annotation and text in NULLS:
        return None
    if plain is str or (get_origin(plain) is Literal and text in get_args(plain)):
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if value is None and text.strip() not in YAML_NULLS else value  # YAML parses a comment as null
