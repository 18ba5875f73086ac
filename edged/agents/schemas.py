"""The schemas of requests and answers: written in three forms, kept as JSON Schema, enforced with the jsonschema package.

A list of names: required fields that are strings. A dict of name to Python type. Or a JSON Schema (2020-12).
The grammar that constrains a model knows fewer keywords (`engines.constrain`): it gets the schema without the others, and
what the model says is held against the whole schema afterwards.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin
from urllib.parse import quote

from edged.agents.refs import (
    NOWHERE,
    BadReference,
    Draft202012Validator,
    SchemaError,
    Unresolvable,
    both,
    check,
    embedded,
    written_out,
)
from edged.engines.base import Unsuitable
from edged.engines.constrain import grammar

Form = Sequence[str] | Mapping[str, Any] | None
FIELDS_MAX = 100
SHOWN_CHARS_MAX = 200  # of a value in a message

_TYPES: Mapping[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object", tuple: "array",
    type(None): "null",
}  # fmt: skip
# Words that only a JSON Schema has at its top; a dict of fields may call a field `type`, but not with a string as its type.
_SCHEMA_WORDS = frozenset({"type", "$ref", "anyOf", "allOf", "oneOf", "enum", "const", "properties", "$schema"})


class BadSchema(ValueError):
    """A schema that cannot be used; the message names the place and what is wrong."""


def compile_schema(form: Form, what: str) -> dict[str, Any] | None:
    """The JSON Schema of one of the three forms, None for None. `what` is named in errors. Raises BadSchema."""
    if form is None:
        return None
    if isinstance(form, str):
        raise BadSchema(f'{what} {form!r}: write a list, ["{form}"]')
    if isinstance(form, Mapping):
        made = dict(form) if _is_json_schema(form) else _of_fields(form, what)
    else:
        unfit = [name for name in form if not isinstance(name, str) or not name]
        if unfit:
            raise BadSchema(f"{what}: {unfit[0]!r} in the list is no name of a field")
        made = _object({name: {"type": "string"} for name in form}, list(dict.fromkeys(form)), what)
    try:
        Draft202012Validator.check_schema(made)
        compiled = typing.cast(dict[str, Any], json.loads(json.dumps(made, allow_nan=False)))
        check(compiled)
        return compiled
    except BadReference as error:
        raise BadSchema(f"{what}: {error}") from None
    except SchemaError as error:
        raise BadSchema(f"{what}{_place(error.absolute_path)}: {error.message[:SHOWN_CHARS_MAX]}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSchema(f"{what}: a schema must be JSON: {error}") from None


def faults(value: Any, schema: Mapping[str, Any] | None) -> str:
    """Why `value` is not what `schema` asks for, the first few reasons with their places; "" when it is."""
    if schema is None:
        return ""
    try:
        validator = Draft202012Validator(schema, registry=NOWHERE)
        found = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.path)))
    except RecursionError:
        return "it nests too deeply"
    except Unresolvable as error:  # of a schema that was not compiled here
        return f"it cannot be held against its schema: {error}"
    said = [f"{_place(error.absolute_path) or 'it'}: {error.message[:SHOWN_CHARS_MAX]}" for error in found[:3]]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(said) + more


def of_type(hint: Any, what: str) -> dict[str, Any]:
    """The schema of a Python type as it stands in a signature. Raises BadSchema for one that no JSON value can be."""
    if hint in (Any, None) or hint is typing.Any:
        return {"type": "null"} if hint is None else {}
    if isinstance(hint, Mapping):
        return embedded(compile_schema(hint, what) or {}, f"urn:edged:{quote(what)}")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        described = [each for each in arguments[1:] if isinstance(each, str)]
        return of_type(arguments[0], what) | ({"description": described[0]} if described else {})
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [of_type(each, what) for each in arguments]}
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return {"type": "array", "items": of_type(arguments[0], what)}
    if origin in (list, Sequence, set, frozenset) or typing.get_origin(hint) is list:
        return {"type": "array", "items": of_type(arguments[0], what)}
    if origin in (dict, Mapping):
        if arguments[0] is not str:
            raise BadSchema(f"{what}: the keys of a JSON object are strings, not {arguments[0]}")
        return {"type": "object", "additionalProperties": of_type(arguments[1], what)}
    if isinstance(hint, type) and hint in _TYPES:
        return {"type": _TYPES[hint]}
    raise BadSchema(
        f"{what}: {hint!r} is no type of a JSON value; use str, int, float, bool, list, dict or a JSON Schema"
    )


def for_grammar(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """A schema that the grammar of a model can keep to and that allows everything `schema` allows and a model would say.

    The schema itself where it can be kept to, its references written out; else without the keywords that cannot.
    `{"type": "string"}` for None.
    """
    if schema is None:
        return {"type": "string"}
    written = written_out(schema)
    for candidate in (written, _looser(written)):
        try:
            grammar(candidate)
        except Unsuitable:
            continue
        return candidate
    return opened(written)


def opened(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """The widest schema that a grammar takes instead: any object, any text, or anything."""
    kind = "string" if schema is None else schema.get("type")
    return {"type": kind} if kind in ("object", "string") else {}


def _looser(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Only the keywords that every grammar takes, all the way down."""
    while "allOf" in schema:
        parts, schema = schema["allOf"], {key: value for key, value in schema.items() if key != "allOf"}
        for part in parts:
            schema = both(part, schema)
    kept: dict[str, Any] = {}
    for key in ("type", "required", "minItems", "maxItems", "minLength", "maxLength", "enum", "const", "description"):
        if key in schema:
            kept[key] = schema[key]
    if "enum" in kept or "const" in kept:
        return {key: kept[key] for key in ("enum", "const") if key in kept}
    if isinstance(schema.get("properties"), Mapping):
        kept["properties"] = {name: _looser_or_any(each) for name, each in schema["properties"].items()}
    if "items" in schema:
        kept["items"] = _looser_or_any(schema["items"])
    for choice in ("anyOf", "oneOf"):
        if choice in schema and "type" not in kept:
            return {"anyOf": [_looser_or_any(each) for each in schema[choice]]}
    return kept


def _looser_or_any(schema: Any) -> Any:
    return _looser(schema) if isinstance(schema, Mapping) else True


def _is_json_schema(form: Mapping[str, Any]) -> bool:
    return any(key in _SCHEMA_WORDS and not isinstance(form[key], type) for key in form) and not any(
        isinstance(value, type) for value in form.values()
    )


def _of_fields(form: Mapping[str, Any], what: str) -> dict[str, Any]:
    return _object({name: of_type(hint, f"{what}, field {name!r}") for name, hint in form.items()}, list(form), what)


def _object(properties: dict[str, Any], required: list[str], what: str) -> dict[str, Any]:
    if not 0 < len(properties) <= FIELDS_MAX:
        raise BadSchema(f"{what}: {len(properties)} fields; write 1 to {FIELDS_MAX}, or None for no schema")
    return {"type": "object", "properties": properties, "required": required}


def _place(path: Sequence[Any]) -> str:
    return "".join(f"/{part}" for part in path)
