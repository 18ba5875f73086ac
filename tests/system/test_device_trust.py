"""A real daemon in the device's own environment and signed releases over a trainer's HTTP: what is refused, what goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.releases import reference
from edged.wire.messages import Event, Result
from tests.support.device import Bus, Device, tables, until
from tests.support.models import put_pictures
from tests.support.trusted import DAY_S, Owner
from tests.system.broker import Broker
from trainer.server import Server, ServerOptions


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "owner")


@pytest.fixture
def url(tmp_path: Path, owner: Owner) -> Iterator[str]:
    server = Server(
        ServerOptions("127.0.0.1", 0, 1 << 20), owner.registry, tmp_path / "samples",
        claimed=lambda _: False, status=dict, arrived=lambda _: None, metadata=owner.repository.read,
    )  # fmt: skip
    server.start()
    yield server.url
    server.stop()


def enrolled(tmp_path: Path, broker: Broker, seed: Path, url: str, root: Path | None) -> dict[str, Any]:
    base = tables(tmp_path, "dev1", broker, seed, host={"url": url})
    return {**base, "trust": {} if root is None else {"root": root}}


def eye(status: dict[str, Any]) -> tuple[str, str, str]:
    model = status["models"]["eye"]
    return model["active"], model["update"], model["reason"]


def answers(bus: Bus, device: Device, name: str) -> None:
    """The device infers, whatever its updates do."""
    put_pictures(device.inbox, [name])
    until(f"{name} is answered", lambda: [r for r in bus.of(Result) if r.item == name])


def test_expired_metadata_refuses_installs_while_inference_goes_on(
    tmp_path: Path, broker: Broker, bus: Bus, owner: Owner, url: str, toy: Path, toy2: Path
) -> None:
    owner.release(toy)
    ref = owner.release(toy2)
    root = tmp_path / "root.json"
    shutil.copyfile(owner.repository.root(), root)
    stopped_yesterday = owner.at(time.time() - 30 * DAY_S)
    stopped_yesterday.publish(stopped_yesterday.current(), {"models"})
    with Device(tmp_path, enrolled(tmp_path, broker, toy, url, root)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        status = device.wait("refused", lambda s: eye(s)[1] == "failed")
        assert "expired: nothing is installed until the trainer renews it" in eye(status)[2]
        device.counted("releases_untrusted", 2)  # it is tried again
        answers(bus, device, "during.png")
        events = [event for event in bus.of(Event) if event.kind == "release_untrusted"]
        assert len(events) == 1
        assert "toy@1.1" in events[0].detail["release"]
        assert status["trust"]["mode"] == "signed"
        owner.repository.renew()
        status = device.wait("installed", lambda s: eye(s)[:2] == ("toy@1.1", "committed"))
        assert status["trust"]["root_version"] == 1
        assert status["trust"]["refused"] is None
        assert "trust      root 1, metadata checked " in device.cli("status").stdout
        answers(bus, device, "after.png")
        assert device.stop() == 0
        device.start()
        assert device.wait("the floor is kept", lambda s: s["trust"]["at"])["trust"]["floor"] > time.time() - 3600


def test_a_revoked_release_goes_on_where_it_runs_and_comes_to_no_other_device(
    tmp_path: Path, broker: Broker, bus: Bus, owner: Owner, url: str, toy: Path, toy2: Path
) -> None:
    ref = owner.release(toy2)
    root = owner.repository.root()
    with Device(tmp_path, enrolled(tmp_path, broker, toy, url, root)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        device.wait("installed", lambda s: eye(s)[:2] == ("toy@1.1", "committed"))
        owner.repository.revoke("toy@1.1", "it burns")
        assert device.stop() == 0
        device.start()
        device.wait("it serves", lambda s: eye(s)[0] == "toy@1.1")
        answers(bus, device, "a.png")
    shutil.rmtree(tmp_path / "dev1")
    with Device(tmp_path, enrolled(tmp_path, broker, toy, url, root)) as device:
        status = device.wait("refused", lambda s: eye(s)[1] == "failed")
        assert eye(status)[0] == "toy@1.0"
        assert "toy@1.1 is not signed: nobody released it, or it was revoked" in eye(status)[2]


def test_without_a_root_only_the_seed_runs_and_everything_names_the_fix(
    tmp_path: Path, broker: Broker, bus: Bus, owner: Owner, url: str, toy: Path, toy2: Path
) -> None:
    ref = owner.registry.register(toy2)
    with Device(tmp_path, enrolled(tmp_path, broker, toy, url, None)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        status = device.wait("refused", lambda s: eye(s)[1] == "failed")
        assert "knows no root and accepts no release: enrol it" in eye(status)[2]
        answers(bus, device, "a.png")
        assert "trust      no root: every release is refused; enrol this device" in device.cli("status").stdout
        assert (
            "WARN trust: no root: every release that the fleet desires is refused"
            in device.cli("check", "--no-prove").stdout
        )
    assert reference(toy2) == ref
