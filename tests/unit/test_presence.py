"""Devices that fall silent without a will message: when they count as gone, and what is done about it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from typer.testing import CliRunner

from edged.link import Inbound
from edged.wire import topics
from tests.unit.test_incoming import BASE, NOW, Desk
from tests.unit.test_rollouts import HOUR, NEW, OLD, SILENT_S, WINDOW_S, World
from trainer import catalogues, incoming
from trainer.catalogues import ask_for_catalogues
from trainer.cli import app
from trainer.config import ConfigError, load_config
from trainer.core.presence import ALWAYS, Lately, lately, present
from trainer.database import commands, devices, put
from trainer.presence import WRITES, silent, there

FAST = "steps = [0.2, 1.0]\naudits_planned = 0\nbaseline_s = 43200\nwatch_s = 900"
# (online, last sign of life, whether it is there at 10 000 when it may be silent for 100 s)
ROWS = [
    (True, 10_000.0, True),
    (True, 9_900.0, True),
    (True, 9_899.9, False),
    (True, 0.0, False),
    (True, 10_100.0, True),  # our clock was set back a little
    (True, 10_100.1, False),  # it was ahead, and what it wrote says nothing
    (True, 4e9, False),
    (False, 10_000.0, False),
    (False, 0.0, False),
]


@pytest.mark.parametrize(("online", "seen_at", "found"), ROWS)
def test_who_is_there(online: bool, seen_at: float, found: bool) -> None:
    assert present(online, seen_at, lately(10_000.0, 100.0)) is found
    assert present(online, seen_at, ALWAYS) is online


@pytest.mark.usefixtures("each_database")
def test_the_database_says_the_same(tmp_path: Path) -> None:
    desk, heard = Desk(tmp_path), lately(10_000.0, 100.0)
    with desk.host.database.write() as connection:
        for number, (online, seen_at, _) in enumerate(ROWS):
            put(connection, devices, {"device": f"d{number}"}, {"online": online, "seen_at": seen_at})
    for each in (heard, ALWAYS, Lately(math.inf, -math.inf)):
        expected = {f"d{number}" for number, (online, at, _) in enumerate(ROWS) if present(online, at, each)}
        assert {row.device for row in desk.rows(select(devices.c.device).where(there(each)))} == expected
        with desk.host.database.read() as connection:
            flagged = {f"d{number}" for number, (online, *_) in enumerate(ROWS) if online}
            assert silent(connection, each) == flagged - expected


def seen_at(desk: Desk, device: str = "evil") -> float:
    return float(desk.rows(select(devices.c.seen_at).where(devices.c.device == device))[0][0])


@pytest.mark.usefixtures("each_database")
@pytest.mark.parametrize("topic", sorted(BASE))
@pytest.mark.parametrize("ts", [0.0, NOW + 4e9])
def test_whatever_a_device_says_is_a_sign_of_life_at_the_time_of_its_receipt(
    tmp_path: Path, topic: str, ts: float
) -> None:
    desk = Desk(tmp_path)
    desk.say("state")
    desk.clock.at += 3 * HOUR
    desk.say(topic, ts=ts)
    assert seen_at(desk) == desk.clock.at


def test_it_is_written_now_and_then_and_not_with_every_message(tmp_path: Path) -> None:
    desk, written = Desk(tmp_path), set[float]()
    desk.say("state")
    for _ in range(60):
        desk.clock.at += SILENT_S / WRITES / 4
        desk.say("metrics")
        written.add(seen_at(desk))
        assert desk.clock.at - seen_at(desk) <= SILENT_S / WRITES
    assert len(written) <= 60 / 4 + 1


@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_the_broker_has_kept_is_no_sign_of_life(
    tmp_path: Path, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker with persistence tells the births of those that died with it to everybody who connects."""
    if one_by_one:
        monkeypatch.setattr(incoming.Incoming, "_together", lambda *_: 1 / 0)
    desk = Desk(tmp_path)

    def again(boot: str = "b1") -> None:
        for topic in ("state", "reported"):
            desk.put("evil", topic, {**BASE[topic], "boot": boot})
        for _ in range(2):
            live: Inbound = desk.coordinator.link.inbox.get_nowait()  # type: ignore[assignment]
            desk.coordinator.link.inbox.put(Inbound(live.topic, live.payload, True, live.token))
        desk.coordinator.incoming.take_in()

    again()
    assert seen_at(desk) == NOW, "nothing was known of it: it may be there"
    for _ in range(4):
        desk.clock.at += HOUR
        again()
    assert seen_at(desk) == NOW
    with desk.host.database.read() as connection:
        assert silent(connection, desk.host.lately()) == {"evil"}
    again("b2")
    assert seen_at(desk) == desk.clock.at, "it was started again since"


def fall_silent(world: World, *names: str) -> None:
    """The broker died with these: no will, no window, and nothing is done that they are told."""
    world.away.update(names)


def test_l13_a_rollout_waits_for_no_device_that_fell_silent_and_tells_it_when_it_speaks(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=f"{FAST}\ninstall_s_max = 604800")
    world.past()
    fall_silent(world, "d03", "d07")
    world.clock += SILENT_S + 1
    world.live(WINDOW_S)  # of the others
    world.begin()
    assert not {"d03", "d07"} & set(world.shown()["canary"])
    last = next(name for name in world.names if name not in (*world.shown()["canary"], "d03", "d07"))
    world.live(2 * WINDOW_S)
    fall_silent(world, last)
    world.live(SILENT_S - 4 * WINDOW_S)
    assert world.shown()["status"] == "rolling", "it may yet come: it was heard lately, and a week is allowed"
    world.live(6 * WINDOW_S)
    shown = world.shown()
    assert (shown["status"], shown["progress"], sorted(shown["away"])) == (
        "done",
        "7/10 nodes",
        sorted([last, "d03", "d07"]),
    )
    assert world.told().get("d03", {}).get("digits", {}).get("release", OLD) == OLD, "it was told nothing"
    world.away.discard("d03")
    world.live(2 * HOUR)  # a window is enough: nothing but its connection to a broker that died was lost
    assert world.active["d03"] == NEW
    assert sorted(world.shown()["away"]) == sorted([last, "d07"])


def test_l11_canaries_are_chosen_among_those_who_are_there(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=FAST)
    world.past()
    fall_silent(world, *world.names[:-2])
    world.clock += SILENT_S + 1
    world.live(WINDOW_S)
    world.begin()
    assert sorted(world.shown()["canary"]) == ["d08", "d09"]


def test_a_newcomer_is_told_only_while_it_is_there(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=FAST)
    world.past()
    world.begin()
    world.live(2 * HOUR)
    assert world.shown()["status"] == "done"
    world.names.append("d10")
    world.active["d10"], world.update["d10"] = OLD, "idle"
    world.born("d10")
    fall_silent(world, "d10")
    world.clock += SILENT_S + 1
    world.start()
    world.live(WINDOW_S)
    assert (world.shown()["devices"], "d10" in world.told()) == (10, False)
    world.away.discard("d10")
    world.live(2 * WINDOW_S)
    assert world.active["d10"] == NEW


def test_people_are_shown_who_is_silent(tmp_path: Path) -> None:
    world, shell = World(tmp_path, devices=2), CliRunner()
    with world.host.database.write() as connection:
        connection.execute(update(devices).values(seen_at=time.time()))
        connection.execute(update(devices).where(devices.c.device == "d01").values(seen_at=time.time() - SILENT_S - 9))
    told = ["fleet", "status", "--config", str(world.config)]
    rows = json.loads(shell.invoke(app, [*told, "--json"]).stdout)
    assert [(row["device"], row["online"], row["silent"]) for row in rows] == [
        ("d00", True, False),
        ("d01", False, True),
    ]
    lines = shell.invoke(app, told).stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["d00", "True"], ["d01", "silent"]]


def test_who_is_silent_is_asked_for_a_sign_of_life_and_takes_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogues, "LISTINGS_MAX", 2)
    desk, sent = Desk(tmp_path), list[str]()
    link = desk.coordinator.link
    link.room = lambda: 16  # type: ignore[method-assign]

    def publish(address: topics.Address, *_: Any, **__: Any) -> bool:
        if topics.COMMAND.match(address.topic):
            sent.append(address.topic.split("/")[3])
        return True

    link.publish = publish  # type: ignore[method-assign, assignment]
    ticking = [0.0]
    desk.coordinator._monotonic = lambda: ticking[0]
    for device in ("a1", "a2", "a3"):
        desk.say("state", device)
    desk.clock.at += SILENT_S + 1
    for device in ("b1", "b2"):
        desk.say("state", device)
    for _ in range(3):
        ask_for_catalogues(desk.host)
    asked = {row.device for row in desk.rows(select(commands.c.device))}
    assert {"b1", "b2"} <= asked, "three that died at once kept all others from being asked"
    silent_ones = asked - {"b1", "b2"}
    assert silent_ones
    for _ in range(5):
        desk.coordinator._send()
        ticking[0] += desk.host.config.command_resend_s
    assert {name: sent.count(name) for name in asked} == {name: 1 if name in silent_ones else 5 for name in asked}
    desk.say("cmd/samples/c1", next(iter(silent_ones)))  # an answer, even to what we do not remember
    with desk.host.database.read() as connection:
        assert len(silent(connection, desk.host.lately())) == 2


def test_a_limit_that_idle_devices_cannot_keep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trainer.toml"
    path.write_text("silent_s_max = 3600\n")
    with pytest.raises(ConfigError, match="silent_s_max = 3600 is not above catalogue_refresh_s = 3600"):
        load_config(path)
