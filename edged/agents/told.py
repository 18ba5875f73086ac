"""What the model of an agent is told: the system prompt, and the conversation as turns. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edged.agents.memory import MemoryManager
from edged.agents.messages import Message
from edged.agents.refs import written_out
from edged.agents.registry import AgentRegistry
from edged.agents.steps import THOUGHT_CHARS_MAX
from edged.agents.tools import Tool
from edged.engines.base import ChatMessage


def turns(system: str, memory: MemoryManager, first: Message | None = None) -> list[ChatMessage]:
    """The conversation as chat templates take it: the system's turn, then user and assistant in turn, the user first.

    `first`: what the run on its way was asked. A run longer than the context leaves its beginning out; that it is shown."""
    said = [ChatMessage("system", system)] if system else []
    conversation = memory.to_llm_format()
    if first is not None and len(conversation) > len(memory.shown) and first not in memory.shown:
        conversation.insert(1, first.to_llm_dict())
    for each in conversation:
        if said and said[-1].role == each["role"]:
            said[-1] = ChatMessage(each["role"], f"{said[-1].content}\n\n{each['content']}")
        else:
            said.append(ChatMessage(each["role"], each["content"]))
    return said


def system_prompt(
    description: str, tools: Mapping[str, Tool], peers: Mapping[str, dict[str, Any] | None],
    output_schema: Mapping[str, Any] | None, *, stepwise: bool,
) -> str:  # fmt: skip
    """The description, the tools, the peers with their input schemas, and with `stepwise` what a step looks like."""
    parts = [description.strip()]
    if tools:
        parts.append("Tools:\n" + "\n".join(_described(tool.schema["function"]) for tool in tools.values()))
    if peers:
        parts.append("Agents that you can ask:\n" + "\n".join(_peer(name, peers[name]) for name in peers))
    if stepwise:
        parts.append(_how_to_step(bool(tools), bool(peers), output_schema))
    return "\n\n".join(part for part in parts if part)


def _described(function: Mapping[str, Any]) -> str:
    return f"- {function['name']}: {function['description']} Arguments: {_short(function['parameters'])}"


def _peer(name: str, schema: Mapping[str, Any] | None) -> str:
    agent = AgentRegistry.get(name)
    about = " ".join(agent.description.split())[:200] if agent else ""
    return f"- {name}: {about} Request: {_short(schema) if schema else 'a text'}"


def _short(schema: Mapping[str, Any]) -> str:
    written = written_out(schema)
    return json.dumps(written.get("properties", written), ensure_ascii=False)


def _how_to_step(tools: bool, peers: bool, output_schema: Mapping[str, Any] | None) -> str:
    forms = []
    if tools:
        forms.append('"call_tool" with {"tool_name", "arguments"}')
    if peers:
        forms.append('"invoke_agent" with {"agent_name", "request"}')
    forms.append('"final_response" with {"response"}')
    response = (
        f"\nThe response must fit {json.dumps(written_out(output_schema), ensure_ascii=False)}" if output_schema else ""
    )
    return (
        'Answer with one step as JSON: {"thought", "next_action", "action_input"}. next_action is '
        f"{' or '.join(forms)}. The thought has at most {THOUGHT_CHARS_MAX} characters.{response}"
    )
