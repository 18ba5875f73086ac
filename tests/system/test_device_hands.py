"""People roll back, pin and unpin on a running device: on its command line, and over MQTT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.releases import reference
from edged.wire import messages, topics
from edged.wire.messages import CommandState, Reported, Result
from tests.support.device import SITE, Bus, Device, tables, until
from tests.support.files import FileServer, file_server
from tests.support.models import make_release, put_pictures
from tests.system.broker import Broker


@pytest.fixture
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def device(tmp_path: Path, broker: Broker, toy: Path, toy2: Path, files: FileServer) -> Iterator[Device]:
    for folder in (toy, toy2):
        files.publish(folder, reference(folder))
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy, host={"url": files.url})) as running:
        yield running


def eye(status: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = status["models"]["eye"]
    return model


def runs(release: str, update: str) -> Any:
    return lambda status: (eye(status)["active"], eye(status)["update"]) == (release, update)


def answers_as(device: Device, bus: Bus, name: str, release: str) -> None:
    put_pictures(device.inbox, [name])
    assert until(name, lambda: next((r for r in bus.of(Result) if r.item == name), None)).release == release


def command(bus: Bus, kind: str, order: str, body: messages.Message) -> CommandState:
    """Send an order until it is done or failed, as the trainer does; how it ended."""
    bus.online("dev1")
    bus.say(topics.COMMAND(site=SITE, dev="dev1", type=kind, id=order), body)

    def ended() -> CommandState | None:
        return next((s for s in bus.of(CommandState) if s.command == order and s.state != "accepted"), None)

    return until(f"{kind} {order} ends", ended)


def test_a_rollback_on_the_device_holds_against_the_same_desire_and_a_restart(
    device: Device, bus: Bus, files: FileServer, toy2: Path
) -> None:
    newer = reference(toy2)
    bus.desire("dev1", 1, {"eye": newer})
    device.wait("committed", runs("toy@1.1", "committed"))
    files.files.clear()  # from here on there is nothing to fetch
    done = device.cli("rollback", "eye")
    assert (done.returncode, done.stdout) == (0, "eye: the release before serves again\n"), done.stderr
    status = device.wait("back", runs("toy@1.0", "reverted"))
    assert (eye(status)["reason"], eye(status)["held"]) == ("rolled back by a person", "toy@1.1")
    answers_as(device, bus, "back.png", "toy@1.0")
    assert "holds off toy@1.1" in device.cli("status").stdout
    again = device.cli("rollback", "eye")
    assert again.returncode == 1
    assert "has just come back from toy@1.1" in again.stderr

    assert device.stop() == 0
    device.start()
    bus.desire("dev1", 2, {"eye": newer})
    until("it has heard", lambda: any(r.desired_rev == 2 for r in bus.of(Reported)))
    until("the report", lambda: bus.of(Reported)[-1].models["eye"].held == "toy@1.1")
    answers_as(device, bus, "still-back.png", "toy@1.0")
    assert device.cli("unpin", "eye").returncode == 0
    device.wait("forward again", runs("toy@1.1", "committed"))
    answers_as(device, bus, "forward.png", "toy@1.1")


def test_a_pinned_slot_ignores_the_fleet(device: Device, bus: Bus, toy2: Path) -> None:
    assert device.stop() == 0
    pinned = device.cli("pin", "eye")
    assert (pinned.returncode, pinned.stdout) == (0, "no edged runs here: it will do this when it starts\n")
    device.start()
    device.wait("pinned", lambda s: eye(s)["pinned"] == "toy@1.0")
    bus.desire("dev1", 1, {"eye": reference(toy2)})
    until("it has heard", lambda: any(r.desired_rev == 1 for r in bus.of(Reported)))
    report = bus.of(Reported)[-1].models["eye"]
    assert (report.active, report.update, report.pinned) == ("toy@1.0", "idle", "toy@1.0")
    nowhere = device.cli("pin", "eye", "toy@9.9")
    assert nowhere.returncode == 1
    assert "toy@9.9 is not on this device; here are: toy@1.0" in nowhere.stderr
    assert device.cli("unpin", "ear").stderr == "no slot 'ear' here; known: eye\n"
    assert device.cli("unpin", "eye").returncode == 0
    device.wait("the fleet's", runs("toy@1.1", "committed"))


def test_the_fleet_orders_over_mqtt_and_hears_how_it_goes(device: Device, bus: Bus, toy: Path, toy2: Path) -> None:
    bus.desire("dev1", 1, {"eye": reference(toy2)})
    device.wait("committed", runs("toy@1.1", "committed"))
    rollback = messages.RollbackCommand(**bus.stamp(), slot="eye")
    assert command(bus, "rollback", "c1", rollback).state == "done"
    assert [s.state for s in bus.of(CommandState) if s.command == "c1"] == ["accepted", "done"]
    device.wait("back", runs("toy@1.0", "reverted"))
    pin = messages.PinCommand(**bus.stamp(), slot="eye", release=reference(toy2))
    assert command(bus, "pin", "c2", pin).state == "done"
    device.wait("what it is pinned to", runs("toy@1.1", "committed"))
    # The trainer has not heard of the first one: it changes nothing when it comes again.
    assert command(bus, "rollback", "c1", rollback).state == "done"
    bus.desire("dev1", 2, {"eye": reference(toy)})
    until("it has heard", lambda: any(r.desired_rev == 2 for r in bus.of(Reported)))
    assert runs("toy@1.1", "committed")(device.status())
    assert command(bus, "unpin", "c3", messages.UnpinCommand(**bus.stamp(), slot="eye")).state == "done"
    device.wait("the fleet's", runs("toy@1.0", "committed"))
    nobody = command(bus, "rollback", "c4", messages.RollbackCommand(**bus.stamp(), slot="ear"))
    assert (nobody.state, nobody.reason) == ("failed", "no slot 'ear' here; known: eye")


def test_a_bad_release_is_named_in_the_report_until_a_person_forgets_it(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer
) -> None:
    ref = make_release(tmp_path / "wrong", "toy@1.1", 1, golden_label=2)
    files.publish(tmp_path / "wrong", ref)
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy, host={"url": files.url})) as device:
        bus.desire("dev1", 1, {"eye": ref})
        device.wait("failed", lambda s: eye(s)["update"] == "failed")
        (bad,) = until("the report", lambda: bus.of(Reported)[-1].bad)
        assert (bad.release, bad.sha256) == ("toy@1.1", ref.sha256)
        assert "golden input 0: expected class 2" in bad.reason
        fetched = len(files.requested)
        done = device.cli("models", "forget", "toy@1.1")
        assert (done.returncode, done.stdout) == (0, "toy@1.1: may be tried again\n"), done.stderr
        until("it is tried again", lambda: len(files.requested) > fetched)
        until("and is bad again", lambda: bus.of(Reported)[-1].bad)


def test_a_release_that_finds_nothing_any_more_does_not_last(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer
) -> None:
    """Nothing fails, and yet it is worse than the one before it: no golden input showed it."""
    ref = make_release(tmp_path / "blind", "toy@1.1", 0, blind_above=0.3)
    files.publish(tmp_path / "blind", ref)
    slot = {"probation_s": 2.0, "probation_items": 30}
    with Device(
        tmp_path, tables(tmp_path, "dev1", broker, toy, host={"url": files.url}, slots={"eye": slot})
    ) as device:
        put_pictures(device.inbox, [f"before{n}.png" for n in range(30)], 150)
        until("what the first one finds", lambda: sum(len(r.prediction) for r in bus.of(Result)) >= 30)
        bus.desire("dev1", 1, {"eye": ref})
        device.wait("probation", runs("toy@1.1", "switched"))
        put_pictures(device.inbox, [f"after{n}.png" for n in range(30)], 150)
        status = device.wait("put back", runs("toy@1.0", "reverted"))
        assert "of its answers are empty, 0% before it" in eye(status)["reason"]
        assert status["bad"][0]["release"] == "toy@1.1"
