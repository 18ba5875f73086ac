"""How much memory a release needs, before anything has loaded it: from its files. Afterwards the proving child knows.

The estimate is a floor, what the release surely needs: a release is not refused for a guess. What lies above it is caught
in the proving child, which may take no more memory than there is, and measures what it took.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edged.core.limits import MIB
from edged.core.providers import long_name
from edged.engines.base import EngineOptions
from edged.wire.manifest import ReleaseManifest

# Of the model file's size. ONNX Runtime holds the parsed file and its own copy of the weights while it loads; a YOLO11n of
# 10.0 MiB took 27 MiB beyond the libraries.
ONNX_FACTOR = 2.0
# Interpreter, NumPy and the engine's library, as far as they are not shared with the daemon: 35 MiB of anonymous memory, and
# what the loader changes of the libraries' pages.
PROCESS_BYTES = 40 * MIB
KV_BYTES = 2  # llama.cpp keeps keys and values as 16-bit floats
NVIDIA = Path("/dev/nvidiactl")  # a card with memory of its own; a Jetson shares the machine's

_KEYS_MAX = 4096
_STRING_BYTES_MAX = 64 * MIB
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF value types
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a release takes: `model` where it is loaded into the daemon, `process` in a process of its own.

    `floor`: it takes at least that; otherwise it was measured.
    """

    model: int
    process: int
    kind: str
    floor: bool = True

    def where(self, isolation: str | None) -> int:
        """Bytes for a slot with this `isolation`."""
        return self.process if self.kind == "llm" and isolation != "daemon" else self.model


def accelerated(manifest: ReleaseManifest, options: EngineOptions) -> bool:
    """Whether a card computes this release: its driver maps memory without end, so that data cannot be limited."""
    if manifest.engine == "llama":
        return options.extra.get("gpu_layers", "auto") != 0 and NVIDIA.exists()
    return any(long_name(each) not in {long_name("cpu"), long_name("openvino")} for each in options.providers)


def estimate(folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> Need:
    """What the release in `folder` surely needs; an adapter needs its own bytes beside its base."""
    size = sum(entry.bytes for role, entry in manifest.files.items() if role in {"model", "adapter"})
    if manifest.engine == "llama" and manifest.kind == "llm":
        if accelerated(manifest, options):
            size = 0  # how much of it goes to the card is llama.cpp's decision
        else:
            size += cache_bytes(folder / manifest.files["model"].path, options) if "model" in manifest.files else 0
    elif manifest.kind != "lora":
        size = int(size * ONNX_FACTOR)
    return Need(size, size + PROCESS_BYTES, manifest.kind)


def cache_bytes(path: Path, options: EngineOptions) -> int:
    """Bytes of llama.cpp's cache of keys and values for the context that it will open; 0 where the file does not say.

    Tokens x layers x heads of keys and values x (length of a key + of a value) x 2 bytes.
    """
    keys = gguf_keys(path)
    architecture = keys.get("general.architecture", "")

    def number(name: str, default: int = 0) -> int:
        value = keys.get(f"{architecture}.{name}", default)
        return value if isinstance(value, int) else default

    tokens, heads, layers = number("context_length"), number("attention.head_count"), number("block_count")
    wanted = options.extra.get("context_max") or 0
    if isinstance(wanted, int) and wanted > 0:
        tokens = min(tokens, wanted)
    window = number("attention.sliding_window")
    if window and architecture != "phi3":  # llama.cpp ignores the window of Phi-3
        tokens = min(tokens, window)
    if not heads:
        return 0
    length = number("embedding_length") // heads
    both = number("attention.key_length", length) + number("attention.value_length", length)
    per_layer = keys.get(f"{architecture}.attention.head_count_kv", heads)
    total = sum(per_layer) if isinstance(per_layer, list) else per_layer * layers
    return int(tokens * total * both * KV_BYTES)


def gguf_keys(path: Path) -> Mapping[str, Any]:
    """Whole numbers, lists of them and strings of a GGUF file's header, up to the tokenizer's. What cannot be read is left
    out: whether the file is good is the engine's to say. Format: github.com/ggml-org/ggml, docs/gguf.md."""
    keys: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version < 2:
                return {}
            for _ in range(min(count, _KEYS_MAX)):
                name = _string(file)
                if name.startswith("tokenizer."):
                    break
                (kind,) = struct.unpack("<I", file.read(4))
                value = _value(file, kind)
                if value is not None:
                    keys[name] = value
    except (OSError, ValueError, struct.error):
        return keys
    return keys


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _STRING_BYTES_MAX:
        raise ValueError(f"a string of {length} bytes")
    return file.read(length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in _INTEGERS and count <= _KEYS_MAX:
            return [_value(file, inner) for _ in range(count)]
        if inner == _STRING:
            for _ in range(count):
                _string(file)
        else:
            file.seek(_size(inner) * count, 1)
        return None
    data = file.read(_size(kind))
    return struct.unpack(_INTEGERS[kind], data)[0] if kind in _INTEGERS else None


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"a value of type {kind}")
    return _SIZES[kind]
