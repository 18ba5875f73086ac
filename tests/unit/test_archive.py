"""L14, L15: what trained is `used`, and may be archived then and not before; after a failure it is `labelled` again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from edged.wire.messages import CommandState
from tests.unit.test_jobs import ALL, World, finished, order, world
from trainer import archive, fleet
from trainer.database import commands, samples

__all__ = ["world"]
pytestmark = pytest.mark.usefixtures("each_database")


def completed(world: World) -> None:
    """A job whose release the whole fleet runs."""
    finished(world, "passed")
    world.rollouts.tick()
    (canary,) = world.told()
    other = "d1" if canary == "d2" else "d2"
    world.report(canary, "digits@1.1", "committed")
    world.rollouts.tick()
    world.window(canary, "digits@1.1", 5)
    world.window(other, "digits@1.0", 50)
    world.rollouts.tick()
    world.report(other, "digits@1.1", "committed")
    world.rollouts.tick()
    world.jobs.tick()
    assert world.job()["status"] == "completed"


def answer(world: World, action: str, device: str, **detail: Any) -> None:
    """The device's answer to its commands of this kind, as `trainer serve` takes it in."""
    with world.host.database.write() as connection:
        rows = connection.execute(select(commands).where(commands.c.device == device)).all()
        for row in rows:
            if row.body["action"] == action and row.state not in fleet.ENDED:
                told = {"moved": row.body["samples"], "unknown": [], "refused": {}, **detail}
                state = CommandState(**world.host.envelope(), command=row.id, state="done", detail=told)
                archive.take_command_state(world.host, connection, row.device, row.id, state)


def states(world: World) -> dict[str, str]:
    with world.host.database.read() as connection:
        return {row.id: row.state for row in connection.execute(select(samples))}


def test_l14_used_samples_are_archived_when_their_devices_have_said_so(world: World) -> None:
    completed(world)
    assert set(states(world).values()) == {"used"}
    asked = order(world, "archive", ids=[], model="digits", release="", device="")
    assert asked == {"asked": 0, "devices": 0, "waiting": 6}, "no device has confirmed the training yet"
    answer(world, "used", "d1")
    assert world.commands("archive") == {}, "nobody has asked for it"
    asked = order(world, "archive", ids=[], model="", release="digits@1.1", device="")
    assert asked == {"asked": 3, "devices": 1, "waiting": 3}
    assert world.commands("archive") == {"d1": ALL[:3]}
    assert set(states(world).values()) == {"used"}, "the device has not answered"
    answer(world, "archive", "d1", moved=["d1-0"], unknown=["d1-1"], refused={"d1-2": "rejected"})
    found = states(world)
    # d1-1 was given up by its device meanwhile, as used samples may be.
    assert [found[name] for name in ALL] == ["archived", "archived", "used", "used", "used", "used"]
    world.sample("d1", 0)  # an entry that says `labelled`, from before
    assert states(world)["d1-0"] == "archived"


def test_l14_archiving_can_follow_a_training_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_MODELS__DIGITS__ARCHIVE", "true")
    world = World(tmp_path)
    completed(world)
    assert world.commands("archive") == {}, "not before the device has confirmed the training"
    answer(world, "used", "d2", moved=["d2-0", "d2-2"], unknown=["d2-1"])
    assert world.commands("archive") == {"d2": ["d2-0", "d2-2"]}
    answer(world, "used", "d2")  # said again
    answer(world, "archive", "d2")
    with world.host.database.read() as connection:
        rows = connection.execute(select(commands)).all()
    assert len([row for row in rows if row.body["action"] == "archive"]) == 1
    assert [states(world)[name] for name in ALL[3:]] == ["archived", "used", "archived"]


@pytest.mark.parametrize("state", ["labelled", "claimed", "escalated", "rejected"])
def test_l15_nothing_is_archived_before_its_training_is_confirmed(world: World, state: str) -> None:
    with world.host.database.write() as connection:
        connection.execute(update(samples).values(state=state))
    said = order(world, "archive", ids=["d1-0", "nothing"], model="", release="", device="")["error"]
    assert f"d1-0 ({state}), nothing (no such sample)" in said
    assert order(world, "archive", ids=[], model="digits", release="", device="")["asked"] == 0
    assert "which samples" in order(world, "archive", ids=[], model="", release="", device="")["error"]
    assert world.commands("archive") == {}
    assert set(states(world).values()) == {state}


def test_l14_after_a_failure_the_samples_are_labelled_again_and_do_not_call_for_training(world: World) -> None:
    finished(world, "refused", "no better than the current release")
    with world.host.database.read() as connection:
        rows = connection.execute(select(samples)).all()
        assert {(row.state, row.job, row.used_by, row.tried) for row in rows} == {("labelled", None, "", 1)}
        assert fleet.training_counts(connection, "digits", 0.0) == (0, 6)
    assert world.commands("release") == {"d1": ALL[:3], "d2": ALL[3:]}
    assert world.commands("used") == {}
