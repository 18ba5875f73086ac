"""Releases as blocks over a real broker to a real `edged run`, through everything that breaks on the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edged.files import sha256_of
from edged.wire.blocks import BLOCK_BYTES, WINDOW
from edged.wire.manifest import ReleaseManifest, ReleaseRef
from edged.wire.messages import Reported
from tests.support.blocks import BlockHost, Forger, ballasted
from tests.support.device import SITE, Bus, Device, tables, until
from tests.support.files import file_server
from tests.support.slow_link import SlowLink
from tests.system.broker import Broker
from trainer.core.access import Identity

KIB = 3072  # of the ballast: 48 blocks
SLOW_KIB_S = 512  # so that there is a middle to be killed in


def plan(folder: Path, broker: Broker, seed: Path, name: str = "dev1", **host: Any) -> dict[str, Any]:
    return tables(folder, name, broker, seed, host={"carrier": "mqtt", **host})


def eye(status: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = status["models"]["eye"]
    return model


def committed(status: dict[str, Any]) -> bool:
    return bool(eye(status)["update"] == "committed" and eye(status)["active"] == "toy@1.1")


def fetched(status: dict[str, Any]) -> int:
    """Bytes of the release that are here while it is fetched, else 0."""
    return int((eye(status).get("progress") or {}).get("bytes", 0))


def half(device: Device) -> None:
    device.wait("half of it is here", lambda s: fetched(s) > KIB * 1024 // 2, 60)


def blocks_of(folder: Path) -> int:
    """Blocks of a release that is fetched from nothing but its predecessor, with the manifest."""
    manifest = ReleaseManifest.model_validate_json((folder / "release.json").read_bytes())
    return 1 + sum(len(manifest.files[role].blocks) for role in ("model", "ballast", "golden_outputs"))


@pytest.fixture
def release(tmp_path: Path, toy2: Path) -> tuple[Path, ReleaseRef]:
    return tmp_path / "next", ballasted(toy2, tmp_path / "next", KIB)


def test_a_release_comes_block_by_block_and_each_block_once(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef]
) -> None:
    folder, ref = release
    with (
        BlockHost(tmp_path / "host", broker, bus) as host,
        Device(tmp_path, plan(tmp_path, broker, toy, carrier="auto")) as device,
    ):
        host.registry.register(folder)
        bus.desire("dev1", 1, {"eye": ref})
        counters = device.wait("committed", committed)["counters"]
        total = host.counters["blocks_published"]
        assert counters["blocks_received"] == total == counters["blocks_asked"]
        assert total <= blocks_of(folder)
        assert counters.get("blocks_wrong", 0) == counters.get("blocks_twice", 0) == 0
        there = device.state_dir / "releases" / f"toy@1.1-{ref.sha256[:12]}" / "ballast.bin"
        assert sha256_of(there) == sha256_of(folder / "ballast.bin")
        assert not list(there.parent.glob("*.part"))


def test_progress_is_reported_while_it_comes(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef]
) -> None:
    folder, ref = release
    host_plan = plan(tmp_path, broker, toy, bandwidth_kib_s=SLOW_KIB_S)
    with BlockHost(tmp_path / "host", broker, bus) as host, Device(tmp_path, host_plan) as device:
        host.registry.register(folder)
        bus.desire("dev1", 1, {"eye": ref})
        device.wait("committed", committed)
        seen = [r.models["eye"].progress for r in bus.of(Reported, "dev1") if r.models["eye"].progress is not None]
        assert seen, "the trainer sees how far it is"
        assert all(p.bytes <= p.total and p.total > KIB * 1024 for p in seen)
        assert [p.bytes for p in seen] == sorted(p.bytes for p in seen)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["device", "broker", "trainer"])
def test_whoever_is_killed_at_half_the_rest_is_fetched_and_little_else(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef], victim: str
) -> None:
    folder, ref = release
    host_plan = plan(tmp_path, broker, toy, bandwidth_kib_s=SLOW_KIB_S)
    with BlockHost(tmp_path / "host", broker, bus) as host, Device(tmp_path, host_plan) as device:
        host.registry.register(folder)
        bus.desire("dev1", 1, {"eye": ref})
        half(device)
        if victim == "device":
            device.kill9()
            device.start()
        elif victim == "broker":
            broker.kill9()
            broker.start()
        else:
            published = host.counters["blocks_published"]
            host.stop()
            host.start()
            host.counters["blocks_published"] = published
        status = device.wait("committed", committed, 90)
        assert host.counters["blocks_published"] <= blocks_of(folder) + WINDOW
        assert status["counters"].get("blocks_wrong", 0) == 0


def test_forged_blocks_are_counted_and_never_accepted(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef]
) -> None:
    folder, ref = release
    slowly = plan(tmp_path, broker, toy, bandwidth_kib_s=1024)  # else it is over before a forger can be quick enough
    with BlockHost(tmp_path / "host", broker, bus) as host, Device(tmp_path, slowly) as device:
        host.registry.register(folder)
        forger = Forger(bus, sha256_of(folder / "ballast.bin"), KIB * 1024 // BLOCK_BYTES, BLOCK_BYTES)
        try:
            until("it is at work", lambda: forger.published > 50)
            bus.desire("dev1", 1, {"eye": ref})
            device.wait("committed", committed, 60)
        finally:
            forger.stop()
        assert device.counted("blocks_wrong")["models"]["eye"]["active"] == "toy@1.1"
        there = device.state_dir / "releases" / f"toy@1.1-{ref.sha256[:12]}" / "ballast.bin"
        assert sha256_of(there) == sha256_of(folder / "ballast.bin")


def test_with_certificates_blocks_have_an_identity_of_their_own_and_only_the_trainer_publishes_them(
    tmp_path: Path, toy: Path, release: tuple[Path, ReleaseRef]
) -> None:
    folder, ref = release
    clients = [Identity("host", SITE, roles=("trainer",)), Identity("dev1", SITE), Identity("dev2", SITE)]
    with Broker(tmp_path / "broker", tls=True, clients=clients) as broker:
        certificate, key = broker.certificate("dev1~blk")
        slowly = plan(tmp_path, broker, toy, bandwidth_kib_s=1024)
        slowly["broker"] |= {"bulk_certificate": certificate, "bulk_key": key}
        bus, thief = Bus(broker, "host"), Bus(broker, "dev2~blk")
        try:
            with BlockHost(tmp_path / "host", broker, bus) as host, Device(tmp_path, slowly) as device:
                host.registry.register(folder)
                ballast = sha256_of(folder / "ballast.bin")
                forger = Forger(thief, ballast, KIB * 1024 // BLOCK_BYTES, BLOCK_BYTES)
                try:
                    bus.desire("dev1", 1, {"eye": ref})
                    counters = device.wait("committed", committed, 60)["counters"]
                finally:
                    forger.stop()
                assert forger.published > 50
                assert "blocks_wrong" not in counters
        finally:
            bus.close()
            thief.close()


def test_what_two_devices_want_is_published_once(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef]
) -> None:
    folder, ref = release
    with (
        BlockHost(tmp_path / "host", broker, bus, window_s=1.0) as host,
        Device(tmp_path, plan(tmp_path, broker, toy, bandwidth_kib_s=SLOW_KIB_S)) as one,
        Device(tmp_path, plan(tmp_path, broker, toy, "dev2", bandwidth_kib_s=SLOW_KIB_S)) as two,
    ):
        host.registry.register(folder)
        for name in ("dev1", "dev2"):
            bus.desire(name, 1, {"eye": ref})
        for device in (one, two):
            device.wait("committed", committed, 60)
        assert host.counters["blocks_answered"] >= 2 * blocks_of(folder)
        assert host.counters["blocks_published"] <= 1.5 * blocks_of(folder)


def test_a_slow_device_loses_nothing_and_holds_nobody_up(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path
) -> None:
    ref = ballasted(toy2, tmp_path / "small", 1024)
    link = SlowLink(broker.port, 128 << 10)
    slowly = plan(tmp_path, broker, toy, "dev2")
    slowly["broker"] |= {"port": link.port}
    try:
        with (
            BlockHost(tmp_path / "host", broker, bus, patience_s=0.2) as host,
            Device(tmp_path, plan(tmp_path, broker, toy)) as one,
            Device(tmp_path, slowly) as two,
        ):
            host.registry.register(tmp_path / "small")
            for name in ("dev1", "dev2"):
                bus.desire(name, 1, {"eye": ref})
            one.wait("committed", committed, 60)
            counters = two.wait("committed", committed, 60)["counters"]
            assert counters["blocks_asked"] == counters["blocks_received"], "nothing is asked for again in impatience"
            assert "blocks_twice" not in counters
    finally:
        link.close()


def test_a_release_that_is_only_an_adapter_more_costs_only_that(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef], toy2: Path
) -> None:
    """What another release here has is linked, not sent."""
    folder = release[0]
    with BlockHost(tmp_path / "host", broker, bus) as host, Device(tmp_path, plan(tmp_path, broker, folder)) as device:
        changed = ballasted(toy2, tmp_path / "more", KIB, "toy@1.2")  # the same bytes under another version
        host.registry.register(tmp_path / "more")
        bus.desire("dev1", 1, {"eye": changed})
        device.wait("committed", lambda s: eye(s)["active"] == "toy@1.2" and eye(s)["update"] == "committed")
        assert host.counters["blocks_published"] == 1, "its manifest"


def test_without_a_trainer_that_serves_blocks_auto_takes_https(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef]
) -> None:
    folder, ref = release
    with file_server() as files:
        files.publish(folder, ref)
        host_plan = plan(tmp_path, broker, toy, carrier="auto", url=files.url)
        with Device(tmp_path, host_plan) as device:
            bus.desire("dev1", 1, {"eye": ref})
            status = device.wait("committed", committed)
            assert "carrier_failures" not in status["counters"]


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ({"metered": True, "metered_mib_max": 1}, r"3\.0 MiB are missing, and this link is metered: at most 1 MiB"),
        ({"carrier": "mqtt"}, ""),
    ],
)
def test_a_metered_link_says_why_it_waits(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, release: tuple[Path, ReleaseRef], host: dict[str, Any],
    said: str,
) -> None:  # fmt: skip
    folder, ref = release
    with (
        BlockHost(tmp_path / "host", broker, bus) as trainer,
        Device(tmp_path, plan(tmp_path, broker, toy, **host)) as device,
    ):
        trainer.registry.register(folder)
        bus.desire("dev1", 1, {"eye": ref})
        if not said:
            device.wait("committed", committed)
            return
        status = device.wait("it waits", lambda s: eye(s)["update"] == "failed")
        assert re.search(said, eye(status)["reason"])
        assert trainer.counters["blocks_published"] == 1, "its manifest, which says how much is missing"
