"""The updater with its clock in hand and its worker on the same thread: what time and restarts do to an update."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from edged import acts as module
from edged import golden
from edged.acts import Carrier, UpdateEvent
from edged.config import Slot as SlotConfig
from edged.core.probation import Criteria
from edged.core.update import RESTARTS_MAX
from edged.fetch import FetchError
from edged.prove import Proof
from edged.releases import Releases, reference
from edged.slot import Slot
from edged.store import StorageFull, Store
from edged.trust import Untrusted
from edged.updater import FULL_RETRY_S, Updater
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Desired, ModelReport

PROBATION_S, RETRY_S = 60.0, 10.0


class AtOnce:
    """An executor that does everything when it is asked."""

    def __init__(self, **_: object) -> None: ...

    def submit(self, act: Callable[..., None], *values: Any) -> Future[None]:
        act(*values)
        return Future()

    def shutdown(self, **_: object) -> None: ...


class Clock:
    """Stands still until it is moved."""

    time, jumped = 1_000_000_000.0, 0.0

    def now(self) -> float:
        return self.time + self.jumped

    def monotonic(self) -> float:
        return self.time

    def real(self, seconds: float) -> float:
        return seconds


class Box:
    """A device's updater that can be switched off and on again; `server` are the releases that can be fetched."""

    def __init__(self, state: Path, seed: Path, *server: Path) -> None:
        self.state, self.seed = state, seed
        self.server = {reference(folder): folder for folder in server}
        self.clock = Clock()
        self.said: list[str] = []
        self.distrust = ""  # why no release is trusted
        self.trouble = "nobody answers"  # what happens to who asks for a release that cannot be fetched
        self.rev = 0
        self.switch_on()

    def switch_on(self) -> None:
        """A new process on the same disk."""
        self.store, self.slot = Store(self.state), Slot("eye")
        self.events: list[UpdateEvent] = []
        self.updater = Updater(
            {"eye": self.slot}, {"eye": SlotConfig(seed=self.seed, probation_s=PROBATION_S)},
            Releases(self.state / "releases"), self.store, self.clock, Carrier(self._fetch),
            post=self.events.append, report=lambda: None, say=lambda kind, text, **_: self.said.append(f"{kind}: {text}"),
            retry_s=RETRY_S,
        )  # fmt: skip
        self.updater.start()

    @property
    def failures(self) -> list[str]:
        """The events that say that an update failed."""
        return [text for text in self.said if text.startswith("update_failed")]

    def _fetch(self, ref: ReleaseRef, folder: Path, _cancelled: Callable[[], bool]) -> None:
        if self.distrust:
            raise Untrusted(self.distrust)
        if ref not in self.server:
            raise FetchError(self.trouble)
        shutil.copytree(self.server[ref], folder, dirs_exist_ok=True)

    def desire(self, ref: ReleaseRef) -> None:
        self.rev += 1
        self.updater.desire(Desired(id="d", ts=0, boot="b", seq=1, rev=self.rev, models={"eye": ref}))
        self.settle()

    def settle(self, events: int = 1000) -> None:
        """Handle what the worker has answered, at most so many events."""
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


@pytest.fixture(autouse=True)
def on_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(module, "prove", lambda *_: Proof(0.1, 0.1, 2))


def test_a_release_is_committed_when_its_probation_is_over_and_not_before(
    tmp_path: Path, toy: Path, toy2: Path
) -> None:
    box = Box(tmp_path, toy, toy2)
    assert box.eye.active == "toy@1.0"
    box.desire(reference(toy2))
    assert (box.eye.active, box.eye.update, box.eye.previous) == ("toy@1.1", "switched", None)
    box.wait(PROBATION_S - 1)
    assert box.eye.update == "switched"
    box.wait(1)
    assert (box.eye.active, box.eye.update, box.eye.previous) == ("toy@1.1", "committed", "toy@1.0")
    box.switch_on()
    assert (box.eye.active, box.eye.update, box.eye.previous) == ("toy@1.1", "committed", "toy@1.0")


def test_a_start_does_not_find_out_again_what_is_known(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole golden set is answered once a release and set of engines: by the seed at the first start, by an update
    when it is proven; every other load answers one input."""
    asked: list[int | None] = []
    real = golden.check
    monkeypatch.setattr(golden, "check", lambda *values: (asked.append(values[3]), real(*values))[1])
    box = Box(tmp_path, toy, toy2)
    assert asked == [None]
    box.switch_on()
    assert asked == [None, 1]
    box.desire(reference(toy2))  # proven in a process of its own
    assert (box.eye.active, asked) == ("toy@1.1", [None, 1, 1])
    monkeypatch.setattr(module, "installed_engines", lambda: ["onnxruntime 99"])
    box.wait(PROBATION_S)
    box.switch_on()
    box.switch_on()
    assert (box.eye.active, asked) == ("toy@1.1", [None, 1, 1, None, 1])


def test_time_without_power_is_no_probation(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy, toy2)
    box.desire(reference(toy2))
    box.clock.time += 10 * PROBATION_S
    box.switch_on()
    box.wait(1)
    box.settle()
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "switched")
    box.wait(PROBATION_S)
    assert box.eye.update == "committed"


@pytest.mark.parametrize("jump", [-1e7, 1e7])
def test_a_clock_that_jumps_ends_no_probation_and_keeps_none_from_ending(
    tmp_path: Path, toy: Path, toy2: Path, jump: float
) -> None:
    box = Box(tmp_path, toy, toy2)
    box.desire(reference(toy2))
    box.clock.jumped = jump
    box.wait(PROBATION_S - 1)
    assert box.eye.update == "switched"
    box.wait(1)
    assert box.eye.update == "committed"


def test_a_candidate_that_does_not_serve_is_never_committed(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy, toy2)
    box.desire(reference(toy2))
    shutil.rmtree(Releases(tmp_path / "releases").folder(reference(toy2)))
    box.switch_on()  # what it was is gone: it cannot be loaded again
    box.updater.tick()
    box.clock.time += 2 * PROBATION_S
    box.updater.tick()  # before the failure is handled
    assert box.eye.update == "switched"
    box.settle()
    assert (box.eye.active, box.eye.update) == ("toy@1.0", "reverted")
    assert any(text.startswith("update_reverted: eye: toy@1.1") for text in box.said)
    box.desire(reference(toy2))
    assert box.eye.update == "reverted"  # it is remembered


def test_errors_end_a_probation_and_the_next_one_starts_from_zero(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy, toy2)
    for _ in range(5):
        box.updater.engine_error("eye")  # of the release before it
    box.desire(reference(toy2))
    box.wait(1)
    assert box.eye.update == "switched"
    for _ in range(Criteria().errors_max):
        box.updater.engine_error("eye")
    box.wait(1)
    assert (box.eye.active, box.eye.update) == ("toy@1.0", "reverted")
    assert box.eye.reason == "3 engine errors during probation"
    assert box.store.bad(reference(toy2).sha256)


def test_what_may_pass_is_tried_again_after_a_while_and_after_a_restart(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy)
    box.desire(reference(toy2))
    assert (box.eye.update, box.eye.reason) == ("failed", "nobody answers")
    box.switch_on()
    box.wait(RETRY_S - 1)
    assert box.eye.update == "failed"
    box.server[reference(toy2)] = toy2
    box.wait(1)
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "switched")


def test_what_may_pass_is_said_once_a_reason_however_often_it_is_tried(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy)
    box.desire(reference(toy2))
    troubles = ["nobody answers", "17 bytes are free", "nobody answers", "9 bytes are free", "nobody answers"]
    for box.trouble in troubles:
        box.wait(RETRY_S)
        assert (box.eye.update, box.eye.reason) == ("failed", box.trouble), "what is so now is reported"
    said = ["update_failed: eye: toy@1.1: nobody answers", "update_failed: eye: toy@1.1: 17 bytes are free"]
    assert box.failures == said
    counters = box.store.counters()
    assert (counters["updates_failed"], counters["updates_failed_again"]) == (2, 4)
    # Who desires it anew hears of it anew.
    box.desire(reference(toy))
    box.desire(reference(toy2))
    assert box.failures == [*said, said[0]]


def test_another_release_fails_for_the_same_reason_and_that_is_said(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy)
    box.desire(reference(toy2))
    third = reference(toy2).model_copy(update={"release": "toy@1.2", "sha256": "0" * 64})
    box.desire(third)
    assert box.failures == [
        "update_failed: eye: toy@1.1: nobody answers",
        "update_failed: eye: toy@1.2: nobody answers",
    ]


def test_a_desire_during_probation_waits_for_its_end(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy, toy, toy2)
    box.desire(reference(toy2))
    box.desire(reference(toy))  # the fleet goes back meanwhile
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "switched")
    box.wait(PROBATION_S)
    assert (box.eye.active, box.eye.update) == ("toy@1.0", "switched")
    box.wait(PROBATION_S)
    assert (box.eye.active, box.eye.update, box.eye.previous) == ("toy@1.0", "committed", "toy@1.1")


@pytest.mark.parametrize("events", range(1, 5))
def test_a_restart_at_any_point_comes_to_the_same_end(tmp_path: Path, toy: Path, toy2: Path, events: int) -> None:
    box = Box(tmp_path, toy, toy2)
    box.updater.desire(Desired(id="d", ts=0, boot="b", seq=1, rev=1, models={"eye": reference(toy2)}))
    box.settle(events)
    box.switch_on()
    box.settle()
    box.wait(PROBATION_S)
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "committed")


def test_restarts_without_end_are_held_against_the_candidate_and_progress_forgives_them(
    tmp_path: Path, toy: Path, toy2: Path
) -> None:
    box = Box(tmp_path, toy, toy2)
    box.updater.desire(Desired(id="d", ts=0, boot="b", seq=1, rev=1, models={"eye": reference(toy2)}))
    box.settle(2)  # it has arrived and is being verified
    assert box.eye.update == "verifying"
    for _ in range(RESTARTS_MAX):
        box.switch_on()
    box.settle(1)
    assert box.eye.update == "proving"
    for _ in range(RESTARTS_MAX):
        box.switch_on()
    assert box.eye.update == "proving"
    box.switch_on()
    assert (box.eye.active, box.eye.update) == ("toy@1.0", "failed")
    assert "restarted too often" in box.eye.reason


def test_a_late_answer_about_another_release_changes_nothing(tmp_path: Path, toy: Path, toy2: Path) -> None:
    box = Box(tmp_path, toy, toy2)
    box.desire(ReleaseRef(release="toy@7.0", sha256="7" * 64))
    assert box.eye.update == "failed"
    box.updater.handle(UpdateEvent("eye", reference(toy2), module.Event.DOWNLOADED))
    assert box.eye.update == "failed"


def test_a_release_that_is_not_trusted_is_said_once_and_installed_when_it_is(
    tmp_path: Path, toy: Path, toy2: Path
) -> None:
    box = Box(tmp_path, toy, toy2)
    box.distrust = "timestamp.json is expired"
    box.desire(reference(toy2))
    for _ in range(3):
        assert (box.eye.active, box.eye.update, box.eye.reason) == ("toy@1.0", "failed", "timestamp.json is expired")
        box.wait(RETRY_S)
    box.distrust = "the clock says 1970"
    box.wait(RETRY_S)
    said = [text for text in box.said if text.startswith("release_untrusted")]
    assert said == ["release_untrusted: eye: timestamp.json is expired", "release_untrusted: eye: the clock says 1970"]
    assert box.store.counters()["releases_untrusted"] == 5
    box.distrust = ""  # these bytes were never bad
    box.wait(RETRY_S)
    box.wait(PROBATION_S)
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "committed")


def test_a_full_disk_at_a_start_keeps_updates_waiting_and_the_model_serving(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path / "state", toy, toy2)
    box.desire(reference(toy2))
    assert box.eye.update == "switched"
    full = True

    def write(self: Store, *values: Any, **more: Any) -> None:
        if full:
            raise StorageFull("no space left")
        kept(self, *values, **more)

    kept = Store.save_update
    monkeypatch.setattr(Store, "save_update", write)
    box.switch_on()
    assert box.slot.live is not None
    assert box.slot.live.ref == reference(toy)
    box.updater.desire(Desired(id="d", ts=0, boot="b", seq=1, rev=9, models={"eye": reference(toy2)}))
    box.wait(FULL_RETRY_S)
    assert box.slot.live.ref == reference(toy)
    assert box.store.counters()["updates_waiting"] == 1
    full = False
    box.wait(FULL_RETRY_S)
    assert box.slot.live.ref == reference(toy2)
    box.wait(PROBATION_S)
    assert (box.eye.update, box.eye.active) == ("committed", "toy@1.1")
