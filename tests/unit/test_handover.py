"""The trainer's commands about samples, on a real store; the uploads alone are replaced, to hold it in the middle."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from edged.clock import SystemClock
from edged.fetch import FetchError
from edged.handover import Handover
from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import NewSample, OutboxMessage, Store
from edged.wire import messages
from edged.wire.messages import CommandState, SamplesCommand

HOST = "https://trainer.example:8443"
WAIT_S = 10.0


class HeldUploads:
    """Notes what it is asked to upload, and waits until it may go on."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def answer(self, samples: Mapping[str, Path], cancelled: Callable[[], bool]) -> None:
        """As one whom the trainer never tells that it has everything."""
        self.begun.set()
        deadline = time.monotonic() + WAIT_S
        while not cancelled():
            if self.go_on.wait(0.005) or time.monotonic() > deadline:
                raise FetchError("the trainer has asked for nothing for 60 s")
        raise FetchError("the device is stopping: ask again")

    def put(self, url: str, path: Path, sha256: str) -> None:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        self.sent.append((url, sha256))
        self.begun.set()
        assert self.go_on.wait(WAIT_S)


class Desk:
    """A handover with two labelled samples."""

    def __init__(self, folder: Path) -> None:
        self.store, self.uploads = Store(folder), HeldUploads()
        outgoing = Outgoing("plant", "dev1", Stamp(SystemClock()))
        self.sent: list[CommandState] = []
        self.answered = threading.Condition()
        self.handover = Handover(self.store, outgoing, self.uploads, lambda: HOST, self._note)  # type: ignore[arg-type]
        for name in ("s1", "s2"):
            image = name.encode()
            self.store.capture(
                NewSample(
                    id=name, pipeline="p", task="detect", model="eye", release="toy@1.0", state="escalated",
                    reason="unsure", decision="escalate", confidence=0.2, inclusion_probability=1.0,
                    sha256=hashlib.sha256(image).hexdigest(), bytes=len(image), prediction=[], item=name,
                    captured=1.0, label_by=1e12,
                ),
                image,
            )  # fmt: skip
            provenance = {"kind": "model", "who": "big", "release": "t@1.0"}
            self.store.label(name, "labelled", [], 0.9, provenance, "", 2.0)

    def _note(self, message: OutboxMessage) -> None:
        state = messages.decode(message.topic, message.payload)[2]
        assert isinstance(state, CommandState)
        with self.answered:
            self.sent.append(state)
            self.answered.notify_all()

    def answers(self, count: int) -> list[CommandState]:
        with self.answered:
            assert self.answered.wait_for(lambda: len(self.sent) >= count, WAIT_S), self.sent
            return list(self.sent)


def command(**fields: object) -> SamplesCommand:
    return SamplesCommand(id="m", ts=1.0, boot="b", seq=1, **fields)  # type: ignore[arg-type]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.uploads.go_on.set()
    desk.handover.close()


def test_a_claim_that_is_repeated_while_it_uploads_uploads_once(desk: Desk) -> None:
    claim = command(action="claim", job="j1", samples=["s1", "s2", "gone"], upload_url=f"{HOST}/samples")
    desk.handover.submit("c1", claim)
    assert desk.uploads.begun.wait(WAIT_S)
    for _ in range(5):
        desk.handover.submit("c1", claim)
    desk.uploads.go_on.set()
    (done,) = desk.answers(1)
    assert (done.state, done.detail["moved"], done.detail["unknown"]) == ("done", ["s1", "s2"], ["gone"])
    assert len(desk.uploads.sent) == 2
    assert desk.store.counts() == {"claimed": 2}
    desk.handover.submit("c1", claim)  # after it ended: the same end again
    assert desk.answers(2)[1].state == "done"


@pytest.mark.parametrize("ending", ["release", "used"])
def test_a_claim_over_mqtt_ends_when_the_trainer_gives_everything_back(desk: Desk, ending: str) -> None:
    """The trainer has all, and died before it could say so: nothing waits for a minute."""
    desk.handover.submit("c1", command(action="claim", job="j1", samples=["s1", "s2"]))
    assert desk.uploads.begun.wait(WAIT_S)
    desk.handover.submit("c2", command(action=ending, job="j1", samples=["s1"], release="toy@1.1"))
    desk.handover.submit("c3", command(action=ending, job="j1", samples=["s2"], release="toy@1.1"))
    answers = desk.answers(3)
    assert [(answer.command, answer.state) for answer in answers] == [("c1", "done"), ("c2", "done"), ("c3", "done")]
    assert desk.store.counts() == ({"labelled": 2} if ending == "release" else {"used": 2})
    assert "samples_uploaded" not in desk.store.counters()


def test_a_claim_over_mqtt_goes_on_while_somebody_wants_one_of_its_samples(desk: Desk) -> None:
    desk.handover.submit("c1", command(action="claim", job="j1", samples=["s1", "s2"]))
    assert desk.uploads.begun.wait(WAIT_S)
    desk.handover.submit("c2", command(action="release", job="j1", samples=["s1"]))
    desk.handover.submit("c3", command(action="release", job="j2", samples=["s2"]))  # another one's
    desk.uploads.go_on.set()
    first = desk.answers(3)[0]
    assert (first.command, first.state, first.reason) == ("c1", "failed", "the trainer has asked for nothing for 60 s")


def test_pixels_go_to_the_known_trainer_only(desk: Desk) -> None:
    desk.uploads.go_on.set()
    for number, url in enumerate(("https://thief.example/samples", f"{HOST}.thief.example/samples", "x"), start=1):
        desk.handover.submit(f"c{number}", command(action="claim", job="j1", samples=["s1"], upload_url=url))
        answer = desk.answers(number)[-1]
        assert answer.state == "failed"
        assert "does not belong to the trainer" in answer.reason
    assert desk.uploads.sent == []


def test_a_failed_training_gives_samples_back_and_a_good_one_uses_them_up(desk: Desk) -> None:
    desk.uploads.go_on.set()
    steps = [
        ({"action": "claim", "job": "j1", "upload_url": f"{HOST}/samples"}, {"claimed": 2}),
        ({"action": "release", "job": "j1"}, {"labelled": 2}),
        ({"action": "claim", "job": "j2", "upload_url": f"{HOST}/samples"}, {"claimed": 2}),
        ({"action": "used", "job": "j2", "release": "toy@1.1"}, {"used": 2}),
        ({"action": "archive"}, {"archived": 2}),
    ]
    for number, (fields, counts) in enumerate(steps, start=1):
        desk.handover.submit(f"c{number}", command(samples=["s1", "s2"], **fields))
        assert desk.answers(number)[-1].state == "done"
        assert desk.store.counts() == counts
