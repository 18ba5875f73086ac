"""What an export says about itself is recognised, and where it and its release disagree, both are named."""

from __future__ import annotations

from typing import Any

import pytest

from edged.engines.metadata import INPUT_KEY, INPUT_UINT8, Export, read_export
from edged.engines.ort import Value
from edged.wire.manifest import FileEntry, ReleaseManifest

LABELS = ["cat", "dog", "owl"]
IMAGES = Value("images", "tensor(float)", (1, 3, 96, 64))
PIXELS = Value("images", "tensor(uint8)", (1, 96, 64, 3))
PLAIN = Value("output0", "tensor(float)", (1, 7, 126))
BOXES = Value("output0", "tensor(float)", (1, 300, 6))
MASKED = Value("output0", "tensor(float)", (1, 39, 126))
MASKED_BOXES = Value("output0", "tensor(float)", (1, 300, 38))
PROTOTYPES = Value("output1", "tensor(float)", (1, 32, 24, 16))
SCORES = Value("output0", "tensor(float)", (1, 3))
ANY = Value("images", "tensor(float)", ("batch", 3, "height", "width"))
NAMES = "{0: 'cat', 1: 'dog', 2: 'owl'}"


def read(
    task: str, outputs: tuple[Value, ...], metadata: dict[str, str] | None = None, image: Value = IMAGES, **more: Any
) -> Export:
    fields = {"kind": task, "engine": f"onnx_{task}", "labels": LABELS, "input_size": (96, 64), **more}
    manifest = ReleaseManifest(
        release="toy@1.0", files={"model": FileEntry.of("m.onnx", 1, [b"x"])}, created="now", **fields
    )
    return read_export(task, (image,), outputs, metadata or {}, manifest)


@pytest.mark.parametrize(
    ("task", "outputs", "metadata", "expected"),
    [
        ("detect", (PLAIN,), {}, {}),
        ("detect", (PLAIN,), {"end2end": "False", "args": "{'nms': False}"}, {}),
        ("detect", (BOXES,), {}, {"end_to_end": True}),
        ("detect", (BOXES,), {"end2end": "True"}, {"end_to_end": True}),
        ("detect", (BOXES,), {"end2end": "False", "args": "{'nms': True}"}, {"end_to_end": True}),
        ("segment", (MASKED, PROTOTYPES), {}, {"masks": 32}),
        ("segment", (MASKED_BOXES, PROTOTYPES), {"end2end": "True"}, {"masks": 32, "end_to_end": True}),
        ("classify", (SCORES,), {"task": "classify", "stride": "1"}, {}),
    ],
)
def test_a_head_is_recognised(
    task: str, outputs: tuple[Value, ...], metadata: dict[str, str], expected: dict[str, Any]
) -> None:
    assert read(task, outputs, metadata) == Export(tuple(LABELS), (96, 64), "float32", False, **expected)


def test_the_metadata_decides_where_the_shape_could_be_either() -> None:
    either = Value("output0", "tensor(float)", (1, 7, 6))
    assert not read("detect", (either,)).end_to_end
    assert read("detect", (either,), {"end2end": "True"}).end_to_end


def test_pixels_are_taken_where_the_file_says_what_they_are() -> None:
    assert read("detect", (PLAIN,), {INPUT_KEY: INPUT_UINT8}, PIXELS).form == "uint8"


def test_the_manifest_gives_what_the_file_leaves_open() -> None:
    export = read("detect", (Value("o", "tensor(float)", ("batch", 7, "anchors")),), {"stride": "32"}, ANY)
    assert (export.size, export.batched) == ((96, 64), True)


def test_labels_come_from_the_metadata_when_the_manifest_has_none() -> None:
    assert read("detect", (PLAIN,), {"names": NAMES}, labels=[]).labels == tuple(LABELS)


@pytest.mark.parametrize(
    ("task", "outputs", "how", "message"),
    [
        ("detect", (PLAIN,), {"kind": "segment"}, "kind is segment, but its engine onnx_detect is for detect"),
        (
            "detect",
            (PLAIN,),
            {"metadata": {"task": "segment"}},
            "kind is detect, the model's metadata says task 'segment': the engine for it is onnx_segment",
        ),
        ("detect", (PLAIN,), {"metadata": {"task": "pose"}}, "'pose': no engine runs it"),
        ("detect", (PLAIN,), {"metadata": {"channels": "4"}}, "4 channels"),
        ("detect", (PLAIN,), {"metadata": {"names": "{0: 'cat', 1: 'dog', 2: 'cow'}"}}, "labels differ.*'owl'.*'cow'"),
        ("detect", (PLAIN,), {"metadata": {"names": "{0: 'cat', 2: 'owl'}"}}, "unreadable names"),
        ("detect", (PLAIN,), {"metadata": {"names": "cat, dog"}}, "unreadable names"),
        ("detect", (PLAIN,), {"labels": []}, "neither the manifest nor"),
        ("detect", (PLAIN,), {"labels": ["cat"]}, r"plain head for detect with 1 labels .*\[batch, 5, anchors\]"),
        ("detect", (PLAIN,), {"metadata": {"end2end": "True"}}, r"end-to-end head for detect .*\[batch, boxes, 6\]"),
        ("detect", (BOXES,), {"metadata": {"end2end": "False"}}, r"plain head for detect .*\[batch, 7, anchors\]"),
        ("detect", (PLAIN,), {"metadata": {"end2end": "perhaps"}}, "unreadable end2end 'perhaps'"),
        ("detect", (PLAIN, PLAIN), {}, r"\[1, 7, 126\], tensor\(float\) \[1, 7, 126\]"),
        ("detect", (SCORES,), {}, r"output is tensor\(float\) \[1, 3\]; a plain head"),
        ("detect", (PLAIN,), {"input_size": (64, 64)}, r"input_size \(64, 64\), the model takes \(96, 64\)"),
        ("detect", (PLAIN,), {"image": ANY, "input_size": None}, "the manifest has no input_size"),
        ("detect", (PLAIN,), {"metadata": {"stride": "64"}}, r"\(96, 64\) is no multiple of the model's stride 64"),
        ("detect", (PLAIN,), {"metadata": {"stride": "none"}}, "unreadable stride 'none'"),
        ("detect", (PLAIN,), {"image": PIXELS}, r"without the metadata edged\.input .*trainer\.export\.uint8"),
        (
            "detect",
            (PLAIN,),
            {"image": Value("x", "tensor(float16)", (1, 3, 96, 64))},
            r"tensor\(float16\) \[1, 3, 96, 64\]; this engine takes",
        ),
        ("segment", (MASKED,), {}, "prototypes whose sides divide"),
        (
            "segment",
            (MASKED, Value("p", "tensor(float)", (1, 32, 25, 16))),
            {},
            r"prototypes whose sides divide \(96, 64\): export a segmentation model",
        ),
        ("segment", (PLAIN, PROTOTYPES), {}, r"\[batch, 39, anchors\] and the prototypes of 32 masks"),
        ("classify", (PLAIN,), {}, r"reads one tensor\(float\) \[batch, 3\]: export a classification model"),
        ("classify", (SCORES,), {"labels": ["cat"]}, r"with 1 labels this engine reads"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    task: str, outputs: tuple[Value, ...], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(task, outputs, **how)


def test_a_model_that_wants_more_than_an_image_is_refused() -> None:
    manifest = ReleaseManifest(
        release="toy@1.0", kind="detect", engine="onnx_detect", files={}, labels=LABELS, created="now"
    )
    with pytest.raises(ValueError, match=r"has inputs \['images', 'images'\]; one is expected"):
        read_export("detect", (IMAGES, IMAGES), (PLAIN,), {}, manifest)
