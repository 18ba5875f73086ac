"""JSON Schema to a grammar whose every sentence is JSON that the schema allows.

Schema: JSON Schema 2020-12. Grammar: GBNF (https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md).
The grammar allows less than the schema does, so that answers end and stay small: no white space but one space after `:`
and `,`; keys in the order of `properties` and no others; what the schema leaves open is limited by the numbers below.
A keyword that cannot be kept to is an error before the model runs, never ignored. (The converter inside llama_cpp
ignores `minimum` and `required` without `properties`, writes raw line breaks into strings, and does not escape `\\`.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from edged.engines.base import Unsuitable
from edged.engines.numerals import INTEGER_MAX, RANGE_MAX, free_integer, free_number, integers, numbers

SCHEMA_BYTES_MAX = 64 * 1024
DEPTH_MAX = 32  # of the schema
PROPERTIES_MAX = 100
CHOICES_MAX = 256  # values of an enum, schemas of an anyOf
STRING_CHARS_MAX = 1000  # of a string whose schema names no maxLength; also the most that maxLength may name
ITEMS_MAX = 64  # of an array whose schema names no maxItems
REPEATS_MAX = 1000  # the most that maxItems may name; llama.cpp refuses from 2 000 on
ALL_REPEATS_MAX = 100_000  # of the whole grammar: each is a rule in llama.cpp's memory
GRAMMAR_CHARS_MAX = 1024 * 1024
ANY_DEPTH = 3  # of nested objects and arrays where the schema allows anything

_ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
        "$schema", "$id", "$comment", "$defs", "definitions",
    }
)  # fmt: skip
_KEYWORDS: dict[str, frozenset[str]] = {  # by the type they speak about; to other types they say nothing
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_WHOLE = ("$ref", "enum", "const", "anyOf")  # these say all there is to say
_KNOWN = _ANNOTATIONS.union(_WHOLE, {"type"}, *_KEYWORDS.values())


def grammar(schema: object) -> str:
    """The grammar of JSON texts that `schema` allows, its first rule `root`.

    Raises Unsuitable naming the place and the keyword of what is not a schema, cannot be kept to, or is too large.
    """
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: NaN, a circle, half a surrogate pair
        raise Unsuitable(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise Unsuitable(f"the schema is {text[:40].decode(errors='replace')}; send an object")
    if len(text) > SCHEMA_BYTES_MAX:
        raise Unsuitable(f"the schema has {len(text)} bytes, at most {SCHEMA_BYTES_MAX} are allowed")
    made = _Converter(json.loads(text)).grammar()
    if len(made) > GRAMMAR_CHARS_MAX:
        raise Unsuitable(f"the schema's grammar has {len(made)} characters, at most {GRAMMAR_CHARS_MAX} are allowed")
    return made


class _Converter:
    """One schema on its way to a grammar. Methods answer with the name of the rule they made."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._names: dict[str, str] = {}  # of rules, by what they say
        self._refs: dict[str, str] = {}
        self._open: set[str] = set()  # refs that are being converted
        self._repeats = 0
        self._nothing = self._rule('""')  # llama.cpp reads on into the next line behind a `|` that nothing follows
        self._gap = self._rule('" "?')
        self._char = self._terminal(r'[^"\\\x00-\x1F] | "\\" ["\\/bfnrt]')
        self._of_type: dict[str, Callable[[dict[str, Any], str, int], str]] = {
            "object": self._object, "array": self._array, "string": self._string, "integer": self._integer,
            "number": self._number, "boolean": lambda *_: self._rule('"true" | "false"'),
            "null": lambda *_: self._rule('"null"'),
        }  # fmt: skip

    def grammar(self) -> str:
        root = self._value(self._schema, "#", 0)
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {body}" for body, name in self._names.items()), ""])

    def _rule(self, body: str) -> str:
        return self._names.setdefault(body, f"r{len(self._names)}")

    def _terminal(self, body: str) -> str:
        """A rule of characters and other terminals alone; `token_mask` reads it at once, not letter by letter."""
        return self._names.setdefault(body, f"t{len(self._names)}")

    def _repeat(self, rule: str, low: int, high: int, at: str) -> str:
        if high == 0:
            return self._nothing
        body = f"{rule}{{{low},{high}}}"
        self._repeats += high if body not in self._names else 0
        if self._repeats > ALL_REPEATS_MAX:
            _refuse(at, f"the schema allows more than {ALL_REPEATS_MAX} characters and items in all; set lower maxima")
        return self._terminal(body) if rule == self._char else self._rule(body)

    def _value(self, schema: object, at: str, depth: int) -> str:
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            _refuse(at, f"{json.dumps(schema)[:40]} is no schema that an answer could follow; write an object")
        if depth > DEPTH_MAX:
            _refuse(at, f"deeper than {DEPTH_MAX} schemas")
        for key in schema:
            if key not in _KNOWN:
                _refuse(at, f"keyword {key!r} is not supported; supported: {', '.join(sorted(_KNOWN - _ANNOTATIONS))}")
        for key in _WHOLE:
            if key in schema:
                return self._whole(key, schema, at, depth)
        types = self._types(schema, at)
        if not types:
            return self._anything(ANY_DEPTH)
        return self._rule(" | ".join(self._of_type[name](schema, at, depth) for name in types))

    def _types(self, schema: dict[str, Any], at: str) -> list[str]:
        """The types that are allowed; none when anything is."""
        named = schema.get("type")
        if named is None:  # keywords without a type: of the kinds they allow, the one they speak about
            return [name for name, keys in _KEYWORDS.items() if keys & schema.keys()][:1]
        types = named if isinstance(named, list) else [named]
        for name in types:
            if not isinstance(name, str) or name not in _KEYWORDS:
                _refuse(at, f"type {json.dumps(name)} is unknown; known: {', '.join(_KEYWORDS)}")
        if not types:
            _refuse(at, "type [] allows nothing")
        return types

    def _whole(self, key: str, schema: dict[str, Any], at: str, depth: int) -> str:
        beside = schema.keys() - _ANNOTATIONS - {key} - ({"type"} if key in ("enum", "const") else set())
        if beside:
            _refuse(at, f"keyword {min(beside)!r} beside {key!r} is not supported; leave it out")
        if key == "$ref":
            return self._ref(schema[key], at, depth)
        options = [schema[key]] if key == "const" else schema[key]
        if not isinstance(options, list) or not 0 < len(options) <= CHOICES_MAX:
            _refuse(at, f"{key} must be a list of 1 to {CHOICES_MAX} entries")
        if key == "anyOf":
            names = [self._value(option, f"{at}/anyOf/{number}", depth + 1) for number, option in enumerate(options)]
            return self._rule(" | ".join(dict.fromkeys(names)))
        types = self._types(schema, at)
        fitting = [option for option in options if not types or _is_of(option, types)]
        if not fitting:
            _refuse(at, f"no value of {key} is of type {', '.join(types)}")
        return self._rule(" | ".join(dict.fromkeys(_literal(option) for option in fitting)))

    def _ref(self, ref: object, at: str, depth: int) -> str:
        if not isinstance(ref, str) or not ref.startswith("#/"):
            _refuse(at, f"$ref {json.dumps(ref)[:80]}: only places within the schema (#/$defs/...) are supported")
        if ref in self._open:
            _refuse(at, f"$ref {ref!r} is recursive, its values could nest without end; write the levels out")
        if ref not in self._refs:
            target: Any = self._schema
            for part in ref[2:].split("/"):
                step = part.replace("~1", "/").replace("~0", "~")  # RFC 6901, section 4
                if not isinstance(target, dict) or step not in target:
                    _refuse(at, f"$ref {ref!r} points to nothing")
                target = target[step]
            self._open.add(ref)
            self._refs[ref] = self._value(target, ref, depth + 1)
            self._open.remove(ref)
        return self._refs[ref]

    def _object(self, schema: dict[str, Any], at: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            _refuse(at, "properties must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            _refuse(at, "required must be a list of names")
        others = schema.get("additionalProperties", True)
        unnamed = [name for name in dict.fromkeys(required) if name not in properties]
        if unnamed and others is False:
            _refuse(at, f"{unnamed[0]!r} is required, and additionalProperties forbids it; add it to properties")
        schemas = {name: (value, f"{at}/properties/{name}") for name, value in properties.items()}
        schemas |= dict.fromkeys(unnamed, (others, f"{at}/additionalProperties"))
        if len(schemas) > PROPERTIES_MAX:
            _refuse(at, f"{len(schemas)} properties, at most {PROPERTIES_MAX} are allowed")
        if not schemas:
            if others is False:
                return self._rule('"{}"')
            return self._map(self._value(others, f"{at}/additionalProperties", depth + 1), at)
        pairs = [
            (self._rule(f'{_literal(name)} ":" {self._gap} {self._value(*place, depth + 1)}'), name in required)
            for name, place in schemas.items()
        ]
        return self._keys(pairs)

    def _keys(self, pairs: list[tuple[str, bool]]) -> str:
        """An object of these (rule, required) in this order. What may follow depends on whether anything went before."""
        first = later = self._nothing
        for pair, required in reversed(pairs):
            after = self._rule(f'"," {self._gap} {pair} {later}')
            begin = f"{pair} {later}"
            if not required:
                begin, after = f"{begin} | {first}", self._rule(f"{after} | {later}")
            first, later = self._rule(begin), after
        return self._rule(f'"{{" {first} "}}"')

    def _map(self, value: str, at: str) -> str:
        pair = self._rule(f'{self._text(0, STRING_CHARS_MAX, at)} ":" {self._gap} {value}')
        return self._rule(f'"{{" {self._series(pair, 0, ITEMS_MAX, at)} "}}"')

    def _series(self, item: str, low: int, high: int, at: str) -> str:
        """`low` to `high` times `item`, with commas."""
        if high == 0:
            return self._nothing
        more = self._repeat(self._rule(f'"," {self._gap} {item}'), max(0, low - 1), high - 1, at)
        series = self._rule(f"{item} {more}")
        return series if low > 0 else self._rule(f"{series}?")

    def _array(self, schema: dict[str, Any], at: str, depth: int) -> str:
        low, high = self._bounds(schema, "Items", ITEMS_MAX, REPEATS_MAX, at)
        items = schema.get("items", True)
        if items is False and low == 0:
            return self._rule('"[]"')
        return self._list(self._value(items, f"{at}/items", depth + 1), low, high, at)

    def _list(self, item: str, low: int, high: int, at: str) -> str:
        return self._rule(f'"[" {self._series(item, low, high, at)} "]"')

    def _string(self, schema: dict[str, Any], at: str, _depth: int) -> str:
        return self._text(*self._bounds(schema, "Length", STRING_CHARS_MAX, STRING_CHARS_MAX, at), at)

    def _text(self, low: int, high: int, at: str) -> str:
        if high == 0:
            return self._terminal(r'"\"\""')
        return self._terminal(f'"\\"" {self._repeat(self._char, low, high, at)} "\\""')

    def _bounds(self, schema: dict[str, Any], what: str, usual: int, most: int, at: str) -> tuple[int, int]:
        """min and max of `what`; the maximum is `usual` where it is not named."""
        low = _count(schema.get(f"min{what}", 0), f"min{what}", most, at)
        high = _count(schema.get(f"max{what}", max(low, usual)), f"max{what}", most, at)
        if low > high:
            _refuse(at, f"min{what} {low} is more than max{what} {high}")
        return low, high

    def _integer(self, schema: dict[str, Any], at: str, _depth: int) -> str:
        if not _KEYWORDS["integer"] & schema.keys():
            return self._terminal(free_integer())
        low, high, low_open, high_open = _limits(schema, INTEGER_MAX, at)
        low_whole = math.floor(low) + 1 if low_open else math.ceil(low)
        high_whole = math.ceil(high) - 1 if high_open else math.floor(high)
        if low_whole > high_whole:
            _refuse(at, "no whole number lies within its minimum and maximum")
        return self._terminal(integers(low_whole, high_whole))

    def _number(self, schema: dict[str, Any], at: str, _depth: int) -> str:
        if not _KEYWORDS["number"] & schema.keys():
            return self._terminal(free_number())
        low, high, low_open, high_open = _limits(schema, RANGE_MAX, at)
        if low != int(low) or high != int(high):
            _refuse(at, f"bounds {low:g} and {high:g} of a number: only whole numbers are supported as bounds")
        if low > high or (low == high and (low_open or high_open)):
            _refuse(at, "no number lies within its minimum and maximum")
        return self._terminal(numbers(int(low), int(high), low_open, high_open))

    def _anything(self, depth: int) -> str:
        scalar = " | ".join(
            [self._text(0, STRING_CHARS_MAX, "#"), self._terminal(free_number()), '"true"', '"false"', '"null"']
        )
        if depth == 0:
            return self._rule(scalar)
        inner = self._anything(depth - 1)
        return self._rule(f"{scalar} | {self._map(inner, '#')} | {self._list(inner, 0, ITEMS_MAX, '#')}")


def _refuse(at: str, text: str) -> NoReturn:
    raise Unsuitable(f"schema at {at}: {text}")


def _literal(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_of(value: object, types: list[str]) -> bool:
    """Whether a JSON value is of one of the schema types; 1.0 is an integer, true is not."""
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int() | float():
            return "number" in types or ("integer" in types and value == int(value))
        case str():
            return "string" in types
        case list():
            return "array" in types
    return "object" in types


def _count(value: object, key: str, most: int, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not 0 <= value <= most:
        _refuse(at, f"{key} {json.dumps(value)[:40]}: use a whole number from 0 to {most}")
    return int(value)


def _limits(schema: dict[str, Any], most: int, at: str) -> tuple[float, float, bool, bool]:
    """(low, high, whether low itself is excluded, whether high is); where there is no bound, as far as `most`."""
    for key in sorted(_KEYWORDS["number"] & schema.keys()):
        value = schema[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > most:
            _refuse(at, f"{key} {json.dumps(value)[:40]}: use a number from -{most} to {most}")
    low, low_above = schema.get("minimum", -most), schema.get("exclusiveMinimum", -math.inf)
    high, high_below = schema.get("maximum", most), schema.get("exclusiveMaximum", math.inf)
    return max(low, low_above), min(high, high_below), low_above >= low, high_below <= high
