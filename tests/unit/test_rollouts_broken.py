"""Rollouts and jobs among broken ones, devices that come and go, and orders that come late, on a real database."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from sqlalchemy import insert, select, update
from typer.testing import CliRunner

from tests.unit.test_rollouts import DAY, HOUR, NEW, OLD, QUICK, WINDOW_S, World, job_of
from trainer import fleet
from trainer.cli import app
from trainer.core.triggers import Fire
from trainer.database import detections, events, identities, jobs, looks, requests, rollouts
from trainer.drift import next_look
from trainer.ready import decision
from trainer.status import faults
from trainer.tools import ToolRefused, Tools

FAST = "steps = [0.2, 1.0]\naudits_planned = 0\nbaseline_s = 43200\nwatch_s = 900"


def world(folder: Path, rollout: str = "") -> World:
    made = World(folder, rollout=rollout or f"{QUICK}\nwatch_s = 1800")
    made.past()
    return made


def said(world: World, kind: str) -> list[str]:
    with world.host.database.read() as connection:
        return list(connection.execute(select(events.c.text).where(events.c.kind == kind)).scalars())


def cli(world: World, *words: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, [*words, "--config", str(world.config)])
    return found.exit_code, found.stdout, found.stderr


def test_a_broken_rollout_stops_no_other_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = world(tmp_path)
    trainer.begin()
    broken = {"id": "0-broken", "model": "cats", "release": "cats@1.1", "sha256": "0" * 64, "phase": "canary"}
    more = {"state": {"what": "is this"}, "previous": {}, "created": 1.0, "updated": 1.0}
    with trainer.host.database.write() as connection:
        connection.execute(insert(rollouts).values(**broken, **more))
    with caplog.at_level(logging.ERROR):
        trainer.live(2 * HOUR)
        for _ in range(20):
            trainer.rollouts.tick()
    assert trainer.shown()["status"] in ("watching", "rolling", "done")
    assert len(said(trainer, "rollout_fault")) == 1
    assert "rollout 0-broken cannot go on, the others do: " in said(trainer, "rollout_fault")[0]
    assert trainer.rollouts.faults.counters["rollout_faults"] >= 28
    with trainer.host.database.read() as connection:
        assert faults(connection, trainer.clock) == said(trainer, "rollout_fault")
        assert faults(connection, trainer.clock + 2 * DAY) == []
    assert len([each for each in caplog.records if "0-broken" in each.message]) == 1  # within a minute
    with trainer.host.database.write() as connection:
        connection.execute(rollouts.delete().where(rollouts.c.id == "0-broken"))
    trainer.live(4 * HOUR)
    assert trainer.shown()["status"] == "done"


def test_a_broken_job_stops_no_other_and_is_named(tmp_path: Path) -> None:
    trainer = world(tmp_path)
    trainer.begin()
    job_of(trainer, ["s1"])
    with trainer.host.database.write() as connection:
        row = dict(connection.execute(select(jobs)).one()._mapping)
        spoilt = {**row, "id": "j0", "created": 1.0, "status": "claiming", "manifest": {"no": "manifest"}}
        connection.execute(insert(jobs).values(**spoilt))
    trainer.live(4 * HOUR)
    with trainer.host.database.read() as connection:
        states = {row.id: row.status for row in connection.execute(select(jobs))}
    assert states == {"j0": "claiming", "j1": "completed"}
    assert len(said(trainer, "job_fault")) == 1
    assert "job j0 cannot go on" in said(trainer, "job_fault")[0]
    assert trainer.jobs.faults.counters["job_faults"] > 1


def test_a_device_that_stays_on_its_way_is_named_and_the_rollout_ends(tmp_path: Path) -> None:
    trainer = world(
        tmp_path, "steps = [0.2, 1.0]\naudits_planned = 0\nbaseline_s = 43200\nwatch_s = 900\ndisruption_max = 2"
    )
    trainer.begin()
    stuck = next(name for name in trainer.names if name not in trainer.shown()["canary"])
    real = trainer.report

    def report(name: str) -> None:
        if name == stuck and trainer.active[name] == NEW:
            trainer.active[name], trainer.update[name] = OLD, "downloading"
        real(name)

    trainer.report = report  # type: ignore[method-assign]
    trainer.live(DAY / 2)
    shown = trainer.shown()
    assert (shown["status"], shown["progress"], shown["away"]) == ("done", "9/10 nodes", [stuck])
    assert f"1 did not get there within 3600 s: {stuck}" in shown["reason"]


def test_one_that_is_born_later_follows_and_one_that_runs_what_nobody_knows_is_left_out(tmp_path: Path) -> None:
    trainer = world(tmp_path)
    trainer.active["d03"], trainer.accuracy["digits@0.7"] = "digits@0.7", 0.9
    trainer.report("d03")
    trainer.begin()
    assert "d03 runs digits@0.7, which is not registered" in said(trainer, "rollout_left_out")[0]
    trainer.live(4 * HOUR)
    assert (trainer.shown()["status"], trainer.shown()["progress"]) == ("done", "9/9 nodes")
    assert "d03" not in trainer.told()
    trainer.start()
    for name in ("d10", "d11"):
        trainer.names.append(name)
        trainer.active[name], trainer.update[name] = OLD, "idle"
        if name == "d11":  # a person has said what it is to run
            with trainer.host.database.write() as connection:
                ref = trainer.host.registry.get(OLD).ref.model_dump(mode="json")
                fleet.desire(connection, name, models={"digits": ref})
        trainer.born(name)
    trainer.live(HOUR)
    assert trainer.active["d10"] == NEW
    assert (trainer.active["d11"], trainer.active["d03"]) == (OLD, "digits@0.7")
    assert any("1 new devices: d10" in text for text in said(trainer, "rollout_done"))
    trainer.live(HOUR)
    assert trainer.shown()["away"] == []


def test_a_revoked_device_is_in_no_rollout_and_waited_for_by_none(tmp_path: Path) -> None:
    trainer = world(tmp_path)

    def revoke(name: str) -> None:
        row = {"name": name, "site": "default", "roles": ["device"], "enrolled": 1.0, "revoked": 2.0}
        with trainer.host.database.write() as connection:
            connection.execute(insert(identities).values(**row))

    revoke("d01")
    trainer.born("d02", "offline")
    trainer.begin()
    assert trainer.shown()["devices"] == 9
    trainer.live(4 * HOUR)
    assert (trainer.shown()["status"], trainer.shown()["away"]) == ("done", ["d02"])
    revoke("d02")
    trainer.live(HOUR)
    assert trainer.shown()["away"] == []


@pytest.mark.usefixtures("each_database")
def test_a_canary_whose_clock_is_wrong_is_named(tmp_path: Path) -> None:
    trainer = world(
        tmp_path, "steps = [0.2, 1.0]\naudits_planned = 0\nbaseline_s = 43200\nwatch_s = 900\nextend_max = 0"
    )
    trainer.begin()
    canary, real = trainer.shown()["canary"], trainer._window

    def window(connection: object, name: str, audited: int) -> None:
        right = trainer.clock
        if name in canary:
            trainer.clock -= 6 * HOUR
        real(connection, name, audited)
        trainer.clock = right

    trainer._window = window  # type: ignore[method-assign]
    trainer.live(4 * WINDOW_S)
    assert trainer.shown()["status"] == "held"
    assert f"the newest window of {canary[0]} ended 21600 s ago by its own clock" in trainer.shown()["reason"]
    trainer._window = real  # type: ignore[method-assign]
    assert trainer.order("rollout_resume", rollout=NEW)["phase"] == "canary"
    assert trainer.shown()["canary_result"] == "pending"
    trainer.live(6 * WINDOW_S)
    assert (trainer.shown()["status"], trainer.shown()["canary_result"]) == ("done", "passed")


def test_a_pause_sets_the_audits_back(tmp_path: Path) -> None:
    trainer = world(tmp_path, QUICK)
    trainer.begin()
    trainer.live(2 * WINDOW_S)
    raised = trainer.told("policy")
    assert any(raised.values())
    trainer.order("rollout_pause", rollout=NEW)
    trainer.live(WINDOW_S)
    assert not any(trainer.told("policy").values())
    trainer.order("rollout_resume", rollout=NEW)
    assert any(trainer.told("policy").values())
    trainer.live(2 * HOUR)
    assert (trainer.shown()["status"], trainer.shown()["canary_result"]) == ("done", "passed")


def test_what_is_over_or_unknown_is_refused_with_the_way_on(tmp_path: Path) -> None:
    trainer = world(tmp_path)
    trainer.begin()
    trainer.live(4 * HOUR)
    assert trainer.shown()["status"] == "done"
    for name in ("digits", NEW, trainer.shown()["rollout_id"]):
        answer = trainer.order("rollout_abort", rollout=name)["error"]
        assert "done" in answer
        assert f"to go back: `trainer rollout start {OLD}`" in answer
    again = trainer.order("rollout_start", release=NEW, unjudged="a test")["error"]
    assert again == f"{NEW} is what all 10 devices run in their slot 'digits': there is nothing to roll out"
    code, out, err = cli(trainer, "rollout", "abort", "digits", "--json")
    assert (code, "to go back" in json.loads(out)["error"], "to go back" in err) == (1, True, True)
    for words in (("jobs", "--model", "nope"), ("fleet", "drift", "--model", "nope")):
        code, out, err = cli(trainer, *words)
        assert (code, out) == (1, ""), words
        assert "nope" in err
    assert cli(trainer, "jobs", "--model", "digits")[:2] == (0, "nothing yet\n")
    with pytest.raises(ToolRefused, match=r"limit: .*, not 0;"):
        Tools(trainer.host.config, trainer.host.database).call("collect_samples", {"model": "digits", "limit": 0})


def test_a_late_order_is_for_the_rollout_that_was_meant(tmp_path: Path) -> None:
    """Placed while the trainer is down, carried out when another rollout of the model is open."""
    trainer = world(tmp_path, "steps = [0.2, 1.0]\naudits_planned = 0\nwatch_s = 90000")
    trainer.begin()
    trainer.live(2 * WINDOW_S)
    first = trainer.shown()["rollout_id"]
    assert cli(trainer, "rollout", "promote", "digits", "--wait", "0")[0] == 1
    trainer.order("rollout_abort", rollout=first)
    trainer.live(2 * WINDOW_S)
    trainer.clock += 1
    trainer.begin()
    trainer.live(2 * WINDOW_S)
    assert trainer.shown()["status"] == "watching"
    trainer.orders.tick()
    assert trainer.shown()["status"] == "watching"
    with trainer.host.database.read() as connection:
        row = connection.execute(select(requests)).one()
    assert row.body["rollout"] == first
    assert "aborted" in row.answer["error"]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_clock_that_was_ahead_left_behind_hides_nothing(tmp_path: Path, ahead: bool) -> None:
    trainer = world(tmp_path)
    model, rules = trainer.host.config.any_model("digits"), trainer.host.config.any_model("digits").trigger_rules()
    rules = type(rules)(1, model.minimum_interval_s, 1)
    manifest = {"samples": []}
    row = {
        "model": "digits",
        "source": OLD,
        "target": NEW,
        "reason": "operator",
        "status": "failed",
        "claim_until": 0.0,
    }
    found = {"model": "digits", "release": OLD, "scope": "", "rule": "shift", "text": "", "evidence": {}}
    with trainer.host.database.write() as connection:
        connection.execute(insert(jobs).values(**row, id="real", created=trainer.clock - 10, manifest=manifest))
        connection.execute(insert(detections).values(**found, id="real", found_at=trainer.clock - 5))
        connection.execute(insert(looks).values(model="digits", release=OLD, scope="", at=trainer.clock, found=[]))
        if ahead:
            later = trainer.clock + 365 * DAY
            connection.execute(insert(jobs).values(**row, id="future", created=later, manifest=manifest))
            connection.execute(insert(detections).values(**found, id="future", found_at=later))
            connection.execute(insert(looks).values(model="digits", release=NEW, scope="", at=later, found=[]))
        for number in range(3):
            trainer._window(connection, f"d0{number}", 3)
        now = trainer.clock
        soon = decision(connection, trainer.host.config, "digits", rules, now=now)
        assert "started too recently" in soon.reason
        due = decision(connection, trainer.host.config, "digits", rules, now=now + model.minimum_interval_s)
        assert due == Fire("drift")
        assert next_look(connection, 600.0, now) == now + 600.0
        if ahead:
            connection.execute(update(looks).values(at=trainer.clock + DAY))
            assert next_look(connection, 600.0, now) == now
