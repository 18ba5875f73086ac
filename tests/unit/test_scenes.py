"""The demo's scenes: splits that share nothing, truth that holds, shifts that move pixels only."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from bench.demo.scenes import (
    DIGITS,
    LABELS,
    SHIFTS,
    SIZE,
    SPLITS,
    decode_png,
    digit_indices,
    encode_png,
    make_scenes,
    photo_band,
)


def test_splits_share_no_digit_instance_and_use_all() -> None:
    parts = [set(digit_indices(split)) for split in SPLITS]
    for one, other in combinations(parts, 2):
        assert not one & other
    assert set().union(*parts) == set(range(1797))


def test_splits_share_no_photo_column() -> None:
    assert photo_band("after", 640) == photo_band("stream", 640), "the line goes on looking at the same place"
    bands = [photo_band(split, 640) for split in SPLITS if split != "after"]
    assert all(high - low >= 100 for low, high in bands)
    for (low, high), (other_low, other_high) in combinations(bands, 2):
        assert high <= other_low or other_high <= low


def test_pixels_come_from_the_split_s_own_digits_and_photo_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wiping everything that is not of the split changes no pixel of its scenes."""
    import bench.demo.scenes as module

    before = make_scenes("stream", 6, seed=3)
    ink, classes = module._digits()
    kept = np.zeros_like(ink)
    kept[digit_indices("stream")] = ink[digit_indices("stream")]
    photos = []
    for photo in module._photos():
        low, high = photo_band("stream", photo.shape[1])
        only = np.zeros_like(photo)
        only[:, low:high] = photo[:, low:high]
        photos.append(only)
    monkeypatch.setattr(module, "_digits", lambda: (kept, classes))
    monkeypatch.setattr(module, "_photos", lambda: tuple(photos))
    after = make_scenes("stream", 6, seed=3)
    assert all(np.array_equal(one.image, other.image) for one, other in zip(before, after, strict=True))


def test_same_seed_same_scenes_other_seed_others() -> None:
    one, again, other = (make_scenes("train", 5, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(one, again, strict=True))
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True))


def test_a_longer_run_starts_with_the_shorter_one() -> None:
    short, long = make_scenes("train", 2, seed=1), make_scenes("train", 4, seed=1)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(short, long[:2], strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_lie_inside_and_apart(split: str) -> None:
    for scene in make_scenes(split, 40, seed=5):
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert DIGITS[0] <= len(scene.boxes) == len(scene.classes) <= DIGITS[1]
        assert ((scene.classes >= 0) & (scene.classes < len(LABELS))).all()
        assert (scene.boxes >= 0).all() and (scene.boxes <= SIZE).all()
        assert (scene.boxes[:, 2:] - scene.boxes[:, :2] >= 8).all()
        for one, other in combinations(scene.boxes, 2):
            width = min(one[2], other[2]) - max(one[0], other[0])
            height = min(one[3], other[3]) - max(one[1], other[1])
            assert width < 0 or height < 0


def test_the_number_of_digits_can_be_chosen() -> None:
    assert {len(scene.boxes) for scene in make_scenes("stream", 20, seed=5, digits=(1, 2))} == {1, 2}


def test_every_class_appears_in_every_split() -> None:
    for split in SPLITS:
        assert {int(c) for scene in make_scenes(split, 60, seed=5) for c in scene.classes} == set(range(10))


@pytest.mark.parametrize("shift", sorted(SHIFTS))
def test_a_shift_changes_pixels_and_not_truth(shift: str) -> None:
    for clean, shifted in zip(make_scenes("holdout", 8, 1), make_scenes("holdout", 8, 1, shift), strict=True):
        assert np.array_equal(clean.boxes, shifted.boxes) and np.array_equal(clean.classes, shifted.classes)
        assert np.abs(clean.image.astype(int) - shifted.image.astype(int)).mean() > 1


def test_mix_uses_every_shift() -> None:
    mixed = make_scenes("holdout", 24, 1, "mix")
    dim = [scene.image.mean() for scene in make_scenes("holdout", 24, 1, "dark")]
    light = [scene.image.mean() for scene in make_scenes("holdout", 24, 1, "invert")]
    clean = [scene.image.mean() for scene in make_scenes("holdout", 24, 1)]
    nearest = {
        int(np.argmin([abs(scene.image.mean() - value) for value in (dim[i], light[i], clean[i])]))
        for i, scene in enumerate(mixed)
    }
    assert nearest == {0, 1, 2}


def test_png_gives_back_the_pixels() -> None:
    for scene in make_scenes("stream", 3, 1, "dark"):
        assert np.array_equal(decode_png(encode_png(scene.image)), scene.image)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'trian'.*train"):
        make_scenes("trian", 1, 1)
    with pytest.raises(ValueError, match=r"'fog'.*dark"):
        make_scenes("train", 1, 1, "fog")
    with pytest.raises(ValueError, match="not an image"):
        decode_png(b"nothing")
