"""YOLO detection on ONNX Runtime: letterbox, infer, decode the plain head of YOLO v8/11 exports, suppress.

The only file of the device that imports onnxruntime.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edged.core.confidence import check_calibration
from edged.engines.base import Detections, EngineError, EngineOptions, Image, ImageStats, Prepared
from edged.wire.manifest import ReleaseManifest

SCORE_FLOOR = 0.05  # weaker candidates say nothing about what was missed, and cost time in suppression
DETECTIONS_MAX = 300  # of one image
CANDIDATES_MAX = 4096  # of one image, before suppression: bounds the work that a wild model can cause
EXTREME = 0.002  # share of the pixels that are its darkest, lightest or sharpest
PAD_VALUE = 114  # grey of the letterbox's bars, as in training

_CPU = "CPUExecutionProvider"
_EXTRA = {"spin", "arena"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Letterbox:
    """Where an image lies inside a model's input, in pixels: `height` x `width`, `left` and `top` from the corner."""

    height: int
    width: int
    left: int
    top: int
    scale: float

    @classmethod
    def fit(cls, image: tuple[int, int], size: tuple[int, int]) -> Letterbox:
        """Centre an image of (height, width) pixels in an input of `size` (height, width), keeping its aspect.

        Rounds as training does: each side on its own, and an odd pixel of padding goes right or below.
        """
        scale = min(size[0] / image[0], size[1] / image[1])
        height, width = max(round(image[0] * scale), 1), max(round(image[1] * scale), 1)
        top, left = round((size[0] - height) / 2 - 0.1), round((size[1] - width) / 2 - 0.1)
        return cls(height, width, left, top, scale)

    def apply(self, image: Image, size: tuple[int, int]) -> tuple[Image, Image]:
        """The letterboxed image of `size` (height, width), and its content alone without the bars."""
        content = image
        if image.shape[:2] != (self.height, self.width):
            content = cv2.resize(image, (self.width, self.height), interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
        if (self.height, self.width) == size:
            return content, content
        canvas = np.full((*size, 3), PAD_VALUE, dtype=np.uint8)
        canvas[self.top : self.top + self.height, self.left : self.left + self.width] = content
        return canvas, content

    def restore(self, boxes: NDArray[np.float32], image: tuple[int, int]) -> NDArray[np.float32]:
        """Boxes (n, 4) x1 y1 x2 y2 from model pixels to pixels of the image (height, width), clipped to it."""
        gain = np.array([self.width / image[1], self.height / image[0]] * 2, dtype=np.float32)
        offset = np.array([self.left, self.top] * 2, dtype=np.float32)
        limit = np.array([image[1], image[0]] * 2, dtype=np.float32)
        return np.asarray(np.clip((boxes - offset) / gain, 0, limit), dtype=np.float32)


def image_stats(content: Image) -> ImageStats:
    """Statistics of the pixels that the model sees, BGR without padding; all scaled to 0..1 of the grey range."""
    grey = cv2.cvtColor(content, cv2.COLOR_BGR2GRAY)
    mean, deviation = cv2.meanStdDev(grey)
    edges = cv2.convertScaleAbs(cv2.Laplacian(grey, cv2.CV_16S))  # clipped at 255: sharper is not told apart
    low, high = _levels(grey, (EXTREME, 1 - EXTREME))
    (sharpness,) = _levels(edges, (1 - EXTREME,))
    return ImageStats(float(mean[0, 0]) / 255, float(deviation[0, 0]) / 255, sharpness, low, high)


def _levels(grey: Any, shares: Sequence[float]) -> list[float]:
    """The levels, scaled to 0..1, below which these shares of the pixels lie; from a histogram, one pass."""
    below = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().cumsum()
    return [int(np.searchsorted(below, share * grey.size)) / 255 for share in shares]


def decode(
    output: NDArray[np.float32], iou: float, floor: float = SCORE_FLOOR
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Boxes (n, 4) x1 y1 x2 y2 in model pixels, scores, classes of one raw output (4 + classes, anchors), best first.

    Greedy suppression within each class of what overlaps a better box by more than `iou`, down to the score `floor`.
    Raises EngineError when the output holds NaN or infinity.
    """
    best = output[4:].max(axis=0)  # max passes NaN on, so two sums see every number without a pass of their own
    if not np.isfinite(best.sum() + output[:4].sum()):
        raise EngineError("the model's output holds NaN or infinity: the file is damaged or the release is broken")
    candidates = np.flatnonzero(best > floor)
    if len(candidates) > CANDIDATES_MAX:
        candidates = candidates[np.argsort(-best[candidates], kind="stable")[:CANDIDATES_MAX]]
    columns = output[:, candidates]
    classes = columns[4:].argmax(axis=0)
    half = columns[2:4] / 2
    boxes = np.concatenate((columns[:2] - half, columns[:2] + half)).T.astype(np.float32, copy=False)
    scores = best[candidates]
    if not len(candidates):
        return boxes, scores, classes
    # The suppression keeps classes apart by shifting them along x; that only works without negative coordinates.
    corner = boxes - boxes.min()
    corner[:, 2:] -= corner[:, :2]
    keep = np.asarray(cv2.dnn.NMSBoxesBatched(corner.astype(np.float64), scores, classes.astype(np.int32), 0.0, iou))[
        :DETECTIONS_MAX
    ]
    return boxes[keep], scores[keep], classes[keep]


class OnnxDetector:
    """A YOLO release on ONNX Runtime. `prepare` and `infer` may run in two threads; `infer` in one at a time.

    `options.extra` knows `spin` (idle threads spin: some percent faster, and a core burns while idle; default false)
    and `arena` (ONNX Runtime keeps freed memory for itself; default true).
    """

    def __init__(self, folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> None:
        """Load files["model"] of the release in `folder`; raises EngineError naming what does not fit."""
        self._release = manifest.release
        self._session: ort.InferenceSession | None = _open_session(folder, manifest, options)
        try:
            self._input = self._session.get_inputs()[0]
            self._size = self._input_size(manifest)
            self._batched = not isinstance(self._input.shape[0], int)
            self.labels = self._labels(manifest)
            self._check_output()
            check_calibration(manifest.calibration)
        except ValueError as error:
            raise EngineError(f"release {self._release}: {error}") from error
        self._iou = manifest.thresholds.iou
        self._spec = (*self._size, "float32")

    def _input_size(self, manifest: ReleaseManifest) -> tuple[int, int]:
        shape, kind = self._input.shape, self._input.type
        if kind != "tensor(float)" or len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
            raise ValueError(
                f"model input is {kind} {shape}; this engine takes tensor(float) [batch, 3, height, width]"
            )
        fixed = tuple(side if isinstance(side, int) else None for side in shape[2:])
        wanted = manifest.input_size or fixed
        if wanted[0] is None or wanted[1] is None:
            raise ValueError(f"the model takes any size {shape} and the manifest has no input_size; name one")
        if any(side is not None and side != want for side, want in zip(fixed, wanted, strict=True)):
            raise ValueError(f"the manifest says input_size {wanted}, the model takes {fixed}")
        return wanted[0], wanted[1]

    def _labels(self, manifest: ReleaseManifest) -> tuple[str, ...]:
        assert self._session is not None
        names = self._session.get_modelmeta().custom_metadata_map.get("names")
        inside = _parse_names(names) if names else ()
        outside = tuple(manifest.labels)
        if not inside and not outside:
            raise ValueError("neither the manifest nor the model's metadata names its labels")
        if inside and outside and inside != outside:
            raise ValueError(f"labels differ: the manifest says {list(outside)}, the model's metadata {list(inside)}")
        return outside or inside

    def _check_output(self) -> None:
        assert self._session is not None
        outputs = self._session.get_outputs()
        shape = outputs[0].shape
        rows = 4 + len(self.labels)
        plain = len(outputs) == 1 and outputs[0].type == "tensor(float)" and len(shape) == 3
        if not plain or (isinstance(shape[1], int) and shape[1] != rows):
            found = ", ".join(f"{each.type} {each.shape}" for each in outputs)
            raise ValueError(
                f"model output is {found}; with {len(self.labels)} labels this engine reads one tensor(float) "
                f"[batch, {rows}, anchors]: export a detection model without an end-to-end head "
                "(nms=False, end2end=False)"
            )

    def prepare(self, image: Image) -> Prepared:
        """Letterbox `image` (height, width, 3) BGR uint8 to (3, height, width) RGB 0..1; raises EngineError."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise EngineError(
                f"image of shape {image.shape} and type {image.dtype}: expected (height, width, 3) uint8, not empty"
            )
        box = Letterbox.fit((image.shape[0], image.shape[1]), self._size)
        canvas, content = box.apply(image, self._size)
        tensor = np.empty((3, *self._size), dtype=np.float32)
        # Splitting first makes every division run over contiguous bytes: several times faster than a transpose.
        for plane, channel in zip(tensor, reversed(cv2.split(canvas)), strict=True):
            np.divide(channel, np.float32(255), out=plane)
        pad = (float(box.left), float(box.top))
        return Prepared(image, tensor, self._spec, box.scale, pad, image_stats(content))

    def infer(self, batch: Sequence[Prepared]) -> list[Detections]:
        """Detect in every image of `batch`, boxes in original pixels, scores down to SCORE_FLOOR; raises EngineError.

        An image prepared for another model, as around a swap, is prepared again.
        """
        batch = [item if item.spec == self._spec else self.prepare(item.image) for item in batch]
        if self._batched and len(batch) > 1:
            outputs = self._run(np.stack([item.tensor for item in batch]))
        else:
            outputs = [self._run(item.tensor[None])[0] for item in batch]
        return [self._detections(item, output) for item, output in zip(batch, outputs, strict=True)]

    def _run(self, tensor: NDArray[np.float32]) -> Any:
        if self._session is None:
            raise EngineError(f"release {self._release} was closed: take a new lease")
        try:
            output: Any = self._session.run(None, {self._input.name: tensor})[0]
        except Exception as error:  # the runtime raises a class of its own for every status
            raise EngineError(f"release {self._release}: inference failed: {error}") from error
        if output.ndim != 3 or output.shape[:2] != (len(tensor), 4 + len(self.labels)):
            expected = (len(tensor), 4 + len(self.labels))
            raise EngineError(
                f"release {self._release}: the model answered {output.shape}, expected {expected} + anchors"
            )
        return output

    def _detections(self, item: Prepared, output: NDArray[np.float32]) -> Detections:
        try:
            boxes, scores, classes = decode(output, self._iou)
        except EngineError as error:
            raise EngineError(f"release {self._release}: {error}") from error
        size = (item.image.shape[0], item.image.shape[1])
        boxes = Letterbox.fit(size, self._size).restore(boxes, size)
        return Detections(boxes, scores, classes.astype(np.int64))

    def close(self) -> None:
        """Free the session; further calls of `infer` raise EngineError."""
        self._session = None


def _open_session(folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> ort.InferenceSession:
    entry = manifest.files.get("model")
    if entry is None:
        raise EngineError(f"release {manifest.release}: no file with the role 'model'; it has {sorted(manifest.files)}")
    path = folder / entry.path
    if not path.is_file():
        raise EngineError(f"release {manifest.release}: {path} is missing; fetch the release again")
    unknown = sorted(set(options.extra) - _EXTRA)
    if unknown:
        raise EngineError(f"release {manifest.release}: unknown engine options {unknown}; known: {sorted(_EXTRA)}")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = max(options.threads, 1)
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = bool(options.extra.get("arena", True))
    settings.add_session_config_entry(
        "session.intra_op.allow_spinning", str(int(bool(options.extra.get("spin", False))))
    )
    settings.log_severity_level = 3
    providers = _providers(options.providers, ort.get_available_providers())
    try:
        session = ort.InferenceSession(str(path), settings, providers=providers)
    except Exception as error:  # the runtime raises a class of its own for every status
        raise EngineError(f"release {manifest.release}: {path.name} does not load: {error}") from error
    if len(session.get_inputs()) != 1:
        names = [each.name for each in session.get_inputs()]
        raise EngineError(f"release {manifest.release}: {path.name} has inputs {names}; a detector has one, the image")
    for lost in set(providers) - set(session.get_providers()):
        log.warning("release %s: execution provider %s did not start; going on without", manifest.release, lost)
    return session


def _providers(wanted: Sequence[str], available: Sequence[str]) -> list[str]:
    """The wanted execution providers that are there, in order, with the CPU last whatever was wanted."""
    chosen = []
    for name in dict.fromkeys(wanted):
        if name == _CPU:
            continue
        if name in available:
            chosen.append(name)
        else:
            log.warning(
                "execution provider %s is not available (there are %s); using the next", name, ", ".join(available)
            )
    return [*chosen, _CPU]


def _parse_names(text: str) -> tuple[str, ...]:
    """Labels from the metadata of an export, a Python literal `{0: 'cat', 1: 'dog'}`; raises ValueError."""
    try:
        names = ast.literal_eval(text)
        labels = tuple(str(names[index]) for index in range(len(names)))
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"the model's metadata has unreadable names {text[:200]!r}") from error
    return labels
