"""Turns are one at a time and in order, whoever is quick to come back, and whoever stops waiting."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from edged.agents import Agent
from edged.agents.hosted import LentSlot
from edged.agents.models import LentModel
from edged.clock import SystemClock
from edged.engines.base import EngineError, Finished, GenerateRequest, Token
from edged.pace import Pace
from edged.slot import Loaded, Slot
from edged.turns import Halted, QueueFull, Turns, Unlimited, never
from edged.wire.manifest import ReleaseManifest, ReleaseRef
from tests.support.device import until
from tests.support.hosted import in_thread
from tests.support.scripted import call, final

WAIT_S = 30.0


def test_whoever_comes_back_at_once_is_behind_those_who_wait() -> None:
    turns, order = Turns(), list[str]()

    def one(name: str) -> None:
        with turns:
            order.append(name)

    threads = []
    for number in range(3):
        with turns:
            for waiting, name in enumerate("abc", 1):
                threads.append(threading.Thread(target=one, args=(f"{name}{number}",)))
                threads[-1].start()
                until("it waits", lambda expected=waiting: turns.waiting == expected)
        one(f"me{number}")
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [f"{name}{number}" for number in range(3) for name in ("a", "b", "c", "me")]


def test_who_stops_waiting_leaves_the_others_their_turns() -> None:
    turns, left = Turns(), threading.Event()
    with turns:
        gone, why = in_thread(lambda: halted(turns, lambda: "cancelled" if left.is_set() else ""))
        until("it waits", lambda: turns.waiting == 1)
        stays, had = in_thread(lambda: halted(turns, never))
        until("both wait", lambda: turns.waiting == 2)
        left.set()
        gone.join(WAIT_S)
        assert why == ["cancelled"] and turns.waiting == 1
    stays.join(WAIT_S)
    assert had == [""]
    assert halted(turns, lambda: "deadline") == "deadline", "nor begins it with a free turn"
    assert halted(Unlimited(), lambda: "deadline") == "deadline"


def test_a_turn_that_comes_to_one_who_stops_waiting_at_this_moment_goes_on_to_the_next() -> None:
    turns, free = Turns(), threading.Event()

    def hold() -> None:
        with turns:
            free.wait(WAIT_S)

    holds, _ = in_thread(hold)
    until("it is held", lambda: turns._taken)

    def halt() -> str:
        if turns.waiting:
            free.set()
            until("the turn has come", lambda: not turns.waiting)
            return "deadline"
        return ""

    assert halted(turns, halt) == "deadline"
    holds.join(WAIT_S)
    after, had = in_thread(lambda: halted(turns, never))
    after.join(WAIT_S)
    assert had == [""]


def halted(turns: Turns, halt: Any) -> str:
    try:
        with turns.turn(halt):
            return ""
    except Halted as why:
        return str(why)


def test_so_many_wait_and_no_more() -> None:
    turns = Turns(1)
    with turns:
        waits, had = in_thread(lambda: halted(turns, never))
        until("it waits", lambda: turns.waiting == 1)
        with pytest.raises(QueueFull, match="1 requests wait for this model already"):
            halted(turns, never)
    waits.join(WAIT_S)
    assert had == [""]


@pytest.mark.parametrize("seed", range(5))
def test_no_turn_is_lost_or_given_twice_however_many_stop_waiting(seed: int) -> None:
    turns, at_work, twice, done = Turns(), threading.Lock(), list[int](), list[int]()

    def worker(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        for _ in range(60):
            patience = time.monotonic() + rng.choice([0.0, 0.0005, 0.05, WAIT_S])
            with suppress(Halted), turns.turn(lambda until=patience: "late" if time.monotonic() > until else ""):
                if not at_work.acquire(blocking=False):
                    twice.append(number)
                    continue
                time.sleep(rng.choice([0.0, 0.0002]))
                at_work.release()
        with turns:
            done.append(number)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    assert sorted(done) == list(range(8)) and not twice


class Speaker:
    """A generator of an agent: calls a tool, and then answers. Says in `order` whose turn it was."""

    context = 100

    def __init__(self, order: list[str], steps: int) -> None:
        self.order, self.left = order, steps

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        self.order.append("agent")
        self.left -= 1
        yield Token(json.dumps(call("look") if self.left else final("done")), -0.1)
        yield Finished("stop", 1, 1, -0.1)

    def attach(self, adapter: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def slot_of(engine: Any) -> Slot:
    ref = ReleaseRef(release="phi@1.0", sha256="a" * 64)
    manifest = ReleaseManifest(release=ref.release, kind="llm", engine="fake", files={}, created="2026")
    slot = Slot("tongue")
    slot.flip(Loaded(ref, manifest, engine))
    return slot


def lent(slot: Slot) -> LentModel:
    return LentModel(LentSlot(slot, Pace(SystemClock()), lambda *_, **__: None, threading.Event()), "tongue")


def look() -> str:
    """Look."""
    return "nothing"


def test_an_agent_has_its_turn_beside_a_pipeline_that_is_never_idle() -> None:
    """The pipeline's worker takes the model again as soon as it has let go, as `edged.pipeline` does."""
    order: list[str] = []
    slot, answered = slot_of(Speaker(order, 5)), threading.Event()

    def pipeline() -> None:
        while not answered.is_set():
            with slot.lease() as live, live.use:
                order.append("pipeline")
                while not live.use.waiting and not answered.is_set():  # an item takes until the agent wants its turn
                    time.sleep(0.0005)

    worker = threading.Thread(target=pipeline)
    worker.start()
    until("the pipeline is at work", lambda: order)
    agent = Agent(lent(slot), "x", tools={"look": look})
    thread, said = in_thread(lambda: asyncio.run(agent.auto_run("go")).text)
    thread.join(WAIT_S)
    answered.set()
    worker.join(WAIT_S)
    assert said == ["done"]
    assert order[:10] == ["pipeline", "agent"] * 5


def test_nobody_waits_for_a_model_longer_than_his_request_has_time() -> None:
    slot = slot_of(Speaker([], 1))
    asked = threading.Event()

    def late() -> str:
        return "deadline" if asked.is_set() else ""

    slot.vacate()  # another model is to come, and nobody knows when
    waiting, said = in_thread(lambda: lent(slot).say(GenerateRequest("x", halt=late)).end.reason)
    until("it has asked", lambda: waiting.is_alive())
    asked.set()
    waiting.join(WAIT_S)
    assert said == ["deadline"]
    slot = slot_of(Speaker([], 1))
    asked.clear()
    with slot.lease() as live, live.use:  # somebody is at work for long
        waiting, said = in_thread(lambda: lent(slot).say(GenerateRequest("x", halt=late)).end.reason)
        until("it waits", lambda: live.use.waiting)
        asked.set()
        waiting.join(WAIT_S)
        assert said == ["deadline"]
    slot.stop()
    with pytest.raises(EngineError, match="the daemon is ending"):
        lent(slot).say(GenerateRequest("x"))
