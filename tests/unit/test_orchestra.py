"""Topologies: what is refused before anybody works, who works after whom, and a trace that tells what went wrong."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.agents import Agent, Message, RequestContext
from edged.agents.base import BaseAgent
from edged.agents.orchestra import Concert, Orchestra, OrchestraLimits
from edged.core.topology import EDGES_MAX, NODES_MAX, BadTopology, ends, read_topology
from tests.support.scripted import Scripted, final


def run(task: Any, topology: dict[str, Any], **more: Any) -> Concert:
    return asyncio.run(Orchestra.run(task, topology, **more))


def speaker(name: str, answer: Any, **more: Any) -> Agent:
    return Agent(Scripted(final(answer)), f"You are {name}.", agent_name=name, **more)


def seen(agent: Agent) -> str:
    """The request that the agent's model was shown."""
    text: str = agent.model.asked[0].messages[-1].content  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ([], "the topology no mapping"),
        ({"nodes": ["A"], "agents": []}, "the topology has agents"),
        ({"nodes": []}, "has no nodes"),
        ({"edges": [["A", "B"]]}, "has no nodes"),
        ({"nodes": "A"}, "nodes of the topology is 'A'; write a list"),
        ({"nodes": ["A", 5]}, "node 5: write an agent's name"),
        ({"nodes": [{"name": "A"}]}, "node {'name': 'A'}"),
        ({"nodes": ["A -> B"]}, "a name is a text without ->"),
        ({"nodes": ["A", "A"]}, "node 'A' is there twice"),
        ({"nodes": ["A"], "edges": [["A", "B"]]}, "edge A -> B: no node 'B'; there are: A"),
        ({"nodes": ["A"], "edges": ["A"]}, "edge 'A': write"),
        ({"nodes": ["A"], "edges": [{"from": "A"}]}, "edge {'from': 'A'}: write"),
        ({"nodes": ["A"], "edges": [["A", "A"]]}, "the edges go round in a circle: A -> A"),
        ({"nodes": ["A", "B", "C"], "edges": ["A -> B", "B -> C", "C -> B"]}, "the edges go round in a circle: "),
        ({"nodes": [f"n{n}" for n in range(NODES_MAX + 1)]}, f"has 101 nodes, at most {NODES_MAX}"),
        ({"nodes": ["A", "B"], "edges": [["A", "B"]] * (EDGES_MAX + 1)}, f"at most {EDGES_MAX}"),
    ],
)
def test_a_topology_that_cannot_be_run_is_refused(topology: Any, said: str) -> None:
    with pytest.raises(BadTopology) as error:
        read_topology(topology)
    assert said in str(error.value)


def test_the_forms_of_nodes_and_edges() -> None:
    nodes = read_topology(
        {
            "nodes": ["A", {"agent": "B"}, {"name": "again", "agent": "A"}],
            "edges": [("A", "B"), "B -> again", {"from": "A", "to": "again"}, ["A", "B"]],
        }
    )
    assert [(node.name, node.agent, node.after) for node in nodes] == [
        ("A", "A", ()), ("B", "B", ("A",)), ("again", "A", ("B", "A")),
    ]  # fmt: skip


@given(
    st.integers(1, 8).flatmap(
        lambda count: st.tuples(
            st.permutations(range(count)),
            st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=15),
        )
    )
)
def test_every_order_keeps_to_the_edges_and_every_circle_is_refused(drawn: tuple[list[int], list[Any]]) -> None:
    names, edges = drawn
    topology = {"nodes": [f"n{n}" for n in names], "edges": [(f"n{a}", f"n{b}") for a, b in edges]}
    nodes, refused = None, ""
    try:
        nodes = read_topology(topology)
    except BadTopology as error:
        refused = str(error)
    if nodes is None:
        path = refused.partition("circle: ")[2].partition(";")[0].split(" -> ")
        assert path[0] == path[-1]
        assert all(pair in topology["edges"] for pair in pairwise(path)), "the circle that is there"
        return
    place = {node.name: number for number, node in enumerate(nodes)}
    assert sorted(place) == sorted(topology["nodes"])
    assert all(place[a] < place[b] for a, b in topology["edges"])
    assert set(ends(nodes)) == {name for name in place if name not in {a for a, _ in topology["edges"]}}


def test_a_sequence_hands_each_answer_on() -> None:
    """A11."""
    draft, edit = speaker("Draft", "a first draft"), speaker("Edit", "a good text")
    found = run("Write about rain.", {"nodes": ["Draft", "Edit"], "edges": [("Draft", "Edit")]})
    assert (found.ok, str(found)) == (True, "a good text")
    assert seen(draft) == "Write about rain."
    assert seen(edit) == '{"task": "Write about rain.", "results": {"Draft": "a first draft"}}'
    first, second = found.trace_text.splitlines()[1:]
    assert first.startswith("1. Draft: done in ") and first.endswith(": a first draft")
    assert second.startswith("2. Edit after Draft: done in ")


def test_fan_out_works_at_the_same_time_and_a_join_waits_for_all() -> None:
    together = threading.Barrier(2)

    def meet(answer: str) -> Any:
        def speak(_request: Any) -> str:
            together.wait(30)
            return str(final(answer)).replace("'", '"')

        return speak

    start = speaker("Start", "go")
    left = Agent(Scripted(meet("from the left")), "l", agent_name="Left")
    right = Agent(Scripted(meet("from the right")), "r", agent_name="Right")
    join = speaker("Join", {"sum": 2}, output_schema={"sum": int}, input_schema=["Left", "Right"])
    topology = {
        "nodes": ["Join", "Start", "Left", "Right"],
        "edges": ["Start -> Left", "Start -> Right", "Left -> Join", "Right -> Join"],
    }
    found = run("t", topology)
    assert found.content == {"sum": 2} and found.ok
    assert seen(join) == '{"Left": "from the left", "Right": "from the right"}'
    assert [each.node for each in found.trace] == ["Start", "Left", "Right", "Join"]
    del start, left, right


def test_several_last_nodes_answer_by_their_names() -> None:
    agents = [speaker("A", "a"), speaker("B", "b")]
    assert run("t", {"nodes": ["A", "B"]}).content == {"A": "a", "B": "b"}
    del agents


def test_an_agent_with_a_schema_gets_the_answer_before_it_as_it_is_or_says_what_is_wrong() -> None:
    ask = speaker("Ask", {"sub_question": "What?"}, output_schema=["sub_question"])
    answer = speaker("Answer", {"answer": "That."}, input_schema=["sub_question"], output_schema=["answer"])
    assert run("t", {"nodes": ["Ask", "Answer"], "edges": ["Ask -> Answer"]}).content == {"answer": "That."}
    unfit = run("t", {"nodes": ["Answer"]})
    assert (unfit.ok, unfit.content) == (False, None)
    assert "node Answer failed: Request validation failed" in str(unfit)
    del ask, answer


def test_a_failure_is_named_and_stops_only_those_who_wait_for_it() -> None:
    class Broken(BaseAgent):
        async def handle(self, request: Any, request_context: RequestContext) -> Message:
            raise RuntimeError("out of ink")

    broken = Broken(Scripted(), "b", agent_name="Broken")
    others = [speaker("After", "never"), speaker("Last", "never"), speaker("Apart", "here")]
    found = run(
        "t", {"nodes": ["Broken", "After", "Last", "Apart"], "edges": ["Broken -> After", "After -> Last"]}
    )  # fmt: skip
    assert not found.ok and found.content is None
    assert found.failures == {
        "Broken": "failed: agent Broken failed: RuntimeError: out of ink",
        "After": "left out: no answer of Broken",
        "Last": "left out: no answer of After",
    }
    assert next(each for each in found.trace if each.node == "Apart").answer == "here"
    assert others[0].model.asked == []  # type: ignore[attr-defined]
    assert "Broken: failed: agent Broken failed: RuntimeError: out of ink" in found.trace_text
    del broken


def test_agents_that_are_not_there_are_missed_before_anybody_works() -> None:
    here = speaker("Here", "x")
    with pytest.raises(BadTopology, match=r"node 'Gone': no agent 'Gone' is registered; there are: .*Here"):
        run("t", {"nodes": ["Here", "Gone"]})
    assert here.model.asked == []  # type: ignore[attr-defined]


def test_the_time_of_all_is_limited() -> None:
    class Slow(BaseAgent):
        async def handle(self, request: Any, request_context: RequestContext) -> Message:
            await asyncio.sleep(3600)
            return Message("assistant", "late")

    quick, slow, after = speaker("Quick", "x"), Slow(Scripted(), "s", agent_name="Slow"), speaker("After", "y")
    found = run(
        "t", {"nodes": ["Quick", "Slow", "After"], "edges": ["Slow -> After"]}, limits=OrchestraLimits(seconds_max=0.2)
    )
    assert {name: why.partition(":")[0] for name, why in found.failures.items()} == {
        "Slow": "stopped", "After": "stopped",
    }  # fmt: skip
    assert "the time of the task is over" in found.failures["Slow"]
    assert found.trace[0].answer == "x"
    with pytest.raises(ValueError, match="at_once_max 0"):
        OrchestraLimits(at_once_max=0)
    del quick, slow, after


def test_no_more_than_so_many_work_at_once() -> None:
    at_work, most = 0, 0

    class Counted(BaseAgent):
        async def handle(self, request: Any, request_context: RequestContext) -> Message:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.01)
            at_work -= 1
            return Message("assistant", "x")

    agents = [Counted(Scripted(), "c", agent_name=f"C{number}") for number in range(6)]
    assert run("t", {"nodes": [agent.name for agent in agents]}, limits=OrchestraLimits(at_once_max=2)).ok
    assert most == 2


def test_one_agent_in_two_places() -> None:
    agent = Agent(Scripted(final("once"), final("twice")), "x", agent_name="Worker")
    found = run("t", {"nodes": ["Worker", {"name": "again", "agent": "Worker"}], "edges": ["Worker -> again"]})
    assert found.content == "twice"
    assert "2. again (agent Worker) after Worker: done" in found.trace_text
    del agent


def test_nothing_is_left_running_when_the_caller_gives_up() -> None:
    ended = []

    class Slow(BaseAgent):
        async def handle(self, request: Any, request_context: RequestContext) -> Message:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(self.name)
            return Message("assistant", "late")

    slow = Slow(Scripted(), "s", agent_name="Slow")

    async def give_up() -> None:
        task = asyncio.create_task(Orchestra.run("t", {"nodes": ["Slow"]}))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert ended == ["Slow"]
    del slow
