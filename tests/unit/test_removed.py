"""Devices that an operator takes out for good: nothing waits for them, nothing they say counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from typer.testing import CliRunner

from edged.link import Connected, Published
from tests.unit import test_jobs as with_jobs
from tests.unit.test_incoming import BASE, Desk
from tests.unit.test_rollouts import DAY, HOUR, NEW, OLD, QUICK, WINDOW_S, World
from tests.unit.test_tools import served
from trainer import fleet, live
from trainer.cli import app
from trainer.database import commands, desired, devices, judged, pulls, removed, samples, windows
from trainer.drift import Drift
from trainer.removed import AGAIN_S, GONE
from trainer.tools import Tools


def kept(desk: Desk, device: str) -> int:
    """Rows that were made of what it said."""
    tables = (devices, samples, windows, judged)
    return sum(desk.count(table, table.c.device == device) for table in tables)


def order(desk: Desk, kind: str, device: str, **more: str) -> dict[str, Any]:
    return desk.coordinator.orders._carry_out(kind, {"device": device, **more})


class Wire:
    """What the coordinator publishes, and a broker's answers to it."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.said = desk, list[tuple[str, bytes, Any]]()
        link = desk.coordinator.link
        link.room = lambda: 16  # type: ignore[method-assign]
        link.publish = self._publish  # type: ignore[method-assign, assignment]

    def _publish(self, address: Any, payload: bytes, ref: Any = None, **_: Any) -> bool:
        assert address.retain or payload, address
        self.said.append((address.topic, payload, ref))
        return True

    def empties(self) -> list[str]:
        """The topics that were emptied since the last look."""
        self.desk.coordinator._send()
        found, self.said = [(topic, payload) for topic, payload, _ in self.said], []
        return sorted(topic.partition("default/")[2] for topic, payload in found if not payload)


ALL = ["cam/down/desired", "cam/up/reported", "cam/up/state"]


def test_what_a_removed_device_says_is_dropped_and_counted_and_another_ones_is_not(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for topic in ("state", "reported", "sample", "metrics", "event"):
        desk.say(topic, "cam")
    before = kept(desk, "cam")
    assert order(desk, "remove", "cam", reason="burnt")["samples_kept"] == 1
    assert kept(desk, "cam") == before - 1, "its samples and what it measured stay"
    assert desk.count(desired) == 0
    for topic in BASE:
        desk.put("cam", topic, BASE[topic] | ({"sample": "late"} if topic == "sample" else {}))
        desk.put("d1", topic, BASE[topic] | ({"sample": "d1-1"} if topic == "sample" else {}))
    desk.coordinator.incoming.take_in()
    assert desk.counters["messages_of_removed"] == len(BASE)
    assert kept(desk, "cam") == before - 1
    assert kept(desk, "d1") == 4
    desk.goes_on()


@pytest.mark.usefixtures("each_database")
def test_the_broker_is_told_to_keep_nothing_of_it_on_every_connection_and_when_it_speaks(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    wire, ticking = Wire(desk), [0.0]
    desk.coordinator._clearing._monotonic = lambda: ticking[0]
    desk.say("state", "cam")
    desk.say("state", "d1")
    assert wire.empties() == []
    order(desk, "remove", "cam")
    assert wire.empties() == ALL
    assert wire.empties() == []
    desk.coordinator.link.inbox.put(Connected(session=False))
    desk.coordinator.incoming.take_in()
    assert wire.empties() == ALL, "a broker that was killed has found it again"
    ticking[0] += AGAIN_S
    desk.say("metrics", "cam")
    assert wire.empties() == [], "of this nothing is retained"
    desk.say("reported", "cam")
    desk.say("state", "cam")
    assert wire.empties() == ALL
    desk.say("state", "cam")
    assert wire.empties() == [], "one that reports all the time is no flood"
    ticking[0] += AGAIN_S
    assert wire.empties() == ALL
    with desk.host.database.write() as connection:
        fleet.desire(connection, "cam", models={"toy": {"release": "toy@1.0", "sha256": "0" * 64}})
    assert desk.count(desired) == 0
    assert wire.empties() == []


@pytest.mark.parametrize(("topic", "refusals"), [("up/state", 0), ("up/reported", 0), ("down/desired", 1)])
def test_a_broker_that_lets_only_the_device_speak_is_no_fault(tmp_path: Path, topic: str, refusals: int) -> None:
    desk = Desk(tmp_path)
    wire = Wire(desk)
    desk.say("state", "cam")
    order(desk, "remove", "cam")
    desk.coordinator._send()
    (ref,) = [ref for where, _, ref in wire.said if where.endswith(f"cam/{topic}")]
    desk.coordinator.link.inbox.put(Published(ref, "Not authorized"))
    desk.coordinator.incoming.take_in()
    assert desk.counters.get("broker_refusals", 0) == refusals


@pytest.mark.usefixtures("each_database")
def test_who_is_taken_back_is_known_as_before_and_asked_for_its_catalogue(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.say("state", "cam")
    desk.say("reported", "cam")
    before = desk.rows(select(devices))
    assert order(desk, "readmit", "cam")["error"] == "device 'cam' is not removed; removed are: none"
    order(desk, "remove", "cam", reason="on holiday")
    for kind, body in (("remove", {}), ("label", {"labels": {"a": "b"}}), ("rollback", {"slot": "toy"})):
        said = desk.coordinator.orders._carry_out(kind, {"device": "cam", **body})
        assert said["error"] == "device 'cam' was removed (on holiday): `trainer fleet readmit cam` takes it back", kind
    assert order(desk, "readmit", "cam") == {"device": "cam", "removed": False}
    assert desk.rows(select(devices)) == before
    assert desk.count(removed) == 0
    desk.say("metrics", "cam")
    assert desk.count(windows) == 1
    assert order(desk, "remove", "cam2")["error"] == "device 'cam2' was never seen; known: cam"


def running(world: World) -> dict[str, int]:
    """Release -> devices that were told to run it."""
    found: dict[str, int] = {}
    for each in world.told().values():
        found[each["digits"]["release"]] = found.get(each["digits"]["release"], 0) + 1
    return found


def test_a_running_rollout_leaves_it_out_and_tells_it_nothing_more(tmp_path: Path) -> None:
    world = World(tmp_path, rollout="steps = [0.2, 1.0]\naudits_planned = 0\nbaseline_s = 43200\nwatch_s = 1800")
    world.past()
    world.born("d00", "offline")
    world.begin()
    canary = world.shown()["canary"]
    stays = next(name for name in world.names if name not in (*canary, "d00"))
    for name in ("d00", canary[1], stays):  # one is away, one has the release already, one would be told later
        assert world.order("remove", device=name)["removed"]
        world.away.add(name)
    world.live(4 * HOUR)
    shown = world.shown()
    assert (shown["status"], shown["away"]) == ("done", []), shown
    assert "3 removed" in shown["reason"]
    assert world.told().keys() == set(world.names) - {"d00", canary[1], stays}
    assert running(world) == {NEW: 7}
    world.start()
    world.live(HOUR)
    assert running(world) == {NEW: 7}, "nor as one that was away at the end, or came late"


def test_a_canary_that_never_gets_there_is_taken_out_and_waited_for_no_more(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    first, second = world.shown()["canary"]
    world.away.add(first)  # it is there, and does nothing
    world.live(2 * WINDOW_S)
    assert world.shown()["status"] == "canary"
    world.order("remove", device=first)
    world.rollouts.tick()
    assert (world.shown()["status"], world.shown()["running"]) == ("watching", [second])


def test_an_abort_brings_nothing_back_to_it(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    world.live(2 * WINDOW_S)
    first, second = world.shown()["canary"]
    assert world.told("policy")[first]["line"]["audit_share"] > 0.02
    world.order("remove", device=first)
    world.away.add(first)
    assert world.order("rollout_abort", rollout="digits")["phase"] == "aborting"
    world.live(2 * WINDOW_S)
    assert world.shown()["status"] == "aborted"
    assert first not in world.told()
    assert world.told()[second]["digits"]["release"] == OLD


def test_what_a_removed_canary_measured_judges_nothing(tmp_path: Path) -> None:
    """A camera that has lost its lens is taken out, and the release is not to blame for it."""
    world = World(tmp_path, rollout="steps = [0.3, 1.0]\naudits_planned = 90\nbaseline_s = 43200\nextend_max = 0")
    world.past()
    world.begin()
    world.live(2 * WINDOW_S)
    broken = world.shown()["canary"][0]
    with world.host.database.write() as connection:  # every answer of it since then was wrong
        changed = judged.update().where(judged.c.device == broken, judged.c.release == NEW).values(right=False)
        assert connection.execute(changed).rowcount > 10
    world.order("remove", device=broken)
    world.away.add(broken)
    world.live(2 * HOUR)
    shown = world.shown()
    assert shown["status"] == "done", shown
    agreement = next(each for each in shown["judged"]["findings"] if each["measure"] == "audited agreement")
    assert agreement["change"] > -0.06


@pytest.mark.usefixtures("each_database")
def test_none_of_its_samples_trains_or_calls_for_a_training_and_a_job_waits_for_none(tmp_path: Path) -> None:
    world = with_jobs.World(tmp_path)
    assert world.jobs.train_now("digits")["samples_collected"] == 6
    world.sample("d2", 9)
    pulled = world.orders._carry_out("pull", {"samples": ["d2-9"], "seconds": 60.0})
    world.upload("d1-0", "d1-1", "d1-2", "d2-0")  # one of the other device's is here
    world.jobs.tick()
    assert world.job()["status"] == "claiming"
    answer = world.orders._carry_out("remove", {"device": "d2"})
    assert answer == {"device": "d2", "removed": True, "samples_kept": 4, "commands_expired": 2, "may_connect": False}
    world.jobs.tick()
    world.orders._collect.tick()
    world.jobs.tick()
    assert world.job()["status"] == "training"
    assert {each["id"] for each in world.job()["manifest"]["samples"]} == {"d1-0", "d1-1", "d1-2", "d2-0"}
    with world.host.database.read() as connection:
        pull = connection.execute(select(pulls).where(pulls.c.id == pulled["pull"])).one()
        assert (pull.state, pull.missing) == ("done", {"d2-9": GONE})
        assert fleet.training_counts(connection, "digits", 0.5) == (0, 0)
        assert connection.execute(select(func.count()).select_from(samples)).scalar_one() == 7
    assert world.orders._carry_out("pull", {"samples": ["d2-9"], "seconds": 60.0})["refused"] == {"d2-9": GONE}
    world.orders._carry_out("readmit", {"device": "d2"})
    with world.host.database.read() as connection:
        assert fleet.training_counts(connection, "digits", 0.5) == (1, 3), "two were tried, one was never"
        waiting = connection.execute(select(commands.c.body).where(commands.c.state == "open")).scalars().all()
    assert [body["action"] for body in waiting if "d2-1" in body["samples"]] == ["release"], (
        "they are not held for nobody"
    )


@pytest.mark.usefixtures("each_database")
def test_drift_looks_at_nothing_of_it_and_the_history_keeps_it(tmp_path: Path) -> None:
    desk, looked = Desk(tmp_path), list[set[str]]()

    def observe(counted: list[Any], *_: Any) -> list[Any]:
        looked.append({live.device_of(block.place) for block in counted})
        return []

    for device in ("cam", "d1"):
        desk.say("state", device)
        desk.say("metrics", device)
    order(desk, "remove", "cam")
    Drift(desk.host, observe).check()
    assert looked == [{"d1"}]
    with desk.host.database.read() as connection:
        assert set(live.report(connection, "toy@1.0", desk.clock.at - DAY)["devices"]) == {"cam", "d1"}


def test_the_commands_ask_refuse_and_show(tmp_path: Path) -> None:
    world, shell = with_jobs.World(tmp_path), CliRunner()
    config = ["--config", str(tmp_path / "trainer.toml")]

    def call(*words: str, **more: Any) -> tuple[int, str, str]:
        done = shell.invoke(app, ["fleet", *words, *config], **more)
        return done.exit_code, done.stdout, done.stderr

    assert call("remove", "d2")[::2] == (1, "trainer: d2 is removed only with --yes where nobody can be asked\n")
    with served(world):
        code, out, _ = call("remove", "d9", "--yes", "--json")
        assert (code, json.loads(out)) == (1, {"error": "device 'd9' was never seen; known: d1, d2"})
        code, out, error = call("remove", "d2", "--yes", "--json", "--reason", "sold")
        assert (code, json.loads(out)["samples_kept"], error) == (0, 3, "")
        assert "was removed (sold): `trainer fleet readmit d2` takes it back" in call("remove", "d2", "--yes")[2]
    assert [row["device"] for row in json.loads(call("status", "--json")[1])] == ["d1"]
    (row,) = json.loads(call("status", "--removed", "--json")[1])
    assert (row["device"], row["reason"]) == ("d2", "sold")
    assert "sold" in call("status", "--removed")[1]
    assert Tools(world.host.config, world.host.database).query_metrics() is not None
    with served(world):
        assert call("readmit", "d2")[0] == 0
    assert [row["device"] for row in json.loads(call("status", "--json")[1])] == ["d1", "d2"]
