"""Every setting by its key, like `limits.max_size`, with its type, its default and what it allows in words: read from
the Structs of `schema`, so that none is written twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from broker.config.schema import ApiKey, Auth, Limits, Log, Reload, Role, Server, TopicRule


class Key(NamedTuple):
    section: str
    name: str
    type: Any
    default: Any
    description: str
    allowed: str
    unit: str
    example: Any
    """For a key that has no default of its own."""
    reload: Reload
    secret: bool
    """Whether no message may show the value."""

    is_required: bool

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list)


def _read_keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for section, struct in SECTIONS.items():
        keys |= {f"{section}.{key.name}": key for key in _keys_of(section, struct, struct())}
    return keys


def _keys_of(section: str, struct: type[msgspec.Struct], defaults: msgspec.Struct | None = None) -> Iterator[Key]:
    types = get_type_hints(struct, include_extras=True)
    required = {field.name for field in msgspec.structs.fields(struct) if field.required}
    for name in struct.__struct_fields__:
        kind = inspect.type_info(types[name])
        assert isinstance(kind, inspect.Metadata)  # every field has a description
        about, extra = kind.extra_json_schema or {}, kind.extra or {}
        unit = extra["unit"]
        yield Key(
            section=section,
            name=name,
            type=types[name],
            default=getattr(defaults, name, None),
            description=about["description"],
            allowed=_allowed(kind.type, _choices(types[name])),
            unit=f" ({unit})" if unit else "",
            example=about.get("examples", [None])[0],
            reload=extra["reload"],
            secret=extra["secret"],
            is_required=name in required,
        )


def _choices(hint: Any) -> tuple[str, ...]:
    """Find the choices of a Literal within a type. msgspec sorts them; people expect the order that they are written
    in."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    inner = (_choices(part) for part in get_args(hint) if not isinstance(part, msgspec.Meta))
    return next((found for found in inner if found), ())


def _allowed(kind: inspect.Type, choices: tuple[str, ...] = ()) -> str:
    """Say in words what a type allows."""
    match kind:
        case inspect.UnionType(types=types):
            (kind,) = (one for one in types if not isinstance(one, inspect.NoneType))
            return _allowed(kind, choices)
        case inspect.Metadata(type=kind):
            return _allowed(kind, choices)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType(ge=low, le=high):
            return f"an integer from {low} to {high}"
        case inspect.FloatType(ge=low, le=high):
            return f"a number from {low} to {high}"
        case inspect.LiteralType():
            return ("one of " if len(choices) > 1 else "") + ", ".join(f'"{choice}"' for choice in choices)
        case inspect.ListType(item_type=inspect.LiteralType()):
            return "a list, not empty, of " + ", ".join(f'"{choice}"' for choice in choices)
        case inspect.ListType(min_length=low) | inspect.VarTupleType(min_length=low):
            return "a list of strings" + (", not empty" if low else "")
        case _:
            return "a string"


def convert(key: Key, value: object, is_text: bool) -> Any:
    if is_text and isinstance(value, str) and key.is_list:
        value = [part.strip() for part in value.split(",")] if value.strip() else []
    # Of what is not a value of the type msgspec says ValidationError, and of a variable that is not UTF-8
    # UnicodeEncodeError; both are ValueErrors.
    return msgspec.convert(value, key.type, strict=not is_text)


SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {"server": Server, "limits": Limits, "auth": Auth, "log": Log}
TABLES: Final[dict[str, type[msgspec.Struct]]] = {"keys": ApiKey, "roles": Role, "topics": TopicRule}
"""The tables of which there may be several, like [[topics]]."""
KEYS: Final = _read_keys()
TABLE_KEYS: Final = {
    section: {key.name: key for key in _keys_of(section, struct)} for section, struct in TABLES.items()
}
RESTART_KEYS: Final = tuple(name for name, key in KEYS.items() if key.reload == "restart")
"""The settings that a reload does not change."""
