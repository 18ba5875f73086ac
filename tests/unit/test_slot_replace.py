"""Too little memory for two models: the old one leaves first, items wait, nothing is lost, and what fails is undone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edged import acts as module
from edged import slot as slot_module
from edged.core.probation import Criteria
from edged.engines.base import EngineError, EngineOptions
from edged.prove import Proof, ProveCancelled, ProveFailed
from edged.releases import Releases, read_manifest, reference
from edged.slot import InUse, Loaded, Slot, SlotStopped
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Desired
from tests.support.tight import Box
from tests.unit.test_slot import WAIT_S, detector, loaded


def in_background(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


# The slot.


def test_no_item_is_lost_and_never_are_two_models_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages as in a pipeline: the first keeps its lease while it hands over to the second, which needs one too."""
    monkeypatch.setattr(slot_module, "CLOSED_S", 0.05)
    slot, models = Slot("eye"), [loaded(number) for number in range(8)]
    slot.flip(models[0])
    between: queue.Queue[int] = queue.Queue(1)
    answered: list[tuple[int, int]] = []
    enough, sent = threading.Event(), 0

    def prepare() -> None:
        nonlocal sent
        while not enough.is_set():
            with slot.lease():
                between.put(sent)
                sent += 1

    def work() -> None:
        while not (enough.is_set() and between.empty()):
            try:
                item = between.get(timeout=0.05)
            except queue.Empty:
                continue
            with slot.lease() as live, live.use:
                answered.append((item, int(live.detector.infer([])[0].classes[0])))

    threads = [in_background(prepare), in_background(work)]
    for number, model in enumerate(models[1:], start=1):
        before = len(answered)
        wait_until(lambda before=before: len(answered) >= before + 20)
        slot.vacate()
        assert [detector(each).closed for each in models] == [1] * number + [0] * (8 - number), (
            "the new one is not loaded"
        )
        assert slot.flip(model) > 0
    enough.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert [item for item, _ in answered] == list(range(sent))
    releases = [release for _, release in answered]
    assert releases == sorted(releases)
    assert set(releases) == set(range(7)) | {releases[-1]}


def test_who_keeps_a_lease_until_somebody_else_gets_one_holds_up_nothing_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a preparer does whose image no worker takes, because the worker waits for a model."""
    monkeypatch.setattr(slot_module, "CLOSED_S", 0.01)
    slot, model, served = Slot("eye"), loaded(0), threading.Event()
    slot.flip(model)

    def come() -> None:
        with slot.lease():
            served.set()

    with slot.lease():
        leaving = in_background(slot.vacate)
        wait_until(lambda: slot.vacated)
        in_background(come)
        assert served.wait(WAIT_S)
    leaving.join(WAIT_S)
    assert detector(model).closed == 1
    assert slot.vacated


def test_who_comes_meanwhile_waits_even_beyond_his_patience_and_gives_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slot_module, "BEAT_S", 0.001)
    beats: list[int] = []
    slot, got = Slot("eye", lambda: beats.append(1)), []
    slot.flip(loaded(0))
    slot.vacate()

    def come() -> None:
        with slot.lease(timeout_s=0.01) as live:
            got.append(live)

    thread = in_background(come)
    wait_until(lambda: len(beats) > 30)
    assert got == []
    model = loaded(1)
    assert slot.flip(model) >= 30, "the milliseconds without a model"
    thread.join(WAIT_S)
    assert got == [model]
    assert not slot.vacated


def test_when_no_model_comes_after_all_patience_ends() -> None:
    slot, failed = Slot("eye"), threading.Event()
    slot.flip(loaded(0))
    slot.vacate()

    def come() -> None:
        with pytest.raises(EngineError, match="no model is loaded yet"), slot.lease(timeout_s=0.01):
            raise AssertionError("there is nothing to lease")
        failed.set()

    in_background(come)
    assert not failed.wait(0.05)
    slot.give_up()
    assert failed.wait(WAIT_S)


def test_an_adapter_does_not_wait_for_the_model_that_only_its_own_thread_can_bring() -> None:
    slot = Slot("eye")
    slot.flip(loaded(0))
    slot.vacate()
    with pytest.raises(EngineError, match="no model is loaded yet"):
        slot.attach(None, None)


def test_a_model_that_is_in_use_all_the_time_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_module, "CLOSED_S", 0.01)
    slot, model = Slot("eye"), loaded(0)
    slot.flip(model)
    with slot.lease(), pytest.raises(InUse, match=r"toy@1\.0 was in use all the time"):
        slot.vacate(drain_s_max=0.02)
    with slot.lease(timeout_s=0) as live:
        assert live is model
    assert not detector(model).closed


@pytest.mark.parametrize("leased", [False, True])
def test_a_shutdown_in_the_middle_unloads_the_old_model_once(leased: bool) -> None:
    slot, model, ended = Slot("eye"), loaded(0), threading.Event()
    slot.flip(model)

    def replace() -> None:
        try:
            slot.vacate()
            with slot.lease():
                raise AssertionError("it is stopped")
        except SlotStopped:
            ended.set()

    if leased:
        with slot.lease():
            in_background(replace)
            wait_until(lambda: slot.vacated)
            slot.stop()
            assert ended.wait(WAIT_S)
            assert not detector(model).closed, "an item is in hand"
    else:
        in_background(replace)
        wait_until(lambda: detector(model).closed)
        slot.stop()
        assert ended.wait(WAIT_S)
    assert detector(model).closed == 1


# The updater.


def test_the_old_model_leaves_before_the_new_one_comes(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=200, monkeypatch=monkeypatch)
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.1", "switched")
    assert box.loads == ["+toy@1.0", "-toy@1.0", "+toy@1.1"]
    assert box.live_at_proof == ["toy@1.0"], "there is room to prove it beside"
    assert box.eye.swap_ms is not None
    assert box.eye.swap_ms > 1, "loading takes longer"
    box.wait(60)
    assert box.outcome == ("toy@1.1", "committed")


def test_without_room_for_a_proof_beside_it_takes_the_place_of_the_old_model(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.1", "switched")
    assert (box.live_at_proof, box.loads) == ([None], ["+toy@1.0", "-toy@1.0", "+toy@1.1"])


def fail() -> Proof:
    raise ProveFailed("it answers nonsense")


def cancel() -> Proof:
    raise ProveCancelled("nobody wants it")


@pytest.mark.parametrize(("proof", "update"), [(fail, "failed"), (cancel, "proving")])
def test_a_proof_that_comes_to_nothing_brings_the_old_model_back(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch, proof: Callable[[], Proof],
    update: str,
) -> None:  # fmt: skip
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    box.proof = proof
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.0", update)
    assert box.loads == ["+toy@1.0", "-toy@1.0", "+toy@1.0"]
    assert not box.slot.vacated


def test_a_new_model_that_does_not_load_brings_the_old_one_back(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    real = module.load

    def load(ref: ReleaseRef, *values: Any, **more: Any) -> Loaded:
        if ref.release == "toy@1.1":
            raise EngineError("no such operator")
        return real(ref, *values, **more)

    monkeypatch.setattr(module, "load", load)
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.0", "failed")
    assert box.eye.reason == "no such operator"
    assert box.loads == ["+toy@1.0", "-toy@1.0", "+toy@1.0"]


def test_a_model_that_gives_back_less_than_it_took_is_not_its_successors_fault(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    real = Slot._unload

    def leak(slot: Slot, old: Loaded) -> None:
        real(slot, old)
        box.memory.models += 4

    box.desire(reference(toy2), events=3)  # it is proven, in place of the old one
    monkeypatch.setattr(Slot, "_unload", leak)
    box.slot.flip(
        module.load(reference(toy), toy, read_manifest(toy), EngineOptions())
    )  # which comes back for a moment
    box.settle()
    assert box.outcome == ("toy@1.0", "failed")
    assert "MiB of limits.memory_mib = 90 are left" in box.eye.reason
    assert box.store.bad(reference(toy2).sha256) is None, "nothing is known against it"


def test_what_memory_refused_is_tried_again_after_a_start_with_more(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch, swap="beside")
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.0", "failed")
    box.wait(1000)
    assert box.outcome == ("toy@1.0", "failed"), "waiting helps nothing"
    box.memory.models = 0
    box.switch_on()
    box.settle()
    assert box.outcome == ("toy@1.0", "failed")
    box.limit = 400
    box.switch_on()
    box.settle()
    assert box.outcome == ("toy@1.1", "switched")


def test_a_new_limit_is_reason_enough_to_try_again(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch, swap="beside")
    box.desire(reference(toy2))
    box.memory.limit = 400
    box.updater.configure(10.0)
    box.settle()
    assert box.outcome == ("toy@1.1", "switched")


def test_a_bad_release_makes_way_for_the_one_before_it(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    box.desire(reference(toy2))
    for _ in range(Criteria().errors_max):
        box.updater.engine_error("eye")
    box.wait(1)
    assert box.outcome == ("toy@1.0", "reverted")
    assert box.loads == ["+toy@1.0", "-toy@1.0", "+toy@1.1", "-toy@1.1", "+toy@1.0"]


def test_a_bad_release_is_better_than_none(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    box.desire(reference(toy2))
    (Releases(tmp_path / "releases").folder(reference(toy)) / "model.onnx").write_bytes(b"rotten")
    for _ in range(Criteria().errors_max):
        box.updater.engine_error("eye")
    box.wait(1)
    assert box.outcome == ("toy@1.1", "reverting")
    assert any(line.startswith("no_way_back") for line in box.said)


@pytest.mark.parametrize("events", range(1, 6))
def test_a_crash_at_any_step_comes_back_with_the_old_model_and_goes_on(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch, events: int
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    box.desire(reference(toy2), events)
    before = len(box.loads)
    box.memory.models = 0
    box.switch_on()
    assert box.loads[before] == "+toy@1.0", "what served before the crash comes first"
    box.settle()
    assert box.outcome == ("toy@1.1", "switched")


def test_who_changes_his_mind_after_the_proof_gets_the_old_model_back(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.in_service.FLIP_S", 0.01)
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch)
    box.desire(reference(toy2), events=3)
    assert box.slot.vacated, "proven, and the control loop has not heard of it yet"
    time.sleep(0.05)
    assert box.slot.vacated, "it is still to be flipped"
    box.updater.desire(Desired(id="d", ts=0, boot="b", seq=1, rev=9, models={"eye": reference(toy)}))
    wait_until(lambda: box.slot.live is not None)
    box.settle()
    assert box.outcome == ("toy@1.0", "idle")
