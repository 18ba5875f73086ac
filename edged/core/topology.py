"""Which agent works after which: a topology of nodes and edges, checked whole before anybody works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

NODES_MAX = 100
EDGES_MAX = 1000
ARROW = "->"


class BadTopology(ValueError):
    """A topology that cannot be run; the message names the node or edge and the fix."""


@dataclass(frozen=True, slots=True)
class Node:
    """One place in a topology: which agent works there, and whose answers it waits for, in the order of the edges."""

    name: str
    agent: str
    after: tuple[str, ...] = ()


def read_topology(topology: Mapping[str, Any]) -> tuple[Node, ...]:
    """The nodes of `{"nodes": [...], "edges": [...]}`, each after all that it waits for.

    A node is an agent's name, or `{"name", "agent"}` where one agent works in several places. An edge is a pair of names,
    `"A -> B"`, or `{"from", "to"}`. Raises BadTopology, also for edges that go round in a circle.
    """
    if not isinstance(topology, Mapping) or (unknown := sorted(set(topology) - {"nodes", "edges"})):
        given = "no mapping" if not isinstance(topology, Mapping) else f"has {', '.join(unknown)}"
        raise BadTopology(f'the topology {given}; write {{"nodes": ["A", "B"], "edges": [["A", "B"]]}}')
    agents = dict(_nodes(_list(topology, "nodes", NODES_MAX)))
    if not agents:
        raise BadTopology("the topology has no nodes; name at least one agent")
    after: dict[str, list[str]] = {name: [] for name in agents}
    for first, then in map(_edge, _list(topology, "edges", EDGES_MAX)):
        for name in (first, then):
            if name not in agents:
                raise BadTopology(f"edge {first} {ARROW} {then}: no node {name!r}; there are: {', '.join(agents)}")
        if first not in after[then]:
            after[then].append(first)
    try:
        order = list(TopologicalSorter(after).static_order())
    except CycleError as error:
        circle = f" {ARROW} ".join(error.args[1])
        raise BadTopology(f"the edges go round in a circle: {circle}; take one of them out") from None
    # In the order in which they were written, as far as the edges leave it open.
    depth: dict[str, int] = {}
    for name in order:
        depth[name] = 1 + max((depth[before] for before in after[name]), default=0)
    written = list(agents)
    order.sort(key=lambda name: (depth[name], written.index(name)))
    return tuple(Node(name, agents[name], tuple(after[name])) for name in order)


def ends(nodes: Sequence[Node]) -> list[str]:
    """The nodes that nobody waits for: their answers are the answer of the whole."""
    waited_for = {name for node in nodes for name in node.after}
    return [node.name for node in nodes if node.name not in waited_for]


def _list(topology: Mapping[str, Any], key: str, limit: int) -> Sequence[Any]:
    found = topology.get(key, [])
    if isinstance(found, str | bytes) or not isinstance(found, Sequence):
        raise BadTopology(f"{key} of the topology is {found!r}; write a list")
    if len(found) > limit:
        raise BadTopology(f"the topology has {len(found)} {key}, at most {limit} are run; split the task")
    return found


def _nodes(given: Sequence[Any]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for each in given:
        if isinstance(each, str):
            name = agent = each
        elif isinstance(each, Mapping) and set(each) <= {"name", "agent"} and isinstance(each.get("agent"), str):
            agent = each["agent"]
            name = each.get("name", agent)
        else:
            raise BadTopology(f'node {each!r}: write an agent\'s name, or {{"name": "...", "agent": "..."}}')
        if not isinstance(name, str) or not name or not agent or ARROW in name:
            raise BadTopology(f"node {each!r}: a name is a text without {ARROW}, and not empty")
        if name in seen:
            raise BadTopology(f"node {name!r} is there twice; give the second one a name of its own")
        seen.add(name)
        yield name, agent


def _edge(given: Any) -> tuple[str, str]:
    found: Any = given
    if isinstance(given, str):
        found = [part.strip() for part in given.split(ARROW)]
    elif isinstance(given, Mapping):
        found = [given.get("from"), given.get("to")] if set(given) == {"from", "to"} else None
    fits = isinstance(found, Sequence) and len(found) == 2 and all(isinstance(name, str) and name for name in found)
    if not fits:
        raise BadTopology(f'edge {given!r}: write ["A", "B"], "A {ARROW} B" or {{"from": "A", "to": "B"}}')
    return found[0], found[1]
