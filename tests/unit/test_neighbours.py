"""Near-duplicates of real pictures: what is the same view again is found, what only looks alike is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bench.demo import scenes
from trainer.core.neighbours import (
    FLAT,
    LEVEL,
    LIMITS,
    PLACE,
    SIDE,
    Sketches,
    groups,
    members,
    near,
    stack,
)
from trainer.sketches import sketch

Image = NDArray[np.uint8]


@lru_cache(maxsize=1)
def pictures() -> list[Image]:
    """Real pixels: the demo's scenes, and pieces of two photos."""
    from sklearn.datasets import load_sample_images

    photos = [np.ascontiguousarray(photo[..., ::-1]) for photo in load_sample_images().images]
    pieces = [photo[y : y + 200, x : x + 200] for photo in photos for y in (0, 210) for x in (0, 220, 430)]
    return [*(scene.image for scene in scenes.make_scenes("train", 60, 7)), *pieces]


def jpeg(image: Image, quality: int) -> Image:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def light(image: Image, factor: float) -> Image:
    return np.clip(image.astype(float) * factor, 0, 255).astype(np.uint8)


def noisy(image: Image, deviation: float) -> Image:
    noise = np.random.default_rng(0).normal(0, deviation, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def cropped(image: Image, share: float) -> Image:
    rows, columns = (round(side * share / 2) for side in image.shape[:2])
    return np.ascontiguousarray(image[rows : image.shape[0] - rows, columns : image.shape[1] - columns])


def sketches(images: list[Image]) -> Sketches:
    return stack([sketch(image) for image in images])


@pytest.mark.parametrize(
    ("change", "found_min"),
    [
        (lambda image: jpeg(image, 90), 1.0),
        (lambda image: jpeg(image, 20), 1.0),
        (lambda image: light(image, 0.5), 1.0),
        (lambda image: light(image, 1.3), 0.97),  # what is burnt out is lost
        (lambda image: (255 * (image / 255.0) ** 0.7).astype(np.uint8), 0.97),
        (lambda image: noisy(image, 20), 1.0),
        (lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), 1.0),
        (lambda image: cropped(image, 0.0125), 0.9),
        (lambda image: cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR), 1.0),
    ],
)
def test_the_same_view_again_is_found(change: Callable[[Image], Image], found_min: float) -> None:
    images = pictures()
    found = near(sketches([change(image) for image in images]), sketches(images))
    assert np.mean(found == np.arange(len(images))) >= found_min


def test_different_scenes_are_not_the_same() -> None:
    leader = groups(sketches(pictures()))
    assert (leader == np.arange(len(leader))).all()


def test_another_object_before_the_same_background_is_another_picture() -> None:
    """A fixed camera: what a hash of the whole picture calls the same is what a detector has to tell apart."""
    frames, again = [], []
    for number in range(6):
        rng = np.random.default_rng([5, number])
        background = scenes._background("train", rng)
        for _ in range(5):
            canvas = background.copy()
            ink = scenes._ink(scenes._digits()[0][int(rng.integers(900))], rng)
            box = scenes._place(*ink.shape, [], rng)
            assert box is not None
            scenes._paint(canvas, ink, box, rng)
            frames.append(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
            again.append(noisy(light(frames[-1], 0.9), 3))
    both = groups(sketches([*frames, *again]))
    count = len(frames)
    assert (both[count:] == both[:count]).all()  # a frame, darker and with other noise, is that frame
    assert np.mean(both[:count] == np.arange(count)) >= 0.9


def test_flat_pictures_are_told_apart_by_their_level() -> None:
    flat = sketches([np.full((20, 30, 3), level, np.uint8) for level in (10, 11, 10, 200)])
    assert near(flat, flat).tolist() == [0, 1, 0, 3]
    assert members(groups(flat)) == [[0, 2]]


def test_pictures_of_finest_structure_are_compared_too() -> None:
    board = (np.indices((SIDE, SIDE)).sum(axis=0) % 2 * 200).astype(np.float32)
    found = stack([board, board + 1, 200 - board])
    assert near(found, found).tolist() == [0, 0, 2]


def test_nothing_is_near_to_nothing() -> None:
    none, some = stack([]), sketches(pictures()[:3])
    assert near(none, some).tolist() == []
    assert near(some, none).tolist() == [-1, -1, -1]
    assert groups(none).tolist() == []


def test_levels_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        stack([np.full((SIDE, SIDE), np.nan, np.float32)])


def reference(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """The rule as it is written down, for one pair of thumbnails."""
    a, b = first.astype(float), second.astype(float)
    if a.std() < FLAT or b.std() < FLAT:
        return bool(a.std() < FLAT and b.std() < FLAT and abs(a.mean() - b.mean()) < LEVEL)
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    coarse = [each.reshape(16, 2, 16, 2).mean(axis=(1, 3)).ravel() for each in (a, b)]
    whole = 1 - coarse[0] @ coarse[1] / np.linalg.norm(coarse[0]) / np.linalg.norm(coarse[1])
    windows = np.lib.stride_tricks.sliding_window_view((a - b) ** 2, (PLACE, PLACE))
    return bool(whole <= LIMITS.whole and np.sqrt(windows.mean(axis=(2, 3)).max()) <= LIMITS.place)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 4.0, 12.0, 25.0]), st.booleans())
def test_the_search_finds_what_comparing_all_pairs_finds(seed: int, noise: float, fixed_camera: bool) -> None:
    rng = np.random.default_rng(seed)
    bases = rng.uniform(0, 255, (1 if fixed_camera else 6, 8, 8))
    made = np.kron(bases[rng.integers(len(bases), size=16)], np.ones((4, 4))).astype(np.float32)
    for each in made[: 8 if fixed_camera else 0]:  # something stands somewhere
        y, x = rng.integers(0, SIDE - 5, 2)
        each[y : y + 5, x : x + 5] = rng.uniform(0, 255)
    made[-1] = 100.0
    made = made + rng.normal(0, noise, made.shape).astype(np.float32)
    all_pairs = np.array([[reference(a, b) for b in made] for a in made])
    found = Sketches(made)
    expected = [next((int(column) for column in np.flatnonzero(row)), -1) for row in all_pairs]
    # Within rounding of a limit either answer is right; hardly any pair is.
    assert np.mean(near(found, found) == expected) >= 0.95
    leader = groups(found)
    for member, first in enumerate(leader.tolist()):
        assert leader[first] == first <= member


def test_many_alike_pictures_give_what_few_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short cuts for fixed cameras and the blocks change nothing."""
    rng = np.random.default_rng(3)
    background = np.kron(rng.uniform(0, 255, (8, 8)), np.ones((4, 4))).astype(np.float32)
    made = np.repeat(background[None], 90, axis=0) + rng.normal(0, 2, (90, SIDE, SIDE)).astype(np.float32)
    for each in made[:60]:
        y, x = rng.integers(0, SIDE - 6, 2)
        each[y : y + 6, x : x + 6] = rng.uniform(0, 255)
    found = Sketches(made)
    plain = near(found, found), groups(found)
    monkeypatch.setattr("trainer.core.neighbours.MANY", 3)
    monkeypatch.setattr("trainer.core.neighbours.BLOCK", 7)
    monkeypatch.setattr("trainer.core.neighbours.CHUNK", 11)
    monkeypatch.setattr("trainer.core.neighbours.PAIRS", 13)
    monkeypatch.setattr("trainer.core.neighbours.FINE_PAIRS", 5)
    assert (near(found, found) == plain[0]).all()
    assert (groups(found) == plain[1]).all()
    assert 10 < len(np.unique(plain[1])) < 80
