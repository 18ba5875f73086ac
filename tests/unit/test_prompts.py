"""Language requests in a pipeline's hands: pieces on a link that is slow or full, the daemon's end, what is recorded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from edged.beats import Beats
from edged.core.policy import Policy
from edged.engines.base import ChatMessage, Finished, GenerateRequest, Token
from edged.link import TooLarge
from edged.metrics import Window
from edged.outgoing import Outgoing
from edged.pace import Pace
from edged.pipeline import Services
from edged.prompts import PARTIAL_S, REFUSED_CHARS_MAX, Prompts
from edged.slot import Loaded, Slot, SlotStopped
from edged.sources import Item
from edged.stamp import Stamp
from edged.store import OutboxMessage, StorageFull, Store, StoreError
from edged.wire import messages, topics
from edged.wire.manifest import Calibration, ReleaseManifest, ReleaseRef, Scaling
from edged.wire.messages import InferReply, Partial

STEP_S = 0.02  # for one token
LETTERS = "abcdefghij"


class HandClock:
    """Moves only when a token is made."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def real(self, seconds: float) -> float:
        return seconds


class Speller:
    """A generator that says the alphabet, a letter a step, and asks `halt` before each."""

    context = 64

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        made = 0
        for letter in LETTERS:
            reason = request.halt()
            if reason:
                yield Finished(reason, 3, made, -1.0)
                return
            self._clock.time += STEP_S
            made += 1
            yield Token(letter, -0.5)
        yield Finished("stop", 3, made, -0.5)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None: ...

    def close(self) -> None: ...


@dataclass
class Bench:
    """A `Prompts` with its slot, its store, and a link that does as it is told."""

    store: Store
    clock: HandClock = field(default_factory=HandClock)
    sent: list[tuple[float, Partial]] = field(default_factory=list)
    replies: list[InferReply] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)
    link: Callable[[], bool] = lambda: True
    stopping: bool = False
    full: int = 0  # so many messages find no room
    failures: int = 0
    window: Window = field(default_factory=lambda: Window(0.0))
    calibration: Calibration = field(default_factory=Calibration)
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        slot = Slot("tongue")
        ref = ReleaseRef(release="p@1.0", sha256="0" * 64)
        manifest = ReleaseManifest(
            release="p@1.0", kind="llm", engine="llama", files={}, created="2026", calibration=self.calibration
        )
        slot.flip(Loaded(ref, manifest, Speller(self.clock)))
        services = Services(
            self.store, Outgoing("plant", "dev1", Stamp(self.clock)), self.clock, self.window,
            wait=cast(Any, None), engine_error=cast(Any, None), unsure=cast(Any, None), wake=cast(Any, None),
            publish=self._publish, beats=Beats(self.clock), pace=Pace(),
        )  # fmt: skip
        self.prompts = Prompts(
            "chat", slot, services, lambda: self.policy, lambda: self.stopping, self._enqueue, self._see_through
        )

    def _publish(self, address: topics.Address, payload: bytes) -> bool:
        if not self.link():
            return False
        message = messages.decode(address.topic, payload)[2]
        assert isinstance(message, Partial)
        self.sent.append((self.clock.time, message))
        return True

    def _see_through(self, _item: Item, act: Callable[[], None]) -> None:
        while True:
            try:
                act()
                return
            except StoreError:
                self.failures += 1

    def _enqueue(self, message: OutboxMessage) -> None:
        if self.full:
            self.full -= 1
            raise StorageFull("the disk is full")
        reply = messages.decode(message.topic, message.payload)[2]
        assert isinstance(reply, InferReply)
        self.replies.append(reply)

    def item(self, request: GenerateRequest, stream: bool = True) -> Item:
        return Item("r1", "r1", 0.0, prompt=request, request="r1", stream=stream, settle=self.settled.append)

    def texts(self) -> list[str]:
        return [partial.text for _, partial in self.sent]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(Store(tmp_path))
    yield made
    made.store.close()


ASK = GenerateRequest("spell", tokens_max=10, seed=7)


def test_pieces_are_gathered_so_that_a_fast_model_does_not_flood_the_broker(bench: Bench) -> None:
    bench.prompts.handle(bench.item(ASK))
    assert bench.texts() == ["a", "bcd", "efg", "hij"]
    assert [partial.index for _, partial in bench.sent] == [0, 1, 2, 3]
    times = [time for time, _ in bench.sent]
    assert min(b - a for a, b in itertools.pairwise(times)) >= PARTIAL_S
    assert bench.replies[0].generated_response == LETTERS


def test_what_a_full_link_did_not_take_comes_with_the_next_piece(bench: Bench) -> None:
    turns = iter([True, False, False, True])
    bench.link = lambda: next(turns)
    bench.prompts.handle(bench.item(ASK))
    assert bench.texts() == ["a", "bcdefghij"]
    assert [partial.index for _, partial in bench.sent] == [0, 1]
    assert "partials_dropped" not in bench.store.counters()


def test_a_link_that_takes_nothing_costs_the_pieces_and_not_the_answer(bench: Bench) -> None:
    bench.link = lambda: False
    bench.prompts.handle(bench.item(ASK))
    assert (bench.sent, bench.replies[0].generated_response, bench.settled) == ([], LETTERS, [""])
    assert bench.store.counters()["partials_dropped"] == 1


def test_a_piece_that_no_broker_would_take_is_dropped(bench: Bench) -> None:
    def refuse() -> bool:
        raise TooLarge("3 bytes do not fit")

    bench.link = refuse
    bench.prompts.handle(bench.item(ASK))
    assert bench.replies[0].generated_response == LETTERS
    assert bench.store.counters()["partials_dropped"] == 4


def test_the_daemons_end_leaves_a_request_to_come_again(bench: Bench) -> None:
    def link() -> bool:
        bench.stopping = bool(bench.sent)  # in the middle of the answer
        return True

    bench.link = link
    with pytest.raises(SlotStopped):
        bench.prompts.handle(bench.item(ASK))
    assert len(bench.sent) == 2
    assert (bench.replies, bench.settled, bench.store.requests(9)) == ([], [], [])


@pytest.mark.parametrize(
    ("reasons", "answer", "tokens"),
    [(["cancelled"], None, 0), (["deadline"], None, 0), (["", "", "", "cancelled"], "ab", 2)],
    ids=["cancelled while it waited", "late before it began", "cancelled in the middle"],
)
def test_who_gave_up_gets_what_there_is_and_no_release_is_blamed(
    bench: Bench, reasons: list[str], answer: str | None, tokens: int
) -> None:
    asked = iter(reasons)
    bench.prompts.handle(bench.item(replace(ASK, halt=lambda: next(asked))))
    (reply,), (kept,) = bench.replies, bench.store.requests(9)
    assert (reply.error, reply.generated_response, reply.answer_tokens) == (reasons[-1], answer, tokens)
    assert (kept.outcome, kept.finish_reason, kept.answer, kept.confidence) == (
        reasons[-1],
        reasons[-1],
        answer or "",
        None,
    )
    assert bench.settled == [""]
    assert bench.window.close(1.0) == []
    assert bench.store.counters() == {f"requests_{reasons[-1]}": 1}


def test_an_answer_that_the_store_does_not_take_yet_is_not_made_twice(bench: Bench) -> None:
    bench.full = 3
    bench.prompts.handle(bench.item(ASK))
    assert (bench.failures, bench.settled, bench.texts()) == (3, [""], ["a", "bcd", "efg", "hij"])
    assert (len(bench.replies), len(bench.store.requests(9)), bench.window.close(1.0)[0]["items"]) == (1, 1, 1)


def test_an_answer_is_recorded_with_what_was_asked(bench: Bench) -> None:
    turns = (ChatMessage("system", "Spell."), ChatMessage("user", "all of it"))
    bench.prompts.handle(bench.item(GenerateRequest(messages=turns, stop=("z",), temperature=0.5), stream=False))
    (kept,), (reply,) = bench.store.requests(9), bench.replies
    assert (kept.id, kept.pipeline, kept.prompt, kept.release, kept.adapter) == ("r1", "chat", "", "p@1.0", "")
    assert kept.messages == [{"role": "system", "content": "Spell."}, {"role": "user", "content": "all of it"}]
    assert kept.options == {"stop": ["z"], "temperature": 0.5}
    assert (kept.answer, kept.outcome, kept.finish_reason) == (LETTERS, "ok", "stop")
    assert (kept.prompt_tokens, kept.answer_tokens) == (3, 10)
    assert kept.latency_ms == pytest.approx(STEP_S * 1000 * 10)
    assert kept.confidence == reply.confidence
    assert 0 < (kept.confidence or 0) < 1
    assert (bench.sent, [row["items"] for row in bench.window.close(1.0)]) == ([], [1])


FITTED = Calibration(method="scaled", answers=Scaling(temperature=1.0, bias=0.0), items=500)


@pytest.mark.parametrize(
    ("calibration", "target_risk", "doubt"),
    [(Calibration(), 0.5, "uncalibrated"), (FITTED, 0.1, "unsure"), (FITTED, 0.5, None)],
)
def test_a_text_is_judged_by_the_policy_too(
    tmp_path: Path, calibration: Calibration, target_risk: float, doubt: str | None
) -> None:
    """Its tokens have a mean log-probability of -0.5: right with 0.61."""
    store = Store(tmp_path)
    bench = Bench(store, calibration=calibration, policy=Policy(target_risk=target_risk))
    bench.prompts.handle(bench.item(GenerateRequest("all of it")))
    assert (bench.replies[0].doubt, bench.replies[0].confidence) == (doubt, pytest.approx(0.607, abs=1e-3))
    (row,) = bench.window.close(1.0)
    assert (row["accepted"], row["reasons"]) == (1, {doubt or "confident": 1})
    store.close()


def test_a_refused_request_is_recorded_without_its_bulk(bench: Bench) -> None:
    turn = ChatMessage("user", "y" * 10_000)
    bench.prompts.refused(bench.item(GenerateRequest("x" * 10_000, messages=(turn,))), "p@1.0", "too long")
    (kept,) = bench.store.requests(9)
    assert (kept.outcome, kept.reason, kept.release, kept.answer) == ("error", "too long", "p@1.0", "")
    assert (len(kept.prompt), len(kept.messages[0]["content"])) == (REFUSED_CHARS_MAX, REFUSED_CHARS_MAX)
