"""The documented interface of agents: their class diagram as tables. Where it differs docs/agents.md says so."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import edged.agents as ours
from edged.agents import Agent, BaseAgent, LearnableAgent, Message, ModelConfig, RequestContext
from edged.agents.browser import BrowserAgent, BrowserTool
from edged.core.lora import SettingsError
from tests.support.scripted import Scripted, final

DOCS = (Path(__file__).parents[2] / "docs" / "agents.md").read_text()


class Plain(BaseAgent):
    """The least that an agent is."""

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        return Message("assistant", request)


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def same(text: str) -> str:
    return text


BASE: dict[str, Any] = {
    "description": "You add.", "tools": {"add": add}, "agent_name": "diagram", "allowed_peers": ["other"],
}  # fmt: skip
AGENT = BASE | {
    "memory_type": "conversation_history", "max_tokens": 77, "system_message_processor": same,
    "user_message_processor": same, "assistant_message_processor": same,
}  # fmt: skip
BROWSER: dict[str, Any] = {
    "generation_description": "You look.", "critic_description": "Be strict.", "memory_type": "conversation_history",
    "max_tokens": 77, "agent_name": "diagram", "allowed_peers": ["other"],
}  # fmt: skip
LEARNS = AGENT | {"learning_config": ours.LearningConfig("peft", {"r": 16})}


@pytest.mark.parametrize(
    ("kind", "given", "attributes"),
    [
        (Plain, BASE, {}),
        (Agent, AGENT, {"memory": ours.MemoryManager}),
        (BrowserAgent, BROWSER, {"memory": ours.MemoryManager, "browser_tool": BrowserTool}),
        (LearnableAgent, LEARNS, {"memory": ours.MemoryManager, "learning_memory": ours.LearningMemory,
                                  "feedback_mechanism": type(None)}),
    ],
)  # fmt: skip
def test_an_agent_is_made_with_the_documented_arguments(
    kind: type[BaseAgent], given: dict[str, Any], attributes: dict[str, type]
) -> None:
    """A1."""
    model: Any = Scripted()
    config = {"model" if kind is LearnableAgent else "model_config": model}
    agent = kind(**config, **given)
    assert isinstance(agent, BaseAgent) and (kind is Plain or isinstance(agent, Agent))
    assert (agent.name, agent.allowed_peers, agent.model_instance) == ("diagram", {"other"}, model)
    assert isinstance(agent.logger, logging.Logger) and isinstance(agent.tools_schema, list)
    assert agent.description.endswith(given.get("description") or given["generation_description"])
    assert all(callable(tool) for tool in agent.tools.values())
    if "tools" in given:
        assert agent.tools["add"](2, b=3) == 5
        assert [tool["function"]["name"] for tool in agent.tools_schema] == ["add"]
    assert agent.max_tokens == given.get("max_tokens", agent.model_config.max_tokens)
    for name, what in attributes.items():
        assert isinstance(getattr(agent, name), what), name


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (BaseAgent.invoke_agent, ["target_agent_name", "request", "request_context"]),
        (Agent.auto_run, ["initial_request", "request_context", "max_steps"]),
        (Agent._run, ["prompt", "request_context", "run_mode"]),
        (BrowserAgent.create_safe, ["model_config"]),
        (LearnableAgent.learn_from_feedback, ["feedback"]),
        (LearnableAgent.adapt_behavior, []),
        (ours.MemoryManager.update_memory, ["message"]),
        (ours.MemoryManager.retrieve_recent, ["limit"]),
        (ours.MemoryManager.to_llm_format, []),
    ],
)
def test_methods_take_the_documented_arguments(method: Callable[..., Any], arguments: list[str]) -> None:
    names = [name for name in inspect.signature(method).parameters if name != "self"]
    assert names[: len(arguments)] == arguments


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (ModelConfig, ["type", "name", "provider", "api_key", "max_tokens", "temperature", "model_class"]),
        (Message, ["role", "content", "message_id", "tool_calls", "tool_call_id", "name"]),
        (RequestContext, ["request_id", "interaction_id", "interaction_count", "depth", "caller_agent_name"]),
    ],
)
def test_values_have_the_documented_fields(kind: Any, names: list[str]) -> None:
    have = list(kind.model_fields) if kind is ModelConfig else [field.name for field in fields(kind)]
    assert [name for name in have if name in names] == names


def test_a_memorys_history_is_a_list_that_changes_nothing() -> None:
    memory = ours.MemoryManager()
    memory.update_memory(Message("user", "hello"))
    history = memory.history
    assert type(history) is list and [message.content for message in history] == ["hello"]
    history.clear()
    assert len(memory.history) == 1


@pytest.mark.parametrize("name", ["BaseVLM", "BaseAPIModel", "FeedbackMechanism", "initial_prompt", '"auto"'])
def test_where_the_interface_differs_the_page_says_so(name: str) -> None:
    section = DOCS.partition("## The documented interface")[2].partition("\n## ")[0]
    assert f"`{name}`" in section


def test_processors_change_what_the_model_is_told_and_what_it_said() -> None:
    model = Scripted("```json\n" + json.dumps(final("5")) + "\n``` I hope this helps!", final("again"))
    agent = Agent(
        model, "You add.", agent_name="adder",
        system_message_processor=lambda text: f"{text}\nAnswer in German.",
        user_message_processor=lambda text: text.replace("secret", "***"),
        assistant_message_processor=lambda text: text.removesuffix(" I hope this helps!"),
    )  # fmt: skip
    assert asyncio.run(agent.auto_run({"q": "the secret"})).content == "5", "it was read as a step"
    system, user = model.asked[0].messages
    assert system.content.startswith("You add.") and system.content.endswith("\nAnswer in German.")
    assert user.content == '{"q": "the ***"}'
    asyncio.run(agent.auto_run("the secret again"))
    assert [turn.content for turn in model.asked[1].messages[1:]] == [
        '{"q": "the ***"}', agent.memory.history[1].content, "the *** again",
    ]  # fmt: skip
    assert "I hope" not in agent.memory.history[1].content


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (lambda text: 1 / 0, "failed: ZeroDivisionError"),
        (lambda text: None, "answered with NoneType; a text is expected"),
    ],
)
def test_a_processor_that_fails_ends_the_run_with_an_error(role: str, processor: Any, said: str) -> None:
    agent = Agent(Scripted(final("5")), "x", **{f"{role}_message_processor": processor})
    answer = asyncio.run(agent.auto_run("?"))
    assert answer.role == "error" and f"{role}_message_processor {said}" in answer.content


def test_a_learning_config_says_the_same_in_one_piece() -> None:
    agent = LearnableAgent(Scripted(), "x", learning_config=ours.LearningConfig("peft", {"r": 4, "lora_alpha": 8}))
    apart = LearnableAgent(Scripted(), "x", learning_head="peft", learning_head_config={"r": 4, "lora_alpha": 8})
    assert agent.peft_config == apart.peft_config and agent.learning_head == "peft"
    with pytest.raises(SettingsError, match="learning_config and learning_head: give one"):
        LearnableAgent(Scripted(), "x", learning_config=ours.LearningConfig(), learning_head="peft")
