"""A real device within its limits: it refuses what does not fit, gives one model for another, works less when it is hot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged.releases import reference
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Event, Result
from tests.support.cgroups import ConfinedDevice, ControlGroup, NoControlGroups
from tests.support.device import Bus, Device, tables, until
from tests.support.files import FileServer, file_server
from tests.support.heavy import make_heavy
from tests.support.hosted import PLAIN, PROMPT, clerk
from tests.support.machines import zone
from tests.support.models import make_release, put_pictures
from tests.system.broker import Broker

MIB = 1 << 20
CPU_WINDOW_S = 30.0  # over which CPU time is promised to stay below its share


@pytest.fixture
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    try:
        made = ControlGroup()
    except NoControlGroups as reason:
        print(f"no control groups: {reason}")
        pytest.skip(f"this machine has no control groups for us: {reason}")
    with made:
        yield made


@contextmanager
def confined(folder: Path, configured: dict[str, Any], group: ControlGroup) -> Iterator[Device]:
    device = ConfinedDevice(folder, configured)
    device.group = group
    with device:
        yield device


def eye(status: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = status["models"]["eye"]
    return model


def used(device: Device) -> int:
    """Bytes that the daemon holds, as it says itself, once its model is loaded and everything has come to rest."""
    status = device.wait("the first readings", lambda s: s["limits"].get("memory"))
    time.sleep(2.5)  # the next reading
    status = device.status() or status
    return int(status["limits"]["memory"]["used_mib"]) * MIB


class Feeder:
    """Puts a picture into a device's folder every few hundredths of a second."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._enough = folder, threading.Event()
        self.written: list[str] = []
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        while not self._enough.wait(0.05):
            name = f"frame{len(self.written):05}.png"
            put_pictures(self._folder, [name])
            self.written.append(name)

    def stop(self) -> None:
        self._enough.set()
        self._thread.join()


def still_answers(device: Device, bus: Bus, name: str, label: str = "cat") -> None:
    """A new picture is answered by the model that finds `label`."""
    put_pictures(device.inbox, [name])
    (result,) = until(f"the result for {name}", lambda: [r for r in bus.of(Result) if r.item == name])
    assert [box.label for box in result.prediction] == [label]


def events(bus: Bus, kind: str) -> list[str]:
    return [event.text for event in bus.of(Event) if event.kind == kind]


# What does not fit.


def refuses(device: Device, bus: Bus, files: FileServer, folder: Path, limit: str, eager_mib: int = 0) -> None:
    """Releases too large for `limit`: one shows it by its file, one by far when it computes, and one computes with so much
    that the system grants it at first. Then one that fits."""
    large = make_heavy(folder / "large", "toy@1.1", 1, weights_mib=160)
    hungry = make_heavy(folder / "hungry", "toy@1.2", 1, computed_mib=600)
    eager = make_heavy(folder / "eager", "toy@1.3", 1, computed_mib=eager_mib)
    fits = make_release(folder / "fits", "toy@1.4", 1)
    for name, ref in {"large": large, "hungry": hungry, "eager": eager, "fits": fits}.items():
        files.publish(folder / name, ref)
    for rev, ref in ((1, large), (2, hungry), (3, eager))[: 3 if eager_mib else 2]:
        bus.desire(device.name, rev, {"eye": ref})

        def refused(status: dict[str, Any], ref: ReleaseRef = ref) -> bool:
            return eye(status)["update"] == "failed" and any(
                ref.release in text for text in events(bus, "update_failed")
            )

        report = eye(device.wait(f"{ref.release} is refused", refused, seconds=90))
        assert report["active"] == "toy@1.0"
        assert report["reason"].startswith("needs at least ")
        assert "beside toy@1.0; " in report["reason"]
        assert limit in report["reason"]
        assert 'set swap = "replace" in [slots.eye]' in report["reason"]
        still_answers(device, bus, f"after-{ref.release}.png")
    bus.desire(device.name, 4, {"eye": fits})
    device.wait("what fits is used", lambda s: eye(s)["update"] == "committed", seconds=60)
    still_answers(device, bus, "fits.png", "dog")


def test_a_release_that_would_not_fit_the_control_group_is_refused_before_the_kernel_kills(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer, group: ControlGroup
) -> None:
    configured = tables(tmp_path, "dev1", broker, toy, host={"url": files.url})
    with confined(tmp_path, configured, group) as device:
        limit = used(device) + 200 * MIB
        group.memory(limit)
        refuses(device, bus, files, tmp_path, f"of the {limit // MIB} MiB of the control group")
        assert group.oom_kills() == 0


def test_a_release_that_would_not_fit_the_configured_limit_is_refused(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer
) -> None:
    configured = tables(tmp_path, "dev1", broker, toy, host={"url": files.url}, limits={"memory_mib": 350})
    with Device(tmp_path, configured) as device:
        refuses(device, bus, files, tmp_path, "of limits.memory_mib = 350", eager_mib=300)


def test_a_seed_that_does_not_fit_is_said_and_the_daemon_goes_on(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    make_heavy(tmp_path / "large", "large@1.0", weights_mib=160)
    configured = tables(tmp_path, "dev1", broker, toy, limits={"memory_mib": 350})
    configured["slots"]["large"] = {"seed": tmp_path / "large"}
    device = Device(tmp_path, configured, ready=False)
    with device:
        device.wait("the small model is loaded", lambda s: s["models"]["eye"]["active"] == "toy@1.0")
        (text,) = until("it is said", lambda: events(bus, "model_not_loaded"))
        assert text.startswith("large: large@1.0 needs at least 3")
        assert "MiB of limits.memory_mib = 350 are left: use a smaller model, or raise limits.memory_mib" in text
        still_answers(device, bus, "one.png")
        assert (device.status() or {})["models"]["large"]["active"] is None


# One for another.


def replaces(device: Device, bus: Bus, ref: ReleaseRef, make_tight: Callable[[int], None]) -> None:
    """While pictures come all the time, a model is replaced by one for which there is no room beside it."""
    feeder = Feeder(device.inbox)
    try:
        until("the first results", lambda: len(bus.of(Result)) >= 10)
        make_tight(used(device))
        bus.desire(device.name, 1, {"eye": ref})
        device.wait("the new model is kept", lambda s: eye(s)["update"] == "committed", seconds=90)
        before = len(bus.of(Result))
        until("results of the new one", lambda: len(bus.of(Result)) >= before + 10)
    finally:
        feeder.stop()
    until("every result", lambda: len(bus.of(Result)) >= len(feeder.written), seconds=60)
    results = sorted(bus.of(Result), key=lambda result: result.seq)
    assert [result.item for result in results] == feeder.written, "none lost, none twice, in order"
    labels = [result.prediction[0].label for result in results]
    assert labels == ["cat"] * labels.count("cat") + ["dog"] * labels.count("dog")
    assert "cannot be proven beside" not in device.log()
    assert "unloaded, so that eye can be proven" in device.log()
    assert eye(device.status() or {})["swap_ms"] > 0


def swapping(folder: Path, broker: Broker, files: FileServer, **limits: Any) -> tuple[dict[str, Any], ReleaseRef]:
    """A device with a model of 64 MiB that it can only replace, and a successor of the same size."""
    make_heavy(folder / "old", "heavy@1.0", 0, weights_mib=64)
    new = make_heavy(folder / "new", "heavy@1.1", 1, weights_mib=64)
    files.publish(folder / "new", new)
    more: dict[str, Any] = {"limits": limits} if limits else {}
    slots = {"eye": {"swap": "replace", "prove_s_max": 120.0}}
    return tables(folder, "dev1", broker, folder / "old", host={"url": files.url}, slots=slots, **more), new


def test_one_model_replaces_another_in_a_control_group_without_room_for_two(
    tmp_path: Path, broker: Broker, bus: Bus, files: FileServer, group: ControlGroup
) -> None:
    configured, new = swapping(tmp_path, broker, files)
    with confined(tmp_path, configured, group) as device:
        # 168 MiB are needed to prove the new one, and 64 come back when the old one leaves.
        replaces(device, bus, new, lambda now: group.memory(now + 155 * MIB))
        assert group.oom_kills() == 0


def test_if_the_new_model_is_no_good_the_old_one_comes_back(
    tmp_path: Path, broker: Broker, bus: Bus, files: FileServer
) -> None:
    configured, _ = swapping(tmp_path, broker, files, memory_mib=390)
    hungry = make_heavy(tmp_path / "hungry", "heavy@1.2", 1, computed_mib=900)
    files.publish(tmp_path / "hungry", hungry)
    with Device(tmp_path, configured) as device:
        feeder = Feeder(device.inbox)
        try:
            bus.desire(device.name, 1, {"eye": hungry})
            report = eye(device.wait("it is refused", lambda s: eye(s)["update"] == "failed", seconds=90))
            assert "needs at least " in report["reason"]
            assert "in place of heavy@1.0; " in report["reason"]
            device.wait("the old one serves", lambda s: eye(s)["active"] == "heavy@1.0")
            assert "unloaded, so that eye can be proven" in device.log()
        finally:
            feeder.stop()
        until("every result", lambda: len(bus.of(Result)) >= len(feeder.written))
        assert {result.prediction[0].label for result in bus.of(Result)} == {"cat"}


@pytest.mark.alone  # what a process has to itself of its libraries depends on who else runs
def test_prompts_wait_while_one_language_model_replaces_another(
    tmp_path: Path, broker: Broker, bus: Bus, files: FileServer, phi: dict[str, Path]
) -> None:
    seed = clerk(tmp_path / "old", phi["model_gguf"], "clerk@1.0")
    new = reference(clerk(tmp_path / "new", phi["model_gguf"], "clerk@1.1"))
    files.publish(tmp_path / "new", new)
    configured = tables(tmp_path, "dev1", broker, None, host={"url": files.url})
    configured["slots"] = {"eye": {"seed": seed, "swap": "replace", "probation_s": 0.5}}
    configured["pipelines"] = {"chat": {"slot": "eye", "task": "generate", "source": {"type": "mqtt"}}}
    with Device(tmp_path, configured) as device:
        now = used(device)
    configured["limits"] = {"memory_mib": now // MIB + 30}  # a process of 40 MiB and more does not fit beside
    with Device(tmp_path, configured) as device:
        asked = [bus.ask("dev1", "chat", generation_prompt=PROMPT)]
        bus.reply(asked[0])
        bus.desire("dev1", 1, {"eye": new})
        while eye(device.status() or {})["update"] != "committed":
            asked.append(bus.ask("dev1", "chat", generation_prompt=PROMPT))
            time.sleep(0.2)
            assert len(asked) < 300, device.log()
        replies = [bus.reply(request) for request in asked]
        assert "unloaded, so that eye can be proven" in device.log()
    assert {(reply.generated_response, reply.error) for reply in replies} == {(PLAIN, None)}
    assert {reply.release for reply in replies} == {"clerk@1.0", "clerk@1.1"}


# Heat and CPU time.


def test_a_hot_device_works_less_says_so_and_recovers(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    sensors = tmp_path / "thermal"
    zone(sensors, 0, "50000")
    zone(sensors, 1, "-274000")
    configured = tables(tmp_path, "dev1", broker, toy, limits={"thermal_root": sensors})
    with Device(tmp_path, configured) as device:
        status = device.wait("the first readings", lambda s: s["limits"])
        assert (status["limits"]["share"], status["limits"]["why"]) == (1.0, "")
        assert status["limits"]["temperature"]["c"] == 50.0
        assert status["limits"]["temperature"]["ignored"] == {"thermal_zone1": "it says -274 degrees"}
        zone(sensors, 0, "80000")
        status = device.wait("it works less", lambda s: s["limits"]["share"] < 1)
        assert status["limits"]["share"] == pytest.approx(0.525)
        assert status["pace"] == pytest.approx(0.525), "what the workers go by"
        assert status["limits"]["why"] == "temperature: 80 °C is above 75 °C"
        assert "temperature: 80 °C is above 75 °C" in device.cli("status").stdout
        still_answers(device, bus, "hot.png")
        zone(sensors, 0, "84000")
        device.wait("still less", lambda s: s["limits"]["share"] < 0.2)
        zone(sensors, 0, None)
        device.wait("the sensor is missed", lambda s: "thermal_zone0" in s["limits"]["temperature"]["ignored"])
        assert (device.status() or {})["limits"]["share"] < 0.2, "a sensor that has gone is not a cold one"
        zone(sensors, 0, "60000")
        status = device.wait("full speed", lambda s: s["limits"]["share"] == 1.0)
        assert status["counters"]["temperature_slowdowns"] == 1
        still_answers(device, bus, "cool.png")
    assert (
        "thermal_zone0 has 80 °C, limits.temperature_soft_c = 75"
        in until("the event", lambda: events(bus, "temperature_high"))[0]
    )
    assert len(until("the end of it", lambda: events(bus, "temperature_ok"))) == 1


@pytest.mark.alone
def test_cpu_time_stays_below_its_share_of_what_the_control_group_allows(
    tmp_path: Path, broker: Broker, bus: Bus, group: ControlGroup
) -> None:
    group.cores(0.8)
    busy = make_release(tmp_path / "busy", "toy@1.0", products=60)
    assert busy.release == "toy@1.0"
    configured = tables(tmp_path, "dev1", broker, tmp_path / "busy", limits={"cpu_share": 0.5})
    with confined(tmp_path, configured, group) as device:
        assert device.process is not None
        status = device.wait("the first readings", lambda s: s["limits"])
        assert status["limits"]["cpu"]["cores"] == 0.8
        feeder = Feeder(device.inbox)
        try:
            status = device.wait("it slows down", lambda s: s["limits"]["share"] < 1, seconds=60)
            assert status["limits"]["why"] == "cpu: limits.cpu_share = 0.5"
            answered = len(bus.of(Result))
            until("it has settled", lambda: len(bus.of(Result)) >= answered + 30, seconds=60)
            before, began = psutil.Process(device.process.pid).cpu_times(), time.monotonic()
            time.sleep(CPU_WINDOW_S)
            after, ended = psutil.Process(device.process.pid).cpu_times(), time.monotonic()
        finally:
            feeder.stop()
        used = (after.user + after.system - before.user - before.system) / (ended - began)
        print(f"{used:.3f} of {0.8 * 0.5:.3f} cores used")
        assert used <= 0.8 * 0.5
