"""The segmentation and the classification engine on planted networks: what the file says comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edged.engines.base import Detector, EngineError, EngineOptions, open_engine
from edged.engines.metadata import INPUT_KEY, INPUT_UINT8
from edged.wire.manifest import FileEntry, ReleaseManifest, Thresholds

LABELS = ["cat", "dog", "owl", "ape", "bee", "cod"]
SIDE = 64


def opened(folder: Path, kind: str, *answers: np.ndarray, pixels: bool = False, **manifest: Any) -> Detector:
    """An engine on a network that gives `answers`, whatever the image shows."""
    shape, number = ([1, SIDE, SIDE, 3], TensorProto.UINT8) if pixels else ([1, 3, SIDE, SIDE], TensorProto.FLOAT)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
    ]
    constants = [numpy_helper.from_array(np.float32(0), "zero")]
    outputs = []
    for index, answer in enumerate(answers):
        nodes.append(helper.make_node("Add", [f"planted{index}", "nothing"], [f"output{index}"]))
        constants.append(numpy_helper.from_array(answer[None].astype(np.float32), f"planted{index}"))
        outputs.append(helper.make_tensor_value_info(f"output{index}", TensorProto.FLOAT, [1, *answer.shape]))
    image = helper.make_tensor_value_info("images", number, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "planted", [image], outputs, constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    helper.set_model_props(model, {INPUT_KEY: INPUT_UINT8} if pixels else {})
    onnx.save(model, str(folder / "model.onnx"))
    plan = ReleaseManifest(
        release="toy@1.0",
        kind=kind,  # type: ignore[arg-type]
        engine=f"onnx_{kind}",
        files={"model": FileEntry.of("model.onnx", 1, [b"x"])},
        labels=LABELS,
        input_size=(SIDE, SIDE),
        created="2026-01-01T00:00:00Z",
        **manifest,
    )
    engine = open_engine(folder, plan, EngineOptions())
    assert isinstance(engine, Detector)
    return engine


def grey(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.full((height, width, 3), 50, dtype=np.uint8)


def half() -> np.ndarray:
    """Two prototypes of 16 x 16 cells: one positive in the left half of the input, one in the upper."""
    across = np.tile(7.5 - np.arange(16, dtype=np.float32), (16, 1))
    return np.stack([across, across.T])


BOXES = np.array(
    [
        # x1, y1, x2, y2, score, class, share of either prototype
        [16, 16, 48, 48, 0.9, 0, 1, 0],
        [16, 16, 48, 48, 0.8, 1, 0, 1],
        [40, 40, 60, 60, 0.7, 2, 1, 0],  # no pixel of its mask lies in the box
        [16, 16, 48, 48, 0.2, 3, 1, 0],  # weak
    ]
)


def test_answered_boxes_have_outlines_in_pixels_of_the_image(tmp_path: Path) -> None:
    engine = opened(tmp_path, "segment", BOXES, half())
    found = engine.infer([engine.prepare(grey(128, 128))])[0]
    assert found.classes.tolist() == [0, 1, 3]
    np.testing.assert_allclose(found.boxes, [[32, 32, 96, 96]] * 3)
    assert found.outlines is not None
    left, upper, weak = found.outlines
    assert sorted(map(tuple, left.tolist())) == [(32, 32), (32, 96), (64, 32), (64, 96)]
    assert sorted(map(tuple, upper.tolist())) == [(32, 32), (32, 64), (96, 32), (96, 64)]
    assert (weak.shape, left.dtype) == ((0, 2), np.float32)
    answer = found.above(0.25)
    assert answer.outlines is not None
    assert len(answer.outlines) == len(answer) == 2


def test_the_release_says_which_boxes_are_answers(tmp_path: Path) -> None:
    engine = opened(tmp_path, "segment", BOXES, half(), thresholds=Thresholds(score=0.85))
    found = engine.infer([engine.prepare(grey())])[0]
    assert found.outlines is not None
    assert [len(outline) > 0 for outline in found.outlines] == [True, False, False, False]


def test_a_plain_head_has_masks_too(tmp_path: Path) -> None:
    rows = np.full((4 + len(LABELS) + 2, 40), 0.01)
    rows[:4] = 5
    rows[:4, 3], rows[4 + 1, 3], rows[-2:, 3] = (32, 32, 32, 32), 0.9, (0, 1)
    engine = opened(tmp_path, "segment", rows, half())
    found = engine.infer([engine.prepare(grey())])[0]
    assert found.classes.tolist() == [1]
    assert found.outlines is not None
    assert sorted(map(tuple, found.outlines[0].tolist())) == [(16, 16), (16, 32), (48, 16), (48, 32)]


def test_no_box_has_no_outline(tmp_path: Path) -> None:
    engine = opened(tmp_path, "segment", np.zeros((30, 8)), half())
    found = engine.infer([engine.prepare(grey())])[0]
    assert (len(found), found.outlines) == (0, ())


def test_broken_prototypes_are_an_error(tmp_path: Path) -> None:
    engine = opened(tmp_path, "segment", BOXES, half() * np.nan)
    with pytest.raises(EngineError, match=r"toy@1\.0: the model answered mask prototypes .* finite"):
        engine.infer([engine.prepare(grey())])


SCORES = np.array([0.05, 0.4, 0.02, 0.3, 0.01, 0.22])


@pytest.mark.parametrize("pixels", [False, True])
def test_the_best_labels_are_boxes_around_the_whole_image(tmp_path: Path, pixels: bool) -> None:
    engine = opened(tmp_path, "classify", SCORES, pixels=pixels)
    found = engine.infer([engine.prepare(grey(30, 90))])[0]
    assert found.classes.tolist() == [1, 3, 5, 0, 2]
    assert found.scores.tolist() == pytest.approx([0.4, 0.3, 0.22, 0.05, 0.02])
    assert found.boxes.tolist() == [[0, 0, 90, 30]] * 5
    assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == (np.float32, np.float32, np.int64)
    assert len(found.above(0.25)) == 2


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    engine = opened(tmp_path, "classify", np.array([0.5, np.nan, 0.1, 0.1, 0.1, 0.1]))
    with pytest.raises(EngineError, match=r"expected 6 finite scores for each"):
        engine.infer([engine.prepare(grey())])


def test_an_image_prepared_for_a_detector_is_prepared_again(tmp_path: Path) -> None:
    (tmp_path / "detector").mkdir()
    detector = opened(tmp_path / "detector", "detect", np.full((10, 40), 0.01))
    classifier = opened(tmp_path, "classify", SCORES)
    image = grey(30, 90)
    image[:, :30] = 200
    item = detector.prepare(image)
    assert item.spec != classifier.prepare(image).spec
    assert len(classifier.infer([item])[0]) == 5
    assert len(detector.infer([classifier.prepare(image)])[0]) == 0
