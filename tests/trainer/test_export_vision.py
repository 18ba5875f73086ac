"""YOLO checkpoints as files for devices: they answer as their checkpoints in every precision, and broken ones are seen."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.photos import LABELS, photos, pieces
from edged.engines.base import EngineOptions, open_engine
from edged.wire.manifest import Thresholds
from tests.support.checkpoints import SIZE, checkpoint
from tests.support.exports import IOU, SCORE, pictures
from trainer.candidate import export_int8
from trainer.core.parity import PARITY_KEY, Exported, ParityFailed
from trainer.evaluate import Labelled
from trainer.export.gguf_architectures import ExportError
from trainer.export.golden_images import APART_KEY, part
from trainer.export.parity import image_parity
from trainer.export.quantize import quantize_static_int8
from trainer.export.vision import export_vision, vision_manifest, vision_model
from trainer.package import package_vision
from trainer.releases import read_manifest

DEVICE = Path("build/venv-device/bin/edged").absolute()
NETWORKS = {"detect": "yolo11n.yaml", "segment": "yolo11n-seg.yaml", "classify": "yolo11n-cls.yaml"}
IMAGES = [*photos(), *(piece for photo in photos() for piece in pieces(photo))]
THRESHOLDS = Thresholds(score=SCORE, iou=IOU)


def mirrored() -> list[Any]:
    """Other pictures of what the photos show: whole, and most of the height or of the width, mirrored."""
    cuts = [photo[top:, left:] for photo in photos() for top, left in ((0, 0), (80, 0), (0, 80))]
    return [np.ascontiguousarray(cut[:, ::-1]) for cut in cuts]


def exported(kind: str, folder: Path, precision: str) -> Exported:
    given: dict[str, Any] = {"golden": pictures(), "calibration": mirrored(), "imgsz": SIZE, "thresholds": THRESHOLDS}
    return export_vision(checkpoint(NETWORKS[kind]), folder, precision, **given)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the detector in float32."""
    folder = tmp_path_factory.mktemp("single")
    exported("detect", folder, "fp32").check()
    return folder


# kind, precision, megabytes that the file may have: 10.4, 11.5 and 6.2 in fp32.
CASES = [
    ("detect", "int8", 3.3), ("detect", "int8-dynamic", 3.0), ("segment", "int8", 3.6), ("segment", "fp16", 6.0),
    ("classify", "fp32", 6.3), ("classify", "fp16", 3.3), ("classify", "int8", 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "precision", "megabytes"), CASES)
def test_it_answers_as_its_checkpoint(tmp_path: Path, kind: str, precision: str, megabytes: float) -> None:
    made = exported(kind, tmp_path, precision).check()
    assert [report.format for report in made.parity] == (["fp32"] if precision == "fp32" else ["fp32", precision])
    told = {row.metric for row in made.parity[-1].rows}
    assert ("mask_off" in told) == (kind == "segment")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx"}
    assert (tmp_path / "model.onnx").stat().st_size < megabytes * 1e6
    model = vision_model(checkpoint(NETWORKS[kind]))
    manifest = vision_manifest(tmp_path, "x@1", model.kind, labels=model.labels, imgsz=SIZE, thresholds=THRESHOLDS)
    engine = open_engine(tmp_path, manifest, EngineOptions())
    assert engine.prepare(pictures()[0]).tensor.dtype == (np.uint8 if precision == "int8" else np.float32)  # type: ignore[union-attr]
    engine.close()


def broken(path: Path, change: str) -> None:
    """Damage an exported file as a wrong exporter would."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    weights = {each.name: each for each in model.graph.initializer}

    def altered(name: str, array: Any) -> None:
        weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    if change == "colours":
        first = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
        altered(first, numpy_helper.to_array(weights[first])[:, ::-1])
    else:
        # The last layers of the scores have a row for each label.
        rows = len(LABELS) if change == "labels" else 64
        names = [
            node.input[index]
            for node in model.graph.node
            if node.op_type == "Conv"
            for index in (1, 2)
            if len(node.input) > 2 and weights[node.input[2]].dims[0] == rows and weights[node.input[1]].dims[2] == 1
        ]
        assert names
        for name in names:
            array = numpy_helper.to_array(weights[name])
            altered(name, array[::-1] if change == "labels" else array * np.float32(1.3))
    onnx.save(model, str(path))


BROKEN = {"colours": "boxes_changed", "labels": "boxes_changed", "scale": "iou_off"}


@pytest.mark.parametrize(("change", "metric"), BROKEN.items())
def test_a_broken_export_is_seen(tmp_path: Path, single: Path, change: str, metric: str) -> None:
    shutil.copyfile(single / "model.onnx", tmp_path / "model.onnx")
    broken(tmp_path / "model.onnx", change)
    model = vision_model(checkpoint(NETWORKS["detect"]))
    manifest = vision_manifest(tmp_path, "x@1", model.kind, labels=model.labels, imgsz=SIZE, thresholds=THRESHOLDS)
    report = image_parity(checkpoint(NETWORKS["detect"]), tmp_path, manifest, pictures(), "int8")
    assert metric in [row.metric for row in report.rows if not row.passed]
    with pytest.raises(ParityFailed, match=f"{metric}.*at most"):
        report.check()


def test_a_quantisation_on_the_wrong_images_is_seen(tmp_path: Path) -> None:
    black = [np.zeros((SIZE, SIZE, 3), np.uint8)] * 8
    made = export_vision(
        checkpoint(NETWORKS["detect"]), tmp_path, "int8", golden=pictures()[:4], calibration=black, imgsz=SIZE,
        thresholds=THRESHOLDS,
    )  # fmt: skip
    assert [report.passed for report in made.parity] == [True, False]


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ExportError, match=r"junk\.pt: not a checkpoint of ultralytics"):
        export_vision(tmp_path / "junk.pt", tmp_path / "out", golden=pictures())
    with pytest.raises(ExportError, match=r"int4.*fp32, fp16, int8, int8-dynamic"):
        exported("detect", tmp_path / "out", "int4")
    with pytest.raises(ValueError, match="2 calibration images, need 8"):
        export_vision(checkpoint(NETWORKS["classify"]), tmp_path / "o", golden=IMAGES[:2], calibration=IMAGES[2:4])
    with pytest.raises(ValueError, match=r"2 of 2 golden images are calibration images too.*take them out of one"):
        export_vision(checkpoint(NETWORKS["classify"]), tmp_path / "o", golden=IMAGES[4:6], calibration=IMAGES[4:16])
    with pytest.raises(ValueError, match="parity needs golden images"):
        export_vision(checkpoint(NETWORKS["classify"]), tmp_path / "o", golden=[])


def labelled(kind: str) -> list[Labelled]:
    """Photos with what their network says of them as truth: what it is calibrated on does not matter here."""
    if kind == "classify":
        return [
            Labelled(piece, np.array([[0, 0, piece.shape[1], piece.shape[0]]]), np.array([number]))
            for number, photo in enumerate(photos())
            for piece in pieces(photo)
        ]
    return [Labelled(image, np.array([[5, 5, 60, 60]]), np.array([0])) for image in IMAGES[4:20]]


@pytest.mark.parametrize("kind", ["segment", "classify"])
def test_a_packaged_release_is_one_that_a_device_proves(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "release"
    package_vision(
        checkpoint(NETWORKS[kind]), out, f"{kind}@1.0", labels=LABELS, imgsz=SIZE, calibration=labelled(kind),
        thresholds=THRESHOLDS,
    )  # fmt: skip
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.engine, manifest.labels) == (kind, f"onnx_{kind}", list(LABELS))
    assert (manifest.input_size, manifest.thresholds) == ((SIZE, SIZE), THRESHOLDS)
    assert [report["format"] for report in manifest.lineage[PARITY_KEY]] == ["fp32", "int8"]
    assert all(report["passed"] for report in manifest.lineage[PARITY_KEY])
    verified = subprocess.run([str(DEVICE), "models", "verify", str(out)], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    assert "8 golden inputs answered as promised" in verified.stdout


def test_golden_images_have_set_no_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches ONNX Runtime's calibration against what the release proves itself on, and parity is judged on."""
    shown: list[bytes] = []

    def watched(source: Path, out: Path, images: list[Any]) -> Path:
        # (1, 3, height, width) RGB in 0..1, as the int8 file takes it: (height, width, 3) BGR of uint8.
        shown.extend(np.rint(each[0][::-1].transpose(1, 2, 0) * 255).astype(np.uint8).tobytes() for each in images)
        return quantize_static_int8(source, out, images)

    monkeypatch.setattr("trainer.export.vision.quantize_static_int8", watched)
    items, out = labelled("classify"), tmp_path / "release"
    manifest = package_vision(
        checkpoint(NETWORKS["classify"]), out, "x@1.0", labels=LABELS, imgsz=SIZE, calibration=items,
        thresholds=THRESHOLDS,
    )  # fmt: skip
    assert manifest.lineage[APART_KEY] == {"ranges": 16, "golden": 8, "golden_near_ranges": 0}
    assert manifest.calibration.items == len(items), "all of them say how sure the model may be"
    engine = open_engine(out, manifest, EngineOptions())
    with np.load(out / "golden_inputs.npz") as arrays:
        golden = {engine.prepare(arrays[name]).tensor.tobytes() for name in arrays}  # type: ignore[union-attr]
    known = {engine.prepare(item.image).tensor.tobytes() for item in items}  # type: ignore[union-attr]
    engine.close()
    assert (len(golden), len(set(shown))) == (8, 16)
    assert known == golden | set(shown)


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name them in its order"):
        package_vision(
            checkpoint(NETWORKS["classify"]), tmp_path / "out", "x@1.0", labels=LABELS[::-1], imgsz=SIZE,
            calibration=labelled("classify"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_export_of_a_training_tells_its_parity(tmp_path: Path) -> None:
    model = vision_model(checkpoint(NETWORKS["detect"]))
    made = export_int8(
        checkpoint(NETWORKS["detect"]), tmp_path / "fp32", tmp_path / "candidate",
        lambda folder: vision_manifest(folder, "x@1", model.kind, labels=LABELS, imgsz=SIZE, thresholds=THRESHOLDS),
        part([item.image for item in labelled("detect")]), imgsz=SIZE, seed=0,
    )  # fmt: skip
    assert [report["format"] for report in made.lineage()] == ["fp32", "int8"]
    assert made.parity[0].passed
    assert all(row.value == row.value for row in made.parity[1].rows)  # everything could be compared
