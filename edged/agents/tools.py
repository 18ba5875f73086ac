"""Tools: Python functions that a model may call. The schema comes from signature and docstring; arguments are checked
before the call; time and output are limited; an exception becomes an observation, never the end of the run."""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
import typing
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from edged.agents.schemas import BadSchema, compile_schema, faults, of_type
from edged.agents.shown import raised, shown

SECONDS_MAX = 30.0  # of one call, unless the agent says otherwise
OUTPUT_CHARS_MAX = 4000  # of what the model gets to see
ABANDONED_MAX = 4  # calls of one tool that ran out of time and still run: a thread cannot be stopped
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
        output_chars_max: int = OUTPUT_CHARS_MAX,
    ) -> None:  # fmt: skip
        """Raises BadSchema for a name or a signature that no model could call."""
        if not NAME.match(name):
            raise BadSchema(f"tool {name!r}: a name is a letter or _, then at most 63 of letters, digits, _ . -")
        if not callable(function):
            raise BadSchema(f"tool {name!r}: {function!r} cannot be called; give a function")
        self.name, self._function = name, function
        self._seconds_max, self._output_chars_max = seconds_max, output_chars_max
        self.description, described = _documented(function)
        self.parameters = _parameters(name, function, described)
        self._abandoned = 0
        self._lock = threading.Lock()

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

    async def call(self, arguments: Any) -> Observation:
        """Check the arguments, call, and say what came of it. Never raises but for the caller's own cancellation."""
        if why := faults(arguments, self.parameters):
            return Observation(False, f"{self.name} was not called: its arguments are wrong: {why}")
        limit = asyncio.timeout(self._seconds_max)
        try:
            async with limit:
                result = await self._result(arguments)
                # What it answers is a stranger's code as well, and may be large: not on the agents' loop.
                return Observation(True, await asyncio.to_thread(shown, result, self._output_chars_max))
        except _TooMany:
            return Observation(
                False, f"{self.name} was not called: {ABANDONED_MAX} earlier calls ran out of time and still run"
            )
        except Exception as error:  # a tool may raise anything, and none of it may end the run
            if limit.expired():  # a TimeoutError of the tool's own is a failure like every other
                return Observation(False, f"{self.name} did not end within {self._seconds_max:g} s")
            return Observation(False, shown(f"{self.name} failed: {raised(error)}", self._output_chars_max))

    async def _result(self, arguments: Mapping[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(**arguments)
        with self._lock:
            if self._abandoned >= ABANDONED_MAX:
                raise _TooMany
            self._abandoned += 1
        future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(future, arguments), daemon=True, name=f"tool {self.name}").start()
        result = await asyncio.wrap_future(future)
        return await result if inspect.isawaitable(result) else result

    def _run(self, future: Future[Any], arguments: Mapping[str, Any]) -> None:
        try:
            result, error = self._function(**arguments), None
        except BaseException as raised:
            result, error = None, raised
        with self._lock:
            self._abandoned -= 1
        if not future.set_running_or_notify_cancel():
            return  # nobody waits any more
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))


class _TooMany(Exception):
    pass


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
