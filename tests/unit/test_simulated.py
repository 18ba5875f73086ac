"""What simulated devices do is decided by names and a seed, and is as often as it was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from edged.wire.measured import latency_quantile
from trainer.core import simulated
from trainer.core.simulated import Nature

CLASSES = ("cat", "dog", "owl")
NATURE = Nature(CLASSES, "m@1.0", seed=7, items=200, escalate_share=0.1, bad_share=0.3, revert_share=0.2)
NAMES = [simulated.name_of(number, "sim-") for number in range(1, 2001)]


def test_the_first_release_is_never_bad_and_others_are_on_their_share_of_the_devices() -> None:
    assert not any(simulated.worse(NATURE, name, "m@1.0") or simulated.reverts(NATURE, name, "m@1.0") for name in NAMES)
    bad = sum(simulated.worse(NATURE, name, "m@1.1") for name in NAMES)
    back = sum(simulated.reverts(NATURE, name, "m@1.1") for name in NAMES)
    assert bad == pytest.approx(600, abs=80)
    assert back == pytest.approx(400, abs=70)
    assert simulated.accuracy(NATURE, "x", "m@1.0") == 0.9
    assert {round(simulated.accuracy(NATURE, name, "m@1.1"), 9) for name in NAMES} == {0.9, 0.6}


def test_the_same_names_and_seed_decide_the_same_and_another_seed_otherwise() -> None:
    def going(seed: int) -> list[bool]:
        nature = Nature(CLASSES, "m@1.0", seed=seed, revert_share=0.5)
        return [simulated.reverts(nature, name, "m@1.1") for name in NAMES]

    assert going(1) == going(1)
    assert going(1) != going(2)


@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
def test_answers_are_right_as_often_as_the_device_is(chance: float) -> None:
    rng = np.random.default_rng(1)
    pictures = [rng.bytes(16) for _ in range(2000)]
    given = [simulated.answer(each, CLASSES, chance, float(rng.random())) for each in pictures]
    right = sum(a == simulated.truth(b, CLASSES) for a, b in zip(given, pictures, strict=True))
    assert right == pytest.approx(2000 * chance, abs=80)
    assert set(given) == set(CLASSES)


def test_a_window_counts_every_item_once() -> None:
    rng = np.random.default_rng(2)
    counted = [simulated.window(NATURE, 0.9, 0.05, rng) for _ in range(200)]
    assert {each.accepted + each.audited + each.escalated for each in counted} == {NATURE.items}
    assert {sum(each.confidence) for each in counted} == {sum(each.latency) for each in counted} == {NATURE.items}
    assert sum(each.escalated for each in counted) == pytest.approx(200 * 20, rel=0.05)
    assert sum(each.audited for each in counted) == pytest.approx(200 * 180 * 0.05, rel=0.1)
    assert latency_quantile(counted[0].latency, 0.5) == pytest.approx(simulated.LATENCY_MS, rel=0.2)


@pytest.mark.parametrize(("devices", "processes", "sizes"), [(10, 3, [3, 3, 4]), (2, 5, [1, 1]), (7, 1, [7])])
def test_every_device_is_in_one_process(devices: int, processes: int, sizes: list[int]) -> None:
    found = simulated.shares(devices, processes)
    assert [len(each) for each in found] == sizes
    assert [number for each in found for number in each] == list(range(1, devices + 1))
