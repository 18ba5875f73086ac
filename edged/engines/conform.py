"""Whether a text is JSON that a schema allows: for answers that nobody here kept to it while they were made.

JSON Schema 2020-12, of it the keywords that `engines.constrain` knows: a schema with others is refused there, before the
model is asked. No library: devices have none, and these few keywords are what the local engine promises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
_BOUNDS: Mapping[str, Callable[[float, float], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
SHOWN_CHARS_MAX = 60  # of a value, in a reason


def fault(text: str, schema: Mapping[str, Any]) -> str:
    """Why `text` is not JSON that `schema` allows, with its place; "": it is. `schema` is one that `constrain.grammar`
    takes."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    try:
        return _fault(value, schema, schema, "#")
    except RecursionError:
        return "it nests too deeply"


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _fault(value: Any, schema: Any, root: Mapping[str, Any], at: str) -> str:
    """`root` is where a `$ref` begins."""
    if isinstance(schema, bool):
        return "" if schema else f"{at}: nothing may stand here"
    if "$ref" in schema:
        return _fault(value, _target(schema["$ref"], root), root, at)
    if "anyOf" in schema and all(_fault(value, each, root, at) for each in schema["anyOf"]):
        return f"{at}: {_shown(value)} is none of anyOf"
    for options in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if options is not None and not any(_same(value, option) for option in options):
            return f"{at}: {_shown(value)} is none of the values allowed"
    named = schema.get("type", list(_TYPES))
    types = named if isinstance(named, list) else [named]
    if not any(_TYPES[name](value) for name in types):
        return f"{at}: {_shown(value)} is not of type {', '.join(types)}"
    if isinstance(value, dict):
        return _of_object(value, schema, root, at)
    if isinstance(value, list):
        return _of_array(value, schema, root, at)
    if isinstance(value, str):
        return _of_size(len(value), schema, "Length", at)
    if _is_number(value):
        broken = [key for key, holds in _BOUNDS.items() if key in schema and not holds(value, schema[key])]
        return f"{at}: {_shown(value)} breaks {broken[0]} {schema[broken[0]]}" if broken else ""
    return ""


def _of_object(value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], at: str) -> str:
    for name in schema.get("required", []):
        if name not in value:
            return f"{at}: {name!r} is missing"
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, each in value.items():
        if name not in properties and others is False:
            return f"{at}: {_shown(name)} is not allowed"
        if found := _fault(each, properties.get(name, others), root, f"{at}/{name[:SHOWN_CHARS_MAX]}"):
            return found
    return ""


def _of_array(value: list[Any], schema: Mapping[str, Any], root: Mapping[str, Any], at: str) -> str:
    if found := _of_size(len(value), schema, "Items", at):
        return found
    items = schema.get("items", True)
    return next(
        (found for place, each in enumerate(value) if (found := _fault(each, items, root, f"{at}/{place}"))), ""
    )


def _of_size(size: int, schema: Mapping[str, Any], what: str, at: str) -> str:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}", size)
    return "" if low <= size <= high else f"{at}: {size} are not {low} to {high} ({what.lower()})"


def _target(ref: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for part in ref[2:].split("/"):
        found = found[part.replace("~1", "/").replace("~0", "~")]  # RFC 6901, section 4
    return found


def _same(value: Any, other: Any) -> bool:
    """Equality of JSON: 1 and 1.0 are one number, true is none."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_same, value, other))
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARS_MAX else f"{text[:SHOWN_CHARS_MAX]}..."
