"""The one slot of a simulated device: which release runs in it, and the update table that real devices go by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edged.core.update import SWITCHING, UNDER_WAY, Effect, Event, State, step
from edged.wire.bundle import BULK
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import BAD_MAX, BadReport, ModelReport, Progress
from trainer.core import simulated
from trainer.simulate.fetch import Count, Fetch, FetchFailed, WrongRelease
from trainer.simulate.link import LoopLink
from trainer.simulate.plan import Plan

AGAIN_S = 15.0  # after a fetch that failed


class Slot:
    """What one device runs. `report` is called when it has changed, `event` when a person should hear of it."""

    def __init__(
        self, plan: Plan, device: str, stamp: Callable[[], dict[str, Any]], dice: Callable[[], float],
        pool: ThreadPoolExecutor, count: Count, moved: Callable[[str, str], None],
        report: Callable[[], None], event: Callable[..., None],
    ) -> None:  # fmt: skip
        self._plan, self._device, self._stamp, self._dice, self._pool = plan, device, stamp, dice, pool
        self._count, self._moved, self._report, self._event = count, moved, report, event
        self.active, self.previous = plan.release, ""
        self.state, self.reason, self.since = State.IDLE, "", 0.0
        self.serves = False  # whether a trainer is there that answers requests for blocks
        self._wanted: ReleaseRef | None = None
        self._candidate: ReleaseRef | None = None
        self._bad: dict[str, BadReport] = {}  # by SHA-256
        self._here = {plan.release}  # what it ran, or has fetched: a real device has the files
        self._fetch: Fetch | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: asyncio.Task[None] | None = None  # the worker's present task
        self._later: asyncio.TimerHandle | None = None

    def desire(self, ref: ReleaseRef | None) -> None:
        """Desired state names this release, or none for this slot: it stays as it is."""
        if ref is None:
            return
        self._wanted = ref
        under_way = self.state in UNDER_WAY
        if under_way and self._candidate == ref:
            return
        if ref.release == self.active and not (under_way and self.state in SWITCHING):
            self._happened(Event.WITHDRAWN)
        elif not (self._candidate == ref and self.state in (State.FAILED, State.REVERTED)):
            self._begin(ref)

    def report(self) -> ModelReport:
        """As `up/reported` says it."""
        staged = self._candidate.release if self._candidate and self.state in UNDER_WAY else None
        fetch = self._fetch
        return ModelReport(
            active=self.active, previous=self.previous or None, staged=staged, update=self.state.value,
            reason=self.reason, since=self.since,
            progress=Progress(bytes=fetch.bytes, total=fetch.total) if fetch and fetch.total else None,
        )  # fmt: skip

    def bad(self) -> list[BadReport]:
        """What is not installed again."""
        return list(self._bad.values())[-BAD_MAX:]

    def stop(self) -> None:
        """End what is under way."""
        if self._later is not None:
            self._later.cancel()
        for task in self._tasks:
            task.cancel()

    def _begin(self, ref: ReleaseRef) -> None:
        after, _ = step(self.state, Event.DESIRED)
        if after is self.state:
            return  # probation ends first; desired state is looked at again then
        self._candidate, self.reason = ref, ""
        self._happened(Event.DESIRED)

    def _happened(self, event: Event, reason: str = "") -> None:
        before = self.state
        self.state, effects = step(before, event)
        if event is Event.WITHDRAWN and self._running is not None:
            self._running.cancel()
        if self.state is not before:
            self.since = time.time()
            self.reason = reason or ("" if event is Event.DESIRED else self.reason)
            self._moved(before.value, self.state.value)
        for effect in effects:
            self._do(effect)
        if before in SWITCHING | {State.REVERTING} and self.state not in UNDER_WAY and self._wanted is not None:
            wanted = self._wanted
            if wanted != self._candidate:
                self.desire(wanted)

    def _do(self, effect: Effect) -> None:
        """One effect of the table; what takes time is the worker's."""
        match effect:
            case Effect.ADMIT:
                self._work(self._admit())
            case Effect.DOWNLOAD:
                self._work(self._download())
            case Effect.VERIFY:  # every block was when it came, and so was the list of them
                self._work(self._soon(Event.VERIFIED, 0.0))
            case Effect.PROVE:
                self._work(self._soon(Event.PROVED, self._plan.prove_s * (0.5 + self._dice())))
            case Effect.FLIP:
                assert self._candidate is not None
                self.previous, self.active = self.active, self._candidate.release
                self._work(self._soon(Event.FLIPPED, 0.0))
            case Effect.WATCH:
                self._work(self._watch())
            case Effect.FLIP_BACK:
                if self.previous:
                    self.active, self.previous = self.previous, ""
                self._work(self._soon(Event.BACK, 0.0))
            case Effect.REMEMBER_BAD:
                assert self._candidate is not None
                ref = self._candidate
                self._bad[ref.sha256] = BadReport(
                    release=ref.release, sha256=ref.sha256, reason=self.reason, at=time.time()
                )
            case Effect.REPORT:
                self._report()
            case Effect.COMMIT | Effect.DISCARD:
                pass  # files, of which there are none

    async def _soon(self, event: Event, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._happened(event)

    async def _admit(self) -> None:
        assert self._candidate is not None
        known = self._bad.get(self._candidate.sha256)
        if known is not None:
            self._happened(Event.REFUSED, f"{known.release} is known to be bad here: {known.reason}")
        else:
            self._happened(Event.ADMITTED)

    async def _watch(self) -> None:
        assert self._candidate is not None
        release = self._candidate.release
        await asyncio.sleep(self._plan.probation_s)
        if not simulated.reverts(self._plan.nature(), self._device, release):
            self._count("installed")
            self._happened(Event.HEALTHY)
            return
        self._count("reverted")
        reason = f"{release} is unhealthy on this device (simulated)"
        self._event("reverted", f"{self._plan.model}: {reason}", release=release)
        self._happened(Event.UNHEALTHY, reason)

    async def _download(self) -> None:
        assert self._candidate is not None
        ref, client = self._candidate, f"{self._device}{BULK}"
        fetch = self._fetch = Fetch(self._plan.site, self._device, self._stamp, self._count)
        try:
            if ref.release in self._here:
                return self._happened(Event.DOWNLOADED)
            if not self.serves:
                raise FetchFailed("no trainer that serves blocks has announced itself")
            fetch.link = LoopLink(self._plan.link(client), [], fetch.take, self._pool, self._dice)
            fetch.link.start()
            await fetch.release(ref)
        except FetchFailed as error:
            self._count("fetches_failed")
            self._fetch = None
            self._later = asyncio.get_running_loop().call_later(AGAIN_S * (0.5 + self._dice()), self._again, ref)
            self._happened(Event.FETCH_FAILED, str(error))
        except WrongRelease as error:
            self._fetch = None
            self._happened(Event.VERIFY_FAILED, str(error))
        else:
            self._count("fetched")
            self._here.add(ref.release)
            self._fetch = None
            self._happened(Event.DOWNLOADED)
        finally:
            self._fetch = None
            if fetch.link is not None:
                fetch.link.stop()

    def _again(self, ref: ReleaseRef) -> None:
        if self.state is State.FAILED and self._wanted == ref:
            self._begin(ref)

    def _work(self, act: Coroutine[Any, Any, None]) -> None:
        """The worker does this now; whatever it did for another candidate is dropped."""
        current = asyncio.current_task()
        if self._running is not None and self._running is not current:
            self._running.cancel()
        self._running = task = asyncio.get_running_loop().create_task(act)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
