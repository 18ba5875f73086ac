"""Language requests in a pipeline's hands: pieces on a link that is slow or full, the daemon's end, what is recorded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from edged import why
from edged.answers import Answers
from edged.beats import Beats
from edged.capture import Capture
from edged.cases import question
from edged.config import Pipeline
from edged.config_sources import MqttSource
from edged.core.policy import Policy
from edged.engines.base import ChatMessage, EngineError, Finished, GenerateRequest, Token
from edged.link import TooLarge
from edged.metrics import Window
from edged.outgoing import Outgoing
from edged.pace import Pace
from edged.prompts import PARTIAL_S, REFUSED_CHARS_MAX, Prompts
from edged.refusals import Refusals
from edged.services import Services
from edged.slot import Loaded, Slot, SlotStopped
from edged.sources import Asked, Item, Unsure
from edged.stamp import Stamp
from edged.store import OutboxMessage, StorageFull, Store, StoreError
from edged.wire import messages, topics
from edged.wire.manifest import Calibration, ReleaseManifest, ReleaseRef, Scaling
from edged.wire.messages import Escalation, InferReply, Partial, Text, Verdict
from edged.wire.parts import Prompt

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
    patient: bool = False  # whoever asks is kept waiting
    waiting: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    unsure: list[Unsure] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    full: int = 0  # so many messages find no room
    failures: int = 0
    window: Window = field(default_factory=lambda: Window(0.0))
    calibration: Calibration = field(default_factory=Calibration)
    policy: Policy = field(default_factory=lambda: Policy(escalate=False))

    def __post_init__(self) -> None:
        self.slot = slot = Slot("tongue")
        ref = ReleaseRef(release="p@1.0", sha256="0" * 64)
        manifest = ReleaseManifest(
            release="p@1.0", kind="llm", engine="llama", files={}, created="2026", calibration=self.calibration
        )
        slot.flip(Loaded(ref, manifest, Speller(self.clock)))
        services = Services(
            self.store, Outgoing("plant", "dev1", Stamp(self.clock)), self.clock, self.window,
            wait=cast(Any, None), engine_error=cast(Any, None), unsure=self.unsure.append, wake=cast(Any, None),
            publish=self._publish, beats=Beats(self.clock), pace=Pace(self.clock),
        )  # fmt: skip
        config = Pipeline(slot="tongue", task="generate", source=MqttSource(), escalate_to="big")
        answers = Answers(5.0)
        capture = Capture("chat", config, "tongue", self.store, services.outgoing, self.clock, answers)
        self.prompts = Prompts(
            "chat", slot, services, lambda: self.policy, lambda: self.stopping, self._enqueue, self._see_through, capture,
            lambda item, kept: kept.asked and item.request is not None and self.patient,
            lambda item, reply: self.waiting.append((item.id, reply)),
        )  # fmt: skip

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
        said = messages.decode(message.topic, message.payload)[2]
        if isinstance(said, Verdict):
            self.verdicts.append(said)
            return
        assert isinstance(said, InferReply)
        self.replies.append(said)

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
        raise TooLarge("t", 3, 2)

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
    bench = Bench(store, calibration=calibration, policy=Policy(target_risk=target_risk, escalate=False))
    bench.prompts.handle(bench.item(GenerateRequest("all of it")))
    assert (bench.replies[0].doubt, bench.replies[0].confidence) == (doubt, pytest.approx(0.607, abs=1e-3))
    (row,) = bench.window.close(1.0)
    assert (row["accepted"], row["reasons"]) == (1, {doubt or "confident": 1})
    store.close()


@pytest.mark.parametrize(("own", "doubt"), [(None, "uncalibrated"), (FITTED, None)])
def test_an_adapters_answers_are_judged_by_what_was_fitted_on_them(
    tmp_path: Path, own: Calibration | None, doubt: str | None
) -> None:
    """Whatever was fitted on the bare base."""
    bench = Bench(Store(tmp_path), calibration=FITTED, policy=Policy(target_risk=0.5, escalate=False))
    adapter = ReleaseRef(release="p-lora@1.0", sha256="1" * 64)
    bench.slot.attach(adapter, tmp_path / "adapter.gguf", own)
    bench.prompts.handle(bench.item(GenerateRequest("all of it")))
    bench.slot.attach(None, None)
    bench.prompts.handle(replace(bench.item(GenerateRequest("all of it")), id="r2"))
    assert [(reply.adapter, reply.doubt) for reply in bench.replies] == [("p-lora@1.0", doubt), (None, None)]
    bench.store.close()


def test_an_adapter_whose_calibration_cannot_be_applied_is_not_attached(bench: Bench) -> None:
    adapter = ReleaseRef(release="p-lora@1.0", sha256="1" * 64)
    with pytest.raises(EngineError, match=r"p-lora@1.0: calibration is scaled, but says nothing about answers"):
        bench.slot.attach(adapter, Path("adapter.gguf"), Calibration(method="scaled", items=500))
    assert bench.slot.live is not None and bench.slot.live.adapter is None


def test_a_refused_request_is_recorded_without_its_bulk(bench: Bench) -> None:
    turn = ChatMessage("user", "y" * 10_000)
    bench.prompts.refused(bench.item(GenerateRequest("x" * 10_000, messages=(turn,))), "p@1.0", "too long")
    (kept,) = bench.store.requests(9)
    assert (kept.outcome, kept.reason, kept.release, kept.answer) == ("error", "too long", "p@1.0", "")
    assert (len(kept.prompt), len(kept.messages[0]["content"])) == (REFUSED_CHARS_MAX, REFUSED_CHARS_MAX)


# Escalated, audited, asked by others.

ASKS = Policy(target_risk=0.1, audit_share=0.0)
SURE = Calibration(method="scaled", answers=Scaling(temperature=0.1, bias=0.0), items=500)


def asking(bench_folder: Path, **more: Any) -> Bench:
    return Bench(Store(bench_folder), **{"calibration": FITTED, "policy": ASKS, **more})


def test_an_unsure_text_is_kept_with_its_question_and_whoever_asked_waits_for_the_answer(tmp_path: Path) -> None:
    bench = asking(tmp_path, patient=True)
    turns = (ChatMessage("system", "Spell."), ChatMessage("user", "all of it"))
    request = GenerateRequest(messages=turns, tokens_max=99, stop=("z",), schema={"type": "object"})
    bench.prompts.handle(bench.item(request, stream=False))
    sample, (row,) = bench.store.sample("r1"), bench.store.due(bench.clock.now(), 9)
    asked = messages.decode(row.message.topic, row.message.payload)[2]
    assert sample is not None
    assert isinstance(asked, Escalation)
    assert (sample.task, sample.state, sample.reason, sample.release) == ("generate", "escalated", "unsure", "p@1.0")
    assert sample.prediction == [{"text": LETTERS}]
    assert row.message.topic.endswith("/up/esc/big/generate")
    assert (asked.prediction, asked.image, asked.sha256) == ([Text(text=LETTERS)], None, sample.sha256)
    path = bench.store.blob(sample.sha256)
    assert path is not None
    assert path.read_bytes() == (asked.prompt or "").encode() == question(request)
    prompt = Prompt.model_validate_json(asked.prompt or "")
    assert [(turn.role, turn.content) for turn in prompt.messages or ()] == [
        ("system", "Spell."),
        ("user", "all of it"),
    ]
    assert (prompt.tokens_max, prompt.stop, prompt.answer_schema) == (99, ["z"], {"type": "object"})
    # The local answer is ready for when nobody answers in time, and nothing is settled or sent before.
    ((waits, local),) = bench.waiting
    assert (waits, local["generated_response"], local["doubt"]) == ("r1", LETTERS, "unsure")
    assert (bench.replies, bench.settled) == ([], [])
    (kept,) = bench.store.requests(9)
    assert (kept.id, kept.answer) == ("r1", LETTERS)
    (row_of_window,) = bench.window.close(1.0)
    assert (row_of_window["escalated"], row_of_window["unheard"]) == (1, 0)
    bench.store.close()


def test_where_nobody_answers_the_local_text_is_given_at_once_and_the_question_kept(tmp_path: Path) -> None:
    bench = asking(tmp_path)
    bench.prompts.handle(bench.item(ASK))
    assert (bench.replies[0].generated_response, bench.settled) == (LETTERS, [""])
    assert bench.store.counts() == {"escalated": 1}
    assert bench.window.close(1.0)[0]["unheard"] == 1
    bench.store.close()


def test_a_sure_text_is_audited_by_lot_with_its_inclusion(tmp_path: Path) -> None:
    bench = asking(tmp_path, calibration=SURE, policy=Policy(audit_share=1.0))
    bench.prompts.handle(bench.item(ASK))
    sample = bench.store.sample("r1")
    assert sample is not None
    assert (sample.decision, sample.reason, sample.inclusion_probability) == ("audit", "audit", 1.0)
    assert bench.replies[0].doubt is None
    bench.store.close()


def test_the_same_prompt_is_asked_about_once_and_another_one_is_another(tmp_path: Path) -> None:
    bench = asking(tmp_path)
    for name, text in (("a", "spell"), ("b", "spell"), ("c", "Spell")):
        item = Item(name, name, 0.0, prompt=GenerateRequest(text), request=name, settle=bench.settled.append)
        bench.prompts.handle(item)
    assert {row.id for row in bench.store.samples()} == {"a", "c"}
    assert bench.window.close(1.0)[0]["suppressed"] == {"duplicate": 1}
    assert (len(bench.replies), len(bench.settled)) == (3, 3)
    bench.store.close()


def test_an_answer_that_was_cut_off_is_nothing_to_ask_about(tmp_path: Path) -> None:
    bench = asking(tmp_path)
    bench.prompts.handle(bench.item(replace(ASK, halt=lambda: "deadline")))
    assert (bench.store.counts(), bench.replies[0].error) == ({}, "deadline")
    bench.store.close()


def test_why_a_text_was_asked_about_is_on_one_screen(tmp_path: Path) -> None:
    bench = asking(tmp_path)
    bench.prompts.handle(bench.item(GenerateRequest("What stands on line 3? " * 40)))
    by = {"kind": "model", "who": "big1", "release": "giant@1.0"}
    bench.store.label("r1", "labelled", [{"text": "nothing at all"}], 0.9, by, "", bench.clock.now())
    sample = bench.store.sample("r1")
    assert sample is not None
    lines = why.screen(sample)
    text = "\n".join(lines)
    assert len(lines) <= why.LINES_MAX
    assert max(map(len, lines)) <= why.COLUMNS_MAX
    assert "What p@1.0 was asked, 920 characters:\n  What stands on line 3?" in text
    assert f"What it answered, {len(LETTERS)} characters:\n  {LETTERS}" in text
    assert "0.607 (fitted on 500 items)\n  its 10 tokens have a mean log-probability of -0.50" in text
    assert "escalate (unsure)\n  not sure enough to be accepted" in text
    assert 'model big1 with giant@1.0 says, with 0.90: "nothing at all"' in text
    bench.store.close()


def question_of(device: str) -> Asked:
    content = question(GenerateRequest("spell"))
    escalation = Escalation(
        id="m1", ts=1.0, boot="b", seq=1, sample="s1", pipeline="chat", task="generate", release="p@1.0", reason="unsure",
        confidence=0.3, prompt=content.decode(), sha256="0" * 64, prediction=[Text(text="abd")], label_by=9e9, origin=device,
    )  # fmt: skip
    return Asked("plant", device, "big", "generate", escalation, 100.0)


@pytest.mark.parametrize("calibration", [SURE, FITTED], ids=["sure", "unsure"])
def test_another_devices_question_is_answered_or_passed_on(tmp_path: Path, calibration: Calibration) -> None:
    bench = asking(tmp_path, calibration=calibration)
    asked = question_of("dev9")
    bench.prompts.handle(Item("big:s1", "s1", 0.0, prompt=ASK, asked=asked, settle=bench.settled.append))
    assert bench.store.requests(9) == [], "what others asked is not this device's to learn from"
    if calibration is SURE:
        (verdict,) = bench.verdicts
        assert (verdict.sample, verdict.status, verdict.label) == ("s1", "labelled", [Text(text=LETTERS)])
        assert (verdict.provenance.who, verdict.provenance.release) == ("dev1", "p@1.0")
        assert (bench.unsure, bench.settled) == ([], [""])
    else:
        (unsure,) = bench.unsure
        assert (unsure.reason, unsure.own.label, bench.verdicts, bench.settled) == (
            "unsure",
            [Text(text=LETTERS)],
            [],
            [],
        )
    bench.store.close()


@pytest.mark.parametrize("reason", ["truncated", "invalid"])
def test_a_question_that_could_not_be_answered_whole_stays_open_for_somebody_else(tmp_path: Path, reason: str) -> None:
    bench = asking(tmp_path, calibration=SURE)
    halted = replace(ASK, halt=lambda: reason)
    bench.prompts.handle(
        Item("big:s1", "s1", 0.0, prompt=halted, asked=question_of("dev9"), settle=bench.settled.append)
    )
    (verdict,) = bench.verdicts
    assert (verdict.status, verdict.label, verdict.reason) == ("unresolved", [], f"its answer ended as {reason}")
    bench.store.close()


def test_errors_and_answers_are_counted_for_the_adapter_that_was_on(bench: Bench) -> None:
    refusals = Refusals(
        "chat", lambda: False, bench.slot, bench.prompts._s, bench.prompts, cast(Any, None), bench._enqueue
    )
    for adapter in (None, ReleaseRef(release="p-lora@1.0", sha256="1" * 64)):
        bench.slot.attach(adapter, Path("adapter.gguf") if adapter else None)
        bench.prompts.handle(bench.item(ASK))
        refusals.reject(bench.item(ASK), "engine_error", "it did not answer")
    counted = {row["release"]: (row["items"], row["errors"]) for row in bench.window.close(1.0)}
    assert counted == {"p@1.0": (1, 1), "p-lora@1.0": (1, 1)}
    assert bench.replies[-1].release == "p@1.0", "whoever asked hears of the model"
