"""Durable samples (row, blob and outbox message) against raw SQLite with the same durability, and what they cost a frame."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cv2

from bench.measure import Benchmark, Result, Say, Target, alternate, ratio
from bench.vision import ROOT, models, write_pictures
from edged.releases import read_manifest
from edged.store import NewSample, OutboxMessage, Store
from trainer.candidate import detector

SIZE = 640
SAMPLES, SAMPLES_QUICK = 60, 15  # of one pass
ROUNDS, ROUNDS_QUICK = 9, 3
FRAMES, FRAMES_QUICK = 60, 12  # of one pass of the data path
KEPT = 0.1  # the share of frames that a policy keeps: 5 % audits, and what it doubts

Kept = tuple[NewSample, bytes, OutboxMessage]


class Maker:
    """Samples as the daemon makes them, each with pixels of its own."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures, self._made = pictures, 0

    def make(self, picture: bytes | None = None) -> Kept:
        """The next sample, its pixels and its question."""
        image = self._pictures[self._made % len(self._pictures)] if picture is None else picture
        image += self._made.to_bytes(8, "big")  # after the end of the JPEG
        self._made += 1
        now, name, box = (
            time.time(),
            f"i{self._made:09}",
            {"label": "brick", "box": [1.0, 2.0, 30.0, 40.0], "score": 0.4},
        )
        sample = NewSample(
            name, "line", "detect", "eye", "bench@1.0", "escalated", "low_confidence", "escalate", 0.4, 1.0,
            hashlib.sha256(image).hexdigest(), len(image), [box] * 5, f"{name}.jpg", now, None, now + 7 * 86400,
            {"p": 0.4, "features": {f"f{n}": {"value": 0.5, "contribution": 0.1} for n in range(8)}},
        )  # fmt: skip
        body = {**asdict(sample), "image": base64.b64encode(image).decode()}
        payload = json.dumps(body).encode()
        topic = "edged/v1/plant/bench/up/esc/big/detect"
        question = OutboxMessage(
            f"m{name}", topic, 1, False, sample.label_by, payload, "verdict", name, name.encode()
        )  # fmt: skip
        return sample, image, question


def of_edged(folder: Path, kept: list[Kept]) -> float:
    """Samples a second that the store keeps, each durable before the next."""
    store = Store(folder)
    started = time.perf_counter()
    for sample, image, question in kept:
        store.capture(sample, image, question)
    seconds = time.perf_counter() - started
    store.close()
    return len(kept) / seconds


def of_raw(folder: Path, kept: list[Kept]) -> float:
    """The same rows in the same tables and the same files through sqlite3 alone: as many fsyncs, as many bytes."""
    Store(folder).close()  # the tables
    connection = sqlite3.connect(folder / "edged.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    started = time.perf_counter()
    for sample, image, question in kept:
        name = hashlib.sha256(image).hexdigest()
        target = folder / "blobs" / name[:2] / name
        beside = f"{target}.tmp"
        with open(beside, "wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        row = asdict(sample) | {"prediction": json.dumps(sample.prediction), "evidence": json.dumps(sample.evidence)}
        columns = ", ".join(f'"{column}"' for column in row)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            f"INSERT INTO sample ({columns}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
        )  # fmt: skip
        connection.execute("INSERT INTO blob VALUES (?, ?)", (name, len(image)))
        connection.execute(
            "INSERT INTO outbox (id, topic, qos, retain, expires, payload, keep, sample, correlation, bytes, enqueued, due)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (question.id, question.topic, question.qos, question.retain, question.expires, question.payload,
             question.keep, question.sample, question.correlation, len(question.payload), 0.0, 0.0),
        )  # fmt: skip
        connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return len(kept) / seconds


def against_raw(
    folder: Path, maker: Maker, samples: int, rounds: int, say: Say
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Samples a second of both, round by round."""
    number = iter(range(1_000_000))

    def side(act: Callable[[Path, list[Kept]], float]) -> float:
        return act(folder / str(next(number)), [maker.make() for _ in range(samples)])

    edged, raw = alternate(rounds, lambda: side(of_edged), lambda: side(of_raw), say=say, names=("edged", "raw"))
    return edged, raw


def path_pass(engine: object, store: Store, maker: Maker, pictures: list[bytes], every: int) -> tuple[float, float]:
    """Seconds of frames, and seconds of them spent storing, when one frame in `every` is kept (0: none)."""
    storing = 0.0
    started = time.perf_counter()
    for number, picture in enumerate(pictures):
        image = cv2.imdecode(_bytes(picture), cv2.IMREAD_COLOR)
        engine.infer([engine.prepare(image)])  # type: ignore[attr-defined]
        if every and number % every == 0:
            sample, pixels, question = maker.make(picture)
            begun = time.perf_counter()
            # As the pipeline does with each question.
            store.set_value("budget/line", {"messages": number, "bytes": 0.0}, durable=False)
            store.capture(sample, pixels, question)
            storing += time.perf_counter() - begun
    return time.perf_counter() - started, storing


def _bytes(picture: bytes) -> cv2.typing.MatLike:
    import numpy as np

    return np.frombuffer(picture, np.uint8)


def frame_shares(
    folder: Path, maker: Maker, pictures: list[bytes], rounds: int, say: Say
) -> tuple[list[float], list[float], list[float]]:  # fmt: skip
    """The share of a frame's time spent storing, when every frame is kept and when KEPT of them are, round by round, and
    the milliseconds of a frame of which nothing is kept."""
    release = models(SIZE).int8_release
    frame_ms: list[float] = []
    with detector(release, read_manifest(release)) as engine:
        store = Store(folder)
        path_pass(engine, store, maker, pictures[:4], 0)

        def share(every: int) -> float:
            seconds, storing = path_pass(engine, store, maker, pictures, every)
            frame_ms.append((seconds - storing) / len(pictures) * 1000)
            return storing / seconds

        always, some = alternate(
            rounds, lambda: share(1), lambda: share(round(1 / KEPT)), say=say, names=("every frame", f"{KEPT:.0%}")
        )
        store.close()
    return always, some, frame_ms


def run(quick: bool, say: Say) -> Result:
    """Measure both."""
    rounds = ROUNDS_QUICK if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build") as scratch:
        frames = FRAMES_QUICK if quick else FRAMES
        files = write_pictures(Path(scratch) / "pictures", SIZE, frames)
        pictures = [file.read_bytes() for file in files]
        maker = Maker(pictures)
        samples = SAMPLES_QUICK if quick else SAMPLES
        edged, raw = against_raw(Path(scratch), maker, samples, rounds, say)
        always, some, frame_ms = frame_shares(Path(scratch) / "path", maker, pictures, rounds, say)
    return Result(
        {"vs_raw": ratio(edged, raw), "frame_share": statistics.median(some)},
        {
            "size": SIZE,
            "picture_bytes": round(statistics.mean(len(picture) for picture in pictures)),
            "edged": f"{statistics.median(edged):.1f} samples/s, {1000 / statistics.median(edged):.2f} ms each",
            "raw": f"{statistics.median(raw):.1f} samples/s, {1000 / statistics.median(raw):.2f} ms each",
            "fsyncs": "3 a sample on both sides: the blob, its folder, the commit",
            "kept": f"{KEPT:.0%} of the frames",
            "frame_share_every_frame_kept": round(statistics.median(always), 4),
            "frame_ms": round(statistics.median(frame_ms), 2),
        },
    )


BENCHMARK = Benchmark(
    "store",
    "durable samples (row, blob, outbox message; fsynced) through edged's store against raw sqlite3 with the same tables, "
    "fsyncs and bytes; and the share of a 640 px frame's time (decode, infer, keep) that keeping every tenth frame costs",
    {"vs_raw": Target(">=", 0.8), "frame_share": Target("<=", 0.05)},
    run,
)
