"""From a release's files to what it needs, and from /proc, /sys and control groups to readings."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged.core.limits import (
    MIB,
    too_tight,
)
from edged.engines.base import EngineOptions
from edged.machine import HELD_S, CpuTime, Memory, Thermal, groups
from edged.needs import ONNX_FACTOR, PROCESS_BYTES, accelerated, cache_bytes, estimate, gguf_keys
from edged.releases import read_manifest
from edged.wire.manifest import ReleaseManifest
from tests.support.machines import fake_machine, zone
from trainer.releases import file_entry

# What a release needs.


def gguf(path: Path, keys: dict[str, Any], tail: bytes = b"") -> Path:
    """The header of a GGUF file; lists are arrays of int32 or strings."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(item: Any) -> bytes:
        if isinstance(item, str):
            return struct.pack("<I", 8) + text(item)
        if isinstance(item, float):
            return struct.pack("<If", 6, item)
        if isinstance(item, list):
            if isinstance(item[0], str):
                return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
            return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)
        return struct.pack("<II", 4, item)

    body = b"".join(text(key) + value(item) for key, item in keys.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(keys)) + body + tail)
    return path


LLAMA = {
    "general.architecture": "llama", "general.tags": ["a", "b"], "llama.rope.freq_base": 1e4, "llama.context_length": 4096,
    "llama.embedding_length": 2048, "llama.block_count": 16, "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}  # fmt: skip
PER_TOKEN = 16 * 8 * (64 + 64) * 2  # layers x heads x lengths of a key and a value x 2 bytes


@pytest.mark.parametrize(
    ("change", "extra", "tokens"),
    [
        ({}, {}, 4096),
        ({}, {"context_max": 1024}, 1024),
        ({}, {"context_max": 9999}, 4096),
        ({"llama.attention.sliding_window": 512}, {}, 512),
        ({"llama.attention.head_count_kv": [8] * 15 + [0]}, {}, 4096 * 15 / 16),
        ({"llama.attention.key_length": 192, "llama.attention.value_length": 64}, {}, 4096 * 2),
        ({"llama.attention.head_count": 0}, {}, 0),
    ],
)
def test_the_cache_of_a_language_model(tmp_path: Path, change: Any, extra: Any, tokens: float) -> None:
    path = gguf(tmp_path / "model.gguf", LLAMA | change | {"tokenizer.ggml.tokens": ["x"] * 10})
    assert cache_bytes(path, EngineOptions(extra=extra)) == tokens * PER_TOKEN


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"nonsense" * 10])
def test_a_header_that_cannot_be_read_says_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    assert gguf_keys(tmp_path / "m") == {}
    assert gguf_keys(tmp_path / "none") == {}


def test_a_real_file_says_what_llama_cpp_will_open(phi: dict[str, Path]) -> None:
    """Against llama.cpp itself: the size of the cache that it reports for this file."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = phi["model_gguf"]
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    layers, heads = llama_cpp.llama_model_n_layer(model), llama_cpp.llama_model_n_head_kv(model)
    length = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
    tokens = llama_cpp.llama_model_n_ctx_train(model)
    llama_cpp.llama_model_free(model)
    assert cache_bytes(path, EngineOptions()) == tokens * layers * heads * 2 * length * 2 > 0


def test_a_network_needs_its_weights_twice_while_it_loads(toy: Path) -> None:
    manifest = read_manifest(toy)
    need = estimate(toy, manifest, EngineOptions())
    assert need.model == int(manifest.files["model"].bytes * ONNX_FACTOR)
    assert (need.where(None), need.where("daemon"), need.floor) == (need.model, need.model, True)


def test_a_language_model_has_a_process_of_its_own_unless_it_lives_in_the_daemon(phi: dict[str, Path]) -> None:
    path = phi["model_gguf"]
    size = path.stat().st_size
    entry = file_entry(path).model_dump(mode="json")
    manifest = ReleaseManifest.model_validate(
        {"release": "phi@1.0", "kind": "llm", "engine": "llama", "files": {"model": entry}, "created": "2026"}
    )
    need = estimate(path.parent, manifest, EngineOptions())
    assert need.model == size + cache_bytes(path, EngineOptions())
    assert need.where(None) == need.where("process") == need.model + PROCESS_BYTES
    assert need.where("daemon") == need.model


@pytest.mark.parametrize(
    ("engine", "providers", "extra", "card", "answer"),
    [
        ("onnx_detect", ("cpu",), {}, True, False),
        ("onnx_detect", ("openvino", "cpu"), {}, False, False),
        ("onnx_detect", ("tensorrt", "cpu"), {}, False, True),
        ("llama", ("cpu",), {}, False, False),
        ("llama", ("cpu",), {}, True, True),
        ("llama", ("cpu",), {"gpu_layers": 0}, True, False),
    ],
)
def test_a_card_has_memory_that_is_not_counted_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, providers: tuple[str, ...], extra: dict[str, Any],
    card: bool, answer: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr("edged.needs.NVIDIA", tmp_path if card else tmp_path / "none")
    kind = "llm" if engine == "llama" else "detect"
    manifest = ReleaseManifest.model_validate(
        {"release": "m@1.0", "kind": kind, "engine": engine, "files": {}, "created": "2026"}
    )
    assert accelerated(manifest, EngineOptions(providers=providers, extra=extra)) is answer


# The machine.


def test_a_control_group_of_version_2_limits_through_its_parents(tmp_path: Path) -> None:
    proc, mount = fake_machine(tmp_path, v2={"": {}, "a": {"memory.max": 400 * MIB, "cpu.max": "50000 100000"},
                                             "a/b": {"memory.max": "max", "memory.high": 300 * MIB}})  # fmt: skip
    bounds = {bound.name: bound for bound in Memory(None, proc, mount).bounds() if not bound.own}
    inner, outer = (bounds[f"the {n} MiB of the control group {path}"] for n, path in ((300, "/a/b"), (400, "/a")))
    # 100 MiB in use, of it 60 of file pages, of which 20 are mapped; 10 of reclaimable kernel memory.
    assert inner.used == outer.used == 50 * MIB
    assert CpuTime(proc, mount).cores() == 0.5


def test_a_control_group_of_version_1(tmp_path: Path) -> None:
    proc, mount = fake_machine(
        tmp_path, v1={"": {}, "a": {"memory.limit_in_bytes": 300 * MIB, "cpu.cfs_quota_us": 25000}}
    )
    bounds = [b for b in Memory(None, proc, mount).bounds() if "control group" in b.name]
    assert [(b.limit, b.own) for b in bounds] == [(300 * MIB, True), (300 * MIB, False)]
    assert bounds[1].used == 60 * MIB
    assert CpuTime(proc, mount).cores() == 0.25


def test_in_a_container_the_mounted_group_counts(tmp_path: Path) -> None:
    """Without a name space of its own /proc names the host's path, which is not mounted."""
    proc, mount = fake_machine(tmp_path, v2={"": {"memory.max": 200 * MIB}}, path="/docker/abc")
    assert [group.path for group in groups("memory", proc, mount)] == ["/"]
    assert min(bound.limit for bound in Memory(None, proc, mount).bounds()) == 200 * MIB


def test_the_machine_keeps_a_reserve_and_others_use_it_too(tmp_path: Path) -> None:
    proc, mount = fake_machine(tmp_path, total=1000 * MIB, available=150 * MIB)
    own, theirs = Memory(None, proc, mount).bounds()
    assert own.limit == theirs.limit == 900 * MIB
    assert (own.own, theirs.own) == (True, False)
    assert theirs.left == (900 - 850 - 45) * MIB
    (proc / "meminfo").unlink()  # as `ProcSubset=pid` does
    assert [bound.own for bound in Memory(None, proc, mount).bounds()] == [True]


def test_the_configured_limit_counts_the_daemon_and_its_children_once(tmp_path: Path) -> None:
    bound = Memory(512).bounds()[0]
    assert bound.name == "limits.memory_mib = 512"
    assert 10 * MIB < bound.used < 4096 * MIB
    blocks = bytearray(os.urandom(MIB)) * 64
    assert Memory(512).bounds()[0].used - bound.used > 50 * MIB
    del blocks


def test_that_others_fill_the_machine_is_no_reason_to_work_less(tmp_path: Path) -> None:
    proc, mount = fake_machine(tmp_path, total=100_000 * MIB, available=1 * MIB)
    memory = Memory(None, proc, mount)
    found = memory.pressure()
    assert found is not None
    assert found[0] < 0.5
    assert too_tight(MIB, 0, memory.bounds()) is not None, "but nothing more is loaded"


def test_cpu_time_of_children_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that runs, of one that has just ended and is not waited for, and of one that is over."""
    cpu, code = (
        CpuTime(),
        "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\nimport sys; sys.stdin.read()",
    )
    assert cpu.used(0.0) is None, "since when?"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running = cpu.used(2.0)
        with monkeypatch.context() as unseen:
            unseen.setattr(psutil.Process, "children", lambda self, recursive: [])
            ended = cpu.used(4.0)
    over = cpu.used(6.0)
    assert running is not None
    assert ended is not None
    assert over is not None
    assert running.seconds == ended.seconds == over.seconds == 2.0
    assert running.share * 2.0 * cpu.cores() > 0.9
    assert ended.share == 0.0
    assert over.share * 2.0 * cpu.cores() < 0.8, "its second is not counted again"


@pytest.mark.parametrize("said", ["-274000", "1000000000", "nonsense", "", None])
def test_a_sensor_that_cannot_be_believed_is_ignored_after_a_while(tmp_path: Path, said: str | None) -> None:
    zone(tmp_path, 0, "80000")
    zone(tmp_path, 1, "40000")
    thermal = Thermal(tmp_path)
    assert thermal.read(0.0) == ("thermal_zone0", 80.0)
    zone(tmp_path, 0, said)
    assert thermal.read(HELD_S) == ("thermal_zone0", 80.0), "what it said last still counts"
    assert set(thermal.broken) == {"thermal_zone0"}
    assert thermal.read(HELD_S + 1) == ("thermal_zone1", 40.0)
    zone(tmp_path, 0, "50000")
    assert thermal.read(HELD_S + 2) == ("thermal_zone0", 50.0)
    assert thermal.broken == {}


def test_a_machine_without_sensors_has_no_temperature(tmp_path: Path) -> None:
    assert Thermal(tmp_path / "none").read(0.0) is None
    zone(tmp_path, 0, "-274000")
    assert Thermal(tmp_path).read(0.0) is None
