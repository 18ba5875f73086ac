"""Live accuracy and drift group by group, whatever label makes the groups: on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest

from tests.unit.test_live import T0, World, world
from trainer import live
from trainer.database import looks
from trainer.drift import Drift

__all__ = ["world"]
pytestmark = pytest.mark.usefixtures("each_database")


def test_one_group_drifts_and_is_named(world: World) -> None:
    for name, group in (("d1", "north"), ("d2", "south")):
        world.enrol(name, group)
    for device, later in (("d1", 0.1), ("d2", 0.25)):
        world.hours(10, 0, 0.1, device)
        world.hours(10, 10, later, device)
    found = {(row["scope"], row["rule"]) for row in Drift(world.host).check()}
    assert ("group=south", "escalation_rate") in found
    assert ("north", "escalation_rate") not in found


def test_groups_are_made_by_any_label(world: World) -> None:
    """Of a label that all share there is nothing to compare, and one that names each device is no group."""
    for number, (profile, line) in enumerate((("pi4", "a"), ("pi4", "b"), ("pi5", "b")), start=1):
        world.enrol(f"d{number}", "all", profile, line=line)
    for number in range(live.GROUPS_MAX):
        world.enrol(f"e{number}")
    for device, later in (("d1", 0.1), ("d2", 0.1), ("d3", 0.25)):
        world.hours(10, 0, 0.1, device)
        world.hours(10, 10, later, device)
    keys = ["profile", "line", "group", "device", "shift"]
    world.regroup(keys)
    found = {row["scope"] for row in Drift(world.host).check() if row["rule"] == "escalation_rate"}
    assert {"profile=pi5"} <= found <= {"", "profile=pi5", "line=b"}
    assert {row["scope"] for row in world.rows(looks)} == {"", "profile=pi4", "profile=pi5", "line=a", "line=b"}
    with world.host.database.read() as connection:
        grouped = live.groups(connection, "default", keys)
        assert grouped["line=b"] == {"d2", "d3"} and grouped["group=all"] == {"d1", "d2", "d3"}
        assert not [name for name in grouped if name.startswith("device=")]
        (part,) = [live.report(connection, "digits@1.0", T0, grouped=grouped, devices=["d2", "d3"])]
    assert (part["fleet"]["items"], part["groups"]["line=b"]["items"], part["groups"]["profile=pi4"]["items"]) == (
        16000, 16000, 8000,
    )  # fmt: skip
    assert part["devices"].keys() == {"d2", "d3"} and "line=a" not in part["groups"]
