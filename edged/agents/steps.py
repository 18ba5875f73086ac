"""One step of an agent: a thought, and one of three actions. What a model may say is a grammar of exactly these, so that
no small model can write a step that cannot be read; what comes from elsewhere is read with the same rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edged.agents.schemas import BadSchema, for_grammar, opened
from edged.agents.shown import whole
from edged.agents.tools import Tool
from edged.engines.base import Unsuitable
from edged.engines.constrain import grammar
from edged.engines.openai_wire import unfenced

Action = Literal["call_tool", "invoke_agent", "final_response"]
ACTIONS: tuple[Action, ...] = ("call_tool", "invoke_agent", "final_response")
THOUGHT_CHARS_MAX = 200
STEP_CHARS_MAX = 64 * 1024  # of a step that a model elsewhere wrote


class BadStep(ValueError):
    """A text that is no step; the message tells the model what is wrong and what a step looks like."""


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next. `target`: the tool's or agent's name, empty for the final response; `value`: arguments, request
    or response."""

    thought: str
    action: Action
    target: str
    value: Any


def step_schema(
    tools: Mapping[str, Tool], peers: Mapping[str, dict[str, Any] | None], output_schema: dict[str, Any] | None
) -> dict[str, Any]:
    """The JSON Schema of the steps that an agent with these tools and peers can take; peers with their input schemas.

    A model's grammar takes it: where all schemas together are too much for one, arguments and requests are left open in it,
    then the response too; what the model says is held against the whole schemas anyway. Raises BadSchema where even that
    is too much: too many tools and peers.
    """
    for given, response in ((for_grammar, for_grammar), (opened, for_grammar), (opened, opened)):
        options = [
            _option("call_tool", {"tool_name": {"const": name}, "arguments": given(tool.parameters)})
            for name, tool in tools.items()
        ]
        options += [
            _option("invoke_agent", {"agent_name": {"const": name}, "request": given(schema)})
            for name, schema in peers.items()
        ]
        options.append(_option("final_response", {"response": response(output_schema)}))
        made = options[0] if len(options) == 1 else {"anyOf": options}
        try:
            grammar(made)
        except Unsuitable as error:
            why = error
        else:
            return made
    raise BadSchema(f"{len(tools)} tools and {len(peers)} peers are too much for one step of a model: {why}")


def read_step(text: str) -> Step:
    """The step that a text holds. Raises BadStep."""
    if len(text) > STEP_CHARS_MAX:
        raise BadStep(f"the step has {len(text)} characters, at most {STEP_CHARS_MAX} are read")
    try:
        said = whole(json.loads(unfenced(text)))
    except (ValueError, RecursionError) as error:
        raise BadStep(f"the step is no JSON ({error}); {_FORM}") from None
    if not isinstance(said, dict) or said.get("next_action") not in ACTIONS:
        raise BadStep(f"next_action is none of {', '.join(ACTIONS)}; {_FORM}")
    action: Action = said["next_action"]
    value, (name, content) = said.get("action_input"), _INPUT[action]
    if not isinstance(value, dict) or content not in value or (name and not isinstance(value.get(name), str)):
        needs = f"{name} and {content}" if name else content
        raise BadStep(f"action_input of {action} needs {needs}; {_FORM}")
    thought = said.get("thought", "")
    return Step(str(thought)[:THOUGHT_CHARS_MAX], action, value[name] if name else "", value[content])


def final_step(response: Any) -> str:
    """The text of the step that gives `response`, as the grammar lets a model write it. Raises TypeError and ValueError for
    what is no JSON."""
    step = {"thought": "", "next_action": "final_response", "action_input": {"response": response}}
    return json.dumps(step, ensure_ascii=False, allow_nan=False)


# What `action_input` holds: the name of the target, and what it is given.
_INPUT: Mapping[Action, tuple[str, str]] = {
    "call_tool": ("tool_name", "arguments"),
    "invoke_agent": ("agent_name", "request"),
    "final_response": ("", "response"),
}
_FORM = 'write {"thought": "...", "next_action": "...", "action_input": {...}}'


def _option(action: Action, given: dict[str, Any]) -> dict[str, Any]:
    return _closed(
        {
            "thought": {"type": "string", "maxLength": THOUGHT_CHARS_MAX},
            "next_action": {"const": action},
            "action_input": _closed(given),
        }
    )


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
