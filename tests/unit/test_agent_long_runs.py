"""A run that is longer than its model's context, and answers that agents give without a model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from edged.agents import Agent, BaseAgent, Message, RequestContext
from edged.agents.browser import BrowserAgent
from edged.agents.models import Said
from edged.engines.base import GenerateRequest, PromptTooLong
from tests.support.scripted import Scripted, call, final

CONTEXT_CHARS = 3000
STEPS = 12


class Small(Scripted):
    """A model with a small context."""

    def say(self, request: GenerateRequest, hear: Any = None) -> Said:
        if sum(len(turn.content) for turn in request.messages) > CONTEXT_CHARS:
            raise PromptTooLong("the prompt is longer than the context")
        return super().say(request, hear)


def reading(number: int) -> str:
    """What a sensor says."""
    return f"{number}: " + "0.5 " * 150


def test_a_run_longer_than_the_context_keeps_its_request_in_sight() -> None:
    model = Small(*(call("reading", number=number) for number in range(STEPS)), final("fine"))
    agent = Agent(model, "You watch sensors.", tools=[reading], agent_name="watcher")
    agent.memory.update_memory(Message("user", "of another day"))
    answer = asyncio.run(agent.auto_run("Which sensor of hall 7 drifts?", max_steps=STEPS + 1))
    assert answer.content == "fine"
    assert len(model.asked) == STEPS + 1
    for request in model.asked:
        turns = [turn.content for turn in request.messages if "hall 7" in turn.content]
        assert len(turns) == 1, request.messages
        assert [turn.role for turn in request.messages[1:]] == ["user", "assistant"] * (
            len(request.messages) // 2 - 1
        ) + ["user"]
    assert "of another day" in model.asked[0].messages[1].content
    last = model.asked[-1].messages
    assert "left out" in last[1].content and "of another day" not in last[1].content
    assert f"{STEPS - 1}: 0.5" in last[-1].content


class Teller(BaseAgent):
    """Answers what it was made with."""

    def __init__(self, says: Message, **given: Any) -> None:
        super().__init__(Scripted(), **given)
        self.says = says

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        return self.says


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (Message("assistant", {"answer": "yes"}), json.dumps({"answer": "yes"})),
        (
            Message("assistant", {"wrong": 1}),
            "Response validation failed: the answer of agent teller is wrong: it: 'answer'",
        ),
        (Message("assistant", "yes"), "Response validation failed"),
        (Message("error", "the sensor is silent"), "the sensor is silent"),
    ],
)
def test_an_answer_without_a_model_is_held_against_the_schema_too(says: Message, told: str) -> None:
    teller = Teller(says, agent_name="teller", output_schema=["answer"])
    asker = Teller(says, agent_name="asker", allowed_peers=["teller"])
    answer = asyncio.run(asker.invoke_agent("teller", "well?"))
    assert teller.name == "teller"
    assert told in answer.text
    assert (answer.role == "assistant") == (says.content == {"answer": "yes"})


def page(number: int) -> str:
    """Read a page."""
    return f"page {number}: " + "0.5 " * 400


def test_a_critic_with_a_small_context_sees_less_of_each_page() -> None:
    """The three pages alone are more than the model takes."""
    accepted = json.dumps({"accept": True, "reason": ""})
    model = Small(final("fine"), accepted)
    agent = BrowserAgent(model, critic_description="Check it.", agent_name="careful")
    for number in range(3):
        agent.memory.update_memory(Message("tool", page(number)))
    answer = asyncio.run(agent.auto_run("Which drifts?", max_steps=4))
    assert answer.content == "fine", answer.text
    told = model.asked[-1].messages[-1].content
    assert all(f"page {number}" in told for number in range(3)) and len(told) <= CONTEXT_CHARS
