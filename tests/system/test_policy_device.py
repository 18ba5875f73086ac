"""The policy on a real device with a real broker: audits, duplicates, budgets, nobody who answers, a region, `edged why`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edged import images
from edged.core.breaker import LATE_MAX
from edged.core.policy import lot
from edged.wire.messages import Escalation, Event, Metrics, Reported, Result
from tests.support.device import Bus, Device, responder_tables, tables, until
from tests.support.models import LABELS, PLAIN, STRANGE, make_release, picture, put_pictures
from tests.system.broker import Broker


def policy(folder: Path, broker: Broker, seed: Path, more: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """A device whose two pipelines have these keys in their policy."""
    both = {"line": {"policy": keys}, "ask": {"policy": keys, "answer_by_s": 1.5}}
    return tables(folder, "dev1", broker, seed, pipelines=both, **(more or {}))


def results(bus: Bus, count: int) -> dict[str, Result]:
    """So many results by item."""
    return until(f"{count} results", lambda: len(found := {r.item: r for r in bus.of(Result)}) == count and found)


def suppressed(bus: Bus) -> dict[str, int]:
    """What all windows of metrics say together."""
    total: dict[str, int] = {}
    for window in bus.of(Metrics):
        for reason, number in window.suppressed.items():
            total[reason] = total.get(reason, 0) + number
    return total


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number:03}.png" for number in range(count)]


def test_audits_are_drawn_by_lot_kept_with_their_inclusion_and_explained(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    with Device(tmp_path, policy(tmp_path, broker, toy, audit_share=0.4, dedupe_s=60.0)) as device:
        put_pictures(device.inbox, names("plain", 30))
        found = results(bus, 30)
        audited = {name: r.sample for name, r in found.items() if r.decision == "audit"}
        assert 3 <= len(audited) <= 22, "4 of 10: so few or many come by chance once in 10 000"
        assert {r.reason for r in found.values()} == {"confident", "audit"}
        listed = json.loads(device.cli("samples", "list", "--json").stdout)
        # Alike as they are, none is held back as a duplicate; each was drawn, and says with what probability.
        assert {row["item"]: row["id"] for row in listed} == audited
        assert {row["inclusion_probability"] for row in listed} == {0.4}
        assert all(lot(row["id"]) < 0.4 for row in listed)
        until("the questions", lambda: {e.sample for e in bus.of(Escalation)} == set(audited.values()))

        until("the metrics", lambda: sum(window.items for window in bus.of(Metrics)) == 30)
        windows = bus.of(Metrics)
        assert sum(window.audited for window in windows) == len(audited)
        assert sum(sum(window.latency_histogram) for window in windows) == 30
        assert sum(sum(window.confidence_histogram) for window in windows) == 30
        assert any((window.machine.memory_mib_max or 0) > 20 for window in windows), "a daemon with a model in it"

        one = listed[0]
        text = device.cli("why", one["id"]).stdout
        assert f"its lot {one['evidence']['draw']:.4f} is below the share 0.4 that is checked" in text
        assert len(text.splitlines()) <= 40
        assert json.loads(device.cli("why", one["id"], "--json").stdout) == {
            k: v for k, v in one.items() if k != "changed"
        }
        unknown = device.cli("why", "nothing")
        assert unknown.returncode == 1
        assert f"no sample 'nothing' on this device: `edged samples list` shows the ids, for example {one['id']}" in (
            unknown.stderr
        )


def test_a_burst_of_alike_frames_is_asked_about_once_and_the_others_are_counted(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    with Device(tmp_path, policy(tmp_path, broker, toy, dedupe_s=600.0)) as device:
        put_pictures(device.inbox, names("strange", 12), STRANGE)
        found = results(bus, 12)
        assert {(r.decision, r.reason) for r in found.values()} == {("escalate", "novel")}
        assert sorted(str(r.suppressed) for r in found.values()) == ["None", *["duplicate"] * 11]
        assert len([r for r in found.values() if r.sample]) == 1
        status = device.wait("one sample", lambda s: s["samples"] == {"escalated": 1})
        assert status["pipelines"]["line"]["breaker"] == "closed"
        until("the metrics", lambda: suppressed(bus) == {"duplicate": 11})
        assert sum(window.escalated for window in bus.of(Metrics)) == 12  # what the policy wanted


def test_over_budget_the_answers_go_on_and_what_is_not_asked_is_kept_counted_and_explained(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    with Device(tmp_path, policy(tmp_path, broker, toy, messages_per_minute=4)) as device:
        put_pictures(device.inbox, names("strange", 10), STRANGE)
        found = results(bus, 10)
        held = [r.sample for r in found.values() if r.suppressed == "messages"]
        assert len(held) == 6
        device.wait("all are kept", lambda s: s["samples"] == {"escalated": 4, "captured": 6})
        until("the metrics", lambda: suppressed(bus) == {"messages": 6})
        text = device.cli("why", str(held[0])).stdout
        assert "nobody was asked (messages): the budget of messages a minute was spent" in text
        assert "spent then: 4 of 4 messages a minute" in text

        # The fleet's desired state may raise it, within its range.
        bus.desire("dev1", 1, {}, policy={"line": {"messages_per_minute": 9999}})
        device.counted("desired_invalid")
        until(
            "why not", lambda: any("messages_per_minute=9999: must be a whole number" in e.text for e in bus.of(Event))
        )
        bus.desire("dev1", 2, {}, policy={"line": {"messages_per_minute": 60}})
        device.wait("revision 2", lambda s: any(r.desired_rev == 2 for r in bus.of(Reported)))
        put_pictures(device.inbox, ["next.png"], STRANGE)
        assert results(bus, 11)["next.png"].suppressed is None
        assert len(bus.of(Escalation)) >= 4


def test_when_nobody_answers_nobody_is_kept_waiting_and_the_questions_are_still_kept(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    strange = base64.b64encode(picture(STRANGE)).decode()
    with Device(tmp_path, policy(tmp_path, broker, toy)) as device:
        first = [bus.ask("dev1", "ask", image=strange) for _ in range(LATE_MAX)]
        assert {bus.reply(request).decided_by for request in first} == {"dev1"}
        status = device.wait("the breaker opens", lambda s: s["pipelines"]["ask"]["breaker"] == "open")
        assert status["pipelines"]["line"]["breaker"] == "closed"  # that one has asked nobody
        assert "ask: nobody answers its questions" in device.cli("status").stdout
        assert bus.reply(bus.ask("dev1", "ask", image=strange)).decided_by == "dev1"
        device.wait("all are kept", lambda s: s["samples"] == {"escalated": LATE_MAX + 1})
        until("the metrics", lambda: sum(window.unheard for window in bus.of(Metrics)) == 1)
        until("the event", lambda: any(e.kind == "breaker_open" and e.text.startswith("ask: ") for e in bus.of(Event)))

        make_release(tmp_path / "teacher", "teacher@3.0", 2)
        with Device(tmp_path, responder_tables(tmp_path, "big1", broker, tmp_path / "teacher")):
            device.wait("late labels", lambda s: s["samples"] == {"labelled": LATE_MAX + 1})
            device.wait("the breaker closes", lambda s: s["pipelines"]["ask"]["breaker"] == "closed")
            assert bus.reply(bus.ask("dev1", "ask", image=strange)).decided_by == "big1"
        until("the event", lambda: any(e.kind == "breaker_closed" for e in bus.of(Event)))
        sample = json.loads(device.cli("samples", "list", "--json", "--state", "labelled").stdout)[0]["id"]
        text = device.cli("why", sample).stdout
        assert "the picture is unlike those that the release was calibrated on" in text
        assert "model big1 with teacher@3.0 says, with 0.07: owl" in text  # as strange to the teacher as to the device


def frame(left: int, right: int) -> bytes:
    """A picture of 160 x 80 pixels, its left and its right half of one grey each."""
    image = np.full((80, 160, 3), left, np.uint8)
    image[:, 80:] = right
    done, data = cv2.imencode(".png", image)
    assert done
    return data.tobytes()


def test_a_region_is_all_that_the_model_sees_and_answers_are_in_pixels_of_the_frame(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    both = {name: {"roi": [0.5, 0.0, 1.0, 1.0], "answer_by_s": 20.0} for name in ("line", "ask")}
    config = tables(tmp_path, "dev1", broker, toy, pipelines=both)
    make_release(tmp_path / "teacher", "teacher@3.0", 2)
    responder = Device(tmp_path, responder_tables(tmp_path, "big1", broker, tmp_path / "teacher"))
    with responder, Device(tmp_path, config) as device:
        sure = bus.reply(bus.ask("dev1", "ask", image=base64.b64encode(frame(STRANGE, PLAIN)).decode()))
        assert sure.prediction is not None
        # The planted box lies in the middle of the right half: 22..42 of 64 pixels, so 27.5..52.5 of 80.
        assert sure.prediction[0].box == pytest.approx((107.5, 27.5, 132.5, 52.5), abs=0.6)
        assert sure.decided_by == "dev1"
        asked = bus.reply(bus.ask("dev1", "ask", image=base64.b64encode(frame(PLAIN, STRANGE)).decode()))
        assert asked.prediction is not None
        assert asked.decided_by == "big1"  # who saw the region alone; the answer is about the frame
        assert (asked.prediction[0].label, asked.prediction[0].box) == (
            LABELS[2], pytest.approx((107.5, 27.5, 132.5, 52.5), abs=0.6),
        )  # fmt: skip
        (question,) = bus.of(Escalation)
        seen = images.decode(base64.b64decode(question.image or ""))
        assert (seen.shape, seen.min(), seen.max()) == ((80, 80, 3), STRANGE, STRANGE)
        assert question.prediction[0].box == pytest.approx((27.5, 27.5, 52.5, 52.5), abs=0.6)
        device.wait("its label", lambda s: s["samples"] == {"labelled": 1})
        (tmp_path / "a.png").write_bytes(frame(STRANGE, PLAIN))
        once = json.loads(device.cli("infer", "eye", "--image", str(tmp_path / "a.png")).stdout)
        assert (once["decision"], once["reason"]) == ("accept", "confident")
        assert once["prediction"][0]["box"] == pytest.approx([107.5, 27.5, 132.5, 52.5], abs=0.6)
        assert "in its region, pixels 80,0 to 160,80 of the frame" in device.cli("why", question.sample).stdout


def test_an_object_that_vanishes_from_an_ordered_stream_is_asked_about(
    tmp_path: Path, broker: Broker, bus: Bus
) -> None:
    make_release(tmp_path / "shy", blind_above=(PLAIN + 2) / 255)
    config = tables(tmp_path, "dev1", broker, tmp_path / "shy", pipelines={"line": {"ordered": True}})
    with Device(tmp_path, config) as device:
        for number in range(4):
            put_pictures(device.inbox, [f"frame{number}.png"], PLAIN)
            results(bus, number + 1)
        put_pictures(device.inbox, ["gone.png"], PLAIN + 4)  # in light that it knows the model finds nothing
        found = results(bus, 5)
        assert {found[f"frame{n}.png"].decision for n in range(4)} == {"accept"}
        gone = found["gone.png"]
        assert (gone.prediction, gone.decision, gone.reason) == ([], "escalate", "lost_track")
        assert "cat was there for 4 frames and is gone, not at the border" in device.cli("why", str(gone.sample)).stdout
