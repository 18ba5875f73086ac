"""A slot under load: a flip loses no item, the old model goes when its last lease ends, waiting ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edged.engines.base import Detections, EngineError, Image, Prepared
from edged.slot import Loaded, Slot, SlotStopped, WrongKind, load
from edged.wire.manifest import ReleaseManifest, ReleaseRef

WAIT_S = 10.0


class FakeDetector:
    """Answers with its own number as class; complains when it is used after it was closed, or by two at once."""

    labels = ("a", "b", "c")

    def __init__(self, number: int) -> None:
        self.number, self.closed, self.busy = number, 0, False

    def prepare(self, image: Image) -> Prepared:
        raise NotImplementedError

    def infer(self, batch: Sequence[Prepared]) -> list[Detections]:
        assert not self.closed, "used after it was unloaded"
        assert not self.busy, "used by two at once"
        self.busy = True
        time.sleep(0.0005)
        self.busy = False
        one = np.ones(1, np.float32)
        return [Detections(np.zeros((1, 4), np.float32), one, np.array([self.number]))]

    def close(self) -> None:
        self.closed += 1


def loaded(number: int, kind: str = "detect") -> Loaded:
    ref = ReleaseRef(release=f"toy@1.{number}", sha256=f"{number}" * 64)
    manifest = ReleaseManifest(release=ref.release, kind=kind, engine="fake", files={}, created="2026")  # type: ignore[arg-type]
    return Loaded(ref, manifest, FakeDetector(number))


def detector(model: Loaded) -> FakeDetector:
    assert isinstance(model.engine, FakeDetector)
    return model.engine


def test_no_item_is_lost_or_answered_by_a_closed_model_while_models_change() -> None:
    slot, models = Slot("eye"), [loaded(number) for number in range(8)]
    slot.flip(models[0])
    answers: list[list[int]] = [[] for _ in range(4)]
    failures: list[BaseException] = []
    enough = threading.Event()

    def work(mine: list[int]) -> None:
        try:
            while not enough.is_set():
                with slot.lease() as live, live.use:
                    mine.append(int(live.detector.infer([])[0].classes[0]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    for model in models[1:]:
        before = sum(map(len, answers))
        deadline = time.monotonic() + WAIT_S
        while sum(map(len, answers)) < before + 20 and time.monotonic() < deadline:
            time.sleep(0.001)
        slot.flip(model)
    enough.set()
    for thread in threads:
        thread.join()
    assert not failures
    for mine in answers:
        assert mine == sorted(mine), "an item was answered by an older model after a newer one"
    assert {number for mine in answers for number in mine} >= set(range(7))
    assert [detector(model).closed for model in models] == [1] * 7 + [0]


def test_the_old_model_unloads_when_its_last_lease_ends() -> None:
    slot, old, new = Slot("eye"), loaded(0), loaded(1)
    slot.flip(old)
    with slot.lease() as first:
        with slot.lease() as second:
            flipping = threading.Thread(target=slot.flip, args=(new,))
            flipping.start()
            deadline = time.monotonic() + WAIT_S
            while slot.live is not new and time.monotonic() < deadline:
                time.sleep(0.001)
            assert first is second is old
            with slot.lease() as third:
                assert third is new
            assert flipping.is_alive(), "it reports only when the old one is out of use"
            assert not detector(old).closed
        assert not detector(old).closed
    flipping.join(WAIT_S)
    assert not flipping.is_alive()
    assert detector(old).closed == 1
    assert not detector(new).closed


def test_a_flip_is_over_when_the_old_model_is_out_of_use_and_freeing_it_is_nobodys_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock moves only where something takes time: 5 s in the last item, 1000 s in freeing."""
    now, closed_by = [0.0], list[str]()
    monkeypatch.setattr("edged.slot.time.monotonic", lambda: now[0])
    monkeypatch.setattr("edged.slot.trim_memory", lambda: now.__setitem__(0, now[0] + 1000))

    class Slow(FakeDetector):
        def close(self) -> None:
            closed_by.append(threading.current_thread().name)
            super().close()

    slot, models = Slot("eye"), [loaded(number) for number in range(3)]
    for model in models:
        model.engine = Slow(detector(model).number)
    slot.flip(models[0])
    assert slot.flip(models[1]) == 0  # nobody had it in hand
    leased, took_ms = threading.Event(), list[float]()

    def work() -> None:
        with slot.lease():
            leased.set()
            while slot.live is not models[2]:
                threading.Event().wait(0.001)
            now[0] += 5

    worker = threading.Thread(target=work, name="worker")
    worker.start()
    assert leased.wait(WAIT_S)
    flipping = threading.Thread(target=lambda: took_ms.append(slot.flip(models[2])), name="flip")
    flipping.start()
    for thread in (worker, flipping):
        thread.join(WAIT_S)
    assert took_ms == [5000]
    assert closed_by == [threading.main_thread().name, "flip"], "a worker has answers to give"


def test_a_lease_that_never_ends_does_not_hold_up_the_flip_for_ever() -> None:
    slot, old, new = Slot("eye"), loaded(0), loaded(1)
    slot.flip(old)
    with slot.lease():
        assert slot.flip(new, drain_s_max=0.05) >= 50
        assert slot.live is new
        assert not detector(old).closed
    assert detector(old).closed == 1


def test_whoever_comes_before_the_first_model_waits_for_it() -> None:
    slot, got = Slot("eye"), []

    def wait() -> None:
        with slot.lease() as live:
            got.append(live)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    model = loaded(0)
    slot.flip(model)
    for thread in threads:
        thread.join(WAIT_S)
    assert got == [model] * 3


def test_without_a_model_a_bounded_wait_ends_with_a_reason() -> None:
    with pytest.raises(EngineError, match="slot eye: no model is loaded yet"), Slot("eye").lease(timeout_s=0.01):
        raise AssertionError("there is nothing to lease")


def test_stop_wakes_whoever_waits_and_unloads_after_the_item_in_hand() -> None:
    empty, ended = Slot("empty"), threading.Event()

    def wait() -> None:
        with pytest.raises(SlotStopped), empty.lease():
            raise AssertionError("there is nothing to lease")
        ended.set()

    threading.Thread(target=wait).start()
    empty.stop()
    assert ended.wait(WAIT_S)

    slot, model = Slot("eye"), loaded(0)
    slot.flip(model)
    with slot.lease() as live:
        slot.stop()
        assert live.detector.infer([])
        with pytest.raises(SlotStopped), slot.lease():
            raise AssertionError("it is stopped")
    assert detector(model).closed == 1
    slot.stop()
    assert detector(model).closed == 1


def test_an_item_of_the_wrong_kind_is_told_apart_from_a_broken_model() -> None:
    model = loaded(0)
    with pytest.raises(WrongKind, match=r"release toy@1\.0 is no generator \(kind detect\)"):
        _ = model.generator
    slot = Slot("eye")
    slot.flip(model)
    with pytest.raises(EngineError, match="is no generator"):
        slot.attach(None, None)


def test_a_candidate_that_fails_its_golden_set_is_closed_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeDetector(0)
    monkeypatch.setattr("edged.slot.open_engine", lambda *_: engine)
    manifest = ReleaseManifest(release="toy@1.0", kind="detect", engine="fake", files={}, created="2026")
    with pytest.raises(EngineError, match="no golden set"):
        load(ReleaseRef(release="toy@1.0", sha256="0" * 64), toy, manifest, None)  # type: ignore[arg-type]
    assert engine.closed == 1
