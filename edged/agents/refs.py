"""References within a schema: where each of them leads, and the schema with what they lead to in their places.

Law of this file: nothing is ever fetched. A `$ref` leads to a place in the same schema, else the schema is refused before
anything is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from graphlib import CycleError, TopologicalSorter
from typing import Any

try:
    from jsonschema import Draft202012Validator as Draft202012Validator
    from jsonschema.exceptions import SchemaError as SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable as Unresolvable
    from referencing.jsonschema import DRAFT202012
except ImportError as error:
    why = f"agents need the package {error.name}, which is not installed; install the extra: pip install edged[agents]"
    raise ImportError(why, name=error.name) from None

NOWHERE: Any = Registry()  # knows no other schema, and does not look for one
WRITTEN_MAX = 2000  # schemas within a schema whose references are written out; beyond, anything is allowed

# Where schemas stand in a schema (JSON Schema 2020-12, core, section 10). Those that say more about the same value:
_SAME_LISTS = frozenset({"anyOf", "allOf", "oneOf"})
_SAME = frozenset({"not", "if", "then", "else"})
_SAME_MAPS = frozenset({"dependentSchemas"})
# and those that speak about a part of it, or about nothing until they are referred to.
_PARTS = frozenset(
    {"items", "contains", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties"}
)
_PART_LISTS = frozenset({"prefixItems"})
_PART_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})

_REFS = ("$ref", "$dynamicRef")
_NAMES = frozenset(
    {"$id", "$anchor", "$dynamicAnchor", "$schema", "$defs", "definitions"}
)  # without use once written out


class BadReference(ValueError):
    """A reference that leads nowhere, or round in a circle; the message names it."""


def check(schema: Mapping[str, Any]) -> None:
    """Raises BadReference, and SchemaError for a reference to what is no schema."""
    same: dict[int, list[int]] = {}  # schema -> those that say more about the same value

    def visit(node: Any, resolver: Any) -> None:
        if not isinstance(node, Mapping) or id(node) in same:
            return
        more = same[id(node)] = []
        resolver = resolver.in_subresource(DRAFT202012.create_resource(node))
        for key in _REFS:
            if key in node:
                found = _found(resolver, node[key])
                Draft202012Validator.check_schema(found.contents)
                more.append(id(found.contents))
                visit(found.contents, found.resolver)
        for key, _, inner in _inside(node):
            if key in _SAME_LISTS | _SAME | _SAME_MAPS:
                more.append(id(inner))
            visit(inner, resolver)

    visit(schema, _resolver(schema))
    try:
        TopologicalSorter(same).prepare()
    except CycleError:
        raise BadReference(
            "a $ref leads back to itself and never to a type; no value could be held against it"
        ) from None


def written_out(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without references: what they lead to stands in their places, and anything where it would stand within
    itself without end. It allows everything that `schema` allows. `schema` has passed `check`."""
    left = WRITTEN_MAX

    def out(node: Any, resolver: Any, within: frozenset[int]) -> Any:
        nonlocal left
        if not isinstance(node, Mapping):
            return node
        left -= 1
        if id(node) in within or left < 0:
            return {}
        within |= {id(node)}
        resolver = resolver.in_subresource(DRAFT202012.create_resource(node))
        made = {key: copy(value) for key, value in node.items() if key not in _NAMES and key not in _REFS}
        for key, name, inner in _inside(made):
            if name is None:
                made[key] = out(inner, resolver, within)
            else:
                made[key][name] = out(inner, resolver, within)
        for key in _REFS:
            if key in node:
                found = _found(resolver, node[key])
                made = both(out(found.contents, found.resolver, within), made)
        return made

    written = out(schema, _resolver(schema), frozenset())
    return written if isinstance(written, dict) else {}


def both(first: Any, second: Any) -> Any:
    """One schema that allows everything that two allow together. Where both say something of the same, the second counts."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return first if second is True or second == {} else second
    made = dict(first) | dict(second)
    if "properties" in first and "properties" in second:
        made["properties"] = dict(first["properties"]) | dict(second["properties"])
    if "required" in first and "required" in second:
        made["required"] = list(dict.fromkeys([*first["required"], *second["required"]]))
    return made


def embedded(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """A schema that may stand within another one: its references keep leading to its own places. `name` is unique there."""
    return {"$id": name, **schema} if "$id" not in schema and _refers(schema) else schema


def _refers(schema: Any) -> bool:
    return isinstance(schema, Mapping) and (
        any(key in schema for key in _REFS) or any(_refers(inner) for _, _, inner in _inside(schema))
    )


def _inside(node: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(keyword, index or name, schema) for each schema that stands directly in one."""
    for key, value in list(node.items()):
        if key in _SAME or key in _PARTS:
            yield key, None, value
        elif (key in _SAME_LISTS or key in _PART_LISTS) and isinstance(value, list):
            for index, inner in enumerate(value):
                yield key, index, inner
        elif (key in _SAME_MAPS or key in _PART_MAPS) and isinstance(value, dict):
            for name, inner in value.items():
                yield key, name, inner


def _resolver(schema: Mapping[str, Any]) -> Any:
    return NOWHERE.resolver_with_root(DRAFT202012.create_resource(schema))


def _found(resolver: Any, ref: Any) -> Any:
    try:
        return resolver.lookup(ref)
    except (Unresolvable, ValueError, TypeError, LookupError):
        raise BadReference(
            f"$ref {str(ref)[:80]!r} leads to nothing in this schema; write it into $defs (nothing is fetched)"
        ) from None
