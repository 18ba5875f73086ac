"""Three tiers of real processes: a device asks `middle`, which asks `top`; some of them die, stop or ask each other."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edged.wire import messages, topics
from edged.wire.messages import Escalation, Metrics, ResponderState, Verdict
from tests.support.device import SITE, Bus, Device, merged, tables, until
from tests.support.models import HARD_WORK, STRANGE, calibration, make_release, picture, put_pictures
from tests.system.broker import Broker
from trainer.core.access import Identity

# A busy machine must not make the living look dead: hearts beat fast only where one stops.
BEAT_S, FAST_BEAT_S = 60.0, 1.0
SURE, UNSURE = 5.0, 0.0  # logits: right with a probability of 0.993, of 0.5
NOBODY_WAITS = {"audit_share": 0.0, "empty_share": 0.0, "dedupe_s": 0.0}


def model(folder: Path, release: str, label: int, logit: float, products: int = 0) -> Path:
    """A release that answers every picture with one box of class `label`, always as sure as `logit` says."""
    trusting = calibration().model_copy(update={"novelty": None, "bias": logit})
    target = folder / release.replace("@", "-")
    make_release(target, release, label, calibration=trusting, products=products)
    return target


def asker(folder: Path, broker: Broker, toy: Path, *tiers: str, **more: Any) -> dict[str, Any]:
    """The device `dev1`: unsure of every strange picture, it asks these tiers."""
    asks = {"escalate_to": list(tiers), "policy": NOBODY_WAITS}
    return merged(tables(folder, "dev1", broker, toy, pipelines={"line": asks, "ask": asks}), more)


def responder(
    folder: Path, name: str, broker: Broker, seed: Path, tier: str, *asks: str, beat_s: float = BEAT_S, **more: Any
) -> dict[str, Any]:
    """A device that answers for `tier` and, when unsure, asks the tiers `asks`."""
    own = {"tier": tier, "slot": "eye", "escalate_to": list(asks), "policy": NOBODY_WAITS, **more}
    base = tables(folder, name, broker, seed, responders={"r": own}, delivery={"presence_s": beat_s})
    return {key: value for key, value in base.items() if key != "pipelines"}


def alive(bus: Bus, tier: str) -> None:
    """Wait until a responder of this tier has announced itself: from then on it is subscribed."""
    until(f"a responder in {tier}", lambda: any(
        fields.get("tier") == tier and isinstance(message, ResponderState) and message.state == "online"
        for _, fields, message in list(bus.heard)
    ))  # fmt: skip


def labelled(device: Device, count: int, seconds: float = 60.0) -> list[dict[str, Any]]:
    """The samples of the device once that many are labelled."""
    device.wait(f"{count} labels", lambda s: s["samples"].get("labelled", 0) == count, seconds)
    rows: list[dict[str, Any]] = json.loads(device.cli("samples", "list", "--json").stdout)
    assert {row["state"] for row in rows} == {"labelled"}
    return rows


def who_said_what(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(o["who"], o["tier"], o["label"][0]["label"] if o["label"] else o["status"]) for o in row["opinions"]]


def questions(bus: Bus, tier: str) -> list[Escalation]:
    """Every question that went to this tier."""
    return [m for _, f, m in list(bus.heard) if isinstance(m, Escalation) and f["tier"] == tier]


MID, TOP = ("mid1", "middle", "dog"), ("top1", "top", "owl")


def test_a_middle_tier_that_is_sure_answers_itself(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    middle = responder(tmp_path, "mid1", broker, model(tmp_path, "mid@1.0", 1, SURE), "middle", "top")
    top = responder(tmp_path, "top1", broker, model(tmp_path, "top@1.0", 2, SURE), "top")
    with Device(tmp_path, top), Device(tmp_path, middle):
        alive(bus, "top")
        alive(bus, "middle")
        with Device(tmp_path, asker(tmp_path, broker, toy, "middle")) as device:
            put_pictures(device.inbox, [f"{n}.png" for n in range(6)], STRANGE)
            for row in labelled(device, 6):
                assert who_said_what(row) == [MID]
                assert row["provenance"]["who"] == "mid1"
            assert not questions(bus, "top")


def test_a_middle_tier_that_is_unsure_asks_the_top_and_the_device_sees_both_opinions(tmp_path: Path, toy: Path) -> None:
    clients = [
        Identity("dev1", SITE),
        *(Identity(name, SITE, roles=("device", "responder")) for name in ("mid1", "top1")),
        Identity("observer", SITE, roles=("observer",)),
    ]
    with Broker(tmp_path / "broker", tls=True, clients=clients) as broker:
        bus = Bus(broker)
        middle = responder(tmp_path, "mid1", broker, model(tmp_path, "mid@1.0", 1, UNSURE), "middle", "top")
        top = responder(tmp_path, "top1", broker, model(tmp_path, "top@1.0", 2, SURE), "top")
        with Device(tmp_path, top), Device(tmp_path, middle) as between:
            alive(bus, "top")
            alive(bus, "middle")
            config = asker(tmp_path, broker, toy, "middle", pipelines={"ask": {"answer_by_s": 20.0}})
            with Device(tmp_path, config) as device:
                put_pictures(device.inbox, [f"{n}.png" for n in range(6)], STRANGE)
                for row in labelled(device, 6):
                    assert who_said_what(row) == [MID, TOP]
                    assert (row["provenance"]["who"], row["provenance"]["release"]) == ("top1", "top@1.0")
                    assert [round(o["confidence"], 2) for o in row["opinions"]] == [0.5, 0.99]
                    assert row["label_confidence"] == row["opinions"][1]["confidence"]
                passed_on = questions(bus, "top")
                assert {(q.origin, tuple(q.path), q.hops) for q in passed_on} == {("dev1", ("dev1", "mid1"), 1)}
                assert len(passed_on) == 6
                assert {q.answer_within_s for q in passed_on} == {None}, "nobody waits for a picture of a folder"
                # Whoever waits is told the top's answer too, and the top how long it may take.
                image = base64.b64encode(picture(STRANGE, 7)).decode()
                reply = bus.reply(bus.ask("dev1", "ask", image=image))
                assert (reply.decided_by, reply.release) == ("top1", "top@1.0")
                assert 0 < (questions(bus, "top")[-1].answer_within_s or 0) < 20.0

                def windows() -> Counter[str]:
                    found = [m for m in bus.of(Metrics, "mid1") if m.pipeline == "responder-r"]
                    return Counter({"items": sum(m.items for m in found), "escalated": sum(m.escalated for m in found)})

                until("what the middle tier counted", lambda: windows()["items"] == 7)
                assert windows()["escalated"] == 7
                counters = between.counted("escalations_forwarded", 7)["counters"]
                assert counters["verdicts_relayed"] == 7
                assert "control_faults" not in counters
        bus.close()


@pytest.mark.parametrize("killed", ["before it is asked", "with the question in its hands"])
def test_the_question_of_a_dead_middle_tier_goes_to_the_top_and_is_labelled_once(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, killed: str
) -> None:
    slow = model(tmp_path, "mid@1.0", 1, SURE, products=0 if killed == "before it is asked" else 5 * HARD_WORK)
    middle = Device(tmp_path, responder(tmp_path, "mid1", broker, slow, "middle", "top", beat_s=FAST_BEAT_S))
    top = responder(tmp_path, "top1", broker, model(tmp_path, "top@1.0", 2, SURE), "top")
    # Left to its own clock the question would be sent again after the test.
    config = asker(tmp_path, broker, toy, "middle", "top", delivery={"retry_s": 900.0, "retry_s_max": 900.0})
    with Device(tmp_path, top), middle, Device(tmp_path, config) as device:
        alive(bus, "top")
        alive(bus, "middle")
        if killed == "before it is asked":
            middle.kill9()
        put_pictures(device.inbox, ["a.png"], STRANGE)
        until("the middle tier is asked", lambda: questions(bus, "middle"))
        if middle.process is not None:
            middle.kill9()
        (row,) = labelled(device, 1)
        assert who_said_what(row) == [TOP]
        device.wait("nothing is left to say", lambda s: s["outbox"]["messages"] == 0)
        assert device.counted("verdicts")["counters"]["verdicts"] == 1
        assert [(q.path, q.hops) for q in questions(bus, "top")] == [(["dev1"], 0)]


def test_a_dead_top_delays_nobody_and_a_late_label_of_it_still_counts(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    middle = responder(tmp_path, "mid1", broker, model(tmp_path, "mid@1.0", 1, UNSURE), "middle", "top")
    top = responder(tmp_path, "top1", broker, model(tmp_path, "top@1.0", 2, SURE), "top")
    config = asker(tmp_path, broker, toy, "middle", pipelines={"ask": {"answer_by_s": 4.0}})
    with Device(tmp_path, top) as above, Device(tmp_path, middle), Device(tmp_path, config) as device:
        alive(bus, "top")
        alive(bus, "middle")
        assert above.process is not None
        os.kill(above.process.pid, signal.SIGSTOP)  # it looks alive, and says nothing
        try:
            reply = bus.reply(bus.ask("dev1", "ask", image=base64.b64encode(picture(STRANGE)).decode()))
            assert (reply.decided_by, reply.release) == ("mid1", "mid@1.0")
            (row,) = labelled(device, 1)
            assert who_said_what(row) == [MID]
            assert row["label_reason"] == "tier top has not answered in time"
        finally:
            os.kill(above.process.pid, signal.SIGCONT)
        until("the late label", lambda: who_said_what(labelled(device, 1)[0]) == [MID, TOP])
        (row,) = labelled(device, 1)
        assert (row["provenance"]["who"], row["label"][0]["label"]) == ("top1", "owl")
        # And when it is known to be dead, nobody waits for it at all.
        above.kill9()
        bus.say(
            topics.RESPONDER(tier="top", task="detect", responder="top1.r"),
            ResponderState(**bus.stamp(), state="offline", device="top1"),
        )
        put_pictures(device.inbox, ["b.png"], STRANGE)
        row = labelled(device, 2)[-1]
        assert who_said_what(row) == [MID]
        assert row["label_reason"] == "unsure: nobody who has not had the question is in top"


def test_responders_that_ask_each_other_come_to_an_end(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    seed = model(tmp_path, "mid@1.0", 1, UNSURE)
    left, twin = (responder(tmp_path, name, broker, seed, "left", "right", wait_s=30.0) for name in ("left1", "left2"))
    right = responder(tmp_path, "right1", broker, seed, "right", "left", wait_s=30.0)
    with Device(tmp_path, left), Device(tmp_path, twin), Device(tmp_path, right):
        for name in ("left1", "left2", "right1"):
            bus.online(name)
        alive(bus, "left")
        alive(bus, "right")
        config = asker(tmp_path, broker, toy, "left", delivery={"retry_s": 900.0, "retry_s_max": 900.0})
        with Device(tmp_path, config) as device:
            put_pictures(device.inbox, [f"{n}.png" for n in range(8)], STRANGE)
            rows = labelled(device, 8)
            for row in rows:
                who = [o["who"] for o in row["opinions"]]
                assert who[:2] in (["left1", "right1"], ["left2", "right1"])
                models = [o["who"] for o in row["opinions"] if o["status"] == "labelled"]
                assert len(models) == len(set(models)), "nobody was asked for two opinions"
            # Each question is asked of left, then right, then left: there it ends.
            assert len(questions(bus, "left")) <= 16
            assert len(questions(bus, "right")) == 8
            assert len(bus.of(Verdict, "dev1")) == 8


def test_a_question_that_has_made_its_hops_is_answered_where_it_is(tmp_path: Path, broker: Broker, bus: Bus) -> None:
    middle = responder(tmp_path, "mid1", broker, model(tmp_path, "mid@1.0", 1, UNSURE), "middle", "top")
    with Device(tmp_path, middle):
        alive(bus, "middle")
        address = topics.RESPONDER(tier="top", task="detect", responder="top1.r")
        bus.say(address, ResponderState(**bus.stamp(), state="online", device="top1"))
        image = picture(STRANGE)
        question = Escalation(
            **bus.stamp(), sample="s1", pipeline="line", task="detect", release="toy@1.0", reason="unsure",
            confidence=0.2, image=base64.b64encode(image).decode(), label_by=2e9, origin="cam", hops=messages.HOPS_MAX,
            sha256=hashlib.sha256(image).hexdigest(), path=["cam", "a", "b", "c"],
        )  # fmt: skip
        bus.say(topics.ESCALATION(site=SITE, dev="c", tier="middle", task="detect"), question)
        verdict = until("a verdict", lambda: next(iter(bus.of(Verdict, "c")), None))
        assert (verdict.status, verdict.label[0].label) == ("labelled", "dog")
        assert verdict.reason == "unsure: the question has made 3 hops, the most it may"
        assert not questions(bus, "top")
