"""A bad release in a fleet of real devices: `edged run` three times, a responder, `trainer serve`, mosquitto (L11-L13).

The release is sound: it proves itself, is as sure as the one before and answers as fast. It is wrong about what the devices
see, which only the audits show.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.wire.messages import Desired, Metrics
from tests.support.device import SITE, Bus, Device, merged, tables, toml, until
from tests.support.models import PLAIN, picture
from tests.system.broker import Broker
from tests.system.test_tiers import SURE, alive, model, responder

CAMERAS = ("cam1", "cam2", "cam3")
PACE_S = 0.25  # between two pictures of a camera
RIGHT, WRONG = 0, 1  # classes: what the responder says, and what the bad release says


class Host:
    """`trainer serve` and its command line."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        folder.mkdir()
        self.config, self.log = folder / "trainer.toml", folder / "serve.log"
        self.config.write_text(
            toml(
                {
                    "name": "host", "site": SITE, "data_dir": "data", "broker": {"port": broker.port}, "http": {"port": 0},
                    "rollout": {
                        "steps": [0.3, 1.0], "watch_s": 20.0, "items_min": 20, "audits_planned": 20, "extend_max": 8,
                        "latency_factor": 20.0, "memory_factor": 20.0, "temperature_margin": 90.0, "failed_grace_s": 2.0,
                    },
                    "models": {"eye": {
                        "tier": "device", "checkpoint": "first.pt", "labels": ["cat", "dog"], "imgsz": 32,
                        "holdout": "holdout", "holdout_clean": "clean", "calibration": "calibration",
                        "threshold": 1_000_000,
                    }},
                }
            )
        )  # fmt: skip

    @contextmanager
    def serving(self) -> Iterator[None]:
        command = [sys.executable, "-m", "trainer", "serve", "--config", str(self.config)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield
        except BaseException:
            print(self.log.read_text()[-6000:])
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)

    def call(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "trainer", *arguments, "--config", str(self.config), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ended(self, release: str) -> dict[str, Any]:
        """The rollout, once it is over or waits for a person."""

        def look() -> dict[str, Any] | None:
            shown: dict[str, Any] = self.call("rollout", "status", release)
            time.sleep(1)
            return shown if shown["status"] in ("done", "aborted", "held") else None

        return until(f"the rollout of {release} has ended", look, 240)


@contextmanager
def feeding(devices: list[Device]) -> Iterator[None]:
    """Every camera gets a picture now and then, each with other bytes."""
    stopping = threading.Event()

    def feed() -> None:
        for number in itertools.count():
            for device in devices:
                beside = device.inbox / f".{number}.png"
                beside.write_bytes(picture(PLAIN, number))
                beside.rename(device.inbox / f"{number}.png")
            if stopping.wait(PACE_S):
                return

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def camera(folder: Path, name: str, broker: Broker, seed: Path) -> Device:
    audits = {"audit_share": 0.3, "dedupe_s": 0.0, "messages_per_minute": 6000}
    more = {"device": {"tier": "device"}, "pipelines": {"line": {"policy": audits}}}
    return Device(folder, merged(tables(folder, name, broker, seed), more))


def ever_told(bus: Bus, release: str) -> set[str]:
    """The devices whose desired state ever named the release."""
    heard = [(fields, message) for _, fields, message in list(bus.heard) if isinstance(message, Desired)]
    return {fields["dev"] for fields, told in heard if any(ref.release == release for ref in told.models.values())}


def answered(bus: Bus, release: str) -> set[str]:
    """The devices that ever answered anything with the release."""
    return {
        fields["dev"] for _, fields, m in list(bus.heard) if isinstance(m, Metrics) and m.release == release and m.items
    }


@pytest.mark.long
@pytest.mark.timeout(900)
def test_l13_real_devices_go_back_from_a_bad_release_and_on_to_a_good_one(
    tmp_path: Path, broker: Broker, bus: Bus
) -> None:
    first, bad = model(tmp_path, "eye@1.0", RIGHT, SURE), model(tmp_path, "eye@1.1", WRONG, SURE)
    good = model(tmp_path, "eye@1.2", RIGHT, SURE, products=1)
    teacher = model(tmp_path, "teacher@1.0", RIGHT, SURE)
    host = Host(tmp_path / "host", broker)
    for folder in (first, bad, good):
        host.call("release", "add", str(folder))
    with ExitStack() as stack:
        stack.enter_context(host.serving())
        big = merged(responder(tmp_path, "big1", broker, teacher, "big"), {"device": {"tier": "big"}})
        stack.enter_context(Device(tmp_path, big))
        alive(bus, "big")
        devices = [stack.enter_context(camera(tmp_path, name, broker, first)) for name in CAMERAS]
        stack.enter_context(feeding(devices))
        for device in devices:  # a past to be compared with
            device.wait("audited answers", lambda s: s["samples"].get("labelled", 0) >= 15, 120)

        (canary,) = host.call("rollout", "start", "eye@1.1", "--unjudged", "made by hand")["canary"]
        ended = host.ended("eye@1.1")
        assert ended["status"] == "aborted", ended
        assert "audited agreement" in ended["reason"]
        assert "1/1 are back on the previous release" in ended["reason"]
        assert ever_told(bus, "eye@1.1") == {canary} == answered(bus, "eye@1.1")
        for device in devices:
            device.wait("the release before serves", lambda s: s["models"]["eye"]["active"] == "eye@1.0")

        host.call("rollout", "start", "eye@1.2", "--unjudged", "made by hand")
        ended = host.ended("eye@1.2")
        assert (ended["status"], ended["progress"]) == ("done", "3/3 nodes"), ended
        for device in devices:
            device.wait("the good release serves", lambda s: s["models"]["eye"]["active"] == "eye@1.2")
