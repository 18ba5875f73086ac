"""De-duplication: what was escalated a moment ago is known again, and nothing else is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged import regions
from edged.core.dedupe import BITS_MAX, LEVEL_MAX, LOOKS_MAX, NOBODY, Dedupe, Look
from edged.engines.base import Detections

A = Look(0x0F0F_0F0F_0F0F_0F0F, 100.0, 1)
FLIPPED = Look(A.bits ^ ((1 << BITS_MAX) - 1), 100.0, 1)
OTHER = Look(A.bits ^ ((1 << BITS_MAX + 1) - 1), 100.0, 1)


@pytest.mark.parametrize(
    ("looks", "item", "now", "window", "expected"),
    [
        ([A], "b", 10.0, 60.0, True),
        ([FLIPPED], "b", 10.0, 60.0, True),
        ([OTHER], "b", 10.0, 60.0, False),
        ([Look(A.bits, 100.0 + LEVEL_MAX, 1)], "b", 10.0, 60.0, True),
        ([Look(A.bits, 101.0 + LEVEL_MAX, 1)], "b", 10.0, 60.0, False),  # another light
        ([Look(A.bits, 100.0, 2)], "b", 10.0, 60.0, False),  # another class
        ([Look(A.bits, 100.0, NOBODY)], "b", 10.0, 60.0, False),
        ([A, OTHER], "b", 10.0, 60.0, False),  # one of the two is new
        ([A, FLIPPED], "b", 10.0, 60.0, True),
        ([A], "b", 60.0, 60.0, False),  # too long ago
        ([A], "b", 59.9, 60.0, True),
        ([A], "b", 0.0, 0.0, False),  # switched off
        ([A], "a", 10.0, 60.0, False),  # it is the item itself, once more
        ([], "b", 10.0, 60.0, False),
    ],
)
def test_what_counts_as_the_same(looks: list[Look], item: str, now: float, window: float, expected: bool) -> None:
    dedupe = Dedupe()
    dedupe.remember([A], "a", 0.0)
    assert dedupe.repeats(looks, item, now, window) is expected


def test_what_was_suppressed_does_not_lengthen_the_window() -> None:
    dedupe = Dedupe()
    dedupe.remember([A], "a", 0.0)
    assert [dedupe.repeats([A], f"b{n}", n * 20.0, 60.0) for n in range(4)] == [True, True, True, False]


all_looks = st.lists(
    st.builds(Look, st.integers(0, (1 << 64) - 1), st.floats(0, 255), st.integers(-1, 80)), max_size=90
)


@given(st.lists(all_looks, max_size=8), all_looks)
def test_its_memory_is_bounded_and_it_knows_what_it_was_told(frames: list[list[Look]], last: list[Look]) -> None:
    dedupe = Dedupe()
    for number, looks in enumerate([*frames * 12, last]):
        dedupe.remember(looks, f"item-{number}", float(number))
    assert len(dedupe) <= LOOKS_MAX
    assert dedupe.repeats(last, "again", 1e3, 1e4) is bool(last)


@pytest.mark.parametrize(("window_s", "left"), [(60.0, 6), (0.0, 1)])
def test_what_left_the_window_is_forgotten(window_s: float, left: int) -> None:
    dedupe = Dedupe()
    for number in range(100):
        item, now = f"item-{number}", number * 10.0
        dedupe.repeats([A], item, now, window_s)
        dedupe.remember([A], item, now)
    assert len(dedupe) == left


def test_the_oldest_is_forgotten_first() -> None:
    dedupe = Dedupe()
    for number in range(LOOKS_MAX + 1):
        dedupe.remember([Look(number * 0x9E37_79B9_7F4A_7C15 % (1 << 64), number % 256, number)], "a", 0.0)
    assert len(dedupe) == LOOKS_MAX
    assert not dedupe.repeats([Look(0, 0.0, 0)], "b", 1.0, 60.0)
    assert dedupe.repeats([Look(0x9E37_79B9_7F4A_7C15, 1.0, 1)], "b", 1.0, 60.0)


# Real pixels.


def frame(seed: int, shift: int = 0, noise: float = 0.0, light: float = 1.0) -> np.ndarray:
    """A smooth random scene of 120 x 160 pixels, moved, noisy, or in another light."""
    chance = np.random.default_rng(seed)
    scene = cv2.resize(chance.uniform(20, 200, (9, 11, 3)), (160, 120), interpolation=cv2.INTER_CUBIC)
    scene = np.roll(scene, shift, axis=1) * light + np.random.default_rng(seed + 99).normal(
        0, noise or 1e-9, scene.shape
    )
    return np.clip(scene, 0, 255).astype(np.uint8)


def answer(*boxes: tuple[float, float, float, float]) -> Detections:
    n = len(boxes)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.full(n, 0.9, np.float32), np.zeros(n, np.int64))


def same(first: list[Look], second: list[Look]) -> bool:
    dedupe = Dedupe()
    dedupe.remember(first, "a", 0.0)
    return dedupe.repeats(second, "b", 1.0, 60.0)


BOX = (40.0, 20.0, 110.0, 95.0)


@pytest.mark.parametrize("seed", range(10))
def test_the_same_scene_with_noise_looks_the_same_and_another_does_not(seed: int) -> None:
    before = regions.looks(frame(seed), answer(BOX))
    assert same(before, regions.looks(frame(seed, noise=4.0), answer((40.4, 19.7, 110.3, 95.2))))
    assert not same(before, regions.looks(frame(seed + 1000), answer(BOX)))
    assert not same(before, regions.looks(frame(seed), answer()))  # a crop is no whole frame
    assert same(regions.looks(frame(seed), answer()), regions.looks(frame(seed, noise=4.0), answer()))
    assert not same(before, regions.looks(frame(seed, light=0.6), answer(BOX)))


@pytest.mark.parametrize(
    "box", [(-5, -5, 3, 3), (0, 0, 0, 0), (159.5, 119.5, 160, 120), (0, 0, 500, 500), (50, 50, 50, 50)]
)
def test_a_box_at_the_border_or_without_area_has_a_look_too(box: tuple[float, float, float, float]) -> None:
    (look,) = regions.looks(frame(1), answer(box))
    assert 0 <= look.bits < 1 << 64
    assert 0 <= look.level <= 255


def test_an_even_picture_with_noise_has_an_even_look() -> None:
    even = np.clip(np.random.default_rng(3).normal(128, 3, (96, 96, 3)), 0, 255).astype(np.uint8)
    (look,) = regions.looks(even, answer())
    assert look.bits.bit_count() <= BITS_MAX
