"""The detection engine on planted networks: what the file says comes out, exactly; what is broken is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edged.engines.base import Detector, EngineError, EngineOptions, open_engine
from edged.engines.decode import CANDIDATES_MAX, DETECTIONS_MAX, decode_end_to_end, decode_plain
from edged.engines.onnx_detect import OnnxDetector
from edged.wire.manifest import FileEntry, ReleaseManifest, Thresholds

LABELS = ["cat", "dog", "owl"]
SIZE = (96, 96)


def planted(
    path: Path, rows: np.ndarray, names: dict[int, str] | None = None, batch: Any = 1, open_output: bool = False
) -> None:
    """An ONNX whose output is `rows` (4 + classes, anchors) for every image of the batch, whatever it shows."""
    output = rows.astype(np.float32)[None]
    nodes = [
        helper.make_node("ReduceSum", ["images", "channel"], ["flat"], keepdims=0),
        helper.make_node("ReduceSum", ["flat", "pixels"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["planted", "nothing"], ["all" if open_output else "output0"]),
    ]
    shape: list[Any] = [batch, *rows.shape]
    if open_output:  # which rows are given is worked out, so that the file cannot promise how many
        shape[1] = "rows"
        nodes += [
            helper.make_node("Squeeze", ["nothing"], ["scalar"]),
            helper.make_node("Add", ["keep", "scalar"], ["kept"]),
            helper.make_node("Cast", ["kept"], ["choice"], to=TensorProto.BOOL),
            helper.make_node("Compress", ["all", "choice"], ["output0"], axis=1),
        ]
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, *SIZE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(output, "planted"),
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(np.ones(len(rows), np.float32), "keep"),
            numpy_helper.from_array(np.array([1]), "channel"),
            numpy_helper.from_array(np.array([1, 2]), "pixels"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if names is not None:
        helper.set_model_props(model, {"names": str(names)})
    onnx.save(model, str(path))


def anchors(*rows: tuple[float, float, float, float, int, float], count: int = 40) -> np.ndarray:
    """Raw output (7, count): each row is centre x, centre y, width, height, class, score; the rest scores 0.01."""
    output = np.full((4 + len(LABELS), count), 0.01, dtype=np.float32)
    output[:4] = 5
    for column, (x, y, w, h, kind, score) in enumerate(rows):
        output[:4, column] = x, y, w, h
        output[4 + kind, column] = score
    return output


def manifest(labels: list[str] = LABELS, size: tuple[int, int] | None = SIZE, **more: Any) -> ReleaseManifest:
    return ReleaseManifest(
        release="toy@1.0",
        kind="detect",
        engine="onnx_detect",
        files={"model": FileEntry.of("model.onnx", 1, [b"x"])},
        labels=labels,
        input_size=size,
        created="2026-01-01T00:00:00Z",
        **more,
    )


def opened(folder: Path, rows: np.ndarray, plan: ReleaseManifest | None = None, **how: Any) -> Detector:
    planted(folder / "model.onnx", rows, **how)
    engine = open_engine(folder, plan or manifest(), EngineOptions())
    assert isinstance(engine, Detector)
    return engine


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 50, dtype=np.uint8)


def test_planted_boxes_come_out_suppressed_scaled_and_clipped(tmp_path: Path) -> None:
    rows = anchors(
        (48, 48, 20, 20, 1, 0.60),  # a second look at the dog below, and weaker: suppressed
        (48, 49, 20, 20, 1, 0.90),
        (48, 49, 20, 20, 0, 0.40),  # the same place, another class: stays
        (10, 40, 30, 10, 2, 0.30),  # reaches over the left edge
        (80, 60, 10, 10, 2, 0.06),  # weak, above the floor
        (70, 30, 10, 10, 2, 0.04),  # below the floor
    )
    engine = opened(tmp_path, rows)
    # 96 pixels hold a 192 x 128 image at half size, 16 pixels below the top edge.
    found = engine.infer([engine.prepare(grey(128, 192))])[0]
    assert found.scores.tolist() == pytest.approx([0.90, 0.40, 0.30, 0.06])
    assert found.classes.tolist() == [1, 0, 2, 2]
    expected = [[76, 46, 116, 86], [76, 46, 116, 86], [0, 38, 50, 58], [150, 78, 170, 98]]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-4)
    assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == (np.float32, np.float32, np.int64)
    assert len(found.above(0.25)) == 3


def test_suppression_follows_the_manifests_iou(tmp_path: Path) -> None:
    rows = anchors((40, 40, 20, 20, 0, 0.9), (44, 40, 20, 20, 0, 0.8))  # IoU 16/24 = 0.667
    loose = opened(tmp_path, rows, manifest(thresholds=Thresholds(iou=0.7)))
    strict = opened(tmp_path, rows, manifest(thresholds=Thresholds(iou=0.6)))
    item = loose.prepare(grey(96, 96))
    assert len(loose.infer([item])[0]) == 2
    assert len(strict.infer([item])[0]) == 1


def test_classes_never_suppress_each_other_at_the_edges() -> None:
    # Boxes over opposite corners of the image: the shift that keeps classes apart must not join them.
    rows = anchors((0, 0, 40, 40, 1, 0.9), (90, 90, 40, 40, 0, 0.8), (96, 96, 40, 40, 2, 0.7))
    assert decode_plain(rows, len(LABELS), 0.0).classes.tolist() == [1, 0, 2]


def test_nothing_found_is_an_empty_answer(tmp_path: Path) -> None:
    engine = opened(tmp_path, anchors())
    found = engine.infer([engine.prepare(grey(20, 30))])[0]
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


def test_a_flood_of_boxes_is_bounded_and_keeps_the_best() -> None:
    count = CANDIDATES_MAX + 500
    rows = anchors(count=count)
    rows[0], rows[1], rows[2:4] = np.arange(count) * 10, 5, 4
    rows[4] = np.linspace(0.1, 0.9, count)
    scores = decode_plain(rows, len(LABELS), 0.7).scores
    assert len(scores) == DETECTIONS_MAX
    np.testing.assert_allclose(scores, np.sort(rows[4])[::-1][:DETECTIONS_MAX])


def test_a_batch_answers_each_image_in_its_own_pixels(tmp_path: Path) -> None:
    engine = opened(tmp_path, anchors((48, 48, 48, 48, 0, 0.9)), batch="batch")
    small, large = engine.infer([engine.prepare(grey(96, 96)), engine.prepare(grey(192, 192))])
    np.testing.assert_allclose(small.boxes, [[24, 24, 72, 72]], atol=1e-4)
    np.testing.assert_allclose(large.boxes, [[48, 48, 144, 144]], atol=1e-4)


def test_an_image_prepared_for_another_model_is_prepared_again(tmp_path: Path) -> None:
    engine = opened(tmp_path, anchors((48, 48, 48, 48, 0, 0.9)))
    item = engine.prepare(grey(192, 192))
    other = type(item)(item.image, np.zeros((3, 32, 32), np.float32), (32, 32, "float32"), 1.0, (0.0, 0.0), item.stats)
    np.testing.assert_allclose(engine.infer([other])[0].boxes, [[48, 48, 144, 144]], atol=1e-4)


@pytest.mark.parametrize(("row", "value"), [(4, np.nan), (0, np.nan), (6, np.inf), (3, -np.inf)])
def test_a_broken_output_is_an_error_not_an_answer(tmp_path: Path, row: int, value: float) -> None:
    rows = anchors((48, 48, 20, 20, 1, 0.9))
    rows[row, 7] = value
    engine = opened(tmp_path, rows)
    with pytest.raises(EngineError, match=r"toy@1\.0.*NaN or infinity"):
        engine.infer([engine.prepare(grey(96, 96))])


def test_labels_come_from_the_metadata_when_the_manifest_has_none(tmp_path: Path) -> None:
    assert opened(tmp_path, anchors(), manifest(labels=[]), names=dict(enumerate(LABELS))).labels == tuple(LABELS)


def end_to_end(*rows: tuple[float, float, float, float, float, float], count: int = 30) -> np.ndarray:
    """Output (count, 6) of an end-to-end head: each row is x1, y1, x2, y2, score, class; the rest is 0."""
    output = np.zeros((count, 6), np.float32)
    output[: len(rows)] = rows
    return output


def test_an_end_to_end_head_is_recognised_and_suppresses_nothing_twice(tmp_path: Path) -> None:
    rows = end_to_end(
        (38, 39, 58, 59, 0.90, 1), (38, 38, 58, 58, 0.60, 1), (-5, 35, 25, 45, 0.30, 2), (1, 1, 9, 9, 0.04, 0)
    )
    engine = opened(tmp_path, rows)
    found = engine.infer([engine.prepare(grey(128, 192))])[0]
    np.testing.assert_allclose(found.boxes, [[76, 46, 116, 86], [76, 44, 116, 84], [0, 38, 50, 58]], atol=1e-4)
    assert found.scores.tolist() == pytest.approx([0.90, 0.60, 0.30])
    assert found.classes.tolist() == [1, 1, 2]
    assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == (np.float32, np.float32, np.int64)


def test_rows_of_an_end_to_end_head_come_out_best_first_and_bounded() -> None:
    rows = end_to_end(*((0.0, 0.0, 9.0, 9.0, 0.1 + n / 1000, 0.0) for n in range(500)), count=600)
    found = decode_end_to_end(rows, 1)
    np.testing.assert_allclose(found.scores, np.sort(rows[:, 4])[::-1][:DETECTIONS_MAX])


def test_a_class_without_a_label_is_an_error(tmp_path: Path) -> None:
    engine = opened(tmp_path, end_to_end((1, 1, 9, 9, 0.9, 3)))
    with pytest.raises(EngineError, match=r"toy@1\.0: the model answers with class 3, it has 3 labels"):
        engine.infer([engine.prepare(grey(96, 96))])


def test_an_answer_of_another_size_than_the_file_promises_is_an_error(tmp_path: Path) -> None:
    # Where the file leaves its output open, only the answer shows that it is no detection.
    planted(tmp_path / "model.onnx", anchors()[:6], open_output=True)
    engine = OnnxDetector(tmp_path, manifest(), EngineOptions())
    with pytest.raises(EngineError, match=r"answered \(1, 6, 40\) to 1 images, expected \[7, anchors\] for each"):
        engine.infer([engine.prepare(grey(96, 96))])


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    engine = opened(tmp_path, anchors())
    item = engine.prepare(grey(96, 96))
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.infer([item])
