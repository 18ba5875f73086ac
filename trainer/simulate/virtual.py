"""A whole rollout to a simulated fleet on a virtual clock, without a broker: what one coordinator carries.

The coordinator, its database file and its messages are the real ones; the clock, the chance, the broker and the devices are
simulated. A good release goes to everybody, then a bad one is caught on its canaries and put back.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from edged.link import IN_FLIGHT_MAX
from trainer.config import TrainerConfig, Worker
from trainer.config_drift import Drift
from trainer.config_network import Http
from trainer.config_rollout import Rollout
from trainer.coordinator import Coordinator, Outside
from trainer.core.rollout import ENDED, Phase
from trainer.core.rollout import Rollout as State
from trainer.database import commands, devices, events, judged, requests, rollouts, windows
from trainer.files import write_whole
from trainer.orders import place
from trainer.releases import MANIFEST, build_manifest, canonical_bytes
from trainer.simulate.virtual_fleet import BIRTHS_S, SITE, SLOT, Habits, VirtualFleet
from trainer.simulate.virtual_world import ROUND_TRIP_S, VirtualLink, VirtualWorld

OLD, GOOD, BAD = f"{SLOT}@1.0", f"{SLOT}@1.1", f"{SLOT}@1.2"
STEP_S = 20.0  # of the clock, when nothing is under way
BASELINE_WINDOWS = 1  # of every device, before the first rollout
INSTALL_S_MAX = 900.0
SETTLE_S = 1200.0  # after a rollout's end, in which those who were away come back
COURSE_S_MAX = 2 * 86400.0  # of one rollout
SHOWN_S = 1800.0  # of the clock, between two words of progress


class Stuck(RuntimeError):
    """A rollout did not end, or did not begin; the message says where it stood."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated. `disruption`: the share of the fleet that may be on its way at once."""

    devices: int
    seed: int = 0
    disruption: float = 0.1
    bad: bool = True  # also a bad release, after the good one
    habits: Habits = field(default_factory=Habits)


def run_virtual(
    scenario: Scenario, folder: Path | None = None, progress: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """Play it; `result` is the same for the same scenario, `cost` is this machine's. `folder`: where the database is made
    and stays; None: a temporary one. Raises Stuck."""
    wall, processor = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trainer-virtual-")))
        play = _Play(scenario, folder, progress)
        try:
            result = play.result()
        finally:
            play.close()
        result["database_bytes"] = play.database.stat().st_size
    processor = time.process_time() - processor
    cost = {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(processor, 1),
        "cpu_ms_per_device": round(1000 * processor / scenario.devices, 2),
        "memory_mib_max": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    return {"result": result, "cost": cost}


class _Play:
    """One run."""

    def __init__(self, scenario: Scenario, folder: Path, progress: Callable[[str], None]) -> None:
        self._scenario, self._progress = scenario, progress
        self._world = world = VirtualWorld(scenario.seed)
        self.fleet = VirtualFleet(world, scenario.devices, OLD, scenario.habits, frozenset({BAD}))
        self._link = VirtualLink(world, self.fleet.told)
        self.fleet.said = self._link.receive
        config = _config(scenario, folder)
        self.database = Path(config.database_at)  # its file
        outside = Outside(world.clock, world.entropy, lambda *_values, **_more: self._link)
        self._coordinator = Coordinator(config, folder / "trainer.toml", outside)
        for release in (OLD, GOOD, BAD):
            self._coordinator.host.registry.register(_release(folder / "made" / release, release))
        self._shown = 0.0

    def close(self) -> None:
        """The database is whole and closed."""
        self._coordinator.host.database.close()

    def result(self) -> dict[str, Any]:
        """Play it all; what came of it."""
        habits, scenario = self._scenario.habits, self._scenario
        self._live(BIRTHS_S + BASELINE_WINDOWS * habits.window_s)
        self.fleet.leave()
        found = [self._rollout(GOOD)]
        if scenario.bad:
            found.append(self._rollout(BAD))
        away = [self.fleet.devices[number - 1] for number in sorted(self.fleet.absent)]
        absent = [{"device": device.name, "away": device.active} for device in away]
        self.fleet.come_back()
        self._live(SETTLE_S)
        counts = {name: value for name, value in asdict(self.fleet.counts).items() if name != "had"}
        return {
            "scenario": asdict(scenario),
            "virtual_s": round(self._world.clock.elapsed, 1),
            "rollouts": found,
            "absent": [{**each, "back": device.active} for each, device in zip(absent, away, strict=True)],
            "devices": counts | {"messages_to_devices": self._link.sent},
            "rows": self._rows(),
            "counters": {name: value for name, value in sorted(self._coordinator.counters.items()) if value},
        }

    def _rollout(self, release: str) -> dict[str, Any]:
        """Order it, and let it run to its end and a while longer."""
        counts, begun = self.fleet.counts, self._world.clock.elapsed
        counts.busy_max, reverts = 0, counts.reverts
        steps = self._course(release)
        self._live(SETTLE_S)
        state = self._state(release)
        had = counts.had.get(release, set())
        canaries = {self.fleet.by_name[name].number for name in state.canary_of(0)}
        steps.append(self._step(release, "settled"))
        return {
            "release": release,
            "phase": state.phase.value,
            "reason": state.reason,
            "steps": steps,
            "seconds": round(steps[-2]["at_s"] - begun, 1),
            "canaries": len(canaries),
            "ran_it": len(had),
            "ran_it_beside_the_canaries": len(had - canaries),
            "run_it_at_the_end": self.fleet.running(release),
            "reverts": counts.reverts - reverts,
            "busy_max": counts.busy_max,
            "away_at_the_end": len(state.left),
        }

    def _course(self, release: str) -> list[dict[str, Any]]:
        """Until it has ended; each phase when it began."""
        order = place(self._coordinator.host.database, "rollout_start", {"release": release, "unjudged": "simulated"})
        until, phase, steps = self._world.clock.elapsed + COURSE_S_MAX, "", list[dict[str, Any]]()
        while self._world.clock.elapsed < until:
            self._turn()
            with self._coordinator.host.database.read() as connection:
                query = select(rollouts.c.phase).where(rollouts.c.release == release)
                now = connection.execute(query).scalar() or ""
                answer = connection.execute(select(requests.c.answer).where(requests.c.id == order)).scalar() or {}
            if "error" in answer:
                raise Stuck(f"rollout of {release}: {answer['error']}")
            if now != phase:
                phase = now
                steps.append(self._step(release, phase))
            if phase and Phase(phase) in (*ENDED, Phase.HELD):
                return steps
        raise Stuck(f"rollout of {release} is {phase} after {COURSE_S_MAX / 3600:.0f} h: {self._state(release).reason}")

    def _step(self, release: str, phase: str) -> dict[str, Any]:
        state = self._state(release)
        at_s = round(self._world.clock.elapsed, 1)
        step = {
            "at_s": at_s,
            "phase": phase,
            "told": len(state.told),
            "running": self.fleet.running(release),
            "audited": int(state.judged.get("audited", 0)),
            "reason": state.reason,
        }
        self._progress(f"{_hours(at_s)} {release} {phase}: {step['told']} told, {step['running']} run it")
        return step

    def _live(self, seconds: float) -> None:
        end = self._world.clock.elapsed + seconds
        while self._world.clock.elapsed < end:
            self._turn()

    def _turn(self) -> None:
        """One turn of the coordinator, and the time until the next one."""
        self._coordinator.turn()
        if self._coordinator.counters.get("faults"):
            raise Stuck("the coordinator met a fault that it counts and survives; see the log above")
        under_way = self._link.inbox.qsize() or self._link.room() < IN_FLIGHT_MAX
        self._world.pass_time(ROUND_TRIP_S if under_way else STEP_S)
        if self._world.clock.elapsed - self._shown >= SHOWN_S:
            self._shown = self._world.clock.elapsed
            self._progress(
                f"{_hours(self._shown)} {self.fleet.counts.messages} messages of {self._scenario.devices} devices"
            )

    def _state(self, release: str) -> State:
        with self._coordinator.host.database.read() as connection:
            query = select(rollouts.c.state).where(rollouts.c.release == release)
            return State.from_dict(connection.execute(query).scalar_one())

    def _rows(self) -> dict[str, int]:
        tables = (devices, windows, judged, events, commands)
        with self._coordinator.host.database.read() as connection:
            return {
                table.name: connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables
            }


def _config(scenario: Scenario, folder: Path) -> TrainerConfig:
    limit = max(1, round(scenario.disruption * scenario.devices)) if scenario.disruption > 0 else 0
    return TrainerConfig(
        name="trainer",
        site=SITE,
        data_dir=folder / "data",
        http=Http(url="http://trainer"),
        worker=Worker(embedded=False),
        drift=Drift(enabled=False),
        rollout=Rollout(disruption_max=limit, install_s_max=INSTALL_S_MAX),
    )


def _release(folder: Path, release: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(release.encode())
    manifest = build_manifest(
        folder,
        release,
        kind="detect",
        engine="onnx_detect",
        roles={"model": "model.onnx"},
        created="2027-01-01T00:00:00Z",
    )
    write_whole(folder / MANIFEST, canonical_bytes(manifest))
    return folder


def _hours(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"
