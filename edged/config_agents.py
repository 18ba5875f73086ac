"""The agents that a device runs on its own models, and those of other devices that they may ask."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from edged.config_sources import Name, Seconds, Section

# Kinds that need not be written as module:callable.
KINDS = {
    "agent": "edged.agents:Agent",
    "learnable": "edged.agents:LearnableAgent",
    "phi": "edged.agents:PhiAgent",
    "browser": "edged.agents.browser:BrowserAgent",
}
CALLABLE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$"
AGENTS_MAX, PEERS_MAX, TOOLS_MAX, CALLERS_MAX = 64, 64, 64, 256
TEXT_CHARS_MAX = 16_000
# A list of required text fields, a table of name to type ("text" is not one: see TYPES), or a JSON Schema.
Schema = list[str] | dict[str, Any] | None
TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
_SCHEMA_WORDS = ("type", "$ref", "anyOf", "allOf", "oneOf", "enum", "const", "properties", "$schema")

Imported = Annotated[str, Field(pattern=CALLABLE)]
# All words of JSON Schema 2020-12, and `definitions`, which it still knows.
_KEYWORDS = frozenset(
    {
        *_SCHEMA_WORDS, "$id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$vocabulary", "$comment", "$defs", "definitions",
        "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "prefixItems", "items", "contains",
        "minContains", "maxContains", "patternProperties", "additionalProperties", "propertyNames", "unevaluatedItems",
        "unevaluatedProperties", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength",
        "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxProperties", "minProperties", "required",
        "format", "contentEncoding", "contentMediaType", "contentSchema", "title", "description", "default", "deprecated",
        "readOnly", "writeOnly", "examples",
    }
)  # fmt: skip


def form(schema: Schema) -> Any:
    """A schema as `agents.schemas` takes it: in a table of fields the names of types become types."""
    if not isinstance(schema, dict) or any(word in schema for word in _SCHEMA_WORDS):
        return schema
    return {name: TYPES.get(kind, kind) if isinstance(kind, str) else kind for name, kind in schema.items()}


def _checked(schema: Schema) -> Schema:
    if not isinstance(schema, dict):
        return schema
    if any(word in schema for word in _SCHEMA_WORDS):
        odd = [word for word, value in schema.items() if _is_field(word, value)]
        if odd:
            meant = next(word for word in schema if word in _SCHEMA_WORDS)
            raise ValueError(
                f"{meant!r} makes it a JSON Schema, and {odd[0]!r} reads as a field; where both are fields write "
                f'{{ type = "object", properties = {{ {meant} = {{ type = "string" }}, ... }} }}'
            )
    else:
        for name, kind in schema.items():
            if isinstance(kind, str) and kind not in TYPES:
                raise ValueError(f"field {name!r} is {kind!r}; use {', '.join(TYPES)}, or a JSON Schema")
    return schema


def _is_field(word: str, value: Any) -> bool:
    """Whether a word beside those that make a table a JSON Schema says nothing in one, or has the name of a type."""
    if word in ("type", "const", "default"):
        return False
    return (word not in _KEYWORDS and not word.startswith("x-")) or (isinstance(value, str) and value in TYPES)


class Limits(Section):
    """What one run may take (`agents.base.RunLimits`)."""

    seconds_max: Seconds = 300.0
    tokens_max: Annotated[int, Field(ge=1, le=1 << 20)] = 16_384
    depth_max: Annotated[int, Field(ge=1, le=64)] = 8
    interactions_max: Annotated[int, Field(ge=1, le=1024)] = 32
    steps_max: Annotated[int, Field(ge=1, le=1000)] = 50


class Agent(Section):
    """An agent of this device. `factory`: a kind, or the callable that makes it, called with `model`,
    `agent_name`, `description` and so on (`agents.building.given`) and with everything in `options`.

    `tools`: functions as module:callable, known to the model by the callable's name. `callers`: devices whose agents may
    ask this one; none: it answers on this device only. `max_steps`: of a run that does not say how many.
    """

    slot: Name
    factory: str = "agent"
    instruction: Annotated[str, Field(max_length=TEXT_CHARS_MAX)] = ""
    tools: Annotated[list[Imported], Field(max_length=TOOLS_MAX)] = []
    input_schema: Schema = None
    output_schema: Schema = None
    allowed_peers: Annotated[list[Name], Field(max_length=PEERS_MAX)] = []
    callers: Annotated[list[Name], Field(max_length=CALLERS_MAX)] = []
    limits: Limits = Limits()
    max_steps: Annotated[int, Field(ge=1, le=1000)] = 10
    max_tokens: Annotated[int, Field(ge=1, le=65536)] = (
        512  # of one answer of its model; a Phi agent's: where it is written
    )
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    remember: bool = True  # its conversation outlives a restart
    options: dict[str, Any] = {}  # further arguments of the factory

    @field_validator("factory")
    @classmethod
    def _factory(cls, value: str) -> str:
        import re

        if value not in KINDS and not re.match(CALLABLE, value):
            raise ValueError(f"write one of {', '.join(KINDS)}, or package.module:callable")
        return value

    @field_validator("input_schema", "output_schema")
    @classmethod
    def _schema(cls, value: Schema) -> Schema:
        return _checked(value)

    @model_validator(mode="after")
    def _steps(self) -> Agent:
        if self.max_steps > self.limits.steps_max:
            raise ValueError(f"max_steps {self.max_steps} is more than limits.steps_max {self.limits.steps_max}")
        names = [each.rpartition(":")[2] for each in self.tools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tools: two of them are called {twice[0]!r}: the model could not tell them apart")
        return self

    @property
    def made_by(self) -> str:
        """The factory as module:callable."""
        return KINDS.get(self.factory, self.factory)


class Peer(Section):
    """An agent of another device, under the name that agents here ask it by. Its schemas are checked here too, so that a
    bad request never travels."""

    device: Name
    agent: Name
    description: Annotated[str, Field(max_length=TEXT_CHARS_MAX)] = ""
    input_schema: Schema = None
    output_schema: Schema = None
    deadline_s: Annotated[float, Field(gt=0, le=3600)] = 60.0

    @field_validator("input_schema", "output_schema")
    @classmethod
    def _schema(cls, value: Schema) -> Schema:
        return _checked(value)


def wrong(agents: dict[str, Agent], peers: dict[str, Peer], slots: dict[str, Any], device: str) -> str:
    """What does not fit together; "" when all does."""
    for what, table, most in (("agents", agents, AGENTS_MAX), ("peers", peers, PEERS_MAX)):
        if len(table) > most:
            return f"{what}: {len(table)} of them; at most {most}"
        odd = [name for name in table if name[0] in ".-"]
        if odd:
            return f"{what}.{odd[0]}: a name has a letter, a digit or _ in front"
    both = sorted(agents.keys() & peers.keys())
    if both:
        return f"peers.{both[0]}: agents.{both[0]} has this name too; call one of them something else"
    for name, agent in agents.items():
        if agent.slot not in slots:
            known = ", ".join(sorted(slots)) or "none"
            return f"agents.{name}.slot={agent.slot!r}: no such slot; add [slots.{agent.slot}] (known: {known})"
        unknown = sorted(set(agent.allowed_peers) - agents.keys() - peers.keys())
        if unknown:
            known = ", ".join(sorted([*agents, *peers])) or "none"
            return (
                f"agents.{name}.allowed_peers: {unknown[0]!r} is no agent here; add [agents.{unknown[0]}], or "
                f"[peers.{unknown[0]}] for one of another device (known: {known})"
            )
        if device in agent.callers:
            return f"agents.{name}.callers: {device!r} is this device: its own agents need allowed_peers, not callers"
    return ""
