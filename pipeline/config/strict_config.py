"""Strict, frozen configuration: YAML plus overrides, validated once, before torch is imported.

A config is a tree of `Config` classes. Its leaves have dotted names (`loss.aux_focal.lambda`); these are the
names on the command line, in MLflow's params and in error messages.
"""

import difflib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.errors import UserError

MOST_BYTES = 1 << 20  # of a YAML file; of more, it is no config
MOST_VALUES = 50_000  # of a YAML document, every alias written out
MOST_TOLD, LONGEST_KEY = 12, 120  # findings in one line, characters of a key in it
NULLS = ("null", "None")  # what may be typed for null
YAML_NULLS = ("null", "Null", "NULL", "~")  # the empty text is one to YAML too, but not to us
FLAGS = {True: ("yes", "on", "true"), False: ("no", "off", "false")}  # words that YAML reads as flags where bare


class Config(BaseModel):
    """A frozen block of settings: unknown keys, NaN and infinity are refused; numeric text is a number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value is None and _block(annotation):
            return {}  # `aux_focal:` with nothing under it is the block with its defaults
        kinds = _kinds(annotation) if isinstance(value, bool) else []
        words = [
            word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind) if word in FLAGS[value]
        ]
        if not words and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("true and false are not numbers")
        return words[0] if words else value


C = TypeVar("C", bound=Config)


class Key(NamedTuple):
    """One leaf of a config class."""

    path: str  # dotted
    field: FieldInfo
    default: str  # canonical text; "required" where there is none

    @property
    def allowed(self) -> str:
        """What the key accepts, in words: type and bounds."""
        return _describe(self.field)


def keys(model: type[Config], prefix: str = "") -> Iterator[Key]:
    """The leaves of a config class, in the order they are written."""
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        block = _block(field.annotation)
        if block:
            yield from keys(block, path + ".")
        else:
            required = field.is_required() or field.default is PydanticUndefined
            yield Key(path, field, "required" if required else canonical(field.default))


def flatten(config: Config, prefix: str = "") -> dict[str, str]:
    """Every effective value under its dotted key, as canonical text (what MLflow's params hold)."""
    flat: dict[str, str] = {}
    for name, field in type(config).model_fields.items():
        value, path = getattr(config, name), prefix + (field.alias or name)
        if isinstance(value, Config):
            flat |= flatten(value, path + ".")
        else:
            flat[path] = canonical(value)
    return flat


def canonical(value: Any) -> str:
    """One text for one value: 1e-1, 0.10 and 0.1 are all `0.1`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return repr(value) if isinstance(value, float) else str(value)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML: loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def load(
    model: type[C],
    file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    shown_as: Mapping[str, str] | None = None,
) -> C:
    """Read `file`, lay `overrides` (dotted key -> text) over it, and validate the whole.

    `shown_as`: the names under which the user typed some of the overrides.

    Raises:
        UserError: an unknown key (names the nearest), or a value outside of what its key allows.
    """
    tree = read_yaml(file) if file else {}
    known = {key.path: key for key in keys(model)}
    given: dict[str, str] = {}
    for path, text in (overrides or {}).items():
        if path not in known:
            raise UserError(f"unknown key {_cut(path)}{nearest(path[:LONGEST_KEY], list(known))}")
        given[path] = (shown_as or {}).get(path, path)
        if reason := _unfit(text):
            raise UserError(f"--{given[path]}: found {reason}")
        if not text.strip():  # as a variable of the shell that is not set
            raise UserError(f"--{given[path]}: found {text!r}, allowed: {known[path].allowed}")
        _set(tree, path, _parse(text, known[path].field))
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, known, file, given)) from None


def with_default(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `tree` with `value` under the dotted key where it has none; for defaults that follow another key."""
    name, _, rest = path.partition(".")
    if not rest:
        return {name: value} | dict(tree)
    block = tree.get(name) or {}
    return {**tree, name: with_default(block, rest, value)} if isinstance(block, Mapping) else dict(tree)


def nearest(name: str, candidates: list[str]) -> str:
    """`; did you mean X?`, or the whole list where nothing comes near and the list is short."""
    if close := closest(name, candidates):
        return f"; did you mean {close}?"
    return f"; allowed: {', '.join(candidates)}" if len(candidates) <= 12 else "; --help lists the keys"


def closest(name: str, candidates: list[str]) -> str | None:
    """The candidate that is spelt most like the name, as a whole or after its last dot; None where none comes near."""
    leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(candidates)}
    close = difflib.get_close_matches(name, candidates, 1, 0.7)
    close = close or [leaf[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaf), 1, 0.6)]
    return close[0] if close else None


class _NotPlainError(yaml.YAMLError):
    """Valid YAML that holds something which fits no setting."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, which plain YAML silently takes the last of."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is written twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

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
    except ValueError as error:  # of the path: a zero character
        raise UserError(f"{str(file)!r}: {error}") from None
    if tree is None:
        raise UserError(f"{file}: the file is empty")
    if not isinstance(tree, dict):
        raise UserError(f"{file}: found a {type(tree).__name__}, allowed: a mapping of keys")
    return tree


def parse_yaml(text: str) -> Any:
    """Plain values from YAML, in memory and time that the text's length bounds.

    Raises:
        yaml.YAMLError: it is not YAML, makes other things than plain values, or more than MOST_VALUES of them.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        tree = loader.construct_document(node)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # YAML's own constructors: month 13, `!!int x`, a number of 5,000 digits, a list as a key
        raise yaml.YAMLError(f"a value that is none ({' '.join(str(error).split())[:100]})") from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()
    _check_plain(tree)
    return tree


def _check_size(root: yaml.Node) -> None:
    """Refuse a few lines of aliases that stand for billions of values, or for themselves."""
    sizes: dict[int, int | None] = {}  # node -> values in it, None while it is being counted

    def size(node: yaml.Node) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise yaml.MarkedYAMLError(problem="a value that holds itself", problem_mark=node.start_mark)
            return known
        sizes[id(node)] = None
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        found = 1 + sum(map(size, parts))
        if found > MOST_VALUES:
            problem = f"found over {MOST_VALUES:,} values with every alias written out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        sizes[id(node)] = found
        return found

    size(root)


def _check_plain(value: Any, place: str = "") -> None:
    """Refuse what fits no setting, and says nothing useful where it is written or hashed."""
    where = f"{place}: " if place else ""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise _NotPlainError(f"{where}found key {_shown(key)}, allowed: text; write it in quotes")
            _check_plain(key, place)
            _check_plain(entry, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for entry in value:
            _check_plain(entry, place)
    elif reason := _unfit(value):
        raise _NotPlainError(where + f"found {reason}")


def _unfit(value: Any) -> str | None:
    """Why a value fits no setting: it could not be a file's name, a param, or be written at all."""
    if isinstance(value, str):
        if "\0" in value:
            return "a zero character, allowed: text without"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "half a character, allowed: UTF-8 text"
    elif isinstance(value, int) and abs(value) > sys.float_info.max:
        return f"a whole number of {value.bit_length()} bits, allowed: up to {sys.float_info.max:.3g}"
    elif not isinstance(value, int | float | date | None):
        kinds: dict[type, str] = {bytes: "binary data", set: "a set", tuple: "an ordered pair"}
        found = kinds.get(type(value), "something else")
        return f"{found}, allowed: text, numbers, true, false, null, dates, lists and mappings"
    return None


def validate(model: type[C], tree: Mapping[str, Any], file: Path | None) -> C:
    """`tree` as a `model`, or a UserError that names the file and the key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, {key.path: key for key in keys(model)}, file, {})) from None


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *blocks, leaf = path.split(".")
    for block in blocks:
        if not isinstance(tree.get(block), dict):
            tree[block] = {}
        tree = tree[block]
    tree[leaf] = value


def _parse(text: str, field: FieldInfo) -> Any:
    """An override's text as a value: strings as they are typed, all else as YAML reads it."""
    optional, plain = _optional(field.annotation)
    if optional and text in NULLS:
        return None
    if plain is str or (get_origin(plain) is Literal and text in get_args(plain)):
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if value is None and text.strip() not in YAML_NULLS else value  # a comment alone is null to YAML


def _explain(error: ValidationError, known: dict[str, Key], file: Path | None, given: dict[str, str]) -> str:
    """Pydantic's findings as one line."""
    told: list[str] = []
    for path, parts, finding in _findings(error, known):
        where = f"--{given[path]}" if path in given else str(file) if file else "config"
        name = "" if given.get(path) == path else path
        place = f"{where}: {name}" if name else where
        inner = path in known and len(parts) > path.count(".") + 1
        block = _block(_optional(known[path].field.annotation)[1]) if inner else None
        if block and finding["type"] in ("extra_forbidden", "missing"):  # within a block that may be null
            whole, own = ".".join(parts), [f"{path}.{key.path}" for key in keys(block)]
            unknown = f"unknown key {_cut(whole)}{nearest(whole[:LONGEST_KEY], own)}"
            line = f"{where}: {unknown if finding['type'] == 'extra_forbidden' else f'{_cut(whole)} is required'}"
        elif inner and (listed := _listed_block(known[path].field.annotation)):
            line = f"{where}: {_of_item('.'.join(parts), parts[path.count('.') + 2 :], listed, finding)}"
        elif inner and get_origin(known[path].field.annotation) is dict:
            reason = finding["ctx"]["error"] if finding["type"] == "value_error" else finding["msg"]
            line = f"{where}: {_cut('.'.join(parts))}: found {_shown(finding['input'])}, {reason}"
        elif finding["type"] == "extra_forbidden":
            blocks = {key[:at] for key in known for at, letter in enumerate(key) if letter == "."}
            line = f"{where}: unknown key {_cut(path)}{nearest(path[:LONGEST_KEY], [*known, *sorted(blocks)])}"
        elif finding["type"] == "missing" and not inner:
            line = f"{place} is required"
        elif path in known:
            shown = "a list that is too short" if finding["type"] == "missing" else _shown(finding["input"])
            line = f"{place}: found {shown}, allowed: {known[path].allowed}"
            if finding["type"] == "value_error":
                line += f" ({finding['ctx']['error']})"
        else:
            reason = finding["ctx"]["error"] if finding["type"] == "value_error" else finding["msg"]
            line = f"{where}: {_cut(path)}: {reason}" if name else f"{where}: {reason}"
        if line not in told:
            told.append(line)
    more = [f"and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
    return "; ".join(told[:MOST_TOLD] + more)


def _of_item(whole: str, parts: list[str], block: type[Config], finding: Any) -> str:
    """What is wrong within one of a list of blocks. whole: where it stands; parts: its place in the block."""
    own, name = {key.path: key for key in keys(block)}, ".".join(parts)
    if finding["type"] == "missing":
        return f"{_cut(whole)} is required"
    if finding["type"] == "extra_forbidden":
        return f"unknown key {_cut(whole)}{nearest(name[:LONGEST_KEY], [*own])}"
    reason = finding["ctx"]["error"] if finding["type"] == "value_error" else finding["msg"]
    allowed = f"allowed: {own[name].allowed}" if name in own else reason
    return f"{_cut(whole)}: found {_shown(finding['input'])}, {allowed}"


def _findings(error: ValidationError, known: dict[str, Key]) -> list[tuple[str, list[str], Any]]:
    """(dotted key, whole place, finding) of each error.

    A value that could have been of several kinds fails as each of them; what it fails at as the kind that it is says
    most, else the first, which has the whole value.
    """
    found: list[tuple[str, list[str], Any]] = []
    unions: dict[str, int] = {}
    for finding in error.errors():
        parts = [str(part) for part in finding["loc"]]
        # a union's branch or a list's index may follow the key: keep the longest part that is a key
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in known), ".".join(parts))
        if path in known and get_origin(_optional(known[path].field.annotation)[1]) in (Union, types.UnionType):
            if path in unions:
                other = found[unions[path]]
                if finding["type"] == "value_error" and finding["input"] == other[2]["input"]:
                    found[unions[path]] = (path, parts, finding)
                continue
            unions[path] = len(found)
        found.append((path, parts, finding))
    return found


def _shown(value: Any) -> str:
    return _cut(canonical(value) if not isinstance(value, str) else repr(value), 80)


def _cut(text: str, longest: int = LONGEST_KEY) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _optional(annotation: Any) -> tuple[bool, Any]:
    """(may it be None, what it is otherwise)."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arg for arg in get_args(annotation) if arg is not type(None)]
        return len(rest) < len(get_args(annotation)), rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007
    return False, annotation


def _kinds(annotation: Any) -> list[Any]:
    """What a value may be as a whole, each without its bounds."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return _kinds(get_args(annotation)[0]) if get_origin(annotation) is Annotated else [annotation]


def _scalar(annotation: Any) -> Any:
    plain = _optional(annotation)[1]
    return get_args(plain)[0] if get_origin(plain) is Annotated else plain


def _listed_block(annotation: Any) -> type[Config] | None:
    """The block that a list holds."""
    return _block(get_args(annotation)[0]) if get_origin(annotation) is tuple else None


def _block(annotation: Any) -> type[Config] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def _describe(field: FieldInfo) -> str:
    optional, plain = _optional(field.annotation)
    if get_origin(plain) in (Union, types.UnionType):
        text = " or ".join(_describe(FieldInfo(annotation=kind)) for kind in get_args(plain))
        return f"{text} or null" if optional else text
    metadata = list(field.metadata)
    if get_origin(plain) is Annotated:
        plain, *inner = get_args(plain)
        metadata += [item for entry in inner for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
    if get_origin(plain) is Literal:
        values = [canonical(value) for value in get_args(plain)]
        text = values[0] if len(values) == 1 else "one of: " + ", ".join(values)
    elif get_origin(plain) is tuple:
        items = get_args(plain)
        count = "" if Ellipsis in items else f"{len(items)} "
        text = f"list of {count}{names.get(_scalar(items[0]), 'value')}s"
        if get_origin(items[0]) is Annotated:
            metadata += [item for entry in get_args(items[0])[1:] for item in getattr(entry, "metadata", [entry])]
    elif get_origin(plain) is dict or _block(plain):
        text = "mapping"
    elif get_origin(plain) is list:
        text = "list"
    else:
        text = names.get(plain, "value")
    signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
    bounds = [f"{sign} {getattr(item, name)}" for item in metadata for kind, (sign, name) in signs.items()
              if isinstance(item, kind)]  # fmt: skip
    bounds += [f"a multiple of {item.multiple_of}" for item in metadata if isinstance(item, MultipleOf)]
    bounds += [f"matching {item.pattern}" for item in metadata if getattr(item, "pattern", None)]
    if plain is not str:
        bounds += [f"of at least {item.min_length}" for item in metadata if getattr(item, "min_length", 0)]
    text = " ".join([text, " and ".join(bounds)]).strip()
    return f"{text} or null" if optional else text


Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
