"""A responder that is itself unsure: what it asks the next tier, what it tells the one who asked, and when."""

from __future__ import annotations

import base64
import hashlib
import queue
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from edged.config import Pipeline as PipelineConfig
from edged.config import Responder
from edged.config_sources import MqttSource
from edged.core.tiers import HOPS_MAX, RETURN_SHARE, Beat, Presence
from edged.in_hand import InHand
from edged.link import Inbound
from edged.metrics import Window
from edged.outgoing import Outgoing
from edged.pipeline import Pipeline
from edged.responders import FORWARDS_MAX, Responders
from edged.services import Services
from edged.slot import Slot
from edged.sources import Asked, Unsure
from edged.stamp import Stamp
from edged.store import Store
from edged.wire import messages, topics
from edged.wire.messages import Box, Escalation, Opinion, Verdict

IMAGE = b"pixels"
EVERY_S, WAIT_S = 1000.0, 60.0
CAT, OWL = Box(label="cat", box=(1, 2, 3, 4), score=0.5), Box(label="owl", box=(1, 2, 3, 4), score=0.9)


class HandClock:
    """Time that is turned by hand; the wall clock is nowhere near the monotonic one."""

    at = 1000.0

    def now(self) -> float:
        return self.at + 1e9

    def monotonic(self) -> float:
        return self.at

    def real(self, seconds: float) -> float:
        return seconds


class Acknowledged:
    """A link that only remembers what was acknowledged."""

    def __init__(self) -> None:
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.messages: list[Inbound] = []

    def acknowledge(self, message: Inbound) -> None:
        self.messages.append(message)


class Middle:
    """The device `mid` with a responder of tier line that asks the tiers top and spare."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.link, self.presence = HandClock(), Acknowledged(), Presence()
        self.store = Store(folder)
        self.outgoing = Outgoing("plant", "mid", Stamp(self.clock))
        config = Responder(tier="line", slot="eye", escalate_to=("top", "spare"), wait_s=WAIT_S)
        self.settled: list[str] = []
        self.responders = Responders(
            self.store, self.link, self.outgoing, self.clock, {"line": config}, {("line", "detect"): self.pipeline()},  # type: ignore[arg-type]
            self.presence, lambda message: self.store.enqueue(message, self.clock.now()), lambda: None, lambda: False,
        )  # fmt: skip
        self.beats = 0

    def pipeline(self) -> Pipeline:
        """One whose slot has no model: it takes no question."""
        unused = {field.name: lambda *_: None for field in fields(Services)}
        known = {"store": self.store, "outgoing": self.outgoing, "clock": self.clock, "window": Window(0),
                 "in_hand": InHand()}  # fmt: skip
        services = Services(**{**unused, **known})  # type: ignore[arg-type]
        return Pipeline("responder-line", PipelineConfig(slot="eye", source=MqttSource()), Slot("eye"), services)

    def beat(self, tier: str, device: str, online: bool = True) -> None:
        self.beats += 1
        beat = Beat(f"m{self.beats}", device, "b", online, EVERY_S)
        self.presence.heard(tier, "detect", f"{device}.r", beat, self.clock.at)

    def question(self, sample: str = "s1", device: str = "cam", **more: Any) -> Escalation:
        values: dict[str, Any] = {
            "sample": sample, "pipeline": "belt", "task": "detect", "release": "toy@1.0", "reason": "novel",
            "confidence": 0.1, "image": base64.b64encode(IMAGE).decode(), "sha256": hashlib.sha256(IMAGE).hexdigest(),
            "label_by": 2e9, "origin": "cam", "path": [device],
        }  # fmt: skip
        return Escalation(**{**self.outgoing.stamp(), **values, **more})

    def unsure(self, question: Escalation, device: str = "cam") -> None:
        """The model here has answered `question` with a cat, and is not sure of it."""
        asked = Asked("plant", device, "line", "detect", question, self.clock.at)
        own = self.outgoing.opinion(asked, "labelled", [CAT], 0.4, "small@1.0")
        self.responders.ask_on(Unsure(asked, own, "unsure", self.settled.append))

    def deliver(self, question: Escalation, device: str = "cam") -> None:
        topic = topics.ESCALATION(site="plant", dev=device, tier="line", task="detect").topic
        parsed = topics.ESCALATION.match(topic)
        assert parsed is not None
        self.responders.on_escalation(Inbound(topic, b"", False, (1, 1, 1)), parsed, question)

    def passes(self, seconds: float) -> None:
        self.clock.at += seconds
        self.responders.tick()

    def sent(self) -> list[tuple[str, Any]]:
        """(topic without its root, message) of everything in the outbox, in order; the outbox is empty then."""
        rows = self.store.due(self.clock.now(), 1000)
        self.store.acked_many([row.message.id for row in rows], self.clock.now(), self.clock.now())
        return [
            (
                row.message.topic.removeprefix("edged/v1/plant/"),
                messages.decode(row.message.topic, row.message.payload)[2],
            )
            for row in rows
        ]

    def asked(self) -> Escalation:
        """The one question that was passed on."""
        ((topic, question),) = self.sent()
        assert topic == "mid/up/esc/top/detect"
        assert isinstance(question, Escalation)
        return question

    def told(self) -> Verdict:
        """The one verdict that went to the device that asked."""
        ((topic, verdict),) = self.sent()
        assert topic == "cam/down/verdict"
        assert isinstance(verdict, Verdict)
        return verdict

    def verdict(self, question: Escalation, status: str = "labelled", **more: Any) -> bool:
        """The top's answer to a question of ours; whether it was about one that is known."""
        verdict = Verdict(
            **self.outgoing.stamp(), sample=question.sample, status=status,  # type: ignore[arg-type]
            label=[OWL] if status == "labelled" else [], confidence=0.9,
            provenance={"kind": "model", "who": "big1", "release": "giant@2.0"}, **more,  # type: ignore[arg-type]
        )  # fmt: skip
        return self.responders.on_verdict(verdict)


def said(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    return [(o.who, o.tier, o.status, o.label[0].label if o.label else "") for o in verdict.opinions]


MID, TOP = ("mid", "line", "labelled", "cat"), ("big1", "top", "labelled", "owl")


@pytest.fixture
def middle(tmp_path: Path) -> Middle:
    middle = Middle(tmp_path)
    middle.beat("top", "big1")
    return middle


def test_the_question_goes_on_as_its_own_with_origin_path_hops_and_what_is_left(middle: Middle) -> None:
    question = middle.question(answer_by=123.0, answer_within_s=5.0)
    asked = Asked("plant", "cam", "line", "detect", question, middle.clock.at)
    middle.clock.at += 1.5  # what the model here needed
    own = middle.outgoing.opinion(asked, "labelled", [CAT], 0.4, "small@1.0")
    middle.responders.ask_on(Unsure(asked, own, "unsure", middle.settled.append))
    onward = middle.asked()
    assert middle.settled == [""], "its owner's message is acknowledged: he asks again anyway"
    assert (onward.origin, onward.path, onward.hops) == ("cam", ["cam", "mid"], 1)
    assert onward.answer_within_s == pytest.approx(3.5 * RETURN_SHARE)
    assert (onward.answer_by, onward.label_by) == (123.0, 2e9)
    assert (onward.reason, onward.confidence, onward.release) == ("unsure", 0.4, "small@1.0")
    assert onward.prediction == [CAT]
    assert base64.b64decode(onward.image or "") == IMAGE
    assert onward.sample != question.sample


def test_the_next_tiers_label_is_passed_on_with_both_opinions(middle: Middle) -> None:
    middle.unsure(middle.question())
    assert middle.verdict(middle.asked())
    verdict = middle.told()
    assert (verdict.sample, verdict.status, verdict.confidence) == ("s1", "labelled", 0.9)
    assert (verdict.provenance.who, verdict.provenance.release, verdict.label) == ("big1", "giant@2.0", [OWL])
    assert said(verdict) == [MID, TOP]


def test_all_opinions_of_the_tiers_above_are_kept_in_their_order(middle: Middle) -> None:
    middle.unsure(middle.question())
    above = [Opinion(who="big1", tier="top", status="labelled"), Opinion(who="huge", tier="sky", status="labelled")]
    middle.verdict(middle.asked(), opinions=above)
    assert [opinion.who for opinion in middle.told().opinions] == ["mid", "big1", "huge"]


def test_two_devices_samples_of_one_name_are_not_mixed_up(middle: Middle) -> None:
    middle.unsure(middle.question("r1"), "cam")
    first = middle.asked()
    middle.unsure(middle.question("r1", "other"), "other")
    second = middle.asked()
    middle.verdict(second)
    assert [topic for topic, _ in middle.sent()] == ["other/down/verdict"]
    middle.verdict(first)
    assert [topic for topic, _ in middle.sent()] == ["cam/down/verdict"]


@pytest.mark.parametrize(("left", "speaks_after"), [(5.0, 5.0 * RETURN_SHARE), (None, WAIT_S), (-2.0, WAIT_S)])
def test_when_the_next_tier_is_silent_the_own_answer_comes_in_time(
    middle: Middle, left: float | None, speaks_after: float
) -> None:
    middle.unsure(middle.question(answer_within_s=left))
    middle.asked()
    middle.passes(speaks_after - 0.01)
    assert not middle.sent()
    middle.passes(0.02)
    verdict = middle.told()
    assert (verdict.status, verdict.confidence, verdict.provenance.who) == ("labelled", 0.4, "mid")
    assert (said(verdict), verdict.reason) == ([MID], "tier top has not answered in time")
    middle.passes(1)
    assert not middle.sent()


def test_a_late_label_of_the_next_tier_still_reaches_the_origin_once(middle: Middle) -> None:
    middle.unsure(middle.question(answer_within_s=5.0))
    question = middle.asked()
    middle.passes(5)
    middle.told()
    assert middle.verdict(question, "unresolved")
    assert not middle.sent(), "it has nothing better"
    assert middle.verdict(question)
    assert said(middle.told()) == [MID, TOP]
    assert middle.verdict(question)
    assert not middle.sent(), "the repetition says nothing new"
    middle.passes(5 * RETURN_SHARE + WAIT_S)
    assert not middle.verdict(question), "it is forgotten: nothing is kept for ever"


@pytest.mark.parametrize("status", ["unresolved", "rejected"])
def test_when_the_next_tier_has_no_label_the_own_one_counts_and_its_opinion_is_kept(
    middle: Middle, status: str
) -> None:
    middle.unsure(middle.question())
    question = middle.asked()
    middle.verdict(question, status, reason="too dark")
    verdict = middle.told()
    assert (verdict.status, verdict.label, verdict.provenance.who) == ("labelled", [CAT], "mid")
    assert said(verdict) == [MID, ("big1", "top", status, "")]
    assert verdict.reason == "tier top has no label: too dark"
    middle.passes(WAIT_S + 1)
    assert not middle.sent()


def test_the_own_answer_is_given_at_once_when_whoever_was_asked_has_gone(middle: Middle) -> None:
    middle.unsure(middle.question())
    middle.asked()
    middle.beat("top", "big1", online=False)
    middle.passes(0.1)
    assert middle.told().reason == "tier top is gone"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"path": ["cam", "big1"]}, "unsure: nobody who has not had the question is in top or spare"),
        ({"hops": HOPS_MAX}, f"unsure: the question has made {HOPS_MAX} hops, the most it may"),
    ],
)
def test_a_question_that_may_not_go_on_is_answered_at_once_and_says_why(
    middle: Middle, more: dict[str, Any], reason: str
) -> None:
    middle.unsure(middle.question(**more))
    verdict = middle.told()
    assert (verdict.reason, said(verdict)) == (reason, [MID])
    assert middle.settled == [""]


def test_the_second_tier_is_asked_when_the_first_is_not_there(middle: Middle) -> None:
    middle.beat("top", "big1", online=False)
    middle.beat("spare", "big2")
    middle.unsure(middle.question())
    ((topic, _),) = middle.sent()
    assert topic == "mid/up/esc/spare/detect"


def test_a_question_that_comes_again_meanwhile_is_not_asked_again(middle: Middle) -> None:
    question = middle.question()
    middle.unsure(question)
    middle.asked()
    middle.deliver(question)
    assert len(middle.link.messages) == 1
    assert not middle.sent()
    assert "escalations_busy" not in middle.store.counters(), "it did not get as far as the pipeline"


def test_a_question_that_has_been_here_is_given_back_and_an_own_sample_left_to_others(middle: Middle) -> None:
    middle.deliver(middle.question("s1", path=["cam", "mid", "big1"], hops=2), "big1")
    ((topic, verdict),) = middle.sent()
    assert (topic, verdict.status) == ("big1/down/verdict", "unresolved")
    assert verdict.reason == "came back to where it was: cam > mid > big1"
    # The broker gave us, of all, our own question: as one passed on it is given back, as one about our own sample it is
    # asked again until another one of this tier gets it.
    middle.deliver(middle.question("s2", path=["cam", "mid"], hops=1), "mid")
    assert [topic for topic, _ in middle.sent()] == ["mid/down/verdict"]
    middle.deliver(middle.question("s3", path=["mid"]), "mid")
    assert not middle.sent()
    assert len(middle.link.messages) == 3


def test_what_waits_for_the_next_tier_is_bounded(middle: Middle) -> None:
    for number in range(FORWARDS_MAX):
        middle.unsure(middle.question(f"s{number}"))
    first = middle.sent()[0][1]
    middle.unsure(middle.question("more"))
    assert f"{FORWARDS_MAX} questions wait" in middle.told().reason
    # One that was answered makes room: what it waited for was only a better answer.
    middle.verdict(first)
    middle.told()
    middle.unsure(middle.question("more"))
    middle.asked()
    assert not middle.verdict(first)


def test_a_verdict_about_something_else_is_left_to_others(middle: Middle) -> None:
    assert not middle.verdict(middle.question("mine"))
