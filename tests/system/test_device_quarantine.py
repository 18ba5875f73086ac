"""An item that kills the daemon is found and set aside, and neither the daemon nor its release pays for it."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged.core.update import RESTARTS_MAX
from edged.engines.host import MODULE
from edged.releases import reference
from edged.wire.messages import Event, Result
from tests.support.device import Bus, Device, responder_tables, tables, until
from tests.support.files import FileServer, file_server
from tests.support.hosted import LONG, Start, ask
from tests.support.models import make_release, picture, put_pictures, write_manifest
from tests.support.supervised import Supervised
from tests.system.broker import Broker
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

KILLER, FINE = 77, 51  # grey values; neither is in the golden set
SEGV = -signal.SIGSEGV
QUARANTINED = "quarantined: in hand at 2 crashes"


@pytest.fixture
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


def put(folder: Path, name: str, value: int) -> None:
    """One picture for a device."""
    folder.mkdir(exist_ok=True)
    (folder / f".{name}").write_bytes(picture(value))
    (folder / f".{name}").rename(folder / name)


def said(bus: Bus) -> list[dict[str, Any]]:
    """The details of every `item_quarantined`."""
    return [event.detail for event in bus.of(Event) if event.kind == "item_quarantined"]


@pytest.mark.parametrize("where", ["toy@1.0", "decoder"])
def test_a_file_that_kills_is_set_aside_and_all_others_are_answered(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, where: str
) -> None:
    inbox = tmp_path / "dev1-in"
    names = [f"good{number}.png" for number in range(6)]
    put_pictures(inbox, names[:3])
    put(inbox, "killer.png", KILLER)
    put_pictures(inbox, names[3:])
    with Supervised(tmp_path, tables(tmp_path, "dev1", broker, toy), {where: [KILLER]}) as device:
        device.died(2)
        results = until("every answer", lambda: {r.item: r for r in bus.of(Result)}.keys() >= {*names, "killer.png"} and
                        {r.item: r for r in bus.of(Result)})  # fmt: skip
        assert results["killer.png"].error == QUARANTINED
        assert not any(results[name].error for name in names)
        assert sorted(path.name for path in (inbox / "done").iterdir()) == names
        assert [path.name for path in (inbox / "rejected").iterdir()] == ["killer.png"]
        until("it is reported", lambda: said(bus))
        assert said(bus) == [{"item": "killer.png", "pipeline": "line", "release": "toy@1.0"}]
        device.counted("items_quarantined")
        device.wait("its release serves", lambda s: s["models"]["eye"]["active"] == "toy@1.0")
        put(inbox, "after.png", FINE)
        until("it goes on", lambda: any(r.item == "after.png" for r in bus.of(Result)))
        assert device.signal(signal.SIGTERM) == 0
    assert device.ends == [SEGV, SEGV, 0]


def test_a_request_that_kills_is_answered_with_an_error(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    with Supervised(tmp_path, tables(tmp_path, "dev1", broker, toy), {"toy@1.0": [KILLER]}) as device:
        request = bus.ask("dev1", "ask", image=base64.b64encode(picture(KILLER)).decode())
        assert bus.reply(request, 60).error == QUARANTINED
        again = bus.ask("dev1", "ask", image=base64.b64encode(picture(FINE)).decode())
        assert bus.reply(again).error is None
    assert device.ends == [SEGV, SEGV, 0]


def test_a_question_that_kills_its_responder_is_rejected(tmp_path: Path, broker: Broker, toy: Path) -> None:
    make_release(tmp_path / "unsure", "small@1.0", sure=False)
    with (
        Supervised(tmp_path, responder_tables(tmp_path, "teacher", broker, toy), {"toy@1.0": [KILLER]}) as teacher,
        Device(tmp_path, tables(tmp_path, "dev1", broker, tmp_path / "unsure")) as device,
    ):
        put(device.inbox, "killer.png", KILLER)
        put(device.inbox, "good.png", FINE)
        wait = {"rejected": 1, "labelled": 1}
        device.wait("both are decided", lambda s: s["samples"] == wait, 90)
        shown = device.cli("samples", "list", "--json").stdout
        assert QUARANTINED in shown or QUARANTINED in device.cli("why", "killer.png").stdout
    assert teacher.ends == [SEGV, SEGV, 0]


def test_an_update_is_not_ended_by_an_item_that_kills_every_release(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path, files: FileServer
) -> None:
    files.publish(toy2, reference(toy2))
    plan = tables(tmp_path, "dev1", broker, toy, host={"url": files.url}, slots={"eye": {"probation_s": 8.0}})
    with Supervised(tmp_path, plan, {"toy@1.0": [KILLER], "toy@1.1": [KILLER]}) as device:
        bus.online("dev1")
        bus.desire("dev1", 1, {"eye": reference(toy2)})
        device.wait("probation", lambda s: s["models"]["eye"]["update"] == "switched")
        put_pictures(device.inbox, ["first.png"])
        until("it answers", lambda: any(r.release == "toy@1.1" for r in bus.of(Result)))
        put(device.inbox, "killer.png", KILLER)
        until("it is turned away", lambda: any(r.error == QUARANTINED for r in bus.of(Result)), 60)
        device.wait("committed", lambda s: s["models"]["eye"]["update"] == "committed")
        assert [detail["item"] for detail in said(bus)] == ["killer.png"]
    assert device.ends == [SEGV, SEGV, 0]


def test_a_release_that_dies_of_every_item_is_put_back_and_its_items_are_answered(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path, files: FileServer
) -> None:
    files.publish(toy2, reference(toy2))
    plan = tables(tmp_path, "dev1", broker, toy, host={"url": files.url}, slots={"eye": {"probation_s": 120.0}})
    with Supervised(tmp_path, plan, {"toy@1.1": [FINE]}) as device:
        bus.online("dev1")
        bus.desire("dev1", 1, {"eye": reference(toy2)})
        device.wait("probation", lambda s: s["models"]["eye"]["update"] == "switched")
        names: list[str] = []
        back = threading.Event()

        def feed() -> None:
            while not back.wait(0.1):
                names.append(f"good{len(names):04}.png")
                put(device.inbox, names[-1], FINE)

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            eye = device.wait("put back", lambda s: s["models"]["eye"]["update"] == "reverted", 90)["models"]["eye"]
        finally:
            back.set()
            feeder.join()
        until("every answer", lambda: {r.item for r in bus.of(Result)} == {*names}, 60)
        assert {r.release for r in bus.of(Result)} == {"toy@1.0"}
        assert not any(r.error for r in bus.of(Result))
        assert eye["active"] == "toy@1.0"
        assert "restarted too often" in eye["reason"]
        assert not said(bus)
        assert not list((device.inbox / "rejected").iterdir())
    assert device.ends == [SEGV] * (RESTARTS_MAX + 1) + [0]


def test_a_release_that_dies_of_every_item_after_its_commit_is_put_back(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path, files: FileServer
) -> None:
    """Its probation passed without an item."""
    files.publish(toy2, reference(toy2))
    plan = tables(tmp_path, "dev1", broker, toy, host={"url": files.url})
    with Supervised(tmp_path, plan, {"toy@1.1": [FINE]}) as device:
        bus.online("dev1")
        bus.desire("dev1", 1, {"eye": reference(toy2)})
        device.wait("committed", lambda s: s["models"]["eye"]["update"] == "committed")
        names = [f"good{number}.png" for number in range(12)]
        for name in names:
            put(device.inbox, name, FINE)
        eye = device.wait("put back", lambda s: s["models"]["eye"]["update"] == "reverted", 90)["models"]["eye"]
        assert (eye["active"], eye["reason"]) == (
            "toy@1.0", "the daemon crashed again and again soon after this update"
        )  # fmt: skip
        until("every answer", lambda: {r.item for r in bus.of(Result)} == {*names}, 60)
        assert {(r.release, r.error) for r in bus.of(Result)} == {("toy@1.0", None)}
        assert not said(bus)
    assert device.ends == [SEGV] * (RESTARTS_MAX + 1) + [0]


def test_ends_with_nothing_in_hand_and_stops_blame_nobody(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    device = Device(tmp_path, tables(tmp_path, "dev1", broker, toy))
    with device:
        put_pictures(device.inbox, ["good.png"])
        until("its answer", lambda: len(bus.of(Result)) == 1)
        for _ in range(3):
            device.kill9()  # while idle
            device.start()
        put_pictures(device.inbox, [f"more{number}.png" for number in range(40)])
        for _ in range(3):
            assert device.stop() == 0  # in the middle of work
            assert not list((device.state_dir / "in_hand").iterdir())
            device.start()
        until(
            "every answer",
            lambda: {r.item for r in bus.of(Result)} == {"good.png", *(f"more{n}.png" for n in range(40))},
        )
        counters = device.wait("its status", lambda s: s)["counters"]
        assert "items_in_hand_at_crash" not in counters
        assert "items_quarantined" not in counters


def test_a_prompt_that_ends_its_engine_twice_is_turned_away(
    tmp_path: Path, broker: Broker, bus: Bus, slow: Path, start: Start
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(slow, base / "model.gguf")
    roles = {
        "model": "model.gguf",
        **write_prompt_golden(base, [("the line", ask(start(slow), "the line", tokens_max=32))]),
    }
    write_manifest(base, build_manifest(base, "talker@1.0", kind="llm", engine="llama", roles=roles))
    plan = tables(tmp_path, "dev1", broker, None)
    plan["slots"] = {"tongue": {"seed": base}}
    plan["pipelines"] = {"chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}
    with Device(tmp_path, plan) as device:
        assert device.process is not None
        daemon, done = psutil.Process(device.process.pid), set[int]()

        def engine() -> psutil.Process | None:
            found = [child for child in daemon.children() if MODULE in child.cmdline() and child.pid not in done]
            return found[0] if found else None

        for _ in range(2):
            child = until("the engine's process", engine)
            used = child.cpu_times().user
            request = bus.ask("dev1", "chat", generation_prompt=LONG, tokens_max=1)
            until("it works on the request", lambda child=child, used=used: child.cpu_times().user > used + 1.0)
            done.add(child.pid)
            os.kill(child.pid, signal.SIGKILL)
            assert "the engine's process was ended by SIGKILL" in (bus.reply(request).error or "")
        assert bus.reply(bus.ask("dev1", "chat", generation_prompt=LONG, tokens_max=1)).error == QUARANTINED
        assert said(bus)[0]["release"] == "talker@1.0"
        assert bus.reply(bus.ask("dev1", "chat", generation_prompt="the line", tokens_max=2)).error is None
        assert device.status() is not None, "it is the same daemon all the time"
