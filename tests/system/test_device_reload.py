"""A new configuration in a running daemon, with items flowing all the time: what goes in comes out, once."""

from __future__ import annotations

import base64
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.wire import messages, topics
from edged.wire.messages import Event, InferReply, Partial, Reported, Result
from tests.support.babble import PROMPT, make_babbler
from tests.support.device import SITE, Bus, Device, merged, tables, toml, until
from tests.support.models import HARD_WORK, make_release, picture, put_pictures
from tests.support.notify import ServiceManager
from tests.system.broker import Broker


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(str(tmp_path / "notify")) as listening:
        yield listening


def write(device: Device, configured: dict[str, Any]) -> None:
    """Replace the configuration file as a careful deployment does."""
    beside = device.config.with_suffix(".new")
    beside.write_text(toml(configured))
    os.replace(beside, device.config)


def events(bus: Bus, kind: str) -> list[Event]:
    return [event for event in bus.of(Event) if event.kind == kind]


class Flow:
    """Pictures into the folder and requests to the pipeline, without a pause."""

    def __init__(self, bus: Bus, device: Device) -> None:
        self._bus, self._device = bus, device
        self.files: list[str] = []
        self.requests: list[str] = []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._put, self._ask)]

    def _put(self) -> None:
        while not self._done.wait(0.02):
            name = f"p{len(self.files):04}.png"
            beside = self._device.inbox / f".{name}"
            beside.write_bytes(picture(mark=len(self.files)))
            beside.rename(self._device.inbox / name)
            self.files.append(name)

    def _ask(self) -> None:
        image = base64.b64encode(picture()).decode()
        while not self._done.wait(0.02):
            if len(self.requests) - len(self._bus.of(InferReply)) > 8:
                continue  # more at once than the pipeline takes would only be told that it is busy
            self.requests.append(self._bus.ask("dev1", "ask", image=image))

    def start(self) -> None:
        self._bus.online("dev1")
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def all_answered(self) -> bool:
        replies = {reply.request for reply in self._bus.of(InferReply)}
        results = {result.item for result in self._bus.of(Result)}
        return replies >= set(self.requests) and results >= set(self.files)

    def check(self) -> None:
        """Everything is answered once, and well."""
        until("everything is answered", self.all_answered, 60)
        results = [result.item for result in self._bus.of(Result)]
        assert sorted(results) == sorted(self.files)
        replies = [reply for reply in self._bus.of(InferReply) if reply.request in set(self.requests)]
        assert sorted(reply.request for reply in replies) == sorted(self.requests)
        assert [reply.error for reply in replies if reply.error] == []
        until("the files are done", lambda: len(list((self._device.inbox / "done").iterdir())) == len(self.files))


@contextmanager
def flowing(bus: Bus, device: Device) -> Iterator[Flow]:
    flow = Flow(bus, device)
    flow.start()
    try:
        yield flow
    finally:
        flow.stop()


def test_good_reloads_lose_and_repeat_nothing(
    tmp_path: Path, manager: ServiceManager, broker: Broker, bus: Bus, toy: Path
) -> None:
    make_release(tmp_path / "slow", "toy@1.0", products=HARD_WORK // 10)
    configured = tables(tmp_path, "dev1", broker, tmp_path / "slow")
    with Device(tmp_path, configured, env=manager.environment()) as device:
        until("READY", lambda: manager.ready)
        with flowing(bus, device) as flow:
            changes = [
                {"pipelines": {"line": {"policy": {"audit_share": 0.5}}}},
                {"pipelines": {"line": {"queue_max": 10}, "ask": {"queue_max": 32}}},
                {"slots": {"eye": {"threads": 2}}},
                {"slots": {"ear": {"seed": toy}}, "pipelines": {"ask": {"slot": "ear"}}},
                {"store": {"outbox_rows_max": 5000}, "delivery": {"retry_s": 3.0}, "device": {"group": "g2"}},
            ]
            for number, change in enumerate(changes, 1):
                before = len(flow.requests)
                until("requests flow", lambda n=before: len(flow.requests) > n + 10)  # type: ignore[misc]
                configured = merged(configured, change)
                write(device, configured)
                device.counted("configs_loaded", number)
        flow.check()
        device.wait("both models", lambda s: {m["active"] for m in s["models"].values()} == {"toy@1.0"})
        status = device.wait("well", lambda s: s["health"]["ready"])
        assert status["config"]["refused"] is None
        assert status["models"].keys() == {"eye", "ear"}
        until("every change is reported", lambda: len(events(bus, "config_loaded")) == len(changes))
        assert "slots.eye.threads" in events(bus, "config_loaded")[2].detail["keys"]
    keys = manager.keys("STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC", "MONOTONIC_USEC")
    assert keys == ["READY", *["RELOADING", "READY"] * len(changes), "STOPPING"]
    assert all(int(stamp) > 0 for stamp in manager.all("MONOTONIC_USEC"))


def test_a_bad_configuration_is_refused_and_the_old_one_serves_on(
    tmp_path: Path, manager: ServiceManager, broker: Broker, bus: Bus, toy: Path
) -> None:
    good = tables(tmp_path, "dev1", broker, toy)
    with Device(tmp_path, good, env=manager.environment()) as device, flowing(bus, device) as flow:
        bad: list[tuple[str, str]] = [
            ("this is no TOML", "not TOML"),
            (toml(merged(good, {"pipelines": {"line": {"queue_mx": 3}}})), "pipelines.line.queue_mx is no known key"),
            (toml(merged(good, {"pipelines": {"line": {"slot": "nose"}}})), "no such slot"),
            (toml(merged(good, {"slots": {"ear": {"seed": tmp_path / "missing"}}})), "slots.ear.seed"),
            # One that could be taken on, together with one that cannot: nothing of it is.
            (
                toml(merged(good, {"device": {"site": "moon"}, "pipelines": {"line": {"results": "off"}}})),
                "device.site cannot change while edged runs: restart edged",
            ),
        ]
        for number, (text, reason) in enumerate(bad, 1):
            device.config.write_text(text)
            status = device.counted("configs_refused", number)
            assert reason in status["config"]["refused"]
            assert "config" in [problem["what"] for problem in status["health"]["problems"]]
        until("it is reported", lambda: len(events(bus, "config_refused")) == len(bad))
        # The fleet sees it too, in the device's own report.
        until("so is its health", lambda: "config" in [p["what"] for p in bus.of(Reported)[-1].health["problems"]])
        assert status["counters"].get("configs_loaded", 0) == 0
        assert status["models"].keys() == {"eye"}
        write(device, good)
        device.wait("the old file again: nothing is wrong any more", lambda s: s["config"]["refused"] is None)
        flow.stop()
        flow.check()
    assert manager.keys("STATUS", "EXTEND_TIMEOUT_USEC", "MONOTONIC_USEC").count("READY") == 1 + len(bad) + 1


def test_sighup_loads_a_file_that_looks_unchanged(tmp_path: Path, broker: Broker, toy: Path) -> None:
    configured = tables(tmp_path, "dev1", broker, toy)
    with Device(tmp_path, configured) as device:
        at = device.status()["config"]["loaded_at"]  # type: ignore[index]
        assert device.process is not None
        device.process.send_signal(signal.SIGHUP)
        device.wait("loaded again", lambda s: s["config"]["loaded_at"] > at)
        assert device.status()["counters"].get("configs_loaded", 0) == 0  # type: ignore[index]


def test_requests_of_a_pipeline_that_goes_are_answered_and_the_files_stay(
    tmp_path: Path, broker: Broker, bus: Bus
) -> None:
    # A second for each item, or half of one: they are not all answered until the new file is loaded, on any machine.
    make_release(tmp_path / "slow", "toy@1.0", products=5 * HARD_WORK)
    configured = tables(tmp_path, "dev1", broker, tmp_path / "slow")
    with Device(tmp_path, configured) as device:
        names = [f"{number}.png" for number in range(40)]
        image = base64.b64encode(picture()).decode()
        asked = [bus.ask("dev1", "ask", image=image) for _ in range(12)]
        put_pictures(device.inbox, names)
        device.wait("they wait", lambda s: s["pipelines"]["ask"]["waiting"] > 3 and s["pipelines"]["line"]["waiting"])
        other = {"slot": "eye", "source": {"type": "mqtt"}}
        write(device, {**configured, "pipelines": {"other": other}})
        device.counted("configs_loaded")
        replies = [bus.reply(request) for request in asked]
        turned_away = [reply for reply in replies if reply.error]
        assert turned_away
        assert all("no such pipeline" in (reply.error or "") for reply in turned_away)
        assert bus.reply(bus.ask("dev1", "other", image=image)).error is None
        until("every file is answered or still there", lambda: _in_or_done(device) == set(names))
        assert [name for name in names if (device.inbox / name).exists()]
        write(device, configured)  # and back again: what stayed is answered
        until("all are done", lambda: len(list((device.inbox / "done").iterdir())) == len(names), 200)
        # What was turned away is settled: the broker does not bring it again to the next start.
        device.stop()
        device.start()
        assert bus.reply(bus.ask("dev1", "ask", image=image)).error is None
        replies = bus.of(InferReply)
        assert [request for request in asked if sum(r.request == request for r in replies) != 1] == []


def _in_or_done(device: Device) -> set[str]:
    return {path.name for folder in (device.inbox, device.inbox / "done") for path in folder.glob("*.png")}


def test_a_slot_whose_seed_does_not_load_costs_nobody_else(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    make_release(tmp_path / "bad", golden_label=1)
    configured = tables(tmp_path, "dev1", broker, toy)
    with Device(tmp_path, configured) as device, flowing(bus, device) as flow:
        more = {"slots": {"ear": {"seed": tmp_path / "bad"}}, "pipelines": {"hear": {"slot": "ear"}}}
        write(device, merged(merged(configured, more), {"pipelines": {"hear": {"source": {"type": "mqtt"}}}}))
        device.counted("configs_loaded")
        until("it is said", lambda: events(bus, "model_not_loaded"))
        status = device.wait("it shows", lambda s: not s["health"]["ready"])
        assert "slot ear" in [problem["what"] for problem in status["health"]["problems"]]
        write(device, configured)  # without it again
        device.wait("ready", lambda s: s["health"]["ready"] and s["models"].keys() == {"eye"})
        flow.stop()
        flow.check()


def test_a_slot_that_goes_gives_its_memory_back_and_serves_again_when_it_returns(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path
) -> None:
    alone = tables(tmp_path, "dev1", broker, toy)
    both = merged(
        alone, {"slots": {"ear": {"seed": toy2}}, "pipelines": {"hear": {"slot": "ear", "source": {"type": "mqtt"}}}}
    )
    image = base64.b64encode(picture()).decode()
    with Device(tmp_path, alone) as device:
        for number in (1, 2):
            write(device, both)
            device.wait("both serve", lambda s: s["models"].get("ear", {}).get("active") == "toy@1.1")
            assert bus.reply(bus.ask("dev1", "hear", image=image)).release == "toy@1.1"
            write(device, alone)
            device.counted("configs_loaded", 2 * number)
            until("it is unloaded", lambda n=number: device.log().count("slot ear: unloaded toy@1.1") == n)  # type: ignore[misc]
        assert "no requests here" in (bus.reply(bus.ask("dev1", "hear", image=image)).error or "")
        assert bus.reply(bus.ask("dev1", "ask", image=image)).error is None


def test_an_option_that_the_model_cannot_have_leaves_the_loaded_one(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    configured = tables(tmp_path, "dev1", broker, toy)
    with Device(tmp_path, configured) as device:
        slot = {"isolation": "process", "probation_s": 0.5}  # and no seed that would tell before
        write(device, {**configured, "slots": {"eye": slot}})
        until("it is said", lambda: events(bus, "slot_not_reloaded"))
        assert bus.reply(bus.ask("dev1", "ask", image=base64.b64encode(picture()).decode())).error is None


def test_a_responder_comes_and_goes_with_a_reload(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    make_release(tmp_path / "teacher", "teacher@3.0", 2)
    responder = tables(tmp_path, "big1", broker, tmp_path / "teacher")
    responder.pop("pipelines")
    with (
        Device(tmp_path, responder) as big,
        Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device,
    ):
        put_pictures(device.inbox, ["strange1.png"], 220)
        write(big, merged(responder, {"responders": {"big": {"tier": "big", "slot": "eye"}}}))
        big.counted("configs_loaded")
        device.wait("the responder labels", lambda s: s["samples"].get("labelled", 0) == 1)
        write(big, responder)
        big.counted("configs_loaded", 2)
        put_pictures(device.inbox, ["strange2.png"], 221)
        device.wait("it is asked", lambda s: s["samples"].get("escalated", 0) == 1)
        write(big, merged(responder, {"responders": {"big2": {"tier": "big", "slot": "eye"}}}))
        device.wait("the next one labels", lambda s: s["samples"].get("labelled", 0) == 2)


def test_an_answer_being_written_and_those_that_wait_for_it_go_on_in_the_new_pipeline(
    tmp_path: Path, broker: Broker, bus: Bus
) -> None:
    make_babbler(tmp_path / "babbler")
    configured = tables(tmp_path, "dev1", broker, tmp_path / "babbler")
    configured["pipelines"] = {"chat": {"slot": "eye", "task": "generate", "source": {"type": "mqtt"}}}
    with Device(tmp_path, configured) as device:
        endless = bus.ask("dev1", "chat", generation_prompt=PROMPT, stream=True)
        until("it is being written", lambda: [p for p in bus.of(Partial) if p.request == endless])
        waiting = [bus.ask("dev1", "chat", generation_prompt=PROMPT, tokens_max=3) for _ in range(5)]
        device.wait("they wait", lambda s: s["pipelines"]["chat"]["waiting"] == 2)
        write(device, merged(configured, {"pipelines": {"chat": {"queue_max": 20}}}))
        device.counted("requests_handed_over", 6)
        # Whoever has a request in his hands can be told to give it up, as before.
        command = messages.CancelCommand(**bus.stamp(), request=endless)
        bus.say(topics.COMMAND(site=SITE, dev="dev1", type="cancel", id=command.id), command)
        assert bus.reply(endless).error == "cancelled"
        assert [bus.reply(request).answer_tokens for request in waiting] == [3] * 5
        replies = [reply.request for reply in bus.of(InferReply)]
        assert sorted(replies) == sorted([endless, *waiting])


def test_the_policy_that_the_fleet_desires_outlives_a_reload(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    configured = tables(tmp_path, "dev1", broker, toy)
    with Device(tmp_path, configured) as device:
        bus.online("dev1")
        assert _escalates(bus, device, "before.png")
        bus.desire("dev1", 1, {}, policy={"line": {"escalate": False}})
        until("it holds", lambda: not _escalates(bus, device, "a.png"))
        write(device, merged(configured, {"pipelines": {"line": {"queue_max": 9}}}))
        device.counted("configs_loaded")
        assert not _escalates(bus, device, "b.png")


def _escalates(bus: Bus, device: Device, name: str) -> bool:
    """Whether a strange picture is asked about."""
    name = f"{len(bus.of(Result))}-{name}"
    put_pictures(device.inbox, [name], 220)
    result = until("its result", lambda: next((r for r in bus.of(Result) if r.item == name), None))
    return result.decision == "escalate"
