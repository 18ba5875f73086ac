"""Rollouts on a real database and registry under a clock of the test's own, which speaks for the devices too (L11-L14)."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert, select
from typer.testing import CliRunner

from edged.wire.messages import Box, Metrics, ModelReport, Provenance, Reported, SampleEntry, State
from trainer import fleet
from trainer.cli import app
from trainer.config import load_config
from trainer.core.rollout import Event
from trainer.database import Database, desired, events, jobs, judged, rollouts, samples, windows
from trainer.files import write_whole
from trainer.host import Host
from trainer.jobs import Jobs
from trainer.orders import Orders
from trainer.presence import touch
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes
from trainer.rollouts import Rollouts, progress

CONFIG = """
name = "host"
data_dir = "data"
[rollout]
{rollout}
[models.digits]
checkpoint = "missing.pt"
labels = ["1"]
holdout = "h"
holdout_clean = "hc"
calibration = "c"
threshold = 1000000
"""
OLD, NEW = "digits@1.0", "digits@1.1"
WINDOW_S, ITEMS = 900.0, 300
BOX = Box(label="1", box=(0, 0, 5, 5))
AUDIT = {"pipeline": "line", "decision": "audit", "inclusion": 0.02, "confidence": 0.9, "said_by": None}


class World:
    """A trainer whose clock stands still until `live` lets time pass."""

    def __init__(self, folder: Path, devices: int = 10, rollout: str = "") -> None:
        self.config = folder / "trainer.toml"
        self.config.write_text(CONFIG.format(rollout=rollout))
        settings = load_config(self.config)
        self.clock, self.dice = 1e6, np.random.default_rng(3)

        class Clocked(Host):
            def now(_self) -> float:  # noqa: N805
                return self.clock

        database, registry = Database(settings.database_at), Registry(settings.releases)
        # The id of a rollout decides who its canaries are: the same every time.
        self.host = Clocked(settings, self.config, database, registry, entropy=Random(3).randbytes)
        self.names = [f"d{number:02}" for number in range(devices)]
        self.active, self.update = dict.fromkeys(self.names, OLD), dict.fromkeys(self.names, "idle")
        self.away: set[str] = set()
        self.accuracy = {OLD: 0.9, NEW: 0.9}
        self.number = 0
        for release in (OLD, NEW):
            source = folder / release
            source.mkdir()
            (source / "model.onnx").write_bytes(release.encode())
            manifest = build_manifest(
                source, release, kind="detect", engine="onnx_detect", roles={"model": "model.onnx"}
            )
            write_whole(source / MANIFEST, canonical_bytes(manifest))
            self.host.registry.register(source)
        self.start()
        for name in self.names:
            self.born(name)

    def start(self) -> None:
        """`trainer serve` starts (again): what it remembered is gone."""
        self.rollouts, self.jobs = Rollouts(self.host), Jobs(self.host)
        self.orders = Orders(self.host, self.jobs, self.rollouts)

    def born(self, name: str, state: str = "online") -> None:
        with self.host.database.write() as connection:
            said = State(**self.host.envelope(), state=state, device=name)  # type: ignore[arg-type]
            fleet.take_state(connection, name, said.model_copy(update={"boot": name}), self.clock)
        (self.away.discard if state == "online" else self.away.add)(name)
        if state == "online":
            self.report(name)

    def report(self, name: str) -> None:
        with self.host.database.write() as connection:
            told = fleet.desired_of(connection, name) or {"rev": 0}
            model = ModelReport(active=self.active[name], update=self.update[name])
            fleet.take_reported(
                connection,
                name,
                Reported(**self.host.envelope(), desired_rev=told["rev"], models={"digits": model}),
                self.clock,
            )

    def told(self, column: str = "models") -> dict[str, Any]:
        with self.host.database.read() as connection:
            return {row.device: getattr(row, column) for row in connection.execute(select(desired))}

    def live(self, seconds: float) -> None:
        """Time passes: windows close, audits are answered, devices do as they are told, the trainer ticks."""
        end = self.clock + seconds
        while self.clock < end:
            self.clock += WINDOW_S
            policies, wanted = self.told("policy"), self.told()
            with self.host.database.write() as connection:
                for name in sorted(set(self.names) - self.away):
                    share = policies.get(name, {}).get("line", {}).get("audit_share", 0.02)
                    self._window(connection, name, int(self.dice.binomial(ITEMS, share)))
                touch(connection, sorted(set(self.names) - self.away), self.clock, SILENT_S)
            for name in sorted(set(self.names) - self.away):
                release = wanted.get(name, {}).get("digits", {}).get("release", self.active[name])
                if release != self.active[name]:
                    self.active[name], self.update[name] = release, "committed"
                    self.report(name)
            self.rollouts.tick()
            self.jobs.tick()

    def _window(self, connection: Any, name: str, audited: int) -> None:
        release = self.active[name]
        window = Metrics(
            **self.host.envelope(), start=self.clock - WINDOW_S, end=self.clock, pipeline="line", release=release,
            items=ITEMS, accepted=ITEMS - audited, audited=audited, latency_ms_p95=50.0,
        )  # fmt: skip
        fleet.take_metrics(connection, name, window)
        for _ in range(audited):
            self.number += 1
            right = self.dice.random() < self.accuracy[release]
            entry = SampleEntry(
                **self.host.envelope(), sample=f"s{self.number}", pipeline="line", task="detect", model="digits",
                release=release, state="labelled", sha256="0" * 64, bytes=1, decision="audit", inclusion_probability=0.02,
                prediction=[BOX] if right else [], label=[BOX], label_confidence=0.9, captured=self.clock,
                provenance=Provenance(kind="model", who="big", release="teacher@1.0"),
            )  # fmt: skip
            fleet.take_sample(connection, name, entry)

    def past(self) -> None:
        """Half a day with the old release, as its messages would have left it; 200 audits of each device."""
        start, rows, checked = self.clock - DAY / 2, [], []
        for name in self.names:
            items = {"items": 14400, "accepted": 14300, "audited": 100, "escalated": 0, "errors": 0}
            body = {"latency_ms_p95": 50.0}
            where = {
                "id": f"w{name}",
                "device": name,
                "pipeline": "line",
                "release": OLD,
                "start": start,
                "end": self.clock,
            }
            rows.append({**where, **items, "body": body})
            checked += [
                {
                    **AUDIT,
                    "id": f"{name}-{n}",
                    "device": name,
                    "release": OLD,
                    "captured": start + n,
                    "right": n % 10 > 0,
                }
                for n in range(200)
            ]
        with self.host.database.write() as connection:
            connection.execute(insert(windows), rows)
            connection.execute(insert(judged), checked)

    def order(self, kind: str, **body: str) -> dict[str, Any]:
        return self.orders._carry_out(kind, body)

    def begin(self) -> None:
        assert "error" not in (answer := self.order("rollout_start", release=NEW, unjudged="a test")), answer
        self.rollouts.tick()

    def shown(self) -> dict[str, Any]:
        with self.host.database.read() as connection:
            row = connection.execute(select(rollouts).order_by(rollouts.c.created.desc())).first()
            assert row is not None
            return progress(connection, row)

    def events(self) -> list[str]:
        with self.host.database.read() as connection:
            return list(connection.execute(select(events.c.kind).order_by(events.c.ts, events.c.id)).scalars())


HOUR, DAY = 3600.0, 86400.0
SILENT_S = 2 * HOUR  # as in the configuration


QUICK = "steps = [0.2, 1.0]\naudits_planned = 120\nbaseline_s = 43200"


@pytest.mark.usefixtures("each_database")
def test_l12_audits_rise_for_the_watch_until_the_planned_sample_is_there_and_are_set_back(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    assert world.told() == {}
    world.begin()
    world.live(WINDOW_S)  # the canaries install
    world.live(WINDOW_S)
    assert world.shown()["status"] == "watching"
    shares = {name: policy.get("line", {}).get("audit_share", 0.0) for name, policy in world.told("policy").items()}
    canary = world.shown()["canary"]
    assert len(canary) == 2
    # Two canaries need four times the least of 120. They give 1 200 an hour each, and are asked for a quarter more: some are
    # never answered. The others check as many together.
    assert [shares[name] for name in canary] == [pytest.approx(1.25 * 480 / 2400, abs=2e-3)] * 2
    others = [shares[name] for name in world.names if name not in canary]
    assert others == [pytest.approx(1.25 * 480 / 9600, abs=2e-3)] * 8
    assert world.told("policy")[canary[0]]["line"]["empty_share"] == shares[canary[0]]
    assert {each["digits"]["release"] for name, each in world.told().items() if name not in canary} <= {OLD}
    world.live(HOUR)
    assert world.shown()["judged"]["audited"] >= 480
    assert all(policy == {} for policy in world.told("policy").values())  # nothing of it is left
    world.live(HOUR)
    assert world.shown()["status"] == "done"
    assert set(world.active.values()) == {NEW}


def test_l13_a_bad_release_is_caught_by_its_audits_and_only_canaries_ever_had_it(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.accuracy[NEW] = 0.6
    world.begin()
    canary = set(world.shown()["canary"])
    world.live(3 * HOUR)
    shown = world.shown()
    assert shown["status"] == "aborted"
    assert "audited agreement" in shown["reason"]
    assert "2/2 are back on the previous release" in shown["reason"]
    assert set(world.active.values()) == {OLD}
    assert {name for name, each in world.told().items() if each["digits"]["release"] == NEW} == set()
    assert {"rollout_canary", "rollout_watching", "rollout_aborting", "rollout_aborted"} <= set(world.events())
    assert "rollout_rolling" not in world.events()
    assert all(policy == {} for policy in world.told("policy").values())
    with world.host.database.read() as connection:
        seen = set(connection.execute(select(judged.c.device).where(judged.c.release == NEW)).scalars())
    assert seen <= canary


def test_l12_a_bad_release_that_went_back_is_no_part_of_a_devices_past(tmp_path: Path) -> None:
    """Else the same canaries would look worse than they are when the next release comes."""
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    canary = world.shown()["canary"]
    bad = [
        {**AUDIT, "id": f"bad-{name}-{n}", "device": name, "release": "digits@0.9", "captured": world.clock - n,
         "right": False} for name in canary for n in range(200)
    ]  # fmt: skip
    with world.host.database.write() as connection:
        connection.execute(insert(judged), bad)
    world.live(2 * HOUR)
    assert world.shown()["status"] == "done"
    agreement = next(each for each in world.shown()["judged"]["findings"] if each["measure"] == "audited agreement")
    assert abs(agreement["change"]) < 0.06


def test_l12_a_policy_that_a_person_set_meanwhile_stays(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    with world.host.database.write() as connection:
        fleet.desire(
            connection, "d00", policy={"line": {"audit_share": 0.001, "dedupe_s": 1.0}}, start_from={"models": {}}
        )
        fleet.desire(connection, "d01", policy={"other": {"audit_share": 0.5}}, start_from={"models": {}})
    world.begin()
    world.live(2 * WINDOW_S)
    raised = dict(world.shown()["canary"] and world.told("policy"))
    name = world.shown()["canary"][0]
    with world.host.database.write() as connection:
        fleet.desire(connection, name, policy={"line": {**raised[name]["line"], "audit_share": 0.4}})
    world.live(2 * HOUR)
    after = world.told("policy")
    assert after[name]["line"]["audit_share"] == 0.4
    assert "empty_share" not in after[name]["line"]
    for device, policy in (
        ("d00", {"line": {"audit_share": 0.001, "dedupe_s": 1.0}}),
        ("d01", {"other": {"audit_share": 0.5}}),
    ):
        if device != name:
            assert after[device] == policy


def test_l13_a_restart_in_every_phase_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=f"{QUICK}\ndisruption_max = 2")
    world.past()
    world.begin()
    most, phases = 0, set[str]()
    for _ in range(24):
        before = {name for name, each in world.told().items() if each["digits"]["release"] == NEW}
        world.start()
        world.live(WINDOW_S)
        told = {name for name, each in world.told().items() if each["digits"]["release"] == NEW}
        most = max(most, len(told - before))
        phases.add(world.shown()["status"])
    assert {"watching", "rolling", "done"} <= phases
    assert most == 2  # on their way at once
    assert world.shown()["progress"] == "10/10 nodes"


def test_l13_a_device_that_was_away_follows_when_it_comes_back(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.born("d07", "offline")
    world.begin()
    assert "d07" not in world.shown()["canary"]
    world.live(3 * HOUR)
    assert (world.shown()["status"], world.shown()["away"]) == ("done", ["d07"])
    assert world.active["d07"] == OLD
    assert "d07" not in world.told() or world.told()["d07"]["digits"]["release"] == OLD
    world.start()
    world.born("d07")
    world.live(3 * WINDOW_S)
    assert world.active["d07"] == NEW
    assert world.shown()["away"] == []
    assert world.events()[-1] == "rollout_done"


def test_a_pause_keeps_everybody_where_he_is_and_a_resume_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=f"{QUICK}\ndisruption_max = 2")
    world.past()
    world.begin()
    while world.shown()["status"] != "rolling":
        world.live(WINDOW_S)
    answer = world.order("rollout_pause", rollout=NEW)  # a release names its rollout
    assert answer["phase"] == "paused"
    assert "means nothing there" in world.order("rollout_pause", rollout="digits")["error"]
    there = world.shown()["told"]
    world.live(HOUR)
    assert (world.shown()["told"], world.shown()["status"]) == (there, "paused")
    world.order("rollout_resume", rollout=NEW)
    world.live(HOUR)
    assert (world.shown()["told"], world.shown()["status"]) == (10, "done")


def test_l13_an_abort_says_who_goes_back(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    world.live(WINDOW_S)
    canary = world.shown()["canary"]
    answer = world.order("rollout_abort", rollout="digits")
    assert (answer["phase"], sorted(answer["going_back"])) == ("aborting", sorted(canary))
    world.live(2 * WINDOW_S)
    assert world.shown()["status"] == "aborted"
    assert world.shown()["reason"].startswith("2/2 are back on the previous release")


def job_of(world: World, names: list[str]) -> None:
    """A training that made the new release of these samples, and is being rolled out."""
    manifest = {
        "job": "j1", "model": "digits", "source": OLD, "target": NEW, "created": "", "config": {},
        "samples": [{"id": each, "device": "d00", "sha256": "0" * 64, "label": {}, "provenance": {}} for each in names],
    }  # fmt: skip
    with world.host.database.write() as connection:
        found = connection.execute(select(rollouts.c.id)).scalar_one()
        row = {"id": "j1", "model": "digits", "source": OLD, "target": NEW, "reason": "operator", "status": "deploying"}
        more = {"created": world.clock, "claim_until": world.clock, "manifest": manifest, "rollout": found}
        connection.execute(insert(jobs).values(**row, **more))
        connection.execute(samples.update().where(samples.c.id.in_(names)).values(job="j1", state="claimed"))


@pytest.mark.parametrize(
    ("accuracy", "status", "states", "action"),
    [(0.9, "completed", ("used", NEW), "used"), (0.5, "rolled_back", ("labelled", ""), "release")],
)
def test_l14_samples_are_used_in_training_after_success_and_labelled_again_after_failure(
    tmp_path: Path, accuracy: float, status: str, states: tuple[str, str], action: str
) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    names = ["s1", "s2", "s3"]
    world.accuracy[NEW] = accuracy
    world.begin()
    job_of(world, names)
    world.live(4 * HOUR)
    with world.host.database.read() as connection:
        job = connection.execute(select(jobs)).one()
        found = connection.execute(select(samples).where(samples.c.id.in_(names))).all()
        asked = connection.exec_driver_sql("select body from commands").scalars().all()
    assert (job.status, {(row.state, row.used_by, row.job) for row in found}) == (status, {(*states, None)})
    assert [(body["action"], body["samples"]) for body in map(json.loads, asked)] == [(action, names)]


def test_the_status_shows_what_a_canary_is_judged_by(tmp_path: Path) -> None:
    world = World(tmp_path, rollout=QUICK)
    world.past()
    world.begin()
    world.live(3 * WINDOW_S)
    told = CliRunner().invoke(app, ["rollout", "status", NEW, "--json", "--config", str(world.config)])
    shown = json.loads(told.stdout)
    assert (shown["status"], shown["step"], shown["devices"]) == ("watching", "1/2", 10)
    assert {each["measure"] for each in shown["judged"]["findings"]} >= {"audited agreement", "escalation rate"}
    assert shown["judged"]["audited"] > 0
    text = CliRunner().invoke(app, ["rollout", "status", "digits", "--config", str(world.config)]).stdout
    for said in ("watching", "audited agreement", "2/10 nodes run it", "the watch ends in"):
        assert said in text
    table = CliRunner().invoke(app, ["rollout", "status", "--config", str(world.config)]).stdout
    assert NEW in table
    world.rollouts.order(NEW, Event.ABORT, "enough")
    world.live(2 * WINDOW_S)
    followed = CliRunner().invoke(app, ["rollout", "status", NEW, "--follow", "--config", str(world.config)])
    assert followed.stdout.startswith(f"{NEW} aborted step 1/2 0/10 nodes:")
    nobody = CliRunner().invoke(app, ["rollout", "status", "cats", "--config", str(world.config)])
    assert nobody.exit_code == 1
    assert "rollout 'cats' does not exist" in nobody.stderr
