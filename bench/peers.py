"""What the daemon is measured against, each in a process of its own: python -m bench.peers NAME MODEL SIZE THREADS FILES...

`bare`: `session.run` on float32 tensors that are ready before the clock starts, with the daemon's own decoding.
`script`: the shortest script that answers files: onnxruntime and OpenCV, nothing else.
`engine`: the device's own engine on a release's folder (MODEL), pictures decoded before the clock starts.
`ultralytics`: `YOLO(MODEL).predict` on each file, as frames come. `ultralytics_stream`: one call of it for all files.

Each prints one JSON object when it has answered its first picture, one when it is warm, and then for every line that it
reads one with the pictures a second of one pass over the files, and the processor time that each took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

SCORE, IOU = 0.25, 0.7

# A peer is an iterator: its first step answers the first file, its second warms up, each later one is a pass over all.
Passes = Iterator[None]


def bare(model: str, size: int, threads: int, files: Sequence[str]) -> Passes:
    """Tensors that are ready, and the daemon's decoding."""
    from edged.engines.decode import decode_plain

    session = _session(model, threads)
    ready = [_tensor(file, size) for file in files]

    def answer(each: Any) -> None:
        (output,) = session.run(None, {"images": each})
        decode_plain(output[0], output.shape[1] - 4, IOU)

    answer(ready[0])
    yield
    while True:
        for each in ready:
            answer(each)
        yield


def engine(model: str, size: int, threads: int, files: Sequence[str]) -> Passes:
    """Prepare and infer."""
    from pathlib import Path

    import cv2
    import numpy as np

    from edged.engines.base import Detector, EngineOptions, open_engine
    from edged.releases import read_manifest

    running = open_engine(Path(model), read_manifest(Path(model)), EngineOptions(threads=threads))
    assert isinstance(running, Detector)
    images = [np.asarray(cv2.imread(file), np.uint8) for file in files]
    running.infer([running.prepare(images[0])])
    yield
    while True:
        for image in images:
            running.infer([running.prepare(image)])
        yield


def script(model: str, size: int, threads: int, files: Sequence[str]) -> Passes:
    """What anyone would write first: read, letterbox, run, suppress."""
    import cv2
    import numpy as np

    session = _session(model, threads)

    def answer(file: str) -> None:
        output = session.run(None, {"images": _tensor(file, size)})[0][0]
        scores = output[4:].max(axis=0)
        kept = np.flatnonzero(scores > SCORE)
        boxes = output[:4, kept].T.copy()
        boxes[:, :2] -= boxes[:, 2:] / 2
        cv2.dnn.NMSBoxes(boxes.tolist(), scores[kept].tolist(), SCORE, IOU)

    answer(files[0])
    yield
    while True:
        for file in files:
            answer(file)
        yield


def _session(model: str, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _tensor(file: str, size: int) -> Any:
    import cv2
    import numpy as np

    image = cv2.imread(file)
    assert image is not None, f"{file} cannot be read"
    scale = size / max(image.shape[:2])
    image = cv2.resize(image, (round(image.shape[1] * scale), round(image.shape[0] * scale)))
    canvas = np.full((size, size, 3), 114, np.uint8)
    top, left = (size - image.shape[0]) // 2, (size - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255


def ultralytics(model: str, size: int, threads: int, files: Sequence[str]) -> Passes:
    """A call for each file."""
    predict = _predict(model, size, threads)
    predict(files[0])
    yield
    while True:
        for file in files:
            predict(file)
        yield


def ultralytics_stream(model: str, size: int, threads: int, files: Sequence[str]) -> Passes:
    """One call, a stream of results: faster, for whoever has all files before."""
    predict = _predict(model, size, threads)
    predict(files[0])
    yield
    while True:
        for _ in predict(list(files), stream=True):
            pass
        yield


def _predict(model: str, size: int, threads: int) -> Callable[..., Any]:
    import onnxruntime as ort

    plain = ort.InferenceSession

    def with_threads(path: str, _options: Any = None, **more: Any) -> Any:  # it has no option of its own for that
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        return plain(path, options, **more)

    ort.InferenceSession = with_threads
    from trainer.tuners.yolo import prepare_process

    prepare_process()
    import torch
    from ultralytics import YOLO

    torch.set_num_threads(threads)
    return partial(YOLO(model, task="detect").predict, imgsz=size, conf=SCORE, iou=IOU, device="cpu", verbose=False)


PEERS = {each.__name__: each for each in (bare, engine, script, ultralytics, ultralytics_stream)}


def main() -> None:
    """Answer the first picture, warm up, then one pass for each line read."""
    name, model, size, threads, *files = sys.argv[1:]
    passes = PEERS[name](model, int(size), int(threads), files)
    for state in ("first", "warm"):
        next(passes)
        print(json.dumps({state: True}), flush=True)
    for _ in sys.stdin:
        started, used = time.perf_counter(), time.process_time()
        next(passes)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        print(json.dumps({"per_second": len(files) / seconds, "cpu_ms": used / len(files) * 1000}), flush=True)


if __name__ == "__main__":
    main()
