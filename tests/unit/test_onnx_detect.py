"""The detection engine on planted networks: what the file says comes out, exactly; what is broken is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edged.engines.base import Detector, EngineError, EngineOptions, ImageStats, open_engine
from edged.engines.onnx_detect import CANDIDATES_MAX, DETECTIONS_MAX, Letterbox, OnnxDetector, decode, image_stats
from edged.wire.manifest import Calibration, FileEntry, ReleaseManifest, Thresholds

LABELS = ["cat", "dog", "owl"]
SIZE = (96, 96)


def planted(
    path: Path, rows: np.ndarray, names: dict[int, str] | None = None, batch: Any = 1, extra_output: bool = False
) -> None:
    """An ONNX whose output is `rows` (4 + classes, anchors) for every image of the batch, whatever it shows."""
    output = rows.astype(np.float32)[None]
    nodes = [
        helper.make_node("ReduceSum", ["images", "channel"], ["flat"], keepdims=0),
        helper.make_node("ReduceSum", ["flat", "pixels"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["planted", "nothing"], ["output0"]),
    ]
    shape = [batch, *rows.shape]
    outputs = [helper.make_tensor_value_info("output0", TensorProto.FLOAT, shape)]
    if extra_output:
        nodes.append(helper.make_node("Identity", ["output0"], ["output1"]))
        outputs.append(helper.make_tensor_value_info("output1", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, *SIZE])],
        outputs,
        [
            numpy_helper.from_array(output, "planted"),
            numpy_helper.from_array(np.float32(0), "zero"),
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
        files={"model": FileEntry(path="model.onnx", sha256="0" * 64, bytes=1)},
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
    _, _, classes = decode(rows, 0.0)
    assert classes.tolist() == [1, 0, 2]


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
    _, scores, _ = decode(rows, 0.7)
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


def test_prepare_letterboxes_in_rgb_between_grey_bars(tmp_path: Path) -> None:
    engine = opened(tmp_path, anchors())
    image = np.zeros((48, 96, 3), dtype=np.uint8)
    image[..., 0], image[..., 2] = 255, 51  # blue and a fifth of red, in BGR
    item = engine.prepare(image)
    assert item.tensor.shape == (3, 96, 96)
    assert item.spec == (96, 96, "float32")
    np.testing.assert_allclose(item.tensor[:, 23, 50], [114 / 255] * 3)
    np.testing.assert_allclose(item.tensor[:, 24, 50], [0.2, 0, 1])
    assert (item.scale, item.pad) == (1.0, (0.0, 24.0))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((96, 96), Letterbox(96, 96, 0, 0, 1.0)),
        ((48, 96), Letterbox(48, 96, 0, 24, 1.0)),
        ((47, 96), Letterbox(47, 96, 0, 24, 1.0)),  # 49 pixels of padding: the odd one goes below
        ((1, 3000), Letterbox(1, 96, 0, 47, 0.032)),  # a side never vanishes
    ],
)
def test_letterbox_geometry(image: tuple[int, int], expected: Letterbox) -> None:
    assert Letterbox.fit(image, SIZE) == expected


def test_stats_see_the_content_not_the_bars() -> None:
    flat = image_stats(np.full((10, 20, 3), 51, dtype=np.uint8))
    assert flat == ImageStats(pytest.approx(0.2), 0.0, 0.0, pytest.approx(0.2), pytest.approx(0.2))
    checks = (np.indices((20, 20)).sum(axis=0) % 2 * 255).astype(np.uint8)
    sharp = image_stats(np.repeat(checks[..., None], 3, axis=2))
    assert sharp.contrast == pytest.approx(0.5)
    assert sharp.sharpness == 1
    assert (sharp.low, sharp.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 3))],
)
def test_prepare_refuses_what_is_not_an_image(tmp_path: Path, image: Any) -> None:
    engine = opened(tmp_path, anchors())
    with pytest.raises(EngineError, match=r"expected \(height, width, 3\) uint8"):
        engine.prepare(image)


@pytest.mark.parametrize(("row", "value"), [(4, np.nan), (0, np.nan), (6, np.inf), (3, -np.inf)])
def test_a_broken_output_is_an_error_not_an_answer(tmp_path: Path, row: int, value: float) -> None:
    rows = anchors((48, 48, 20, 20, 1, 0.9))
    rows[row, 7] = value
    engine = opened(tmp_path, rows)
    with pytest.raises(EngineError, match=r"toy@1\.0.*NaN or infinity"):
        engine.infer([engine.prepare(grey(96, 96))])


def test_labels_come_from_the_metadata_when_the_manifest_has_none(tmp_path: Path) -> None:
    assert opened(tmp_path, anchors(), manifest(labels=[]), names=dict(enumerate(LABELS))).labels == tuple(LABELS)


@pytest.mark.parametrize(
    ("plan", "how", "message"),
    [
        (manifest(), {"names": {0: "cat", 1: "dog", 2: "cow"}}, r"labels differ.*'owl'.*'cow'"),
        (manifest(), {"names": {0: "cat", 2: "owl"}}, "unreadable names"),
        (manifest(labels=["cat"]), {}, r"with 1 labels.*\[batch, 5, anchors\]"),
        (manifest(labels=[]), {}, "neither the manifest nor"),
        (manifest(size=(64, 64)), {}, r"input_size \(64, 64\).*\(96, 96\)"),
        (manifest(), {"extra_output": True}, "end-to-end head"),
        (manifest(calibration=Calibration(features=["mood"])), {}, "unknown features"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, plan: ReleaseManifest, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        opened(tmp_path, anchors(), plan, **how)


def test_an_end_to_end_head_is_refused_by_its_shape(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tensor\(float\) \[1, 300, 6\].*export a detection model without"):
        opened(tmp_path, np.zeros((300, 6)))


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "missing"])
def test_a_damaged_file_is_an_error_with_its_reason(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.onnx"
    planted(path, anchors(count=4000))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "noise": b"\x07" * 500, "empty": b""}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(EngineError, match=r"toy@1\.0: .*model\.onnx (does not load: .+|is missing)"):
        OnnxDetector(tmp_path, manifest(), EngineOptions())


def test_a_missing_provider_is_named_and_the_cpu_takes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planted(tmp_path / "model.onnx", anchors((48, 48, 20, 20, 1, 0.9)))
    with caplog.at_level(logging.WARNING):
        engine = OnnxDetector(tmp_path, manifest(), EngineOptions(providers=("AcmeExecutionProvider",)))
    assert "AcmeExecutionProvider is not available" in caplog.text
    assert len(engine.infer([engine.prepare(grey(96, 96))])[0]) == 1


def test_unknown_engine_options_are_refused(tmp_path: Path) -> None:
    planted(tmp_path / "model.onnx", anchors())
    with pytest.raises(EngineError, match=r"\['spinn'\]; known: \['arena', 'spin'\]"):
        OnnxDetector(tmp_path, manifest(), EngineOptions(extra={"spinn": True}))


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    engine = opened(tmp_path, anchors())
    item = engine.prepare(grey(96, 96))
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.infer([item])
