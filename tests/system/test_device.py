"""`edged run` as a process against a real mosquitto: items, bad input, requests, start and stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edged.files import sha256_of
from edged.wire import messages, topics
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Escalation, Event, InferReply, Result, SampleEntry, State, Verdict
from tests.support.device import SITE, Bus, Device, responder_tables, tables, until
from tests.support.files import file_server
from tests.support.models import HARD_WORK, STRANGE, make_release, picture, put_pictures
from tests.support.ports import free_port
from tests.system.broker import Broker
from trainer.core.access import Identity


def results(bus: Bus, device: str = "dev1") -> dict[str, Result]:
    """The results of a device by item; fails when one came twice."""
    found = bus.of(Result, device)
    by_item = {result.item: result for result in found}
    assert len(by_item) == len(found), "an item was answered twice"
    return by_item


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number:03}.png" for number in range(count)]


def test_every_picture_is_answered_once_and_the_unsure_ones_are_labelled_by_the_responder(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    """L1, L6: what a device is unsure of is escalated, and labelled by a larger model."""
    make_release(tmp_path / "teacher", "teacher@3.0", 2)
    responder = Device(tmp_path, responder_tables(tmp_path, "big1", broker, tmp_path / "teacher"))
    with responder, Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        put_pictures(device.inbox, names("plain", 40))
        put_pictures(device.inbox, names("strange", 15), STRANGE)
        device.wait("15 labels", lambda s: s["samples"].get("labelled", 0) == 15)
        status = device.counted("verdicts", 15)
        until("55 results", lambda: len(results(bus)) == 55)

        answered = results(bus)
        assert answered.keys() == {*names("plain", 40), *names("strange", 15)}
        assert {r.decision for name, r in answered.items() if name.startswith("plain")} == {"accept"}
        assert {(r.decision, r.reason) for n, r in answered.items() if n.startswith("strange")} == {
            ("escalate", "novel")
        }
        assert all(r.prediction[0].label == "cat" for r in answered.values())
        assert status["counters"]["verdicts"] == 15
        assert status["samples"] == {"labelled": 15}

        def told() -> dict[str, SampleEntry]:
            entries = {entry.sample: entry for entry in bus.of(SampleEntry, "dev1")}
            return entries if [entry.state for entry in entries.values()] == ["labelled"] * 15 else {}

        entries = until("the host was told of 15 labels", told)
        assert entries.keys() == {answered[name].sample for name in names("strange", 15)}
        for entry in entries.values():
            assert entry.label[0].label == "owl"
            assert entry.provenance is not None
            assert (entry.provenance.who, entry.provenance.release) == ("big1", "teacher@3.0")
        device.wait("an empty outbox", lambda s: s["outbox"]["messages"] == 0)
        assert not [path for path in device.inbox.iterdir() if path.is_file()]
        assert len(list((device.inbox / "done").iterdir())) == 55

        listed = json.loads(device.cli("samples", "list", "--state", "labelled", "--json").stdout)
        assert {row["item"] for row in listed} == set(names("strange", 15))
        assert json.loads(device.cli("status", "--json").stdout)["device"] == "dev1"


def test_bad_items_are_counted_answered_and_set_aside_and_the_next_ones_go_on(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        (device.inbox / ".noise").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\x07" * 300)
        (device.inbox / ".noise").rename(device.inbox / "noise.png")
        (device.inbox / ".half").write_bytes(picture()[:40])
        (device.inbox / ".half").rename(device.inbox / "half.png")
        (device.inbox / "empty.png").touch()
        put_pictures(device.inbox, names("good", 5))
        until("8 results", lambda: len(results(bus)) == 8)
        answered = results(bus)
        for name in ("noise.png", "half.png", "empty.png"):
            assert answered[name].error
            assert (device.inbox / "rejected" / name).is_file()
            assert f"{name}: " in device.log()
        assert "empty" in (answered["empty.png"].error or "")
        assert {answered[name].error for name in names("good", 5)} == {None}
        assert device.counted("items_bad_image", 3)["counters"]["items_bad_image"] == 3


def test_requests_are_answered_and_broken_ones_are_answered_with_their_error(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    import base64

    image = base64.b64encode(picture()).decode()
    infer = topics.INFER(site=SITE, dev="dev1", pipeline="ask")
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        good = bus.reply(bus.ask("dev1", "ask", image=image))
        assert good.prediction is not None
        assert (good.prediction[0].label, good.release, good.decided_by) == ("cat", "toy@1.0", "dev1")

        def error(**fields: str) -> str:
            return bus.reply(bus.ask("dev1", fields.pop("pipeline", "ask"), **fields)).error or ""

        assert "neither `image` (base64) nor `generation_prompt`" in error()
        assert "not base64" in error(image="%%%")
        assert "no complete JPEG" in error(image=base64.b64encode(b"junk").decode())
        assert "has task 'detect': send an `image`" in error(generation_prompt="Hello")
        assert "'nope' takes no requests here; those that do: ask" in error(pipeline="nope", image=image)
        assert "'line' takes no requests here" in error(pipeline="line", image=image)

        # Not JSON at all: nobody can know the request's id, so the pipeline's name stands for it.
        bus.say(infer, b"{not json")
        assert "Invalid JSON" in (bus.reply("ask").error or "")
        # Valid JSON with an id, but a field of the wrong type.
        broken = {**bus.stamp(), "image": 7}
        bus.say(infer, json.dumps(broken).encode())
        assert "image: " in (bus.reply(broken["id"]).error or "")
        # An id that cannot be part of a topic must not reach the code that builds one.
        bus.say(infer, json.dumps({**bus.stamp(), "id": "a/b#", "image": image}).encode())
        until("a third complaint", lambda: device.counted("payloads_invalid", 3))

        counters = device.counted("requests_refused", 5)["counters"]
        assert counters["items_bad_image"] == 1
        assert bus.reply(bus.ask("dev1", "ask", image=image)).error is None
        assert "control_faults" not in counters
        assert "pipeline_faults" not in counters


def test_whoever_waits_gets_the_verdict_or_in_time_the_local_answer(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    import base64

    strange = base64.b64encode(picture(STRANGE)).decode()
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        local = bus.reply(bus.ask("dev1", "ask", image=strange))  # nobody answers: after answer_by
        assert (local.decided_by, local.release) == ("dev1", "toy@1.0")
        make_release(tmp_path / "teacher", "teacher@3.0", 2)
        with Device(tmp_path, responder_tables(tmp_path, "big1", broker, tmp_path / "teacher")):
            # The responder's birth makes the device ask again at once what is still open.
            device.wait("the late label", lambda s: s["samples"].get("labelled") == 1)
            decided = bus.reply(bus.ask("dev1", "ask", image=strange))
            assert (decided.decided_by, decided.release) == ("big1", "teacher@3.0")
            assert decided.prediction is not None
            assert decided.prediction[0].label == "owl"
        assert len(bus.of(InferReply)) == 2


def test_a_request_that_comes_twice_is_answered_once(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    import base64

    request = messages.InferRequest(**bus.stamp(), image=base64.b64encode(picture()).decode())
    address = topics.INFER(site=SITE, dev="dev1", pipeline="ask")
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)):
        bus.online("dev1")
        bus.say(address, request)
        bus.say(address, request)
        bus.reply(request.id)
        bus.say(address, request)
        bus.reply(bus.ask("dev1", "ask", image=request.image))
        assert [r.request for r in bus.of(InferReply)].count(request.id) == 1


def test_invalid_messages_are_dropped_counted_and_said_once(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    down = {route: route(site=SITE, dev="dev1") for route in (topics.DESIRED, topics.VERDICT)}
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        bus.online("dev1")
        for _ in range(3):
            bus.say(down[topics.DESIRED], b"\xff\x00 nothing")
        bus.say(down[topics.DESIRED], json.dumps({**bus.stamp(), "rev": -1}).encode())
        bus.say(down[topics.VERDICT], json.dumps({**bus.stamp(), "sample": "s"}).encode())
        bus.say(topics.COMMAND(site=SITE, dev="dev1", type="dance", id="c1"), json.dumps(bus.stamp()).encode())
        status = device.counted("payloads_invalid", 6)
        assert device.log().count("down/desired: ") == 1
        assert "unknown command; known: cancel, forget, pin, rollback, samples, unpin" in device.log()

        # Valid, about something that is not here: counted, and said to people.
        unknown = messages.Verdict(
            **bus.stamp(), sample="unheard", status="labelled", provenance={"kind": "model", "who": "big1"}
        )
        bus.say(down[topics.VERDICT], unknown)
        wanted = {"ear": ReleaseRef(release="toy@9.0", sha256="0" * 64)}
        policy = {"line": {"target_risk": "low"}, "tail": {"target_risk": 0.5}}
        bus.desire("dev1", 1, wanted, policy=policy)
        device.counted("verdicts_unknown")
        device.counted("desired_unknown_model")
        device.counted("desired_invalid", 2)
        texts = until("three events", lambda: len(bus.of(Event)) >= 3 and " | ".join(e.text for e in bus.of(Event)))
        assert "desired state names 'ear'; this device has eye" in texts
        assert "'line': policy target_risk='low': must be a number" in texts
        assert "'tail': no such pipeline; known: ask, line" in texts

        put_pictures(device.inbox, names("after", 3))
        until("3 results", lambda: len(results(bus)) == 3)
        assert status["models"]["eye"]["active"] == "toy@1.0"
        assert "control_faults" not in device.counted("desired_invalid")["counters"]


def test_desired_policy_holds_until_the_next_desired_state(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    def decision(name: str) -> str:
        put_pictures(device.inbox, [name], STRANGE)
        return until(f"result of {name}", lambda: results(bus).get(name)).decision

    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        assert decision("a.png") == "escalate"
        bus.desire("dev1", 1, {}, policy={"line": {"escalate": False}})
        device.wait("revision 1", lambda s: any(r.desired_rev == 1 for r in bus.of(messages.Reported)))
        assert decision("b.png") == "accept"
        bus.desire("dev1", 2, {})
        device.wait("revision 2", lambda s: any(r.desired_rev == 2 for r in bus.of(messages.Reported)))
        assert decision("c.png") == "escalate"
        bus.desire("dev1", 1, {}, policy={"line": {"escalate": False}})  # outdated
        device.counted("desired_outdated")
        assert decision("d.png") == "escalate"


def test_an_escalation_whose_image_is_damaged_is_refused_by_the_responder(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    address = topics.ESCALATION(site=SITE, dev="other", tier="big", task="detect")
    with Device(tmp_path, responder_tables(tmp_path, "big1", broker, toy)):
        question = Escalation(
            **bus.stamp(), sample="s1", pipeline="line", task="detect", release="toy@1.0", reason="unsure",
            confidence=0.2, image="AAAA", sha256="0" * 64, label_by=2e9, origin="other",
        )  # fmt: skip
        bus.online("big1")
        bus.say(address, question)
        verdict = until("a verdict", lambda: next(iter(bus.of(Verdict, "other")), None))
        assert (verdict.sample, verdict.status) == ("s1", "rejected")
        assert "does not have sha256" in verdict.reason


@pytest.mark.parametrize("obstacle", ["another authority", "not authorised", "no broker"])
def test_without_a_broker_that_takes_it_the_device_works_and_keeps_everything(
    tmp_path: Path, toy: Path, obstacle: str
) -> None:
    with (
        Broker(tmp_path / "broker", tls=True, clients=[Identity("dev1", SITE)]) as broker,
        Broker(tmp_path / "stranger", tls=True) as stranger,
    ):
        config = tables(tmp_path, "dev1", broker, toy)
        if obstacle == "another authority":
            config["broker"]["ca"] = stranger.ca
        elif obstacle == "no broker":
            config["broker"]["port"] = free_port()
        else:  # a certificate of another device: it may connect, and nothing else
            certificate, key = broker.certificate("somebody")
            config["broker"] |= {"certificate": certificate, "key": key}
        with Device(tmp_path, config) as device:
            put_pictures(device.inbox, names("strange", 4), STRANGE)
            status = device.wait(
                "4 samples kept", lambda s: s["samples"].get("escalated") == 4 and s["outbox"]["messages"] >= 8
            )
            if obstacle == "another authority":
                device.wait("why", lambda s: "certificate verify failed" in s["broker"])
            elif obstacle == "no broker":
                device.wait("why", lambda s: "refused" in s["broker"])
            else:
                device.counted("broker_refusals")
                assert "Not authorized" in device.log()
            assert "control_faults" not in status["counters"]
            assert device.stop() == 0
        with Device(tmp_path, config) as device:  # nothing is forgotten
            status = device.wait("status", bool)
            assert status["samples"] == {"escalated": 4}
            assert status["outbox"]["messages"] >= 8


def test_sigterm_finishes_the_item_in_hand_and_leaves_the_rest(tmp_path: Path, broker: Broker, bus: Bus) -> None:
    make_release(tmp_path / "slow", products=HARD_WORK)
    config = tables(tmp_path, "dev1", broker, tmp_path / "slow")
    with Device(tmp_path, config) as device:
        put_pictures(device.inbox, names("item", 12))
        until("the first results", lambda: len(results(bus)) >= 2)
        assert device.stop() == 0
        done = {path.name for path in (device.inbox / "done").iterdir()}
        left = {path.name for path in device.inbox.iterdir() if path.is_file()}
        assert done | left == set(names("item", 12))
        assert not done & left
        assert left, "it was too fast: nothing was left"
        until("what was done was also said", lambda: results(bus).keys() == done)
        states = bus.of(State, "dev1")
        assert [state.state for state in states] == ["online", "offline"]
        assert states[0].boot == states[1].boot
    with device:
        until("all results", lambda: results(bus).keys() == {*names("item", 12)})


def test_kill_9_loses_nothing(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        put_pictures(device.inbox, names("strange", 60), STRANGE)
        device.wait("some samples", lambda s: s["samples"].get("escalated", 0) >= 5)
        device.kill9()
        device.start()
        status = device.wait("60 samples", lambda s: s["samples"].get("escalated") == 60)
        assert status["samples"] == {"escalated": 60}  # the same file again is the same sample
        until("60 results", lambda: {r.item for r in bus.of(Result)} == set(names("strange", 60)))
        until("60 questions", lambda: len({e.sample for e in bus.of(Escalation)}) == 60)


def test_a_device_without_a_model_waits_for_it_and_still_stops(tmp_path: Path, broker: Broker, bus: Bus) -> None:
    config = tables(tmp_path, "dev1", broker, None, pipelines={"line": {"queue_max": 2}})
    with Device(tmp_path, config, ready=False) as device:
        put_pictures(device.inbox, names("early", 8))
        device.wait("a full queue", lambda s: s["pipelines"]["line"]["waiting"] == 2)
        assert device.stop() == 0  # the source waits for room and the preparer for a model: neither may hang
        device.start()
        make_release(tmp_path / "first")
        with file_server() as server:
            ref = ReleaseRef(release="toy@1.0", sha256=sha256_of(tmp_path / "first" / "release.json"))
            server.publish(tmp_path / "first", ref)
            bus.say(topics.HOST(trainer="t1"), messages.HostState(**bus.stamp(), state="online", url=server.url))
            bus.desire("dev1", 1, {"eye": ref})
            until("all results", lambda: results(bus).keys() == set(names("early", 8)))


def test_a_second_daemon_on_the_same_state_is_refused(tmp_path: Path, broker: Broker, toy: Path) -> None:
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        second = device.cli("run")
        assert second.returncode == 1
        assert "another edged runs with this state_dir; stop it or choose another" in second.stderr
        assert "Traceback" not in second.stderr
        assert device.status() is not None
        assert device.stop() == 0
        absent = device.cli("status")
        assert absent.returncode == 3
        assert "no edged runs with state_dir" in absent.stderr


def test_check_names_what_is_wrong_before_deployment(tmp_path: Path, broker: Broker, toy: Path) -> None:
    good = Device(tmp_path, tables(tmp_path, "dev1", broker, toy)).cli("check")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "toy@1.0 answers 2 golden inputs as promised" in good.stdout
    make_release(tmp_path / "liar", golden_label=1)
    config = tables(tmp_path, "dev2", broker, tmp_path / "liar", broker={"port": free_port()})
    bad = Device(tmp_path, config).cli("check")
    assert bad.returncode == 1
    assert "FAIL broker" in bad.stdout
    assert "expected class 1" in bad.stdout


def test_infer_answers_one_picture_without_a_daemon(tmp_path: Path, broker: Broker, toy: Path) -> None:
    device = Device(tmp_path, tables(tmp_path, "dev1", broker, toy))
    (tmp_path / "a.png").write_bytes(picture())
    answer = json.loads(device.cli("infer", "eye", "--image", str(tmp_path / "a.png")).stdout)
    assert (answer["release"], answer["prediction"][0]["label"], answer["decision"]) == ("toy@1.0", "cat", "accept")
    (tmp_path / "b.png").write_bytes(b"junk")
    refused = device.cli("infer", "eye", "--image", str(tmp_path / "b.png"))
    assert refused.returncode == 1
    assert "no complete JPEG" in refused.stderr
