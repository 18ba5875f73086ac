"""After a rollout that was aborted the fleet is where the last one that is done left it: whoever was away goes there too,
and whoever comes (L13)."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import event

from edged.wire.messages import ModelReport, Reported, State
from tests.unit.test_rollouts import HOUR, NEW, OLD, QUICK, WINDOW_S, World
from trainer import fleet
from trainer.files import write_whole
from trainer.followed import Followed
from trainer.releases import MANIFEST, build_manifest, canonical_bytes
from trainer.rollouts import Rollouts

BAD, WORSE = "digits@1.2", "digits@1.3"


class Later(World):
    """A fleet with two more releases, which nobody should keep."""

    def __init__(self, folder: Path, rollout: str = QUICK) -> None:
        super().__init__(folder, rollout=rollout)
        for release in (BAD, WORSE):
            self.accuracy[release] = 0.5
            source = folder / release
            source.mkdir()
            (source / "model.onnx").write_bytes(release.encode())
            manifest = build_manifest(
                source, release, kind="detect", engine="onnx_detect", roles={"model": "model.onnx"}
            )
            write_whole(source / MANIFEST, canonical_bytes(manifest))
            self.host.registry.register(source)
        self.past()

    def goes_on(self, release: str, until: str) -> None:
        """A rollout to its end."""
        assert "error" not in (answer := self.order("rollout_start", release=release, unjudged="a test")), answer
        self.rollouts.tick()
        for _ in range(24):
            if self.shown()["status"] == until:
                return
            self.live(WINDOW_S)
        raise AssertionError(self.shown())


@pytest.mark.usefixtures("each_database")
@pytest.mark.parametrize("aborted", [[BAD], [BAD, WORSE]])
def test_l13_who_was_away_gets_the_good_release_though_a_later_one_was_aborted(
    tmp_path: Path, aborted: list[str]
) -> None:
    world = Later(tmp_path)
    world.born("d07", "offline")
    world.goes_on(NEW, "done")
    for release in aborted:
        world.goes_on(release, "aborted")
    world.live(HOUR)
    assert world.active["d07"] == OLD
    world.start()
    world.live(WINDOW_S)
    world.born("d07")
    world.live(2 * WINDOW_S)
    assert set(world.active.values()) == {NEW}
    assert "audited agreement" in world.shown()["reason"]
    with world.host.database.read() as connection:
        over, _ = Followed(world.host).read(connection)
        assert world.rollouts._open(connection, over) == {}  # nobody is waited for any more


@pytest.mark.parametrize("told", [False, True])
def test_l13_an_offline_canary_of_an_aborted_rollout_goes_to_what_the_others_run(tmp_path: Path, told: bool) -> None:
    """Whether it had been told of the good release before it went away, or not."""
    world = Later(tmp_path, f"{QUICK}\ninstall_s_max = 900")
    if told:  # it never gets there, and is away when the next one comes
        real = world.report

        def report(name: str) -> None:
            if name == "d05" and world.active[name] != OLD:
                world.active[name], world.update[name] = OLD, "downloading"
            real(name)

        world.report = report  # type: ignore[method-assign]
    else:
        world.born("d05", "offline")
    world.goes_on(NEW, "done")
    assert world.shown()["away"] == ["d05"]
    for name in world.names:  # nobody is connected: the hash alone chooses, until d05 is a canary
        world.born(name, "offline")
    for _ in range(20):
        assert "error" not in (answer := world.order("rollout_start", release=BAD, unjudged="a test")), answer
        world.clock += 1
        world.rollouts.tick()
        if "d05" in world.shown()["canary"]:
            break
        world.order("rollout_abort", rollout="digits")
        world.rollouts.tick()
    assert world.told()["d05"]["digits"]["release"] == BAD
    if told:
        world.report = real  # type: ignore[method-assign]
    world.order("rollout_abort", rollout="digits")
    for _ in range(2):
        world.rollouts.tick()
    assert world.shown()["status"] == "aborted"
    assert "d05" in world.shown()["away"]
    world.update["d05"] = "idle"
    for name in world.names:
        world.born(name)
    world.live(3 * WINDOW_S)
    assert set(world.active.values()) == {NEW}
    assert world.told()["d05"]["digits"]["release"] == NEW
    assert (world.shown()["away"], "aborted by an operator" in world.shown()["reason"]) == ([], True)


def test_what_a_person_told_a_device_meanwhile_is_what_an_abort_gives_back(tmp_path: Path) -> None:
    world = Later(tmp_path, f"{QUICK}\ninstall_s_max = 900")
    world.born("d07", "offline")
    world.goes_on(NEW, "done")
    world.born("d07")
    world.rollouts.tick()  # it is told now
    world.born("d07", "offline")
    with world.host.database.write() as connection:
        ref = world.host.registry.get(OLD).ref.model_dump(mode="json")
        fleet.desire(connection, "d07", models={"digits": ref})
    world.order("rollout_start", release=BAD, unjudged="a test")
    with world.host.database.read() as connection:
        row = connection.exec_driver_sql("select previous from rollouts order by created desc").scalar()
    assert f'"d07": {{"release": "{OLD}"' in row


@pytest.mark.usefixtures("each_database")
def test_who_is_born_after_an_aborted_rollout_gets_what_the_last_good_one_brought(tmp_path: Path) -> None:
    world = Later(tmp_path)
    world.goes_on(NEW, "done")
    world.goes_on(BAD, "aborted")
    world.names.append("d10")
    world.active["d10"], world.update["d10"] = OLD, "idle"
    world.born("d10")
    world.live(3 * WINDOW_S)
    assert set(world.active.values()) == {NEW}


def test_who_is_born_after_the_only_rollout_was_aborted_keeps_what_it_runs(tmp_path: Path) -> None:
    world = Later(tmp_path)
    world.goes_on(BAD, "aborted")
    world.names.append("d10")
    world.active["d10"], world.update["d10"] = OLD, "idle"
    world.born("d10")
    world.live(3 * WINDOW_S)
    assert set(world.active.values()) == {OLD}


@pytest.mark.parametrize("restarted", [False, True])
def test_who_was_heard_while_a_newcomer_could_not_be_taken_in_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    world = Later(tmp_path)
    world.goes_on(NEW, "done")
    world.live(WINDOW_S)
    real, broken = Rollouts._step, [True]

    def step(self: Rollouts, *values: object) -> object:
        if broken:
            raise ValueError("not now")
        return real(self, *values)  # type: ignore[arg-type]

    monkeypatch.setattr(Rollouts, "_step", step)
    world.names.append("d10")
    world.active["d10"], world.update["d10"] = OLD, "idle"
    world.born("d10")
    if restarted:
        world.start()
    world.rollouts.tick()
    broken.clear()
    world.live(3 * WINDOW_S)
    assert world.active["d10"] == NEW


def test_what_devices_of_another_model_say_costs_a_finished_rollout_no_transaction(tmp_path: Path) -> None:
    """Nor does who is to stay where it is; of 100 000 devices the state of a rollout is megabytes."""
    world = Later(tmp_path)
    world.goes_on(NEW, "done")
    world.live(WINDOW_S)
    other, pinned = ModelReport(active="cats@1.0"), ModelReport(active=OLD, pinned=OLD)
    for name, models in (("cat", {"cats": other}), ("d10", {"digits": pinned})):
        with world.host.database.write() as connection:
            said = Reported(**world.host.envelope(), models=models)
            fleet.take_reported(connection, name, said, world.clock)
    done: list[str] = []
    event.listen(
        world.host.database.engine, "before_cursor_execute", lambda *values: done.append(" ".join(values[2].split()))
    )
    world.rollouts.tick()
    assert any("FROM devices" in statement for statement in done)
    assert [each for each in done if "rollouts.state" in each or each.startswith(("BEGIN IMMEDIATE", "UPDATE"))] == []


def test_a_device_whose_slot_is_empty_is_brought_along(tmp_path: Path) -> None:
    world = Later(tmp_path)
    world.goes_on(NEW, "done")
    with world.host.database.write() as connection:
        fleet.take_state(connection, "d10", State(**world.host.envelope(), state="online", device="d10"), world.clock)
        said = Reported(**world.host.envelope(), models={"digits": ModelReport(active=None)})
        fleet.take_reported(connection, "d10", said, world.clock)
    for _ in range(2):
        world.rollouts.tick()
    assert world.told()["d10"]["digits"]["release"] == NEW
