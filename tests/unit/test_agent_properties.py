"""The limits of agents hold whatever a model, a tool or another agent does: properties, with the models and calls drawn."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.agents import Agent, BaseAgent, Message, RequestContext, RunLimits, Tool
from edged.agents.browser import BrowserAgent
from edged.agents.models import Said
from edged.engines.base import Finished, GenerateRequest
from edged.turns import QueueFull, Turns, never
from tests.support.device import until
from tests.support.scripted import Scripted, call, final

LINES = st.sampled_from(
    [
        json.dumps(call("add", a=1)), json.dumps(call("add", a="x")), json.dumps(call("fly")), "no step",
        json.dumps(final({"n": 1})), json.dumps(final({"n": "one"})),
        '{"accept": false, "reason": "no"}', '{"accept": true}',
    ]
)  # fmt: skip


class Drawn:
    """Says what was drawn, in as many tokens as were drawn, or as it may; each answer takes a second of `clock`."""

    def __init__(self, said: list[tuple[str, int]]) -> None:
        self._said, self.asked, self.used, self.clock = list(said), list[GenerateRequest](), 0, 0.0

    def say(self, request: GenerateRequest, hear: Any = None) -> Said:
        self.asked.append(request)
        text, tokens = self._said[(len(self.asked) - 1) % len(self._said)]
        tokens = min(tokens, request.tokens_max)
        self.used += tokens
        self.clock += 1.0
        return Said(text, Finished("stop", 1, tokens, -0.1), "drawn@1.0")


NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def agent(kind: str, model: Drawn, limits: RunLimits, max_tokens: int = 64) -> Agent:
    tools = {"add": lambda a: a}
    given: dict[str, Any] = {"tools": tools, "limits": limits, "max_tokens": max_tokens, "output_schema": NUMBER}
    return Agent(model, "x", **given) if kind == "agent" else BrowserAgent(model, "x", "Check it.", **given)


SAID = st.lists(st.tuples(LINES, st.integers(1, 100)), min_size=1, max_size=8)
KINDS = st.sampled_from(["agent", "browser with a critic"])


@settings(deadline=None)
@given(kind=KINDS, said=SAID, tokens=st.integers(1, 300), a_step=st.integers(1, 100), steps=st.integers(1, 12))
def test_no_run_has_more_steps_or_tokens_than_it_may(
    kind: str, said: list[tuple[str, int]], tokens: int, a_step: int, steps: int
) -> None:
    model = Drawn(said)
    limits = RunLimits(tokens_max=tokens, steps_max=12)
    answer = asyncio.run(agent(kind, model, limits, a_step).auto_run("go", max_steps=steps))
    assert model.used <= tokens
    assert all(1 <= request.tokens_max <= a_step for request in model.asked)
    taken = [request for request in model.asked if "Check it." not in request.messages[0].content]
    assert 1 <= len(taken) <= steps and len(model.asked) - len(taken) <= 2, "a critic looks twice at most"
    assert answer.role == "error" or answer.content == {"n": 1}


@settings(deadline=None)
@given(kind=KINDS, said=SAID, seconds=st.integers(1, 12), own=st.one_of(st.none(), st.integers(1, 12)))
def test_nothing_begins_after_the_time_of_a_run_or_of_its_task(
    kind: str, said: list[tuple[str, int]], seconds: int, own: int | None
) -> None:
    model = Drawn([(line, 1) for line, _ in said])
    clock = SimpleNamespace(monotonic=lambda: model.clock)
    context = RequestContext(deadline=None if own is None else float(own))
    with (
        patch("edged.agents.agent.time", clock),
        patch("edged.agents.models.time", clock),
        patch("edged.agents.base.time", clock),
    ):
        answer = asyncio.run(agent(kind, model, RunLimits(seconds_max=seconds)).auto_run("go", context, 20))
    assert model.clock <= min(seconds, own or seconds), "each answer takes a second, and none begins at the end"
    assert answer.role == "error" or answer.content == {"n": 1}


class Caller(BaseAgent):
    """Asks those that were drawn, one after the other."""

    seen: list[RequestContext] = []

    def __init__(self, asks: list[str], **given: Any) -> None:
        super().__init__(Scripted(), **given)
        self._asks = asks

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        self.seen.append(request_context)
        for name in self._asks if len(self.seen) < 300 else []:
            await self.invoke_agent(name, request, request_context)
        return Message("assistant", "done")


@settings(deadline=None, max_examples=50)
@given(
    asks=st.lists(st.lists(st.integers(0, 2), max_size=2), min_size=3, max_size=3), depth=st.integers(1, 6),
    calls=st.integers(1, 6),
)  # fmt: skip
def test_agents_never_wait_deeper_nor_call_more_often_than_they_may(
    asks: list[list[int]], depth: int, calls: int
) -> None:
    Caller.seen = []
    limits = RunLimits(depth_max=depth, interactions_max=calls)
    names = ["limited-0", "limited-1", "limited-2"]
    callers = [
        Caller([names[each] for each in wanted], agent_name=name, allowed_peers=names, limits=limits)
        for name, wanted in zip(names, asks, strict=True)
    ]
    answer = asyncio.run(callers[0].invoke("go", RequestContext()))
    assert answer.content == "done"
    assert max(context.depth for context in Caller.seen) <= depth
    assert max(context.interaction_count for context in Caller.seen) <= calls
    assert all(len(context.path) == context.depth for context in Caller.seen)
    if asks[0]:
        assert len(Caller.seen) > 1, "what is within the limits is called"


@settings(deadline=None)
@given(said=st.one_of(st.text(max_size=200), st.lists(st.text(max_size=20), max_size=20)), most=st.integers(1, 120))
def test_of_what_a_tool_says_so_much_is_shown_and_no_more(said: Any, most: int) -> None:
    whole = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)

    def fails() -> None:
        raise ValueError(whole)

    for tool in (Tool("says", lambda: said, output_chars_max=most), Tool("fails", fails, output_chars_max=most)):
        seen = asyncio.run(tool.call({}))
        note = f" [cut: {10**6} characters, {most} shown]"
        assert len(seen.text) <= most + len(note)
        if tool.name == "says":
            assert seen.text == whole if len(whole) <= most else seen.text.startswith(whole[:most])


@settings(deadline=None, max_examples=8)
@given(most=st.integers(1, 6))
def test_so_many_wait_for_a_model_and_no_more(most: int) -> None:
    turns, go_on, served = Turns(most), threading.Event(), list[int]()

    def wait(number: int) -> None:
        with turns.turn(never):
            served.append(number)
            go_on.wait(20)

    threads = []
    for number in range(most + 1):  # one has its turn, the others wait
        threads.append(threading.Thread(target=wait, args=(number,), daemon=True))
        threads[-1].start()
        until("it waits", lambda number=number: len(served) == 1 and turns.waiting == number)
    room = iter(["", *["there was room"] * 9])
    with pytest.raises(QueueFull, match=f"{most} requests wait"), turns.turn(lambda: next(room)):
        pass
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert served == list(range(most + 1)), "in the order in which they came"
    assert turns.waiting == 0
    with turns.turn(never):
        pass  # and then there is room again
