"""`trainer rollout` in a terminal: what an operator says is done, and he sees how it goes (L11)."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event
from typer.testing import CliRunner

from tests.unit.test_rollouts import DAY, HOUR, NEW, QUICK, WINDOW_S, World, job_of
from trainer import cli_rollout, fleet
from trainer.cli import app
from trainer.core.rollout import Event, Rollout
from trainer.database import rollouts
from trainer.fleet import prune

WAIT_S = 60.0


def said(world: World, *words: str) -> tuple[int, str, str]:
    """The command, while `trainer serve` carries orders out."""
    done = threading.Event()

    def serve() -> None:
        while not done.wait(0.02):
            world.orders.tick()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        found = CliRunner().invoke(app, ["rollout", *words, "--config", str(world.config)])
    finally:
        done.set()
        thread.join()
    return found.exit_code, found.stdout, found.stderr


def test_l11_pause_and_resume_are_commands(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    code, out, _ = said(world, "pause", NEW)
    assert (code, world.shown()["status"]) == (0, "paused")
    assert "paused" in out
    code, _, err = said(world, "pause", "digits")
    assert (code, "means nothing there" in err) == (1, True)
    code, out, _ = said(world, "resume", "digits")
    assert (code, world.shown()["status"]) == (0, "canary")
    assert "canary" in out
    assert [world.events().count(kind) for kind in ("rollout_paused", "rollout_canary")] == [1, 2]
    code, _, err = said(world, "resume", "cats")
    assert (code, "rollout 'cats' does not exist" in err) == (1, True)


def test_l11_follow_says_each_phase_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    live = SimpleNamespace(sleep=lambda _s: world.live(WINDOW_S), time=lambda: world.clock)
    monkeypatch.setattr(cli_rollout, "time", live)
    found = CliRunner().invoke(app, ["rollout", "status", NEW, "--follow", "--config", str(world.config)])
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    phases = list(dict.fromkeys(line.split()[1] for line in lines))
    assert [phases[0], phases[1], phases[-1]] == ["canary", "watching", "done"]
    assert lines[-1].startswith(f"{NEW} done step 2/2 10/10 nodes: ")


def test_l11_a_terminal_shows_the_picture_of_a_rollout_while_it_goes(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from trainer.cli import app; app()", "rollout", "status", NEW, "--follow"]
    surroundings = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    shown, seen = bytearray(), threading.Event()
    with subprocess.Popen(
        [*command, "--config", str(world.config)], stdout=theirs, stderr=subprocess.STDOUT, env=surroundings
    ) as follows:
        os.close(theirs)

        def read() -> None:
            try:
                while part := os.read(ours, 4096):
                    shown.extend(part)
                    if b"watching" in shown and b"audited agreement" in shown:
                        seen.set()
            except OSError:  # the other end is closed
                return

        reader = threading.Thread(target=read)
        reader.start()
        try:
            world.live(3 * WINDOW_S)
            assert world.shown()["status"] == "watching"
            assert seen.wait(WAIT_S), bytes(shown)
            world.live(4 * HOUR)
            assert follows.wait(WAIT_S) == 0
        finally:
            follows.kill()
            follows.wait()
            reader.join()
            os.close(ours)
    text = shown.decode()
    for part in ("canary", "2/10 nodes run it, 2 were told", "the watch ends in", "10/10 nodes run it", "\x1b["):
        assert part in text
    assert text.count("\x1b[2K") > 0, "it is drawn over in place"
    assert "done" in text[text.rindex(NEW) :]


def test_following_one_rollout_reads_no_other_and_a_list_each_fleet_once(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    for _ in range(3):
        world.clock += 1
        world.begin()
        world.rollouts.order(NEW, Event.ABORT, "enough")
        world.live(2 * WINDOW_S)
    states, fleets = list[Any](), list[Any]()
    from_dict, members = Rollout.from_dict, fleet.members
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "from_dict", lambda values: states.append(1) or from_dict(values))
        patch.setattr("trainer.rollouts.members", lambda *given, **more: fleets.append(1) or members(*given, **more))
        found = CliRunner().invoke(app, ["rollout", "status", NEW, "--follow", "--config", str(world.config)])
        assert (found.exit_code, len(states), len(fleets)) == (0, 1, 1)
        found = CliRunner().invoke(app, ["rollout", "status", "--json", "--config", str(world.config)])
        assert (found.exit_code, len(states), len(fleets)) == (0, 4, 2)


def test_a_job_that_waits_for_its_rollout_reads_its_phase_alone(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    job_of(world, ["s1"])
    world.jobs.tick()
    done: list[str] = []
    event.listen(
        world.host.database.engine, "before_cursor_execute", lambda *values: done.append(" ".join(values[2].split()))
    )
    world.jobs.tick()
    assert any("SELECT rollouts.phase" in each for each in done)
    assert [each for each in done if "rollouts.state" in each or each.startswith("BEGIN IMMEDIATE")] == []


def test_the_last_rollout_that_is_done_is_kept_as_long_as_the_last_one(tmp_path: Path) -> None:
    """Who was away at its end follows it, however many were aborted since and however long ago."""
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    world.live(4 * HOUR)
    with world.host.database.write() as connection:
        row = dict(connection.execute(rollouts.select()).one()._mapping)
        for number, phase in enumerate(("done", "aborted", "aborted")):
            at = row["created"] - 1 if phase == "done" else row["created"] + number
            connection.execute(rollouts.insert().values(**row | {"id": f"r{number}", "phase": phase, "created": at}))
        prune(connection, world.clock + 3 * 365 * DAY)
        left = set(connection.execute(rollouts.select()).scalars())
    assert left == {row["id"], "r2"}
