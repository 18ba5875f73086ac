"""Models under adapters: another model takes an adapter off, and devices that come late get both (L11-L13)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from edged.wire.messages import Desired, ModelReport, Reported, State
from tests.unit.test_rollouts_text import BASE, FIRST, HOUR, WINDOW_S, World
from trainer import fleet
from trainer.core.rollout import Rollout
from trainer.database import desired, rollouts
from trainer.watch import Watch

OLD, NEXT = "clerk@0.9", "clerk@1.1"


class Bases(World):
    """Devices whose model changes too; they do as `edged.updater` does: an adapter goes on only to the model it is for."""

    def __init__(self, folder: Path, devices: int = 5, rollout: str = "") -> None:
        self.base: dict[str, str] = {}
        super().__init__(folder, devices, rollout)
        for release in (OLD, NEXT):
            self.release(folder, release, None)
        self.right |= {OLD: 0.9, NEXT: 0.9}
        self.unsure |= {OLD: 1.0, NEXT: 1.0}

    def report(self, name: str, base: str = "") -> None:
        super().report(name, base or self.base.setdefault(name, BASE))

    def runs(self, base: str, adapter: str | None) -> None:
        for name in self.names:
            self.base[name], self.active[name] = base, adapter
            self.report(name)

    def late(self, name: str, base: str = OLD) -> None:
        """A device is born."""
        if name not in self.names:
            self.names.append(name)
        self.base[name], self.active[name], self.update[name] = base, None, "idle"
        with self.host.database.write() as connection:
            said = State(**self.host.envelope(), state="online", device=name)
            fleet.take_state(connection, name, said.model_copy(update={"boot": name}), self.clock)
        self.report(name)

    def live(self, seconds: float) -> None:
        end = self.clock + seconds
        while self.clock < end:
            told = self.told()
            for name in self.names:
                model, adapter = told.get(name, (None, None))
                base = model or self.base[name]
                fits = adapter if adapter is None else adapter if self._is_for(adapter, base) else None
                assert fits == adapter, f"{name} was told {adapter} on {base}: it would say failed for ever"
                if name in told and (base, fits) != (self.base[name], self.active[name]):
                    self.base[name], self.active[name], self.update[name] = base, fits, "committed"
                    self.report(name)
            super().live(WINDOW_S)

    def _is_for(self, adapter: str, base: str) -> bool:
        found = self.host.registry.get(adapter).manifest.base
        return found is not None and found.release == base

    def _window(self, connection: Any, name: str) -> None:
        if self.active[name] is None and self.base[name] != BASE:  # the parent takes the bare base for BASE
            self.active[name] = self.base[name]
            super()._window(connection, name)
            self.active[name] = None
        else:
            super()._window(connection, name)


def test_l11_a_new_model_takes_off_the_adapter_that_is_not_for_it(tmp_path: Path) -> None:
    world = Bases(tmp_path)
    world.runs(BASE, FIRST)
    world.past()
    canary = world.begin(NEXT)
    assert world.told() == dict.fromkeys(canary, (NEXT, None))
    world.live(3 * HOUR)
    shown = world.shown()
    assert (shown["status"], shown["canary_result"], shown["progress"]) == ("done", "passed", "5/5 nodes"), shown
    assert world.told() == dict.fromkeys(world.names, (NEXT, None))
    agreement = next(each for each in shown["judged"]["findings"] if each["measure"] == "audited agreement")
    assert abs(agreement["change"]) < 0.1, "it was compared with what the adapter answered"
    with world.host.database.read() as connection:
        row = connection.execute(select(rollouts)).one()
        before = Watch(world.host)._past(connection, row, Rollout.from_dict(row.state))
    assert {name: tally.audited for name, tally in before.items()} == dict.fromkeys(world.names, 200)


@pytest.mark.usefixtures("each_database")
def test_l13_a_worse_model_goes_back_and_its_adapter_with_it(tmp_path: Path) -> None:
    world = Bases(tmp_path)
    world.runs(BASE, FIRST)
    world.past()
    world.right[NEXT] = 0.5
    canary = world.begin(NEXT)
    world.live(3 * HOUR)
    shown = world.shown()
    assert (shown["status"], shown["progress"]) == ("aborted", "0/5 nodes"), shown
    assert "audited agreement" in shown["reason"]
    assert {name: world.told()[name] for name in canary} == dict.fromkeys(canary, (BASE, FIRST))
    assert set(world.active.values()) == {FIRST}
    assert set(world.base.values()) == {BASE}


def test_one_device_that_is_told_another_model_loses_an_adapter_for_the_old_one_and_it_is_said(tmp_path: Path) -> None:
    world = Bases(tmp_path)
    world.runs(BASE, FIRST)
    assert "adapters_off" not in world.order("desire", device="d00", models={"clerk": BASE}, adapters={})  # type: ignore[arg-type]
    answer = world.order("desire", device="d00", models={"clerk": NEXT}, adapters={})  # type: ignore[arg-type]
    assert answer["adapters_off"] == {"clerk": FIRST}
    assert world.told()["d00"] == (NEXT, None)
    answer = world.order("desire", device="d01", models={"clerk": BASE}, adapters={"clerk": FIRST})  # type: ignore[arg-type]
    assert world.told()["d01"] == (BASE, FIRST)


def test_an_adapter_for_another_model_is_refused_with_what_it_is_for_and_what_runs(tmp_path: Path) -> None:
    world = Bases(tmp_path)
    world.runs(NEXT, None)

    def told(models: dict[str, str], adapters: dict[str, str]) -> dict[str, Any]:
        return world.order("desire", device="d00", models=models, adapters=adapters)  # type: ignore[arg-type]

    error = told({}, {"clerk": FIRST})["error"]
    assert f"{FIRST} is an adapter for {BASE}, and d00 runs {NEXT} there" in error
    assert f"--model clerk={BASE}" in error
    assert NEXT in told({"clerk": NEXT}, {"clerk": FIRST})["error"]
    assert world.told() == {}
    assert "error" not in told({"clerk": BASE}, {"clerk": FIRST})
    assert "error" not in told(
        {}, {"clerk": FIRST}
    )  # the model that it shall run counts, though it does not run it yet
    assert world.told()["d00"] == (BASE, FIRST)


def adapted(folder: Path) -> Bases:
    """A fleet to which an adapter was rolled out."""
    world = Bases(folder)
    world.past()
    world.begin(FIRST)
    world.live(2 * HOUR)
    assert world.shown()["status"] == "done", world.shown()
    return world


@pytest.mark.parametrize("base", [OLD, BASE])
def test_who_comes_late_gets_the_model_and_the_adapter_that_the_others_run(tmp_path: Path, base: str) -> None:
    world = adapted(tmp_path)
    world.late("d09", base)
    world.live(2 * WINDOW_S)
    assert world.told()["d09"] == (BASE, FIRST)
    with world.host.database.read() as connection:
        row = connection.execute(select(desired).where(desired.c.device == "d09")).one()
    said = Desired(**world.host.envelope(), rev=row.rev, models=row.models, adapters=row.adapters)
    assert said.models["clerk"] == world.host.registry.get(BASE).ref
    assert (world.base["d09"], world.active["d09"]) == (BASE, FIRST)
    world.live(WINDOW_S)
    assert (world.shown()["progress"], world.shown()["away"]) == ("6/6 nodes", [])


@pytest.mark.parametrize("why", ["pinned", "told", "unregistered", "silent"])
def test_who_comes_late_and_is_to_stay_as_it_is_stays(tmp_path: Path, why: str) -> None:
    world = adapted(tmp_path)
    runs = "clerk@0.3" if why == "unregistered" else OLD
    if why == "told":
        with world.host.database.write() as connection:
            ref = world.host.registry.get(OLD).ref.model_dump(mode="json")
            fleet.desire(connection, "d09", models={"clerk": ref})
    if why == "pinned":
        pinned = ModelReport(active=runs, pinned=runs)
        world.report = lambda name, base="": None  # type: ignore[method-assign]
        world.late("d09", runs)
        with world.host.database.write() as connection:
            said = Reported(**world.host.envelope(), models={"clerk": pinned})
            fleet.take_reported(connection, "d09", said, world.clock)
    else:
        world.late("d09", runs)
    if why == "silent":
        world.clock += world.host.config.silent_s_max + 1
    before = world.told().get("d09")
    world.rollouts.tick()
    world.rollouts.tick()
    assert world.told().get("d09") == before
    assert "d09" not in world.shown()["away"]


@pytest.mark.usefixtures("each_database")
def test_who_was_away_when_the_model_came_gets_it_and_then_the_adapter(tmp_path: Path) -> None:
    """The last rollout is the adapter's; the one before it still owes somebody the model."""
    world = Bases(tmp_path, rollout="install_s_max = 60")
    world.runs(OLD, None)
    world.past()
    with world.host.database.write() as connection:
        ref = world.host.registry.get(OLD).ref.model_dump(mode="json")
        for name in world.names:  # as an earlier rollout would have left them
            fleet.desire(connection, name, models={"clerk": ref})
        said = State(**world.host.envelope(), state="offline", device="d04").model_copy(update={"boot": "d04"})
        fleet.take_state(connection, "d04", said, world.clock)
    world.names.remove("d04")
    world.begin(BASE)
    world.live(2 * WINDOW_S)
    world.order("rollout_promote", rollout="clerk")  # all is escalated here, and audits alone judge bare models
    world.live(HOUR)
    assert (world.shown()["status"], world.shown()["away"]) == ("done", ["d04"]), world.shown()
    world.begin(FIRST)
    world.live(3 * HOUR)
    assert (world.shown()["status"], world.shown()["devices"]) == ("done", 4), world.shown()
    assert world.told()["d04"] == (OLD, None)
    world.late("d04", OLD)
    world.live(3 * WINDOW_S)
    assert (world.base["d04"], world.active["d04"]) == (BASE, FIRST)
