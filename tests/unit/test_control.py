"""The control loop against a link that is full, and verdicts that come before anybody waits for them."""

from __future__ import annotations

import hashlib
import json
import queue
from pathlib import Path
from typing import Any

import pytest

from edged.acts import UpdateEvent
from edged.clock import SystemClock
from edged.config import Settings
from edged.control import BATCH_MAX, Control
from edged.core.update import Event as Happened
from edged.link import Connected, Inbound
from edged.metrics import Window
from edged.outgoing import Outgoing
from edged.sources import Waiting
from edged.stamp import Stamp
from edged.store import NewSample, OutboxMessage, Ruling, Sample, StorageFull, Store
from edged.wire import messages, topics
from edged.wire.messages import InferReply, ResponderState, State, Text, Verdict
from tests.support.device import until

IMAGE = b"pixels"


class FullLink:
    """Takes as many messages as there is room for."""

    def __init__(self) -> None:
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.free, self.connected = 0, True
        self.sent: list[tuple[topics.Address, bytes]] = []
        self.acknowledged: list[Inbound] = []

    def room(self) -> int:
        return self.free

    def publish(self, address: topics.Address, payload: bytes, ref: Any = None, *, correlation: Any = None) -> bool:
        if not self.free:
            return False
        self.free -= 1
        self.sent.append((address, payload))
        return True

    def acknowledge(self, message: Inbound) -> None:
        self.acknowledged.append(message)

    def ensure_alive(self) -> bool:
        return True

    def of(self, kind: type[messages.Message]) -> list[Any]:
        decoded = [messages.decode(address.topic, payload)[2] for address, payload in self.sent]
        return [message for message in decoded if isinstance(message, kind)]


class Updates:
    """An updater whose slot has, or has not yet, a model."""

    loaded = True
    full = False

    def __init__(self) -> None:
        self.handled: list[str] = []

    def reports(self) -> dict[str, messages.ModelReport]:
        return {"eye": messages.ModelReport(active="toy@1.0" if self.loaded else None)}

    def known_bad(self) -> list[messages.BadReport]:
        return []

    def tick(self) -> None: ...

    def handle(self, event: UpdateEvent) -> None:
        if self.full:
            raise StorageFull("no room")
        self.handled.append(event.event)


class Bench:
    """A control loop that is turned by hand."""

    def __init__(self, folder: Path, **delivery: float) -> None:
        tables = {"slots": {"eye": {}}, "responders": {"big": {"tier": "big", "slot": "eye"}}, "delivery": delivery}
        self.settings = Settings(device={"id": "dev1", "site": "plant"}, **tables)  # type: ignore[arg-type]
        self.clock, self.link = SystemClock(), FullLink()
        self.store = Store(folder)
        self.outgoing = Outgoing("plant", "dev1", Stamp(self.clock))
        self.control = Control(
            self.settings, self.store, self.link, self.outgoing, self.clock,  # type: ignore[arg-type]
            Window(0), None, {}, {},  # type: ignore[arg-type]
        )  # fmt: skip
        self.updates = Updates()
        self.control.updater = self.updates  # type: ignore[assignment]
        self.settled: list[str] = []

    def turn(self) -> None:
        """Handle everything that has come, then hand over what fits."""
        self.control.flush(0.001)
        while not self.link.inbox.empty():
            self.control._drain(0)
        self.control._sending.pump()

    def capture(self, sample: str, task: str = "detect") -> None:
        self.store.capture(
            NewSample(
                id=sample, pipeline="ask", task=task, model="eye", release="toy@1.0", state="escalated",
                reason="unsure", decision="escalate", confidence=0.2, inclusion_probability=1.0,
                sha256=hashlib.sha256(IMAGE).hexdigest(), bytes=len(IMAGE), prediction=[], item="i",
                captured=self.clock.now(), label_by=self.clock.now() + 60,
            ),
            IMAGE,
        )  # fmt: skip

    def verdict(self, sample: str, status: str) -> None:
        message = Verdict(
            **self.outgoing.stamp(), sample=sample, status=status,  # type: ignore[arg-type]
            label=[{"label": "owl", "box": [1, 2, 3, 4]}] if status == "labelled" else [], confidence=0.9,  # type: ignore[list-item]
            provenance={"kind": "model", "who": "big1", "release": "teacher@3.0"},  # type: ignore[arg-type]
        )  # fmt: skip
        topic = topics.VERDICT(site="plant", dev="dev1").topic
        self.link.inbox.put(Inbound(topic, messages.encode(message), False, (1, 1, 1)))

    def wait(self, sample: str, seconds: float) -> None:
        reply = {"confidence": 0.2, "release": "toy@1.0", "decided_by": "dev1"}
        self.control.wait(sample, Waiting(f"r-{sample}", reply, self.clock.monotonic() + seconds, self.settled.append))

    def replies(self) -> dict[str, InferReply]:
        self.link.free = 100
        self.turn()
        return {reply.request: reply for reply in self.link.of(InferReply)}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_birth_that_found_no_room_is_announced_as_soon_as_there_is(bench: Bench) -> None:
    bench.link.inbox.put(Connected(session=True))
    bench.turn()
    assert not bench.link.sent
    for _ in range(4):
        bench.link.free = 1
        bench.turn()
    assert [state.state for state in bench.link.of(State)] == ["online"]
    assert [responder.state for responder in bench.link.of(ResponderState)] == ["online"]


def test_a_responder_is_there_as_soon_as_it_has_a_model(bench: Bench) -> None:
    bench.updates.loaded = False
    bench.link.inbox.put(Connected(session=True))
    bench.link.free = 100
    bench.turn()
    bench.control._tick()
    bench.turn()
    assert [beat.state for beat in bench.link.of(ResponderState)] == ["offline"]
    bench.updates.loaded = True
    bench.control._tick()
    bench.turn()
    assert [beat.state for beat in bench.link.of(ResponderState)] == ["offline", "online"]


def test_a_responders_heart_beats(tmp_path: Path) -> None:
    bench = Bench(tmp_path, presence_s=0.02)
    bench.link.inbox.put(Connected(session=True))
    bench.link.free = 100

    def beats() -> list[ResponderState]:
        bench.control._tick()
        bench.turn()
        found: list[ResponderState] = bench.link.of(ResponderState)
        return found if len(found) >= 4 else []

    found = until("four heartbeats", beats)
    assert {(beat.state, beat.release, beat.device, beat.every_s) for beat in found} == {
        ("online", "toy@1.0", "dev1", 0.02)
    }
    assert len({beat.id for beat in found}) == len(found)
    kept = {address.expiry_s for address, _ in bench.link.sent if address.retain and "_resp" in address.topic}
    assert kept == {1}, "the broker forgets a responder that is dead: after three beats, in whole seconds"


def test_a_verdict_that_is_faster_than_whoever_waits_answers_him_at_once(bench: Bench) -> None:
    bench.capture("s1")
    bench.verdict("s1", "labelled")
    bench.turn()
    bench.wait("s1", 3600)
    reply = bench.replies()["r-s1"]
    assert (reply.decided_by, reply.release, reply.confidence) == ("big1", "teacher@3.0", 0.9)
    assert reply.prediction is not None
    assert reply.prediction[0].label == "owl"
    assert bench.settled == [""]


@pytest.mark.parametrize("status", ["unresolved", "rejected"])
@pytest.mark.parametrize("first", ["verdict", "wait"])
def test_a_verdict_without_a_label_frees_whoever_waits_with_the_local_answer(
    bench: Bench, status: str, first: str
) -> None:
    bench.capture("s1")
    steps = [lambda: bench.verdict("s1", status), lambda: bench.wait("s1", 3600)]
    for step in steps if first == "verdict" else steps[::-1]:
        step()
    reply = bench.replies()["r-s1"]
    assert (reply.decided_by, reply.release) == ("dev1", "toy@1.0")
    assert bench.settled == [""]


def test_an_open_question_is_waited_for(bench: Bench) -> None:
    bench.capture("s1")
    bench.wait("s1", 3600)
    assert bench.replies() == {}
    assert not bench.settled


def test_a_verdict_is_acknowledged_after_it_is_committed_and_a_repeated_one_changes_nothing(bench: Bench) -> None:
    bench.capture("s1")
    for _ in range(2):
        bench.verdict("s1", "labelled")
    bench.turn()
    assert len(bench.link.acknowledged) == 2
    counters = bench.store.counters()
    assert (counters["verdicts"], counters["verdicts_repeated"]) == (1, 1)
    assert bench.store.counts() == {"labelled": 1}


def test_verdicts_that_came_together_are_one_transaction(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[int] = []
    label_many = bench.store.label_many

    def counted(rulings: list[Ruling], *more: Any) -> list[Sample | None]:
        assert not bench.link.acknowledged, "not before the commit"
        commits.append(len(rulings))
        return label_many(rulings, *more)

    monkeypatch.setattr(bench.store, "label_many", counted)
    for name in ("s1", "s2", "s3"):
        bench.capture(name)
        bench.verdict(name, "labelled")
    bench.wait("s2", 60.0)
    bench.turn()
    assert (commits, len(bench.link.acknowledged)) == ([3], 3)
    assert bench.store.counts() == {"labelled": 3}
    assert bench.replies()["r-s2"].decided_by == "big1"


def test_a_verdict_that_trips_a_bug_does_not_hold_up_those_that_came_with_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = bench.outgoing.catalogue

    def spoilt(sample: Sample) -> OutboxMessage:
        assert sample.id != "s2", "a bug"
        return catalogue(sample)

    monkeypatch.setattr(bench.outgoing, "catalogue", spoilt)
    for name in ("s1", "s2", "s3"):
        bench.capture(name)
        bench.verdict(name, "labelled")
    bench.turn()
    assert bench.store.counts() == {"labelled": 2, "escalated": 1}
    assert (len(bench.link.acknowledged), bench.store.counters()["control_faults"]) == (2, 1)
    assert "verdict on s2" in caplog.text


def test_a_label_that_is_none_of_the_samples_task_is_turned_away_and_the_question_stays(bench: Bench) -> None:
    bench.capture("s1")
    text = Verdict(
        **bench.outgoing.stamp(), sample="s1", status="labelled", label=[Text(text="an owl")], confidence=0.9,
        provenance=messages.Provenance(kind="model", who="big1", release="teacher@3.0"),
    )  # fmt: skip
    topic = topics.VERDICT(site="plant", dev="dev1").topic
    bench.link.inbox.put(Inbound(topic, messages.encode(text), False, (1, 1, 1)))
    bench.turn()
    sample = bench.store.sample("s1")
    assert sample is not None
    assert (sample.state, sample.label, len(bench.link.acknowledged)) == ("escalated", [], 1)
    assert bench.store.counters()["verdicts_unfit"] == 1
    bench.verdict("s1", "labelled")
    bench.turn()
    assert bench.store.counts() == {"labelled": 1}


def test_a_text_reaches_whoever_waits_in_the_place_of_the_local_one(bench: Bench) -> None:
    bench.capture("s1", task="generate")
    local = {"generated_response": "abd", "generation_prompt": "spell", "doubt": "unsure", "finish_reason": "stop",
             "adapter": "p-terse@1.0", "answer_tokens": 3, "release": "p@1.0", "decided_by": "dev1"}  # fmt: skip
    waits = Waiting("r-s1", local, bench.clock.monotonic() + 3600, bench.settled.append)
    bench.control.wait("s1", waits)
    bench.turn()
    text = Verdict(
        **bench.outgoing.stamp(), sample="s1", status="labelled", label=[Text(text="abc")], confidence=0.9,
        provenance=messages.Provenance(kind="model", who="big1", release="giant@3.0"),
    )  # fmt: skip
    topic = topics.VERDICT(site="plant", dev="dev1").topic
    bench.link.inbox.put(Inbound(topic, messages.encode(text), False, (1, 1, 1)))
    bench.turn()
    reply = bench.replies()["r-s1"]
    assert (reply.generated_response, reply.generation_prompt, reply.decided_by) == ("abc", "spell", "big1")
    assert (reply.release, reply.confidence) == ("giant@3.0", 0.9)
    assert (reply.doubt, reply.finish_reason, reply.adapter, reply.answer_tokens) == (None, None, None, None)
    assert bench.settled == [""]


def test_who_gives_up_waiting_gets_the_local_answer_at_the_next_tick(bench: Bench) -> None:
    bench.capture("s1", task="generate")
    given_up: list[str] = []
    waits = Waiting("r-s1", {"generated_response": "abd"}, bench.clock.monotonic() + 3600, bench.settled.append,
                    wanted=lambda: "cancelled" if given_up else "")  # fmt: skip
    bench.control.wait("s1", waits)
    bench.turn()
    bench.control._tick()
    assert bench.replies() == {}
    given_up.append("yes")
    bench.control._tick()
    assert bench.replies()["r-s1"].generated_response == "abd"
    assert bench.settled == [""]


def test_the_loop_outlives_what_it_does_not_expect(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    topic = topics.INFER(site="plant", dev="dev1", pipeline="ask").topic
    bench.link.inbox.put(
        Inbound(topic, json.dumps({**bench.outgoing.stamp(), "image": "AA=="}).encode(), False, (1, 1, 1))
    )
    bench.control._handlers[topics.INFER] = lambda *_: 1 / 0  # type: ignore[assignment,return-value]
    bench.turn()
    assert bench.store.counters()["control_faults"] == 1
    bench.capture("s1")
    bench.verdict("s1", "labelled")
    bench.turn()
    assert bench.store.counts() == {"labelled": 1}


def test_a_burst_is_handled_to_the_last_event(bench: Bench) -> None:
    count = 3 * BATCH_MAX + 1
    for number in range(count):
        bench.capture(f"s{number}")
        bench.verdict(f"s{number}", "labelled")
    bench.turn()
    assert len(bench.link.acknowledged) == count
    assert bench.store.counts() == {"labelled": count}


def test_a_verdict_that_finds_the_store_failing_is_taken_in_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageFull("disk full")

    bench.capture("s1")
    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "label_many", full)
        bench.verdict("s1", "labelled")
        bench.turn()
        assert not bench.link.acknowledged
    bench.control._tick()
    assert len(bench.link.acknowledged) == 1
    assert bench.store.counts() == {"labelled": 1}


def test_what_a_worker_did_is_not_lost_when_the_store_does_not_take_it(bench: Bench) -> None:
    bench.updates.full = True
    bench.link.inbox.put(UpdateEvent("eye", None, Happened.FLIPPED))
    bench.turn()
    bench.control._tick()
    assert bench.updates.handled == []
    bench.updates.full = False
    bench.control._tick()
    assert bench.updates.handled == ["flipped"]
    bench.control._tick()
    assert bench.updates.handled == ["flipped"], "once"
