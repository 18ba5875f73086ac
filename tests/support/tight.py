"""A device whose memory is a number, with its updater on the test's own thread."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edged import acts as module
from edged import exchange
from edged.acts import Carrier, Seeded, UpdateEvent
from edged.config import Slot as SlotConfig
from edged.core.limits import MIB, Bound
from edged.prove import Proof
from edged.releases import Releases, reference
from edged.slot import Loaded, Slot
from edged.store import Store
from edged.updater import Updater
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Desired, ModelReport
from tests.support.machines import HandClock
from tests.unit.test_updater import AtOnce


class FakeMemory:
    """A limit of so many MiB; the daemon takes 40 of them, and each loaded model 20. `others`: what others use."""

    others = 0

    def __init__(self, limit: int) -> None:
        self.limit, self.models = limit, 0

    def own(self) -> int:
        return (40 + 20 * self.models) * MIB

    def bounds(self) -> list[Bound]:
        return [
            Bound(f"limits.memory_mib = {self.limit}", self.limit * MIB, self.own()),
            Bound("this machine", 1000 * MIB, self.others * MIB, own=False),
        ]


class Box:
    """A device with `limit` MiB of memory, as in test_updater. The proof measures 5 MiB, or what `proof` does."""

    def __init__(
        self, state: Path, seed: Path, *server: Path, limit: int, monkeypatch: pytest.MonkeyPatch, swap: str = "replace"
    ) -> None:
        self.state, self.seed, self.limit, self.swap = state, seed, limit, swap
        self.server = {reference(folder): folder for folder in server}
        self.clock, self.said, self.fetched, self.rev = HandClock(), [], 0, 0
        self.live_at_proof: list[str | None] = []
        self.proof: Callable[[], Proof] = lambda: Proof(0.1, 0.1, 2, 5 * MIB, 60 * MIB)
        monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
        monkeypatch.setattr(module, "prove", self._prove)
        monkeypatch.setattr(exchange, "DRAIN_S_MAX", 5.0)
        monkeypatch.setattr(module, "PASSING_S", 0.0)
        real_load, real_unload = module.load, Slot._unload
        self.loads: list[str] = []

        def load(ref: ReleaseRef, *values: Any, **more: Any) -> Loaded:
            made = real_load(ref, *values, **more)
            self.loads.append(f"+{ref.release}")
            self.memory.models += 1
            return made

        def unload(slot: Slot, old: Loaded) -> None:
            real_unload(slot, old)
            self.loads.append(f"-{old.ref.release}")
            self.memory.models -= 1

        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(Slot, "_unload", unload)
        self.switch_on()

    def switch_on(self) -> None:
        """A new process on the same disk."""
        self.store, self.slot = Store(self.state), Slot("eye")
        self.memory = FakeMemory(self.limit)
        self.events: list[UpdateEvent | Seeded] = []
        self.updater = Updater(
            {"eye": self.slot},
            {"eye": SlotConfig(seed=self.seed, probation_s=60.0, swap=self.swap)},  # type: ignore[arg-type]
            Releases(self.state / "releases"), self.store, self.clock, Carrier(self._fetch),
            post=self.events.append, report=lambda: None, say=lambda kind, text, **_: self.said.append(f"{kind}: {text}"),
            retry_s=10.0, memory=self.memory,  # type: ignore[arg-type]
        )  # fmt: skip
        self.updater.start()

    def _prove(self, *_: object) -> Proof:
        live = self.slot.live
        self.live_at_proof.append(live.ref.release if live else None)
        return self.proof()

    def _fetch(self, ref: ReleaseRef, folder: Path, _cancelled: Callable[[], bool]) -> None:
        self.fetched += 1
        shutil.copytree(self.server[ref], folder, dirs_exist_ok=True)

    def desire(self, ref: ReleaseRef, events: int = 1000) -> None:
        self.rev += 1
        self.updater.desire(Desired(id="d", ts=0, boot="b", seq=1, rev=self.rev, models={"eye": ref}))
        self.settle(events)

    def settle(self, events: int = 1000) -> None:
        while self.events and events:
            self.updater.handle(self.events.pop(0))
            events -= 1

    def wait(self, seconds: float) -> None:
        self.clock.time += seconds
        self.updater.tick()
        self.settle()

    @property
    def eye(self) -> ModelReport:
        return self.updater.reports()["eye"]

    @property
    def outcome(self) -> tuple[str | None, str]:
        return self.eye.active, self.eye.update
