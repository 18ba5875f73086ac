"""Tools: Python functions that a model may call. The schema comes from signature and docstring; arguments are checked
before the call; time and output are limited; an exception becomes an observation, never the end of the run.

A call runs in a thread of its own (`agents.apart`), a coroutine function too: what blocks there holds up no agent.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edged.agents.apart import Apart, TooManyStuck, Wait
from edged.agents.schemas import BadSchema, compile_schema, faults, of_type
from edged.agents.shown import raised, shown

SECONDS_MAX = 30.0  # of one call, unless the agent says otherwise
OUTPUT_CHARS_MAX = 4000  # of what the model gets to see
DESCRIPTION_CHARS_MAX = 1000
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Observation:
    """What came of a call: `text` is what the model is told."""

    ok: bool
    text: str


class Tool:
    """A function with its schema. `name` as the model calls it, which need not be the function's own."""

    def __init__(
        self, name: str, function: Callable[..., Any], *, seconds_max: float = SECONDS_MAX,
        output_chars_max: int = OUTPUT_CHARS_MAX, in_callers_loop: bool = False,
    ) -> None:  # fmt: skip
        """`in_callers_loop`: for a coroutine function whose objects belong to the agent's event loop. It runs there, and
        must never block: until its next `await` it would hold up every agent.

        Raises BadSchema for a name or a signature that no model could call.
        """
        if not NAME.match(name):
            raise BadSchema(f"tool {name!r}: a name is a letter or _, then at most 63 of letters, digits, _ . -")
        if not callable(function):
            raise BadSchema(f"tool {name!r}: {function!r} cannot be called; give a function")
        self.name, self._function = name, function
        self._seconds_max, self._output_chars_max = seconds_max, output_chars_max
        self._in_callers_loop, self._apart = in_callers_loop, Apart(f"tool {name}")
        self.description, described = _documented(function)
        self.parameters = _parameters(name, function, described)

    @classmethod
    def described(
        cls, name: str, description: str, parameters: Mapping[str, Any], function: Callable[..., Any], **limits: Any
    ) -> Tool:
        """A tool whose schema is known already, as that of a tool elsewhere. `function` gets the arguments by name;
        `limits` as the constructor's. Raises BadSchema."""
        compiled = compile_schema(parameters, f"tool {name!r}")
        made = cls(name, _nothing, **limits)
        made._function, made.parameters = function, compiled or made.parameters
        made.description = " ".join(description.split())[:DESCRIPTION_CHARS_MAX]
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, for code: nothing is checked or limited, as `call` does for a model."""
        return self._function(*args, **kwargs)

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as OpenAI's protocol describes one."""
        described = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": described}

    async def call(self, arguments: Any, within_s: float | None = None) -> Observation:
        """Check the arguments, call, and say what came of it; `within_s`: what the run has left, if less than the tool may
        take. Never raises but for the caller's own cancellation."""
        if why := faults(arguments, self.parameters):
            return Observation(False, f"{self.name} was not called: its arguments are wrong: {why}")
        seconds = self._seconds_max if within_s is None else max(0.0, min(self._seconds_max, within_s))
        limit = asyncio.timeout(seconds)
        try:
            if not self._in_callers_loop:
                return await self._apart.result(lambda wait: self._called(arguments, wait), seconds)
            async with limit:
                return self._seen(await self._function(**arguments))
        except TooManyStuck as error:
            return Observation(False, f"{self.name} was not called: {error}")
        except Exception as error:
            # Of what runs apart only the end of its time comes here; a tool's own TimeoutError is a failure like others.
            if isinstance(error, TimeoutError) and (limit.expired() or not self._in_callers_loop):
                return Observation(False, f"{self.name} did not end within {seconds:g} s")
            return self._failed(error)

    def _called(self, arguments: Mapping[str, Any], wait: Wait) -> Observation:
        """The call, in its thread. What it answers or raises becomes a text here too: that is a stranger's code as well."""
        try:
            result = self._function(**arguments)
            return self._seen(wait(result) if inspect.isawaitable(result) else result)
        except BaseException as error:  # a tool may raise anything, and none of it may end the run
            return self._failed(error)

    def _seen(self, result: Any) -> Observation:
        return Observation(True, shown(result, self._output_chars_max))

    def _failed(self, error: BaseException) -> Observation:
        return Observation(False, shown(f"{self.name} failed: {raised(error)}", self._output_chars_max))


def _nothing() -> None:
    pass


def tools_of(given: Mapping[str, Callable[..., Any]] | typing.Sequence[Callable[..., Any]] | None) -> dict[str, Tool]:
    """The tools of an agent, from a mapping of names or a list of functions. Raises BadSchema."""
    if given is None:
        return {}
    named = given if isinstance(given, Mapping) else {getattr(each, "__name__", repr(each)): each for each in given}
    return {name: each if isinstance(each, Tool) else Tool(name, each) for name, each in named.items()}


def _parameters(name: str, function: Callable[..., Any], described: Mapping[str, str]) -> dict[str, Any]:
    try:
        signature, hints = inspect.signature(function), typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise BadSchema(f"tool {name!r}: its signature cannot be read: {error}") from None
    properties: dict[str, Any] = {}
    required = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise BadSchema(f"tool {name!r}: parameter {parameter} has no name to call it by; write plain parameters")
        schema = of_type(hints.get(parameter.name, typing.Any), f"tool {name!r}, parameter {parameter.name!r}")
        if parameter.name in described:
            schema = schema | {"description": described[parameter.name]}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif parameter.default is None or isinstance(parameter.default, str | int | float | bool):
            schema = schema | {"default": parameter.default}
        properties[parameter.name] = schema
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


# `name: what it is`, `name (type): what it is` below a heading Args: or Parameters:, and `:param name: what it is`.
_ARGUMENT = re.compile(r"(?::param\s+(?:[\w\[\], |.]+\s+)?(\w+):|(\w+)\s*(?:\([^)]*\))?\s*:)\s*(.+)")
_HEADING = re.compile(r"(args|arguments|parameters)\s*:?\Z", re.IGNORECASE)
_OTHER_HEADING = re.compile(
    r"(returns?|raises?|yields?|examples?|notes?)\s*:?\Z|:(returns?|raises?|rtype)\b", re.IGNORECASE
)


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """A docstring's text without its list of parameters, and what it says of each parameter."""
    text: list[str] = []
    described: dict[str, str] = {}
    inside, skip, last = False, False, ""
    for line in (inspect.getdoc(function) or "").splitlines():
        stripped = line.strip()
        if _HEADING.match(stripped):
            inside, skip = True, False
        elif _OTHER_HEADING.match(stripped):
            inside, skip = False, True
        elif (found := _ARGUMENT.match(stripped)) and (inside or found[1]):
            last = found[1] or found[2]
            described[last] = found[3].strip()
        elif inside and last and line.startswith((" ", "\t")) and stripped:
            described[last] += f" {stripped}"
        elif not stripped:
            text += [""] if text and not skip and not inside else []
        elif not inside and not skip and set(stripped) - set("-="):
            text.append(stripped)
    return " ".join(" ".join(text).split())[:DESCRIPTION_CHARS_MAX], described
