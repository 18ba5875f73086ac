"""Whom a device asks: decided when a question is sent, and again when somebody comes or goes."""

from __future__ import annotations

from typing import Any

import pytest

from edged.config import Pipeline as PipelineConfig
from edged.config_sources import MqttSource
from edged.core.tiers import Presence
from edged.outgoing import Outgoing
from edged.routes import Routes
from edged.stamp import Stamp
from edged.store import OutboxMessage
from edged.wire import messages, topics
from edged.wire.messages import Escalation, ResponderState
from tests.unit.test_responders import HandClock

EVERY_S = 10.0
GONE_S = 3 * EVERY_S


class Asker:
    """The device `cam`, which asks the tiers line and plant."""

    def __init__(self, *tiers: str) -> None:
        self.clock = HandClock()
        self.outgoing = Outgoing("plant", "cam", Stamp(self.clock))
        pipeline = PipelineConfig(slot="eye", source=MqttSource(), escalate_to=tiers)
        quiet = PipelineConfig(slot="eye", source=MqttSource())
        self.routes = Routes(Presence(), self.outgoing, self.clock, {"belt": pipeline, "quiet": quiet})

    def hears(self, tier: str, *, task: str = "detect", retained: bool = False, **more: Any) -> bool:
        fields: dict[str, Any] = {"state": "online", "device": f"d-{tier}", "every_s": EVERY_S, **more}
        state = ResponderState(**{**self.outgoing.stamp(), **fields})
        return self.routes.heard({"tier": tier, "task": task, "responder": f"d-{tier}.r"}, state, retained=retained)

    def question(self, **more: Any) -> OutboxMessage:
        fields: dict[str, Any] = {
            "sample": "s1", "pipeline": "belt", "task": "detect", "release": "toy@1.0", "reason": "novel",
            "confidence": 0.1, "sha256": "0" * 64, "label_by": 2e9, "origin": "cam",
        }  # fmt: skip
        message = Escalation(**{**self.outgoing.stamp(), **fields, **more})
        address = topics.ESCALATION(site="plant", dev="cam", tier="line", task="detect")
        return self.outgoing.message(address, message, keep="verdict")

    def goes_to(self, message: OutboxMessage | None = None) -> str:
        topic, _ = self.routes.fresh(message or self.question(), self.clock.now())
        fields = topics.ESCALATION.match(topic)
        assert fields is not None
        assert (fields["site"], fields["dev"], fields["task"]) == ("plant", "cam", "detect")
        return fields["tier"]


@pytest.fixture
def asker() -> Asker:
    return Asker("line", "plant")


def test_a_question_goes_to_the_first_tier_that_lives_whenever_it_is_sent(asker: Asker) -> None:
    question = asker.question()
    assert asker.goes_to(question) == "line", "with nobody alive: the first"
    asker.hears("plant")
    assert asker.goes_to(question) == "plant"
    asker.hears("line")
    assert asker.goes_to(question) == "line"
    asker.hears("line", state="offline")
    assert asker.goes_to(question) == "plant"


def test_a_tier_whose_heart_has_stopped_is_left_and_open_questions_move_at_once(asker: Asker) -> None:
    asker.hears("line")
    asker.clock.at += EVERY_S
    asker.hears("plant")
    assert not asker.routes.changed()
    asker.clock.at += GONE_S - EVERY_S
    assert asker.routes.changed()
    assert asker.goes_to() == "plant"
    assert not asker.routes.changed(), "said once"


def test_nothing_is_sent_again_when_nobody_is_left(asker: Asker) -> None:
    asker.hears("line")
    asker.clock.at += GONE_S
    assert not asker.routes.changed()


@pytest.mark.parametrize(
    ("tier", "more", "again"),
    [
        ("plant", {}, True),
        ("plant", {"retained": True}, True),  # after a connect: now it is known who lives
        ("sky", {}, False),  # nobody here asks that tier
        ("plant", {"task": "classify"}, False),
        ("plant", {"state": "offline"}, False),
    ],
)
def test_open_questions_are_asked_again_when_somebody_has_come_who_may_answer(
    asker: Asker, tier: str, more: dict[str, Any], again: bool
) -> None:
    assert asker.hears(tier, **more) is again


def test_a_heartbeat_causes_nothing_and_a_restart_does(asker: Asker) -> None:
    asker.hears("line")
    assert not asker.hears("line")
    assert asker.hears("line", boot="another")
    assert not asker.hears("line", boot="yet another", retained=True), "it may have restarted long ago"


def test_a_responder_on_this_very_device_does_not_count() -> None:
    asker = Asker("line", "plant")
    asker.hears("line", device="cam")
    asker.hears("plant")
    assert asker.goes_to() == "plant"


def test_what_is_left_of_the_time_is_what_is_left_when_it_is_sent(asker: Asker) -> None:
    def left(**more: Any) -> float | None:
        _, payload = asker.routes.fresh(question, asker.clock.now())
        decoded = messages.decode(question.topic, payload)[2]
        assert isinstance(decoded, Escalation)
        return decoded.answer_within_s

    question = asker.question(answer_by=asker.clock.now() + 5)
    assert left() == pytest.approx(5)
    asker.clock.at += 3
    assert left() == pytest.approx(2)
    asker.clock.at += 3600
    assert left() is None, "nobody waits any longer"
    question = asker.question()
    assert left() is None, "nobody ever waited"


def test_a_question_of_a_pipeline_that_is_gone_keeps_its_tier_and_strange_bytes_go_as_they_are(asker: Asker) -> None:
    asker.hears("plant")
    assert asker.goes_to(asker.question(pipeline="gone")) == "line"
    assert asker.goes_to(asker.question(pipeline="quiet")) == "line"
    strange = OutboxMessage("m", asker.question().topic, 1, False, None, b'{"v":9}', keep="verdict")
    assert asker.routes.fresh(strange, 0) == (strange.topic, strange.payload)
