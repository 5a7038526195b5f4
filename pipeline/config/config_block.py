"""`Config`, the base class of settings, and functions on config classes and their keys."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config.yaml_file import canonical

FLAGS = {True: ("yes", "on", "true"), False: ("no", "off", "false")}  # words that YAML parses as booleans
TYPE_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
BOUNDS = {
    Ge: (">=", "ge"),
    Gt: (">", "gt"),
    Le: ("<=", "le"),
    Lt: ("<", "lt"),
    MultipleOf: ("a multiple of", "multiple_of"),
}

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """A frozen block of settings. Unknown keys, NaN and infinity are refused; numeric text is converted to numbers."""

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
    def _undo_yaml(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value is None and block_of(annotation):
            return {}  # an empty block in YAML, such as `aux_focal:`, has its default values
        if not isinstance(value, bool):
            return value
        choices = list(_choices(annotation))
        words = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
        if word := next((word for word in words if word in FLAGS[value]), None):
            return word
        if bool not in choices and (int in choices or float in choices):
            raise ValueError("true and false are not numbers")
        return value


class Key(NamedTuple):
    """A setting of a config class: a leaf of the tree."""

    path: str  # dotted
    field: FieldInfo
    default: str  # canonical text, or "required"

    @property
    def allowed(self) -> str:
        """Type and bounds in words."""
        return _describe(self.field)


def keys(model: type[Config], prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a config class in the order of their definition."""
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        if block := block_of(field.annotation):
            yield from keys(block, path + ".")
        else:
            required = field.is_required() or field.default is PydanticUndefined
            yield Key(path, field, "required" if required else canonical(field.default))


def keys_in_unions(model: type[Config]) -> Iterator[Key]:
    """Yield the keys of blocks that a key may hold beside other values, such as `seeds.most` where seeds may be a list.

    Only the command line knows them; elsewhere the whole value is one key.
    """
    for key in keys(model):
        for choice in _choices(key.field.annotation):
            if block := block_of(choice):
                yield from keys(block, key.path + ".")


def flatten(config: Config, prefix: str = "") -> dict[str, str]:
    """Flatten a config to {dotted key: canonical text}, the form logged as MLflow params."""
    flat: dict[str, str] = {}
    for name, field in type(config).model_fields.items():
        value, path = getattr(config, name), prefix + (field.alias or name)
        flat |= flatten(value, path + ".") if isinstance(value, Config) else {path: canonical(value)}
    return flat


def to_yaml(config: Config) -> str:
    """Dump a config as YAML that loads to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def block_of(annotation: Any) -> type[Config] | None:
    """Return the annotation if it is a config class, else None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def without_none(annotation: Any) -> Any:
    """Remove None from a union."""
    if not is_union(annotation):
        return annotation
    return Union[tuple(part for part in get_args(annotation) if part is not types.NoneType)]  # noqa: UP007


def _choices(annotation: Any) -> Iterator[Any]:
    """Yield the members of nested unions, stripped of `Annotated` constraints."""
    if is_union(annotation):
        for part in get_args(annotation):
            yield from _choices(part)
    elif get_origin(annotation) is Annotated:
        yield from _choices(get_args(annotation)[0])
    else:
        yield annotation


def _describe(field: FieldInfo) -> str:
    plain = without_none(field.annotation)
    null = " or null" if plain is not field.annotation and types.NoneType in get_args(field.annotation) else ""
    if is_union(plain):
        return " or ".join(_describe(FieldInfo(annotation=part)) for part in get_args(plain)) + null
    plain, inner = _split_annotated(plain)
    metadata = [*field.metadata, *inner]
    if get_origin(plain) is Literal:
        values = [canonical(value) for value in get_args(plain)]
        text = values[0] if len(values) == 1 else "one of: " + ", ".join(values)
    elif get_origin(plain) is tuple:
        items = get_args(plain)
        item, inner = _split_annotated(items[0])
        metadata += inner
        count = "" if Ellipsis in items else f"{len(items)} "
        text = f"list of {count}{TYPE_NAMES.get(item, 'value')}s"
    elif get_origin(plain) is dict or block_of(plain):
        text = "mapping"
    elif get_origin(plain) is list:
        text = "list"
    else:
        text = TYPE_NAMES.get(plain, "value")
    bounds = [f"{sign} {getattr(item, name)}" for item in metadata for kind, (sign, name) in BOUNDS.items()
              if isinstance(item, kind)]  # fmt: skip
    bounds += [f"matching {item.pattern}" for item in metadata if getattr(item, "pattern", None)]
    if plain is not str:
        bounds += [f"of at least {item.min_length}" for item in metadata if getattr(item, "min_length", 0)]
    return " ".join([text, " and ".join(bounds)]).strip() + null


def _split_annotated(annotation: Any) -> tuple[Any, list[Any]]:
    """Split `Annotated[T, ...]` into T and its constraints; other annotations have none."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    plain, *entries = get_args(annotation)
    return plain, [part for entry in entries for part in getattr(entry, "metadata", [entry])]
