"""What the vision benchmarks share: the models, the pictures, the daemon, and the peers in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path
from typing import Any

import cv2

from bench.kept import kept
from bench.photos import CACHE, LABELS, overfit, photos, pieces
from edged.engines.letterbox import Letterboxer
from trainer.candidate import MODEL_FILE, detector
from trainer.export.golden_images import GOLDEN_IMAGES
from trainer.export.quantize import quantize_static_int8
from trainer.export.uint8 import take_uint8
from trainer.files import write_whole
from trainer.golden import write_detect_golden
from trainer.releases import MANIFEST, build_manifest, canonical_bytes

ROOT = Path(__file__).parents[1]
DEVICE = ROOT / "build" / "venv-device" / "bin"
NETWORK = "yolo11n.yaml"
SCORE, IOU = 0.25, 0.7
JPEG_QUALITY = 90
WAIT_S = 120.0
MADE_BY = (
    "trainer/export/quantize.py", "trainer/export/uint8.py", "trainer/golden.py", "trainer/releases.py",
    "edged/wire/manifest.py", "edged/wire/blocks.py",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Models:
    """One network for `size` x `size` pixels: as exported, and quantised; the folders are releases. `int8_float` is the
    quantised file before its input was made uint8."""

    size: int
    fp32: Path
    int8_float: Path
    fp32_release: Path
    int8_release: Path


def models(size: int) -> Models:
    """Made once and kept under the hash of how they are made."""
    fp32 = overfit(NETWORK, size)
    told = hashlib.sha256("".join((fp32.name, cv2.__version__, getsource(models), getsource(_release))).encode())
    # With the manifest's format too: a release of an older one is kept, but no device reads it any more.
    for source in MADE_BY:
        told.update((ROOT / source).read_bytes())
    folder = CACHE / f"bench-{size}-{told.hexdigest()[:12]}"

    def make(beside: Path) -> None:
        beside.mkdir()
        letterboxer = Letterboxer((size, size), "float32")
        seen = [*photos(), *(piece for photo in photos() for piece in pieces(photo))]
        quantize_static_int8(
            fp32, beside / "int8.onnx", [letterboxer.prepare(image).tensor[None].copy() for image in seen]
        )
        pixels = take_uint8(beside / "int8.onnx", beside / "uint8.onnx")
        _release(beside / "fp32", fp32, size)
        _release(beside / "int8", pixels, size)

    kept(folder, make)
    return Models(size, fp32, folder / "int8.onnx", folder / "fp32", folder / "int8")


def _release(folder: Path, model: Path, size: int) -> None:
    folder.mkdir()
    shutil.copyfile(model, folder / MODEL_FILE)
    fields: dict[str, Any] = {
        "kind": "detect", "engine": "onnx_detect", "labels": list(LABELS), "input_size": (size, size),
    }  # fmt: skip
    roles = {"model": MODEL_FILE}
    with detector(folder, build_manifest(folder, "bench@1.0", roles=roles, **fields)) as engine:
        golden = [piece for photo in photos() for piece in pieces(photo)][::3][:GOLDEN_IMAGES]
        roles |= write_detect_golden(folder, engine, golden, SCORE)
    write_whole(folder / MANIFEST, canonical_bytes(build_manifest(folder, "bench@1.0", roles=roles, **fields)))


def write_pictures(folder: Path, size: int, count: int) -> list[Path]:
    """`count` JPEG files as a camera of about the network's resolution gives them, each with other bytes."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        photo = photos()[number % len(photos())]
        width = photo.shape[1]
        left = number * 7 % (width // 8)
        part = photo[:, left : left + width - width // 8]
        scale = size / max(part.shape[:2])
        picture = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        paths.append(folder / f"{number:05d}.jpg")
        done = cv2.imwrite(str(paths[-1]), picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        assert done, f"{paths[-1]} cannot be written"
    return paths


class Device:
    """`edged run` from the device's own environment on one release, fed by a folder, without a broker."""

    def __init__(self, folder: Path, release: Path, threads: int) -> None:
        self.cpu_ms: list[float] = []
        self.inbox = folder / "in"
        self.inbox.mkdir(parents=True)
        self._config = folder / "edged.toml"
        self._log = folder / "edged.log"
        # Port 9 is nobody's: the daemon works offline, and asks for a broker once an hour.
        self._config.write_text(
            f"""
[device]
id = "bench"
state_dir = {json.dumps(str(folder / "state"))}
[broker]
port = 9
reconnect_s_max = 3600
[slots.eye]
seed = {json.dumps(str(release))}
threads = {threads}
[pipelines.line]
slot = "eye"
source = {{ type = "directory", path = {json.dumps(str(self.inbox))}, after = "delete" }}
policy = {{ escalate = false, audit_share = 0.0, empty_share = 0.0 }}
"""
        )

    def start(self) -> None:
        """Start the process; it takes what lies in `inbox` as soon as it can."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([DEVICE / "edged", "run", "-c", self._config], stdout=log, stderr=log)

    def wait_left(self, left: int) -> None:
        """Wait until at most so many files are left in the folder; raises RuntimeError when that takes too long."""
        deadline = time.monotonic() + WAIT_S
        while sum(name.endswith(".jpg") for name in os.listdir(self.inbox)) > left:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the daemon does not go on:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.002)
        if any((self.inbox / "rejected").iterdir()):
            raise RuntimeError(f"the daemon rejects the pictures:\n{self._log.read_text()[-3000:]}")

    def cpu_s(self) -> float:
        """Processor time that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf(
            "SC_CLK_TCK"
        )  # user and system; the name may hold spaces

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(WAIT_S)


@contextmanager
def device(folder: Path, release: Path, threads: int) -> Iterator[Device]:
    """A running daemon that has answered its first picture."""
    running = Device(folder, release, threads)
    (warm,) = write_pictures(folder / "warm", 160, 1)
    warm.rename(running.inbox / warm.name)
    running.start()
    try:
        running.wait_left(0)
        yield running
    finally:
        running.stop()


class Peer:
    """A process of `bench/peers.py`: `ultralytics` in this environment, the others in the device's."""

    def __init__(self, name: str, model: Path, size: int, threads: int, files: Sequence[Path]) -> None:
        self._name = name
        self.cpu_ms: list[float] = []
        python = sys.executable if name.startswith("ultralytics") else DEVICE / "python"
        self.process = subprocess.Popen(
            [str(each) for each in (python, "-m", "bench.peers", name, model, size, threads, *files)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hear(self) -> dict[str, float]:
        """What it says next; raises RuntimeError when it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                said: dict[str, float] = json.loads(line)
                return said
        raise RuntimeError(f"the peer {self._name} ended with status {self.process.wait()}")

    def go(self) -> float:
        """One pass over its pictures; how many a second. `cpu_ms` says what processor time each took."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        said = self.hear()
        self.cpu_ms.append(said["cpu_ms"])
        return said["per_second"]

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@contextmanager
def peer(name: str, model: Path, size: int, threads: int, files: Sequence[Path]) -> Iterator[Peer]:
    """A peer that is warm."""
    running = Peer(name, model, size, threads, files)
    try:
        running.hear()  # the first picture
        running.hear()  # warm
        yield running
    finally:
        running.stop()


def pss_mib(pid: int) -> float:
    """Proportional set size of a process in MiB: shared pages count as a share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss")
