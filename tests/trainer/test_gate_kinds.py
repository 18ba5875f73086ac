"""Segmenters and classifiers on the device's engines: scored by masks and by labels, and judged by the same gate."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from edged.core.matching import iou_matrix
from edged.engines.base import Detector, EngineOptions, open_engine
from edged.wire.manifest import Thresholds
from tests.support.parities import SAME
from tests.support.squares import LABELS, SIDE, Weights, learn, scenes
from tests.support.tinted import TRIANGLE, learn_tints, manifest_of, tints, triangles, write_classifier, write_segmenter
from trainer.core.gate import Evidence, Holdout, Rules, Verdict, judge
from trainer.evaluate import Labelled, calibration_items, evaluate, evaluate_release, image_sha256, kind_of, observe
from trainer.evidence import gather

DIM = 0.35


@pytest.fixture(scope="module")
def weights() -> Weights:
    return learn([*scenes(40, 1), *scenes(40, 2, DIM)])


@pytest.fixture(scope="module")
def pictures() -> list[Labelled]:
    return triangles(60, 3)


def segmenter(folder: Path, weights: Weights, inside_out: bool = False) -> Path:
    write_segmenter(weights, folder / "model.onnx", inside_out=inside_out)
    return folder


def classifier(folder: Path, means: np.ndarray) -> Path:
    write_classifier(means, folder / "model.onnx")
    return folder


def judged(folder: Path, current: Path, kind: str, target: list[Labelled], base: list[Labelled]) -> Verdict:
    """The gate on two real releases, each by its own file; calibration and weights are not what these tests are about."""

    def evidence(where: Path, release: str) -> Evidence:
        known = sha256((where / "model.onnx").read_bytes()).hexdigest()
        found = gather(
            where,
            manifest_of(where, release, kind),
            target,
            base,
            weights_sha256=known,
            calibration_ece=0.0,
            parity=(SAME,),
        )
        return replace(found, calibration_method="logistic", export_before=found.export_after)

    images = [frozenset(image_sha256(item.image) for item in each) for each in (target, base)]
    new, old = evidence(folder, "tint@1.1"), evidence(current, "tint@1.0")
    rules = Rules(boxes_min=50)
    return judge(
        new, old, Holdout(images[0], images[1], frozenset({"s"}), frozenset()), rules, np.random.default_rng(0)
    )


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def test_a_segmenter_is_scored_by_its_masks(tmp_path: Path, weights: Weights, pictures: list[Labelled]) -> None:
    good = segmenter(tmp_path / "good", weights)
    result = evaluate_release(good, manifest_of(good, "tint@1.0", "segment"), pictures)
    assert (result.kind, result.figure, set(result.metrics)) == ("segment", "mask F1", {"mask F1", "mAP50", "mAP50-95"})
    assert result.f1 > 0.9
    assert result.map50 > 0.9
    assert result.class_f1.keys() == set(LABELS)
    # The same boxes around masks of the wrong halves of their cells: by boxes it would be as good as before.
    bad = segmenter(tmp_path / "bad", weights, inside_out=True)
    manifest = manifest_of(bad, "tint@1.1", "segment")
    worse = evaluate_release(bad, manifest, pictures)
    assert worse.f1 < 0.1
    assert worse.map50 < 0.1
    engine = open_engine(bad, manifest, EngineOptions())
    assert isinstance(engine, Detector)
    by_boxes = evaluate(engine, pictures, Thresholds(), kind="detect")
    assert by_boxes.f1 > 0.9
    engine.close()


def test_an_outline_of_the_engine_is_the_triangle_that_was_painted(
    tmp_path: Path, weights: Weights, pictures: list[Labelled]
) -> None:
    """What the figures above are made of: mask IoU worked out by hand on one picture."""
    from trainer.average_precision import filled

    folder = segmenter(tmp_path, weights)
    engine = open_engine(folder, manifest_of(folder, "tint@1.0", "segment"), EngineOptions())
    assert isinstance(engine, Detector)
    assert kind_of(engine) == "segment"
    item = pictures[0]
    found = engine.infer([engine.prepare(item.image)])[0].above(0.25)
    assert found.outlines is not None
    assert item.outlines is not None
    best = iou_matrix(found.boxes, item.boxes).argmax(axis=1)
    for number, outline in enumerate(found.outlines):
        mask = filled(outline, (SIDE, SIDE)).astype(bool)
        x, y = item.boxes[best[number], :2].astype(int)
        painted = np.zeros((SIDE, SIDE), bool)
        painted[y : y + len(TRIANGLE), x : x + len(TRIANGLE)] = TRIANGLE
        assert np.array_equal(filled(item.outlines[best[number]], (SIDE, SIDE)).astype(bool), painted)
        assert (mask & painted).sum() / (mask | painted).sum() > 0.8
    rows = calibration_items(observe(engine, [item.image]), [item], Thresholds())
    assert rows[0].right
    engine.close()


def test_masks_that_got_worse_are_refused(tmp_path: Path, weights: Weights, pictures: list[Labelled]) -> None:
    good, bad = segmenter(tmp_path / "good", weights), segmenter(tmp_path / "bad", weights, inside_out=True)
    base = triangles(60, 4)
    assert failed(judged(good, bad, "segment", pictures, base)) == set()
    verdict = judged(bad, good, "segment", pictures, base)
    assert {"gain", "chance", "f1", "forgetting"} <= failed(verdict)
    assert "mask F1 lost on the base holdout" in " ".join(verdict.reasons)


def test_a_segmenter_needs_outlines_in_the_truth(tmp_path: Path, weights: Weights, pictures: list[Labelled]) -> None:
    folder = segmenter(tmp_path, weights)
    bare = [item._replace(outlines=None) for item in pictures]
    evidence = gather(folder, manifest_of(folder, "tint@1.0", "segment"), bare, bare, weights_sha256="1")
    assert evidence.target is None
    assert "is a segmenter and is judged by its masks; label the outlines too" in evidence.failures[0]


def test_a_classifier_is_scored_by_its_best_label(tmp_path: Path) -> None:
    items = tints(120, 7)
    folder = classifier(tmp_path, learn_tints(tints(200, 8)))
    result = evaluate_release(folder, manifest_of(folder, "tint@1.0", "classify"), items)
    means = learn_tints(tints(200, 8))
    colours = np.array([item.image[..., ::-1].mean(axis=(0, 1)) / 255 for item in items])
    nearest = ((colours[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    right = nearest == np.array([int(item.classes[0]) for item in items])
    assert result.f1 == result.frame_accuracy == pytest.approx(right.mean())
    assert 0.6 < result.f1 < 1, "else this shows nothing"
    assert (result.kind, result.metrics) == ("classify", {"accuracy": result.f1})
    assert (result.n_boxes, result.quality) == (120, result.f1)
    assert set(result.counts) == {(1, 0, 0), (0, 1, 1)}
    assert np.isnan(result.map50)
    assert result.summary()["map50"] is None


def test_classifiers_are_compared_picture_by_picture(tmp_path: Path) -> None:
    target, base = tints(120, 7), tints(120, 9, strength=60)
    means = learn_tints(tints(200, 8))
    good = classifier(tmp_path / "good", means)
    confused = classifier(tmp_path / "confused", means[[1, 0, 2]])
    assert failed(judged(good, confused, "classify", target, base)) == set()
    verdict = judged(confused, good, "classify", target, base)
    expected = {f"class {label} ({what})" for label in LABELS[:2] for what in ("target", "base")}
    assert {"gain", "chance", "f1", "forgetting", *expected} == failed(verdict) | {"f1"}
    assert "accuracy lost on class 'cat' of the base holdout" in " ".join(verdict.reasons)


def test_a_classifier_needs_one_class_an_image(tmp_path: Path) -> None:
    folder = classifier(tmp_path, learn_tints(tints(50, 8)))
    items = tints(3, 7)
    items[1] = items[1]._replace(boxes=items[1].boxes[:0], classes=items[1].classes[:0])
    with pytest.raises(ValueError, match=r"image 1 of the truth has 0 classes: tint@1\.0 is a classifier"):
        evaluate_release(folder, manifest_of(folder, "tint@1.0", "classify"), items)
