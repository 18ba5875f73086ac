"""Limits of runs: they hold whatever a run waits for, for all agents of a task together, and leave nobody at work."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.agents import Agent, AgentRegistry, BaseAgent, Message, RequestContext, RunLimits
from edged.agents.browser import BrowserAgent
from edged.agents.feedback import Execution, Feedback
from edged.agents.phi import PhiAgent
from edged.engines.base import GenerateRequest
from tests.support.scripted import Scripted, ask, call, final

T = TypeVar("T")
ENDS_S_MAX = 60.0  # a test that waits so long has found a run without an end
BRIEF = RunLimits(seconds_max=0.3)


def ends(work: Coroutine[Any, Any, T]) -> T:
    """The result of what must end by itself."""
    return asyncio.run(asyncio.wait_for(work, ENDS_S_MAX))


class Kept:
    """A recorder that keeps the executions."""

    def __init__(self) -> None:
        self.executions: list[Execution] = []

    def record(self, execution: Execution) -> str:
        self.executions.append(execution)
        return f"run {len(self.executions)}"

    def feedback(self, sample_id: str, feedback: Feedback) -> None:
        raise NotImplementedError


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Lets threads go that wait for it, at the latest when the test is over."""
    event = threading.Event()
    yield event
    event.set()


class Endless(BaseAgent):
    """Never answers, and knows who waits in it."""

    def __init__(self, **given: Any) -> None:
        super().__init__(Scripted(), "e", **given)
        self.inside, self.began = 0, asyncio.Event()

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        self.inside += 1
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.inside -= 1
        raise AssertionError("unreachable")


def test_agents_that_ask_each_other_at_the_same_time_end() -> None:
    """Each has its own turn and waits for the other's."""
    both_work = threading.Barrier(2)

    def asks(other: str) -> Callable[[GenerateRequest], str]:
        def say(_request: GenerateRequest) -> str:
            both_work.wait(ENDS_S_MAX)
            return json.dumps(ask(other, "you?"))

        return say

    agents = [
        Agent(Scripted(asks(other), *[final("done")] * 3), "x", agent_name=name, allowed_peers=[other], limits=BRIEF)
        for name, other in (("mutual-a", "mutual-b"), ("mutual-b", "mutual-a"))
    ]

    async def at_once() -> list[Message]:
        return await asyncio.gather(*(agent.auto_run("go") for agent in agents))

    assert any("its time is over (0.3 s at most)" in answer.text for answer in ends(at_once()))
    assert [ends(agent.auto_run("again")).text for agent in agents] == ["done", "done"], "each has its turn back"


def test_a_tool_in_hand_does_not_outlast_the_run(released: threading.Event) -> None:
    kept = Kept()
    agent = Agent(Scripted(call("wait")), "x", tools={"wait": released.wait}, limits=BRIEF, recorder=kept)
    answer = ends(agent.auto_run("go"))
    assert answer.role == "error" and "its time is over (0.3 s at most)" in answer.text
    assert [execution.error for execution in kept.executions] == [answer.text], "it is recorded, once"
    assert len(kept.executions[0].asked) == 1, "with what its model said"


def test_a_run_that_waits_for_another_one_has_its_time_too(released: threading.Event) -> None:
    kept = Kept()
    agent = Agent(
        Scripted(call("wait"), final("first")), "x", tools={"wait": released.wait}, recorder=kept, agent_name="one-at-a-time"
    )  # fmt: skip

    async def two() -> tuple[Message, Message]:
        first = asyncio.create_task(agent.auto_run("first"))
        await asyncio.sleep(0)
        second = await agent.auto_run("second", RequestContext(deadline=time.monotonic() + 0.2))
        released.set()
        return await first, second

    first, second = ends(two())
    assert first.text == "first" and "its time is over" in second.text
    assert [(execution.goal, execution.error) for execution in kept.executions] == [
        ("second", second.text), ("first", ""),
    ]  # fmt: skip


def test_an_agent_of_ones_own_kind_has_its_time_too() -> None:
    endless = Endless(limits=BRIEF, agent_name="endless-own")
    answer = ends(endless.invoke("go", RequestContext()))
    assert answer.role == "error" and "agent endless-own stopped: its time is over (0.3 s at most)" in answer.text
    assert endless.inside == 0, "it is not left behind at its work"

    class Late(BaseAgent):
        async def handle(self, request: Any, request_context: RequestContext) -> Message:
            raise TimeoutError("the sensor did not answer")

    late, asker = Late(Scripted(), agent_name="late-own"), Agent(Scripted(), allowed_peers=["late-own"])
    answer = ends(asker.invoke_agent("late-own", "go"))
    assert answer.text == "agent late-own failed: TimeoutError: the sensor did not answer", "its own, not the run's"
    del late


def test_a_cancelled_run_lets_go_of_a_tool_and_of_another_agent(released: threading.Event) -> None:
    endless, kept = Endless(agent_name="endless-peer"), Kept()
    asker = Agent(
        Scripted(ask("endless-peer", "go"), final("next")), "x", allowed_peers=["endless-peer"], recorder=kept
    )
    began = threading.Event()

    def wait() -> None:
        began.set()
        released.wait(ENDS_S_MAX)

    caller = Agent(Scripted(call("wait"), final("next")), "x", tools={"wait": wait}, recorder=kept)

    async def cancelled(agent: Agent, begun: Coroutine[Any, Any, Any]) -> Message:
        work = asyncio.create_task(agent.auto_run("go"))
        await begun
        assert await asyncio.to_thread(agent.cancel), "on any thread"
        answer = await work
        assert not agent.cancel(), "nothing runs any more"
        return answer

    for agent, begun in ((asker, endless.began.wait()), (caller, asyncio.to_thread(began.wait, ENDS_S_MAX))):
        answer = ends(cancelled(agent, begun))
        assert answer.text == f"agent {agent.name} stopped: it was cancelled"
        assert ends(agent.auto_run("again")).text == "next"
    assert endless.inside == 0
    assert [bool(execution.error) for execution in kept.executions] == [True, False] * 2


def test_a_run_that_is_cancelled_from_outside_is_recorded_once() -> None:
    endless, kept = Endless(agent_name="endless-outside"), Kept()
    agent = Agent(Scripted(ask("endless-outside", "go")), "x", allowed_peers=["endless-outside"], recorder=kept)

    async def cancelled() -> None:
        work = asyncio.create_task(agent.auto_run("go"))
        await endless.began.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    ends(cancelled())
    assert [execution.error for execution in kept.executions] == [f"agent {agent.name} stopped: it was cancelled"]


def test_a_run_that_is_cancelled_while_it_is_recorded_is_recorded_as_it_was(released: threading.Event) -> None:
    recording = threading.Event()

    class Slow(Kept):
        def record(self, execution: Execution) -> str:
            recording.set()
            released.wait(ENDS_S_MAX)
            return super().record(execution)

    kept = Slow()
    agent = Agent(Scripted(final("done")), "x", recorder=kept)

    async def cancelled() -> None:
        work = asyncio.create_task(agent.auto_run("go"))
        await asyncio.to_thread(recording.wait, ENDS_S_MAX)
        assert not agent.cancel(), "it has its answer"
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        released.set()

    ends(cancelled())
    assert [execution.summary for execution in kept.executions] == ["done"]


def test_the_critic_of_a_browsers_agent_is_part_of_the_run() -> None:
    """One deadline, one cancel and one budget for the answers and what is said of them."""
    speaking = threading.Event()

    def endless(request: GenerateRequest) -> str:
        speaking.set()
        while not request.halt():
            time.sleep(0.005)
        return ""

    def made(*lines: Any, **given: Any) -> BrowserAgent:
        return BrowserAgent(Scripted(final("12"), *lines), critic_description="Check it.", recorder=kept, **given)

    async def cancelled(agent: BrowserAgent) -> Message:
        work = asyncio.create_task(agent.auto_run("How many?"))
        await asyncio.to_thread(speaking.wait, ENDS_S_MAX)
        assert agent.cancel()
        return await work

    kept = Kept()
    assert ends(cancelled(made(endless))).text.endswith("stopped: it was cancelled")
    assert "its time is over" in ends(made(endless, limits=BRIEF).auto_run("How many?")).text
    refused = {"accept": False, "reason": "the page says 13"}
    spent = made(refused, final("13"), limits=RunLimits(tokens_max=20))
    assert "it has used its 20 tokens" in ends(spent.auto_run("How many?")).text
    twice = made(refused, final("13"), {"accept": True, "reason": ""})
    assert ends(twice.auto_run("How many?")).text == "13"
    assert [each["status"] for each in kept.executions[-1].execution] == ["failure", "success"]
    assert kept.executions[-1].execution[0]["error"] == "not accepted: the page says 13"
    assert len(kept.executions) == 4, "each run once"


def test_an_agent_with_few_steps_can_be_asked_and_its_own_number_holds_for_whoever_asks() -> None:
    few = Agent(Scripted(final("done")), "x", agent_name="few-steps", limits=RunLimits(steps_max=3))
    asker = Agent(Scripted(), "x", allowed_peers=["few-steps", "two-steps"])
    assert ends(asker.invoke_agent("few-steps", "go")).text == "done"
    two = Agent(Scripted(*["no step"] * 5), "x", agent_name="two-steps", max_steps=2)
    assert "no final response within 2 steps" in ends(asker.invoke_agent("two-steps", "go")).text
    assert "no final response within 1 steps" in ends(two.auto_run("go", max_steps=1)).text
    for steps in (0, 51):
        with pytest.raises(ValueError, match=r"max_steps \d+: use 1 to 50 \(limits\.steps_max\)"):
            Agent(Scripted(), "x", max_steps=steps)
    del few


# What an agent of the property tests does: asks others with these requests, one after the other or all at once.
Plan = dict[str, Any]


def plans(*, hang: bool = False) -> st.SearchStrategy[Plan]:
    kinds = st.sampled_from(["in turn", "at once", *(["never"] if hang else [])])
    return st.recursive(
        st.fixed_dictionaries({"how": kinds, "ask": st.just([])}),
        lambda inner: st.fixed_dictionaries({"how": kinds, "ask": st.lists(inner, max_size=5)}),
        max_leaves=40,
    )


class Branch(BaseAgent):
    """Does what its request says. `seen` are the contexts of all calls between the agents of a test, `inside` how many of
    them are at work."""

    seen: list[RequestContext] = []
    inside = 0

    async def handle(self, request: Plan, request_context: RequestContext) -> Message:
        Branch.seen.append(request_context)
        Branch.inside += 1
        try:
            await asyncio.sleep(0)
            if request["how"] == "never":
                await asyncio.Event().wait()
            if request["how"] == "at once":
                asked = [self.invoke_agent(name, each, request_context) for name, each in self._whom(request)]
                await asyncio.gather(*asked)
            else:
                for name, each in self._whom(request):
                    await self.invoke_agent(name, each, request_context)
        finally:
            Branch.inside -= 1
        return Message("assistant", "done")

    def _whom(self, request: Plan) -> list[tuple[str, Plan]]:
        peers = sorted(self.allowed_peers)
        return [(peers[number % len(peers)], each) for number, each in enumerate(request["ask"])]


def played(plan: Plan, limits: RunLimits) -> list[RequestContext]:
    """What agents that may all ask each other make of a plan: the calls that were let through."""
    names = [f"branch-{number}" for number in range(3)]
    agents = [Branch(Scripted(), agent_name=name, allowed_peers=names, limits=limits) for name in names]
    Branch.seen = []
    try:
        ends(agents[0].invoke(plan, RequestContext()))
    finally:
        for agent in agents:
            AgentRegistry.unregister(agent.name, agent)
    assert Branch.inside == 0, "nobody is left at work"
    return Branch.seen[1:]  # the first one was asked by nobody


def calls(plan: Plan) -> int:
    return sum(1 + calls(each) for each in plan["ask"])


def depth(plan: Plan) -> int:
    return max((1 + depth(each) for each in plan["ask"]), default=0)


@settings(max_examples=150, deadline=None)
@given(plan=plans(), depth_max=st.integers(1, 5), interactions_max=st.integers(1, 20))
def test_no_task_has_more_calls_or_more_agents_that_wait_than_it_may(
    plan: Plan, depth_max: int, interactions_max: int
) -> None:
    seen = played(plan, RunLimits(depth_max=depth_max, interactions_max=interactions_max))
    assert len(seen) <= interactions_max
    assert len({context.interaction_count for context in seen}) == len(seen), "each call has its own number"
    assert all(context.depth == len(context.path) <= depth_max for context in seen)
    if calls(plan) <= interactions_max and depth(plan) <= depth_max:
        assert len(seen) == calls(plan), "what is within the limits is let through"


@settings(max_examples=25, deadline=None)
@given(plan=plans(hang=True))
def test_a_task_ends_whoever_of_its_agents_does_not(plan: Plan) -> None:
    played(plan, RunLimits(seconds_max=0.05))


@pytest.mark.parametrize(("own", "most", "asked"), [(0, 100, 100), (40, 100, 40), (400, 100, 100)])
def test_an_answer_of_the_phi_agent_has_the_tokens_of_a_run_and_no_more(own: int, most: int, asked: int) -> None:
    model = Scripted("gray")
    phi = PhiAgent(model, agent_name="phi-limited", max_tokens=own or None, limits=RunLimits(tokens_max=most))
    assert ends(phi.generate("The sky is ")).generated_response == "gray"
    assert [request.tokens_max for request in model.asked] == [asked]
