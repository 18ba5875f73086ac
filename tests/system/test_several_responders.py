"""Three responders share the questions of a tier; one is killed in the middle of its work (docs/scale.md)."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from edged.wire.messages import SampleEntry, Verdict
from tests.support.device import Bus, Device, merged, tables, until
from tests.support.models import HARD_WORK, STRANGE, put_pictures
from tests.system.broker import Broker
from tests.system.test_tiers import NOBODY_WAITS, SURE, labelled, model, questions, responder

RESPONDERS = ("big1", "big2", "big3")
CAMERAS = ("cam1", "cam2")
PICTURES = 16  # of each camera
RETRY_S = 4.0  # longer than a responder has work with its share


def camera(folder: Path, name: str, broker: Broker, seed: Path) -> Device:
    asks = {"escalate_to": ["big"], "policy": NOBODY_WAITS}
    more = {"pipelines": {"line": asks, "ask": asks}, "delivery": {"retry_s": RETRY_S, "retry_s_max": 2 * RETRY_S}}
    return Device(folder, merged(tables(folder, name, broker, seed), more))


def test_three_responders_share_the_questions_and_the_death_of_one_loses_none(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    knows = model(tmp_path, "teacher@1.0", 2, SURE, products=HARD_WORK // 3)
    with ExitStack() as stack:
        team = {
            name: stack.enter_context(Device(tmp_path, responder(tmp_path, name, broker, knows, "big")))
            for name in RESPONDERS
        }
        for name in RESPONDERS:
            bus.online(name)
        devices = [stack.enter_context(camera(tmp_path, name, broker, toy)) for name in CAMERAS]
        for device in devices:
            put_pictures(device.inbox, [f"{number}.png" for number in range(PICTURES)], STRANGE)
        until("each has answered", lambda: {v.provenance.who for v in bus.of(Verdict)} == set(RESPONDERS), 60)
        team["big2"].kill9()
        in_hand = unanswered(bus)
        assert in_hand, "it was killed when there was no work"

        for device in devices:
            rows = labelled(device, PICTURES, 120)
            # Once in effect, whoever answered and how often: one label, of one responder, the right one.
            assert [[o["who"] for o in row["opinions"]] for row in rows] == [[row["provenance"]["who"]] for row in rows]
            assert {row["provenance"]["who"] for row in rows} <= set(RESPONDERS)
            assert {row["label"][0]["label"] for row in rows} == {"owl"}
            counters = device.wait("nothing is left to ask", lambda s: s["outbox"]["messages"] == 0)["counters"]
            assert counters["verdicts"] == PICTURES
        asked = Counter(question.sample for question in questions(bus, "big"))
        assert len(asked) == len(CAMERAS) * PICTURES
        assert set(asked) == told(bus), "the trainer hears of each label"
        again = {sample for sample, times in asked.items() if times > 1}
        assert again & in_hand, "what the dead one had in its hands was asked again"

        # Back again it takes its share; what it had answered before it died may come twice, and changes nothing.
        team["big2"].start()
        before = len(bus.of(Verdict))
        put_pictures(devices[0].inbox, [f"more-{number}.png" for number in range(12)], STRANGE + 5)
        rows = labelled(devices[0], PICTURES + 12, 60)
        until("it answers again", lambda: "big2" in {v.provenance.who for v in bus.of(Verdict)[before:]})
        assert len({row["id"] for row in rows}) == PICTURES + 12


def unanswered(bus: Bus) -> set[str]:
    """The questions that nobody has answered so far."""
    return {question.sample for question in questions(bus, "big")} - {verdict.sample for verdict in bus.of(Verdict)}


def told(bus: Bus) -> set[str]:
    """The samples whose catalogue entry says that they are labelled."""
    return {entry.sample for entry in bus.of(SampleEntry) if entry.state == "labelled"}
