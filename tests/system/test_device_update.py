"""Updates of a running device: good releases arrive without losing a frame, bad ones are refused, said and remembered."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged.core.update import RESTARTS_MAX
from edged.releases import reference
from edged.wire import messages
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Event, Reported, Result
from tests.support.device import Bus, Device, tables, until
from tests.support.files import FileServer, file_server
from tests.support.models import DARK, copy_release, make_release, put_pictures
from tests.support.planted import make_crashing, without_golden_set
from tests.system.broker import Broker
from trainer.releases import Registry, file_entry
from trainer.server import Server, ServerOptions


@pytest.fixture
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


def configured(tmp_path: Path, broker: Broker, seed: Path, url: str, **slot: Any) -> dict[str, Any]:
    return tables(tmp_path, "dev1", broker, seed, host={"url": url}, slots={"eye": slot})


def eye(status: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = status["models"]["eye"]
    return model


def test_a_hot_swap_loses_no_frame_and_the_new_release_survives_a_restart(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.register(toy)
    ref = registry.register(toy2)
    server = Server(
        ServerOptions("127.0.0.1", 0, 1 << 20), registry, tmp_path / "samples",
        claimed=lambda _: False, status=dict, arrived=lambda _: None,
    )  # fmt: skip
    server.start()
    written: list[str] = []
    enough = threading.Event()

    def feed(folder: Path) -> None:
        while not enough.wait(0.02):
            name = f"frame{len(written):05}.png"
            put_pictures(folder, [name])
            written.append(name)

    try:
        with Device(tmp_path, configured(tmp_path, broker, toy, server.url)) as device:
            feeder = threading.Thread(target=feed, args=(device.inbox,))
            feeder.start()
            try:
                until("the first results", lambda: len(bus.of(Result)) >= 10)
                bus.desire("dev1", 7, {"eye": ref})
                device.wait("committed", lambda s: eye(s)["update"] == "committed")
                until("results of 1.1", lambda: sum(r.release == "toy@1.1" for r in bus.of(Result)) >= 10)
            finally:
                enough.set()
                feeder.join()
            until("every result", lambda: len(bus.of(Result)) >= len(written))
            answers = sorted(bus.of(Result), key=lambda r: r.seq)
            assert [a.item for a in answers] == written  # in order, none twice, none missing
            releases = [a.release for a in answers]
            swap = releases.index("toy@1.1")
            assert set(releases[:swap]) == {"toy@1.0"}
            assert set(releases[swap:]) == {"toy@1.1"}
            assert [a.prediction[0].label for a in answers] == ["cat"] * swap + ["dog"] * (len(answers) - swap)

            def reported() -> messages.ModelReport | None:
                last = bus.of(Reported)[-1]
                return (
                    last.models["eye"] if last.desired_rev == 7 and last.models["eye"].update == "committed" else None
                )

            said = until("the report", reported)
            assert (said.active, said.previous, said.staged) == ("toy@1.1", "toy@1.0", None)
            assert said.swap_ms is not None
            assert device.stop() == 0
            device.start()
            assert eye(device.wait("1.1 is back", lambda s: eye(s)["active"]))["active"] == "toy@1.1"
            assert "toy@1.1" in device.cli("models", "list").stdout
    finally:
        server.stop()


Make = Callable[[Path, str, FileServer], ReleaseRef]


def altered(name: str, data: bytes) -> Make:
    """A release whose file `name` was overwritten before its manifest was written."""

    def make(folder: Path, release: str, files: FileServer) -> ReleaseRef:
        make_release(folder / "whole", release, 1)
        manifest = json.loads((folder / "whole" / "release.json").read_bytes())
        (folder / "whole" / name).write_bytes(data)
        for entry in manifest["files"].values():
            if entry["path"] == name:
                entry.update(file_entry(folder / "whole" / name).model_dump())
        ref = copy_release(folder / "whole", folder / "altered", {"files": manifest["files"]})
        files.publish(folder / "altered", ref)
        return ref

    return make


def spoiled(spoil: Callable[[bytes], bytes]) -> Make:
    """A good release whose model is served with other bytes."""

    def make(folder: Path, release: str, files: FileServer) -> ReleaseRef:
        ref = made(label=1, lineage={"of": release})(folder, release, files)
        blob = files.blob(folder)
        files.files[blob] = spoil(files.files[blob])
        return ref

    return make


def made(**how: Any) -> Make:
    """A release made in this way."""

    def make(folder: Path, release: str, files: FileServer) -> ReleaseRef:
        ref = make_release(folder, release, **{"label": 1, **how})
        files.publish(folder, ref)
        return ref

    return make


def with_field(**change: Any) -> Make:
    """A good release whose manifest says something else."""

    def make(folder: Path, release: str, files: FileServer) -> ReleaseRef:
        make_release(folder / "good", release, 1)
        ref = copy_release(folder / "good", folder / "odd", change)
        files.publish(folder / "odd", ref)
        return ref

    return make


def another_manifest(folder: Path, release: str, files: FileServer) -> ReleaseRef:
    made()(folder, release, files)
    return ReleaseRef(release=release, sha256="0" * 64)


def of_the_future(folder: Path, release: str, files: FileServer) -> ReleaseRef:
    make_release(folder, release, 1)
    data = (folder / "release.json").read_bytes().replace(b'"schema_version":1', b'"schema_version":9')
    files.files[f"/releases/{release}/release.json"] = data
    return ReleaseRef(release=release, sha256=sha256(data).hexdigest())


def planted(plant: Callable[[Path, str], ReleaseRef]) -> Make:
    """A release that `plant` has made."""

    def make(folder: Path, release: str, files: FileServer) -> ReleaseRef:
        ref = plant(folder, release)
        files.publish(folder, ref)
        return ref

    return make


LATENCY_MS_MAX = 100.0  # of the device that they are tried on

BAD: dict[str, tuple[Make, str]] = {
    "a shorter model": (spoiled(lambda data: data[: len(data) // 2]), "bytes, the server has"),
    "other bytes": (spoiled(lambda data: data[:-1] + b"!"), "expected sha256"),
    "more bytes": (spoiled(lambda data: data + b"!"), "bytes, the server has"),
    "another manifest": (another_manifest, "desired state pins 000000000000"),
    "a manifest of the future": (of_the_future, "schema_version"),
    "not ONNX": (altered("model.onnx", b"junk" * 99), "does not load"),
    "a damaged golden set": (altered("golden_inputs.npz", b"junk"), "pickle"),
    "other answers than promised": (made(golden_label=2), "golden input 0: expected class 2"),
    "it never answers": (made(products=-1), "it did not prove itself within 8 s"),
    "it crashes": (planted(make_crashing), f"the proving process ended with status {-signal.SIGFPE}"),
    "it is too slow": (made(products=600), f"golden answer, latency_ms_max = {LATENCY_MS_MAX:g} in its slot"),
    "nothing to be proven with": (planted(without_golden_set), "no golden set; nothing shows that this model works"),
    "no golden outputs": (altered("golden_outputs.json", b"[]"), "2 golden inputs and 0 outputs"),
    "another kind": (with_field(kind="llm"), "eye runs releases of kind detect, this one is of kind llm"),
    "an adapter": (with_field(kind="lora"), "a release of kind lora cannot go to eye"),
    "an unknown engine": (
        with_field(engine="abacus"),
        "engine 'abacus' is unknown; known: llama, onnx_classify, onnx_detect",
    ),
}


class Line:
    """One device that every bad release is tried on, one after the other."""

    def __init__(self, device: Device, bus: Bus, files: FileServer) -> None:
        self.device, self.bus, self.files, self.rev = device, bus, files, 0

    def desire(self, ref: ReleaseRef) -> None:
        """Name a release, and wait until the device has heard of it."""
        self.rev += 1
        self.bus.desire("dev1", self.rev, {"eye": ref})
        until("it is heard", lambda: any(r.desired_rev == self.rev for r in self.bus.of(Reported)))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("line")
    with Broker(folder / "broker") as broker, file_server() as files:
        bus = Bus(broker)
        try:
            files.publish(toy, reference(toy))
            slot = {"prove_s_max": 8.0, "latency_ms_max": LATENCY_MS_MAX}
            with Device(folder, configured(folder, broker, toy, files.url, **slot)) as device:
                yield Line(device, bus, files)
        finally:
            bus.close()


@pytest.mark.alone
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_release_is_refused_said_and_remembered(tmp_path: Path, line: Line, toy: Path, kind: str) -> None:
    device, bus, files = line.device, line.bus, line.files
    make, reason = BAD[kind]
    release = f"toy@2.{list(BAD).index(kind)}"
    ref, good = make(tmp_path, release, files), reference(toy)
    line.desire(ref)
    status = device.wait("the update failed", lambda s: eye(s)["update"] == "failed")
    assert reason in eye(status)["reason"]
    assert eye(status)["active"] == "toy@1.0"
    event = until("the event", lambda: next((e for e in bus.of(Event) if f"eye: {release}: " in e.text), None))
    assert event.kind == "update_failed"
    assert reason in event.text

    # The same desire again, a better one in between, a restart: these bytes are never fetched again.
    asked = list(files.requested)
    line.desire(ref)
    line.desire(good)
    device.wait("withdrawn", lambda s: eye(s)["update"] == "idle")
    line.desire(ref)
    device.wait("known to be bad", lambda s: eye(s)["reason"].startswith("known to be bad"))
    if kind == "other bytes":
        assert device.stop() == 0
        device.start()
        line.desire(ref)
    line.desire(good)
    device.wait("withdrawn", lambda s: eye(s)["update"] == "idle")
    assert files.requested == asked

    name = f"{release}.png"
    put_pictures(device.inbox, [name])
    answer = until("a result", lambda: next((r for r in bus.of(Result) if r.item == name), None))
    assert (answer.release, answer.prediction[0].label) == ("toy@1.0", "cat")
    kept = [path.name for path in (device.state_dir / "releases").iterdir()]
    assert kept == [f"toy@1.0-{good.sha256[:12]}"], "its files are gone"
    assert "updater_faults" not in device.wait("", bool)["counters"]


def test_a_connection_that_breaks_is_tried_again_until_the_release_is_there(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path, files: FileServer
) -> None:
    ref = reference(toy2)
    files.publish(toy2, ref)
    blob = files.blob(toy2)
    files.cut[blob] = 200
    with Device(tmp_path, configured(tmp_path, broker, toy, files.url)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        status = device.wait("it failed", lambda s: eye(s)["update"] == "failed")
        assert "peer closed connection" in eye(status)["reason"] or "ended after" in eye(status)["reason"]
        until("a second try", lambda: files.requested.count(blob) >= 2)
        del files.cut[blob]
        device.wait("committed", lambda s: eye(s)["update"] == "committed" and eye(s)["active"] == "toy@1.1")


def proving_child(device: Device) -> psutil.Process | None:
    assert device.process is not None
    children = psutil.Process(device.process.pid).children()
    return next((child for child in children if "edged.prove" in child.cmdline()), None)


def test_a_candidate_that_kills_its_process_kills_nothing_else(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer
) -> None:
    ref = made(products=-1)(tmp_path / "endless", "toy@1.1", files)
    with Device(tmp_path, configured(tmp_path, broker, toy, files.url)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        child = until("the proof runs", lambda: proving_child(device))
        child.send_signal(signal.SIGSEGV)
        status = device.wait("it failed", lambda s: eye(s)["update"] == "failed")
        assert f"ended with status {-signal.SIGSEGV}" in eye(status)["reason"]
        assert eye(status)["active"] == "toy@1.0"


@pytest.mark.parametrize("when", ["downloading", "proving"])
def test_an_update_goes_on_after_kill_9(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer, when: str
) -> None:
    # A second of work an answer: long enough to be killed in, short enough to be proved afterwards.
    ref = make_release(tmp_path / "next", "toy@1.1", 1, products=1500)
    files.publish(tmp_path / "next", ref)
    gate = files.held[files.blob(tmp_path / "next")] = threading.Event()
    if when == "proving":
        gate.set()
    with Device(tmp_path, configured(tmp_path, broker, toy, files.url)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        device.wait(when, lambda s: eye(s)["update"] == when)
        child = until("the proof runs", lambda: proving_child(device)) if when == "proving" else None
        device.kill9()
        if child is not None:
            child.kill()  # a power cut would have ended it too
        gate.set()
        device.start()
        device.wait("committed", lambda s: eye(s)["update"] == "committed" and eye(s)["active"] == "toy@1.1")


def test_an_update_that_always_ends_in_a_crash_is_given_up(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer
) -> None:
    ref = made(products=-1)(tmp_path / "endless", "toy@1.1", files)
    with Device(tmp_path, configured(tmp_path, broker, toy, files.url)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        for _ in range(RESTARTS_MAX + 1):
            child = until("the proof runs", lambda: proving_child(device))
            device.kill9()
            child.kill()
            device.start()
        status = device.wait("given up", lambda s: eye(s)["update"] == "failed")
        assert "restarted too often" in eye(status)["reason"]
        assert eye(status)["active"] == "toy@1.0"


def test_a_release_that_fails_in_probation_is_reverted(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, files: FileServer
) -> None:
    ref = make_release(tmp_path / "fragile", "toy@1.1", 1, dark_fails=True)
    files.publish(tmp_path / "fragile", ref)
    plan = configured(tmp_path, broker, toy, files.url, probation_s=60.0)
    plan["pipelines"]["ask"]["escalate_to"] = []  # else a prompt is turned away before it comes to the engine
    with Device(tmp_path, plan) as device:
        bus.desire("dev1", 1, {"eye": ref})
        device.wait("probation", lambda s: eye(s)["update"] == "switched" and eye(s)["active"] == "toy@1.1")
        # Bad input is nobody's fault but its own: it must not end a probation.
        for _ in range(4):
            assert "is no generator" in (bus.reply(bus.ask("dev1", "ask", generation_prompt="Hello")).error or "")
        until("the window with them", lambda: sum(m.errors for m in bus.of(messages.Metrics)) == 4)
        assert eye(device.wait("status", bool))["update"] == "switched"
        put_pictures(device.inbox, [f"dark{n}.png" for n in range(4)], DARK)
        status = device.wait("reverted", lambda s: eye(s)["update"] == "reverted")
        assert eye(status)["active"] == "toy@1.0"
        assert "engine errors during probation" in eye(status)["reason"]
        event = until("the event", lambda: next((e for e in bus.of(Event) if e.kind == "update_reverted"), None))
        assert "toy@1.1" in event.text
        put_pictures(device.inbox, ["dark-again.png"], DARK)
        answer = until("a result", lambda: next((r for r in bus.of(Result) if r.item == "dark-again.png"), None))
        assert (answer.release, answer.error) == ("toy@1.0", None)
        assert device.stop() == 0
        device.start()
        assert eye(device.wait("still 1.0", lambda s: eye(s)["active"]))["active"] == "toy@1.0"


def test_probation_starts_again_after_a_restart(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path, files: FileServer
) -> None:
    ref = reference(toy2)
    files.publish(toy2, ref)
    with Device(tmp_path, configured(tmp_path, broker, toy, files.url, probation_s=600.0)) as device:
        bus.desire("dev1", 1, {"eye": ref})
        before = device.wait("probation", lambda s: eye(s)["update"] == "switched")
        device.kill9()
        # What the disk has lost meanwhile must not be committed just because time has passed.
        shutil.rmtree(device.state_dir / "releases" / f"toy@1.1-{ref.sha256[:12]}")
        device.start()
        status = device.wait("reverted", lambda s: eye(s)["update"] == "reverted")
        assert eye(status)["active"] == "toy@1.0"
        assert eye(status)["since"] > eye(before)["since"]


def test_a_newer_desire_ends_a_slow_download_at_once_and_sigterm_too(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path, files: FileServer
) -> None:
    slow = make_release(tmp_path / "slow", "toy@1.2", 2)
    files.publish(tmp_path / "slow", slow)
    files.held[files.blob(tmp_path / "slow")] = threading.Event()  # for hours
    ref = reference(toy2)
    files.publish(toy2, ref)
    with Device(tmp_path, configured(tmp_path, broker, toy, files.url)) as device:
        bus.desire("dev1", 1, {"eye": slow})
        until("the download runs", lambda: files.blob(tmp_path / "slow") in files.requested)
        bus.desire("dev1", 2, {"eye": ref})
        device.wait("committed", lambda s: eye(s)["update"] == "committed" and eye(s)["active"] == "toy@1.1")
        bus.desire("dev1", 3, {"eye": slow})
        until("the download runs again", lambda: files.requested.count(files.blob(tmp_path / "slow")) == 2)
        assert device.stop() == 0
