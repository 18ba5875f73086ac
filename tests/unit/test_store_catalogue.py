"""A device's whole catalogue on request, and the trainer's moves of many samples: in pages, as there is room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged import handover
from edged.clock import SystemClock
from edged.handover import Handover
from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import OutboxMessage, Store, StoreLimits
from edged.wire import messages
from edged.wire.messages import CommandState, SampleEntry, SamplesCommand
from tests.unit.store_cases import image_of, label, message, new_sample

SAMPLES, ROWS_MAX, WAIT_S = 45, 20, 20.0


def command(**fields: object) -> SamplesCommand:
    return SamplesCommand(id="m", ts=1.0, boot="b", seq=1, **fields)  # type: ignore[arg-type]


class Desk:
    """A device with more samples than its outbox takes, and a broker that takes what is there."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder, StoreLimits(outbox_rows_max=ROWS_MAX))
        self.answers: list[CommandState] = []
        self.answered = threading.Event()
        outgoing = Outgoing("plant", "dev1", Stamp(SystemClock()))
        self.handover = Handover(self.store, outgoing, None, lambda: None, self._note)  # type: ignore[arg-type]
        for n in range(SAMPLES):
            name = f"s{n:02}"
            self.store.capture(new_sample(name, captured=float(n // 3)), image_of(name))
            label(self.store, name, boxes=[])
        self.entries: list[SampleEntry] = []
        self.deepest = 0

    def _note(self, sent: OutboxMessage) -> None:
        state = messages.decode(sent.topic, sent.payload)[2]
        assert isinstance(state, CommandState)
        self.answers.append(state)
        self.answered.set()

    def send(self) -> None:
        """What the broker takes in one go."""
        rows = self.store.due(SystemClock().now() + 1, 5)
        self.deepest = max(self.deepest, self.store.depth()[0])
        for row in rows:
            if row.message.id != "other":
                entry = messages.decode(row.message.topic, row.message.payload)[2]
                assert isinstance(entry, SampleEntry)
                self.entries.append(entry)
        self.store.acked_many([row.message.id for row in rows], 0.0, 0.0)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(handover, "ROOM_LOOK_S", 0.01)
    desk = Desk(tmp_path)
    yield desk
    desk.handover.close()


def test_a_catalogue_larger_than_the_outbox_comes_whole(desk: Desk) -> None:
    desk.store.enqueue(message("other"), 1.0)
    desk.handover.submit("c1", command(action="list"))
    while not desk.answered.wait(0.01):
        desk.send()
    while desk.store.depth()[0]:
        desk.send()
    assert desk.answers[0].detail == {"listed": SAMPLES, "of": SAMPLES}
    assert [entry.sample for entry in desk.entries] == [f"s{n:02}" for n in range(SAMPLES)]
    assert {entry.state for entry in desk.entries} == {"labelled"}
    assert desk.deepest <= ROWS_MAX


def test_a_listing_without_room_gives_up_and_says_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "ROOM_S_MAX", 0.03)
    desk.handover.submit("c1", command(action="list"))
    assert desk.answered.wait(WAIT_S)
    assert (desk.answers[0].state, "ask again" in desk.answers[0].reason) == ("failed", True)
    assert desk.store.depth()[0] == ROWS_MAX


def test_a_listing_ends_with_the_daemon(desk: Desk) -> None:
    desk.handover.submit("c1", command(action="list"))
    desk.handover.close()
    assert desk.answered.wait(WAIT_S)
    assert desk.answers[0].state == "failed"


def test_many_samples_are_moved_in_small_transactions(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "MOVE_MAX", 10)
    ids = [f"s{n:02}" for n in range(SAMPLES)]
    desk.store.claim(ids, "j1")
    for action, fields, state in (
        ("used", {"release": "d@1.1"}, "used"),
        ("archive", {}, "archived"),
        ("archive", {}, "archived"),
        ("release", {"job": "j1"}, "archived"),
    ):
        desk.answered.clear()
        desk.handover.submit("c", command(action=action, samples=[*ids, "nobody"], **fields))
        assert desk.answered.wait(WAIT_S)
        detail = desk.answers[-1].detail
        assert detail["unknown"] == ["nobody"]
        assert (len(detail["moved"]), len(detail["refused"])) == ((0, SAMPLES) if action == "release" else (SAMPLES, 0))
        assert desk.store.counts() == {state: SAMPLES}
