"""Jobs and rollouts on a real database and registry; what the broker and the child would do, the test does."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from edged.wire.messages import CommandState, Metrics, ModelReport, Reported, SampleEntry, State
from tests.support.trusted import Owner
from trainer import fleet
from trainer.child import METADATA
from trainer.config import load_config
from trainer.core.rollout import Event
from trainer.database import Database, commands, desired, detections, jobs, rollouts, samples, windows
from trainer.files import write_json, write_whole
from trainer.host import Host, new_id
from trainer.jobs import Jobs
from trainer.orders import Orders, await_answer, place
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes
from trainer.rollouts import Rollouts, start_rollout
from trainer.signing import repository_of, sign
from trainer.status import job_status

pytestmark = pytest.mark.usefixtures("each_database")

CONFIG = """
name = "host"
data_dir = "data"
[rollout]
watch_s = 0.001
items_min = 10
audits_planned = 0
failed_grace_s = 0
[models.digits]
checkpoint = "missing.pt"
labels = ["1"]
holdout = "h"
holdout_clean = "hc"
calibration = "c"
threshold = 3
minimum_interval_s = 0
"""


class World:
    """A trainer without broker and children, with two devices that hold three samples each."""

    def __init__(self, folder: Path) -> None:
        (folder / "trainer.toml").write_text(CONFIG)
        config = load_config(folder / "trainer.toml")
        self.host = Host(config, folder / "trainer.toml", Database(config.database_at), Registry(config.releases))
        self.jobs, self.rollouts = Jobs(self.host), Rollouts(self.host)
        self.orders = Orders(self.host, self.jobs, self.rollouts)
        self.release(folder / "first", "digits@1.0", b"first")
        self.host.registry.register(folder / "first")
        for device in ("d1", "d2"):
            with self.host.database.write() as connection:
                birth = State(**self.host.envelope(), state="online", device=device)
                fleet.take_state(connection, device, birth, self.host.now())
            self.report(device, "digits@1.0")
            for number in range(3):
                self.sample(device, number)

    def release(self, folder: Path, release: str, model: bytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(model)
        roles = {"model": "model.onnx"}
        manifest = build_manifest(folder, release, kind="detect", engine="onnx_detect", roles=roles)
        write_whole(folder / MANIFEST, canonical_bytes(manifest))

    def report(self, device: str, active: str, update: str = "idle", reason: str = "") -> None:
        with self.host.database.write() as connection:
            told = fleet.desired_of(connection, device) or {"rev": 0}
            model = ModelReport(active=active, update=update, reason=reason)
            reported = Reported(**self.host.envelope(), desired_rev=told["rev"], models={"digits": model})
            fleet.take_reported(connection, device, reported, self.host.now())

    def sample(self, device: str, number: int) -> None:
        digest = sha256(f"{device}{number}".encode()).hexdigest()
        entry = SampleEntry(
            **self.host.envelope(), sample=f"{device}-{number}", pipeline="p", task="detect", model="digits",
            release="digits@1.0", state="labelled", sha256=digest, bytes=3, label_confidence=0.9, captured=float(number),
        )  # fmt: skip
        with self.host.database.write() as connection:
            fleet.take_sample(connection, device, entry)

    def upload(self, *given: str) -> None:
        self.host.config.samples.mkdir(exist_ok=True)
        for name in given:
            data = name.replace("-", "").encode()
            (self.host.config.samples / sha256(data).hexdigest()).write_bytes(data)

    def window(self, device: str, release: str, escalated: int) -> None:
        now = self.host.now()
        fields = {"start": now, "end": now, "pipeline": "p", "release": release, "items": 100, "escalated": escalated}
        with self.host.database.write() as connection:
            fleet.take_metrics(connection, device, Metrics(**self.host.envelope(), **fields))

    def job(self) -> dict[str, Any]:
        with self.host.database.read() as connection:
            row = connection.execute(select(jobs).order_by(jobs.c.created.desc())).first()
            assert row is not None
            return {**row._mapping, "shown": job_status(connection, self.host.config, row)}

    def commands(self, action: str) -> dict[str, list[str]]:
        with self.host.database.read() as connection:
            rows = connection.execute(select(commands)).all()
        return {row.device: sorted(row.body["samples"]) for row in rows if row.body["action"] == action}

    def answer(self, device: str, **detail: Any) -> None:
        with self.host.database.write() as connection:
            rows = connection.execute(select(commands).where(commands.c.device == device)).all()
            for row in rows:
                state = CommandState(**self.host.envelope(), command=row.id, state="done", detail=detail)
                fleet.take_command_state(connection, device, row.id, state)

    def told(self) -> dict[str, str]:
        with self.host.database.read() as connection:
            return {row.device: row.models["digits"]["release"] for row in connection.execute(select(desired))}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


ALL = [f"{device}-{number}" for device in ("d1", "d2") for number in range(3)]


def test_a_trigger_claims_from_every_device_and_answers_with_the_promised_fields(world: World) -> None:
    answer = world.jobs.train_now("digits")
    assert set(answer) == {
        "action", "reason", "samples_collected", "training_job_id", "target_model", "estimated_completion",
    }  # fmt: skip
    assert (answer["action"], answer["reason"]) == ("training_triggered", "operator")
    assert (answer["samples_collected"], answer["target_model"]) == (6, "digits@1.1")
    assert answer["estimated_completion"].endswith("Z")
    assert world.commands("claim") == {"d1": ALL[:3], "d2": ALL[3:]}
    assert "a job of this model is open" in world.jobs.train_now("digits")["error"]


def test_the_threshold_fires_by_itself(world: World) -> None:
    world.jobs.tick()
    assert world.job()["reason"] == "sample_threshold"


def test_a_job_goes_on_without_what_a_device_does_not_have(world: World) -> None:
    world.jobs.tick()
    world.upload(*ALL[1:])
    world.answer("d1", unknown=["d1-0"], refused={})
    world.jobs.tick()
    kept = [each["id"] for each in world.job()["manifest"]["samples"]]
    assert sorted(kept) == ALL[1:]
    assert world.job()["status"] == "claiming"
    world.jobs.tick()
    assert world.job()["status"] == "training"


def test_a_job_with_too_little_left_fails_and_gives_back(world: World) -> None:
    world.jobs.tick()
    world.upload(*ALL[:3])
    with world.host.database.write() as connection:
        connection.execute(update(jobs).values(claim_until=0.0))
    world.jobs.tick()
    job = world.job()
    assert job["status"] == "failed"
    assert "3 of 6 samples did not come; 3 are left, more than 3 are needed" in job["detail"]
    assert world.commands("release") == {"d1": ALL[:3], "d2": ALL[3:]}
    world.jobs.tick()
    assert world.job()["id"] == job["id"]  # the same samples do not call for training again
    assert "training_job_id" in world.jobs.train_now("digits")  # but an operator may


def finished(world: World, outcome: str, reason: str = "the gate passed") -> Path:
    """A training child has come to its end while the trainer was away."""
    world.jobs.tick()
    world.upload(*ALL)
    with world.host.database.write() as connection:
        connection.execute(update(jobs).values(status="training", started=world.host.now()))
    run = world.host.config.runs / world.job()["id"]
    world.release(run / "candidate", "digits@1.1", b"second")
    (run / "model.pt").write_bytes(b"weights")
    summary = {"accuracy": 0.9, "accuracy_before": 0.877, "samples_used": 6}
    write_json(run / METADATA, {"outcome": outcome, "reason": reason, "summary": summary})
    world.jobs.tick()
    return run


def test_a_release_that_the_gate_refused_goes_nowhere(world: World) -> None:
    finished(world, "refused", "no better than the current release")
    assert (world.job()["status"], world.job()["detail"]) == ("refused", "no better than the current release")
    assert [each.ref.release for each in world.host.registry.list()] == ["digits@1.0"]
    assert world.told() == {}
    assert world.commands("release") == {"d1": ALL[:3], "d2": ALL[3:]}
    assert list(world.host.config.samples.iterdir()) == []


def test_a_release_that_passed_rolls_out_and_uses_its_samples_up(world: World) -> None:
    """L10, L13, L14: registered, rolled out, and only then used."""
    finished(world, "passed")
    job = world.job()
    assert job["status"] == "deploying"
    assert job["shown"]["metrics"]["improvement"] == "+2.3%"
    assert (world.host.config.checkpoints / "digits@1.1.pt").read_bytes() == b"weights"
    world.rollouts.tick()
    (canary,) = world.told()
    other = "d1" if canary == "d2" else "d2"
    world.report(canary, "digits@1.1", "committed")
    world.rollouts.tick()
    assert world.job()["shown"]["deployment"]["progress"] == "1/2 nodes"
    world.window(canary, "digits@1.1", 5)
    world.window(other, "digits@1.0", 50)
    world.rollouts.tick()
    assert world.told() == {"d1": "digits@1.1", "d2": "digits@1.1"}
    world.jobs.tick()
    assert world.commands("used") == {}  # nothing is confirmed before everybody runs it
    world.report(other, "digits@1.1", "committed")
    world.rollouts.tick()
    world.jobs.tick()
    done = world.job()["shown"]
    assert (done["status"], done["deployment"]["canary_result"]) == ("completed", "passed")
    assert world.commands("used") == {"d1": ALL[:3], "d2": ALL[3:]}
    with world.host.database.read() as connection:
        assert {(row.state, row.used_by) for row in connection.execute(select(samples))} == {("used", "digits@1.1")}


def test_a_worse_canary_rolls_back_and_gives_the_samples_back(world: World) -> None:
    finished(world, "passed")
    world.rollouts.tick()
    (canary,) = world.told()
    world.report(canary, "digits@1.1", "committed")
    world.rollouts.tick()
    world.window(canary, "digits@1.1", 95)
    world.window("d1" if canary == "d2" else "d2", "digits@1.0", 20)
    world.rollouts.tick()
    assert world.told() == {canary: "digits@1.0"}
    world.report(canary, "digits@1.0", "committed")
    world.rollouts.tick()
    world.jobs.tick()
    assert world.job()["status"] == "rolled_back"
    assert "escalation rate 0.950 on 1 canary (100) against 0.200 on 1 other" in world.job()["detail"]
    assert world.commands("release") == {"d1": ALL[:3], "d2": ALL[3:]}
    assert str(world.host.registry.next_version("digits")) == "digits@1.2"  # a number is never used twice


def order(world: World, kind: str, **body: Any) -> dict[str, Any]:
    placed = place(world.host.database, kind, body)
    world.orders.tick()
    answer = await_answer(world.host.database, placed, 0)
    assert answer is not None
    return answer


def test_orders_are_answered_or_say_what_is_wrong(world: World, tmp_path: Path) -> None:
    world.release(tmp_path / "second", "digits@1.1", b"second")
    world.host.registry.register(tmp_path / "second")
    assert "registered: digits@1.0, digits@1.1" in order(world, "rollout_start", release="digits@7.0")["error"]
    assert (
        "was never seen; known: d1, d2"
        in order(world, "desire", device="d9", models={"digits": "digits@1.1"}, adapters={})["error"]
    )
    assert "is no adapter" in order(world, "desire", device="d1", models={}, adapters={"digits": "digits@1.1"})["error"]
    assert order(world, "desire", device="d1", models={"digits": "digits@1.1"}, adapters={}) == {
        "device": "d1",
        "rev": 1,
    }
    assert world.told() == {"d1": "digits@1.1"}
    started = order(world, "rollout_start", release="digits@1.1", unjudged="made by hand")
    assert (
        "promote or abort it first"
        in order(world, "rollout_start", release="digits@1.1", unjudged="made by hand")["error"]
    )
    assert order(world, "rollout_abort", rollout=started["rollout"])["phase"] == "aborted"
    assert "means nothing there" in order(world, "rollout_promote", rollout=started["rollout"])["error"]
    assert "does not exist" in order(world, "rollout_abort", rollout="nothing")["error"]


def test_a_held_rollout_waits_for_a_person(world: World) -> None:
    finished(world, "passed")
    world.rollouts.tick()
    (canary,) = world.told()
    world.report(canary, "digits@1.1", "committed")
    for _ in range(6):  # nobody sends a window: the watch is made longer, then given up
        world.rollouts.tick()
    with world.host.database.read() as connection:
        row = connection.execute(select(rollouts)).one()
    assert row.phase == "held"
    assert world.told() == {canary: "digits@1.1"}
    assert world.rollouts.order(row.id, Event.PROMOTE, "by hand")["phase"] == "rolling"
    assert set(world.told()) == {"d1", "d2"}


def test_a_fleet_of_one_is_compared_with_its_own_past(world: World, tmp_path: Path) -> None:
    with world.host.database.write() as connection:
        connection.exec_driver_sql("delete from devices where device = 'd2'")
        past = {"items": 100, "accepted": 50, "audited": 0, "escalated": 50, "errors": 0, "body": {}, "pipeline": "p"}
        start = world.host.now() - 0.002
        window = {"id": new_id(), "device": "d1", "release": "digits@1.0", "start": start, "end": start, **past}
        connection.execute(insert(windows).values(**window))
    world.release(tmp_path / "second", "digits@1.1", b"second")
    world.host.registry.register(tmp_path / "second")
    order(world, "rollout_start", release="digits@1.1", unjudged="made by hand")
    world.rollouts.tick()
    world.report("d1", "digits@1.1", "committed")
    world.rollouts.tick()
    world.window("d1", "digits@1.1", 5)
    world.rollouts.tick()
    with world.host.database.read() as connection:
        assert connection.execute(select(rollouts.c.phase)).scalar_one() == "rolling"


@pytest.mark.parametrize(("update_state", "aborted"), [("failed", False), ("reverted", True)])
def test_a_fetch_that_broke_off_gets_another_try_and_a_revert_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update_state: str, aborted: bool
) -> None:
    monkeypatch.setenv("TRAINER_ROLLOUT__FAILED_GRACE_S", "1000")
    world = World(tmp_path)
    finished(world, "passed")
    world.rollouts.tick()
    (canary,) = world.told()
    world.report(canary, "digits@1.0", update_state, "broken off")
    world.rollouts.tick()
    assert world.told() == {canary: "digits@1.0" if aborted else "digits@1.1"}
    if not aborted:
        world.report(canary, "digits@1.1", "committed")
        world.rollouts.tick()
        assert world.job()["shown"]["deployment"]["status"] == "watching"


def open_commands(world: World) -> list[str]:
    with world.host.database.read() as connection:
        rows = connection.execute(select(commands).where(commands.c.state.notin_(fleet.ENDED))).all()
    return sorted(row.body["action"] for row in rows)


def test_an_ended_job_claims_nothing_any_more(world: World) -> None:
    """A device that comes back late must hear the release alone, else its samples stay claimed by a job that is gone."""
    world.jobs.tick()
    assert open_commands(world) == ["claim", "claim"]
    with world.host.database.write() as connection:
        connection.execute(update(jobs).values(claim_until=0.0))
    world.jobs.tick()
    assert world.job()["status"] == "failed"
    assert open_commands(world) == ["release", "release"]


def test_what_ends_a_claim_is_sent_until_it_is_heard(world: World) -> None:
    with world.host.database.write() as connection:
        for action in ("claim", "list", "release", "used"):
            world.host.command_samples(connection, "d1", action, ["d1-0"], job="j")  # type: ignore[arg-type]
        fleet.prune(connection, world.host.now() + 10 * fleet.COMMAND_S_MAX)
    assert open_commands(world) == ["release", "used"]


def test_without_a_way_back_there_is_no_rollout(world: World) -> None:
    world.report("d2", "digits@0.9")  # seeded by hand; nobody registered it
    world.release(world.host.config.data_dir / "next", "digits@1.1", b"next")
    ref = world.host.registry.register(world.host.config.data_dir / "next")
    with world.host.database.write() as connection:
        answer = start_rollout(world.host, connection, ref)
    assert isinstance(answer, str)
    assert "d2 runs digits@0.9, which is not registered" in answer


def test_with_keys_a_job_signs_what_passed_and_there_is_a_way_back(world: World, tmp_path: Path) -> None:
    owner = Owner(tmp_path / "owner")
    shutil.copytree(owner.repository.folder, world.host.config.trust.folder)
    repository = repository_of(world.host.config)
    assert repository is not None
    finished(world, "passed")
    assert repository.signed().keys() == {"digits@1.1"}
    assert "digits@1.0 runs and is not signed, so there would be no way back" in world.job()["detail"]
    first = world.host.registry.get("digits@1.0")
    sign(repository, first)
    with world.host.database.write() as connection:
        started = start_rollout(world.host, connection, world.host.registry.get("digits@1.1").ref)
    assert not isinstance(started, str)


def test_what_replaces_a_revoked_release_does_not_wait_for_a_way_back(world: World, tmp_path: Path) -> None:
    owner = Owner(tmp_path / "owner")
    shutil.copytree(owner.repository.folder, world.host.config.trust.folder)
    repository = repository_of(world.host.config)
    assert repository is not None
    repository.revoke("digits@1.0", "it burns")
    finished(world, "passed")
    assert world.job()["status"] == "deploying"


def schedule(world: World, cron: str) -> None:
    own = world.host.config.model("digits").model_copy(update={"cron": cron, "threshold": 100, "samples_min": 6})
    world.host.config = world.host.config.model_copy(update={"models": {"digits": own}})


def has_job(world: World) -> bool:
    with world.host.database.read() as connection:
        return connection.execute(select(jobs)).first() is not None


def test_a_schedule_trains_once_also_when_its_time_passed_while_the_trainer_was_down(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule(world, "0 2 * * sun")
    week, now = 7 * 86400.0, world.host.now()
    monkeypatch.setattr(Host, "now", lambda _self: now)
    world.jobs.tick()
    assert not has_job(world)  # a new schedule begins with its next time
    now += 5 * week
    world.jobs = Jobs(world.host)  # another process
    world.jobs.tick()
    assert world.job()["reason"] == "schedule"
    world.upload(*ALL)
    with world.host.database.write() as connection:
        connection.execute(update(jobs).values(status="failed"))
        connection.execute(update(samples).values(job=None))
    for _ in range(3):
        now += 60
        world.jobs.tick()
    assert [row["status"] for row in [world.job()]] == ["failed"]


def test_a_schedule_waits_for_a_job_that_is_open_but_not_for_samples(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule(world, "0 2 * * sun")
    week, now = 7 * 86400.0, world.host.now()
    monkeypatch.setattr(Host, "now", lambda _self: now)
    world.jobs.tick()
    with world.host.database.write() as connection:
        connection.execute(update(samples).values(tried=1))
    now += week
    world.jobs.tick()  # nothing new: this Sunday is over
    with world.host.database.write() as connection:
        connection.execute(update(samples).values(tried=0))
    world.jobs.tick()
    assert not has_job(world)
    with world.host.database.write() as connection:
        row = {"id": "r", "model": "digits", "release": "digits@1.0", "sha256": "0", "state": {}, "previous": {}}
        connection.execute(insert(rollouts).values(**row, phase="held", created=now, updated=now))
    now += week
    world.jobs.tick()
    assert not has_job(world)  # a rollout is open: this Sunday waits
    with world.host.database.write() as connection:
        connection.execute(update(rollouts).values(phase="done"))
    now += 3600
    world.jobs.tick()
    assert world.job()["reason"] == "schedule"


def test_drift_of_the_running_release_trains_once(world: World) -> None:
    schedule(world, "")

    def find(release: str) -> None:
        with world.host.database.write() as connection:
            row = {"id": new_id(), "model": "digits", "release": release, "rule": "escalation_rate", "evidence": {}}
            row |= {"scope": "", "text": "more escalations", "found_at": world.host.now()}
            connection.execute(insert(detections).values(**row))

    find("digits@0.9")
    world.jobs.tick()
    assert not has_job(world)
    find("digits@1.0")
    world.jobs.tick()
    assert world.job()["reason"] == "drift"
    with world.host.database.write() as connection:
        connection.execute(update(jobs).values(status="failed"))
        connection.execute(update(samples).values(job=None))
    before = world.job()["id"]
    world.jobs.tick()
    assert world.job()["id"] == before
