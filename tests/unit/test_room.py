"""What does not fit into memory is refused with numbers, and neither blamed nor tried in vain."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edged.core.limits import MIB
from edged.prove import Proof, ProveShort
from edged.releases import reference
from tests.support.models import make_release
from tests.support.tight import Box, FakeMemory
from tests.unit.test_slot_replace import wait_until

# Refusals.


def test_what_does_not_fit_beside_is_refused_with_numbers_and_a_way_out(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=90, monkeypatch=monkeypatch, swap="beside")
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.0", "failed")
    assert box.eye.reason == (
        "needs at least 41 MiB to be proven beside toy@1.0; 25 MiB of limits.memory_mib = 90 are left: set swap = "
        '"replace" in [slots.eye], so that the old model leaves first, use a smaller model, or raise limits.memory_mib'
    )
    assert not box.live_at_proof
    assert box.store.counters()["models_refused"] == 1
    box.wait(3600)
    assert box.fetched == 1, "waiting would not help"
    assert box.store.bad(reference(toy2).sha256) is None, "nothing is wrong with it"


def test_what_others_use_now_may_be_free_later(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=200, monkeypatch=monkeypatch, swap="beside")
    box.memory.others = 930
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.0", "failed")
    assert "20 MiB of this machine are left: it is tried again" in box.eye.reason
    box.wait(10)
    assert box.eye.update == "failed"
    box.memory.others = 100
    box.wait(10)
    assert box.outcome == ("toy@1.1", "switched")


def test_a_need_that_was_measured_is_held_against_a_release_at_the_door(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=200, monkeypatch=monkeypatch, swap="beside")
    box.proof = lambda: Proof(0.1, 0.1, 2, 150 * MIB, 190 * MIB)
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.0", "failed")
    assert "needs 150 MiB beside toy@1.0; 130 MiB of limits.memory_mib = 200 are left" in box.eye.reason
    assert (len(box.live_at_proof), box.fetched) == (1, 1)
    box.desire(reference(toy))
    box.desire(reference(toy2))
    assert "needs 150 MiB" in box.eye.reason
    assert (len(box.live_at_proof), box.fetched) == (1, 1), "known, and not fetched again"
    assert box.store.bad(reference(toy2).sha256) is None


@pytest.mark.parametrize(("limit", "tried"), [(90, [None]), (200, ["toy@1.0", None])])
def test_a_proof_that_ran_short_of_memory_says_nothing_against_the_release(
    tmp_path: Path,
    toy: Path,
    toy2: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    tried: list[str | None],
) -> None:
    def short() -> Proof:
        raise ProveShort("bad_alloc")

    box = Box(tmp_path, toy, toy2, limit=limit, monkeypatch=monkeypatch)
    box.proof = short
    box.desire(reference(toy2))
    assert box.outcome == ("toy@1.0", "failed")
    assert "needs at least" in box.eye.reason
    assert box.live_at_proof == tried, "once with all that there is, and never again with as little"
    assert box.slot.live is not None
    assert box.store.bad(reference(toy2).sha256) is None


def test_a_seed_that_does_not_fit_is_not_loaded_and_the_daemon_goes_on(
    tmp_path: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = tmp_path / "big"
    make_release(big, "toy@1.0")
    box = Box(tmp_path / "state", big, toy2, limit=46, monkeypatch=monkeypatch)
    assert box.slot.live is not None
    monkeypatch.setattr("edged.needs.ONNX_FACTOR", 1e9)
    box.switch_on()
    assert box.slot.live is None
    (said,) = box.said
    assert said.startswith("model_not_loaded: eye: toy@1.0 needs at least ")
    assert said.endswith("MiB of limits.memory_mib = 46 are left: use a smaller model, or raise limits.memory_mib")


def test_a_flip_for_which_there_is_no_room_just_now_waits(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(tmp_path, toy, toy2, limit=200, monkeypatch=monkeypatch, swap="beside")
    box.desire(reference(toy2), events=3)  # as far as the proof
    assert box.eye.update == "proving"
    box.memory.others = 950
    box.settle(1)
    box.settle(1)
    assert box.outcome == ("toy@1.0", "staged")
    assert "are left" in box.eye.reason
    box.memory.others = 0
    box.settle()
    assert box.outcome == ("toy@1.1", "switched")


def test_a_start_that_found_too_little_memory_just_then_is_made_good(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.in_service.PASSING_S", 0.01)
    monkeypatch.setattr(FakeMemory, "others", 1000)
    box = Box(tmp_path, toy, limit=200, monkeypatch=monkeypatch)
    assert box.slot.live is None
    time.sleep(0.05)
    assert len(box.said) == 1, "said once, however often it is tried"
    box.memory.others = 0
    wait_until(lambda: box.slot.live is not None)
    assert box.said[0].startswith("model_not_loaded: eye: toy@1.0 needs at least 1 MiB; 0 MiB of this machine are left")
