"""Releases of the kinds, precisions and sizes that the firmware profiles claim to carry; kept below build/, so that only the
first run makes them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from bench.kept import kept
from bench.photos import CACHE, LABELS, overfit, photos, pieces
from edged.config import MIB
from edged.engines.base import Detector, EngineOptions, Image, open_engine
from edged.engines.llama import BATCH_TOKENS
from trainer.export.quantize import quantize_static_int8
from trainer.export.uint8 import take_uint8
from trainer.golden import write_detect_golden
from trainer.package import package_gguf
from trainer.releases import MANIFEST, build_manifest, canonical_bytes

# The network that a claim names, as ultralytics describes it.
NETWORKS = {name: f"{name}.yaml" for name in ("yolo11n", "yolo11s", "yolo11n-seg", "yolo11n-cls")}
SCORE = 0.25
GOLDEN = 2  # images of a golden set
ROOT = Path(__file__).parents[2]
RECIPE = ("tests/support/claimed.py", "trainer/export/quantize.py", "trainer/export/uint8.py", "trainer/golden.py",
          "trainer/releases.py", "edged/wire/manifest.py", "edged/wire/blocks.py")  # fmt: skip


def vision_release(kind: str, model: str, precision: str, size: int) -> Path:
    """A release of a YOLO that takes `size` x `size` pixels, in `precision` (int8 or fp32), with its golden set."""
    source = overfit(NETWORKS[model], size)
    told = hashlib.sha256(f"{source.name} {kind} {precision} {version('onnxruntime')}".encode())
    for name in RECIPE:
        told.update((ROOT / name).read_bytes())
    folder = CACHE / f"claimed-{model}-{precision}-{size}-{told.hexdigest()[:12]}"
    return kept(folder, lambda beside: _make(source, beside, kind, model, precision, size))


def _make(source: Path, folder: Path, kind: str, model: str, precision: str, size: int) -> Path:
    folder.mkdir()
    shutil.copyfile(source, folder / "model.onnx")
    release, roles = f"{model}@1.0", {"model": "model.onnx"}
    plan: dict[str, Any] = {"kind": kind, "engine": f"onnx_{kind}", "labels": list(LABELS), "input_size": (size, size)}
    images = [*photos(), *(piece for photo in photos() for piece in pieces(photo))]
    if precision == "int8":
        engine = open_engine(folder, build_manifest(folder, release, roles=roles, **plan), EngineOptions(threads=2))
        assert isinstance(engine, Detector)
        inputs = [engine.prepare(image).tensor[None] for image in images[:10]]
        engine.close()
        take_uint8(quantize_static_int8(folder / "model.onnx", folder / "int8.onnx", inputs), folder / "model.onnx")
        (folder / "int8.onnx").unlink()
    engine = open_engine(folder, build_manifest(folder, release, roles=roles, **plan), EngineOptions(threads=2))
    assert isinstance(engine, Detector)
    roles |= write_detect_golden(folder, engine, list(islice(_solid(engine, images), GOLDEN)), SCORE)
    engine.close()
    (folder / MANIFEST).write_bytes(canonical_bytes(build_manifest(folder, release, roles=roles, **plan)))
    return folder


def _solid(engine: Detector, images: Sequence[Image]) -> Iterator[Image]:
    """The images in which the network finds something, and no box that is cut away at an edge: such a one overlaps with
    none."""
    for image in images:
        found = engine.infer([engine.prepare(image)])[0].above(SCORE)
        if len(found) and (found.boxes[:, 2:] - found.boxes[:, :2]).min() > 2:
            yield image


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much memory a Phi takes.."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int

    def cache_mib(self, context: int) -> float:
        """llama.cpp's cache of keys and values in 16 bits: every head has its own, as in Phi-2 and Phi-3-mini."""
        return 2 * self.layers * self.hidden * context * 2 / MIB

    def work_mib(self, context: int) -> float:
        """Buffers for one batch of a prompt: logits, attention scores of a layer, and what the widest layer makes."""
        return BATCH_TOKENS * 4 * (self.vocabulary + context * self.heads + 8 * 4 * self.hidden) / MIB

    def process_mib(self, file_mib: float, context: int) -> float:
        """A process that holds the model alone: the interpreter, the file's pages, the copy of a part of them that llama.cpp
        arranges for the processor, the cache and the buffers."""
        return LLAMA_MIB + REPACKED * file_mib + self.cache_mib(context) + self.work_mib(context)


LLAMA_MIB = 72  # a process with llama.cpp and no model: 65 to 66 measured, and how its library was built varies it
REPACKED = 1.7  # of the file; what of it is Q4_K is copied
# Published shapes (config.json of the models on Hugging Face).
SHAPES = {"phi-2": Shape(32, 2560, 32, 51200), "phi-3-mini": Shape(32, 3072, 32, 32064)}
SMALL = {"small": Shape(8, 512, 8, 400), "large": Shape(12, 1024, 16, 400)}
PROMPTS = ("the line reads a seven, ask the teacher " * 8,)


def language_release(size: str) -> Path:
    """A release of a Phi-2 of random weights in Q4_K_M, in the `SMALL` shape `size`, with its golden set."""
    told = hashlib.sha256(f"{SMALL[size]} {version('llama-cpp-python')} {PROMPTS}".encode())
    exported = ("gguf.py", "gguf_architectures.py", "gguf_vocab.py", "language.py")
    for name in (*RECIPE, "tests/trainer/tiny_phi.py", *(f"trainer/export/{name}" for name in exported)):
        told.update((ROOT / name).read_bytes())
    folder = CACHE / f"claimed-phi-{size}-Q4_K_M-{told.hexdigest()[:12]}"
    return kept(folder, lambda beside: _make_phi(beside, SMALL[size]))


def _make_phi(folder: Path, shape: Shape) -> None:
    from tests.trainer.tiny_phi import save_phi2

    checkpoint = folder.with_name("checkpoint")
    save_phi2(
        checkpoint, hidden_size=shape.hidden, intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, initializer_range=0.05,
    )  # fmt: skip
    package_gguf(checkpoint, folder, "phi-shaped@1.0", prompts=PROMPTS)
