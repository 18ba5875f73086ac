"""The part of the benchmark `swap` that is about LoRA adapters: they come and go on a GGUF model that answers prompts."""

from __future__ import annotations

import math
import shutil
import statistics
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bench.llm import ROOT, SMALL, make_model
from bench.measure import Say
from edged.engines.base import EngineOptions, GenerateRequest, Generator, generate_all, open_engine
from edged.releases import read_manifest, reference
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import InferReply
from tests.support.device import Bus, Device, tables
from tests.support.files import file_server
from tests.support.models import write_manifest
from tests.system.broker import Broker
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

PROMPT = "The belt of line 3 stands still. What is to be done?"
TOKENS = 32  # as many as a golden prompt is answered with
RANK = 8
WAIT_S = 120.0


def make_adapter(path: Path, seed: int) -> None:
    """A LoRA adapter of random weights for the second matrix of every feed-forward network of `SMALL`."""
    chance = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for layer in range(SMALL["num_hidden_layers"]):
        name = f"blk.{layer}.ffn_down.weight"
        sides = {"lora_a": (RANK, SMALL["intermediate_size"]), "lora_b": (SMALL["hidden_size"], RANK)}
        for which, shape in sides.items():
            writer.add_tensor(f"{name}.{which}", chance.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_releases(folder: Path) -> tuple[Path, list[tuple[Path, ReleaseRef]]]:
    """A base of random weights, and two adapters for it that answer otherwise."""
    base = folder / "base"
    base.mkdir(parents=True)
    shutil.copyfile(make_model(ROOT / "build" / "bench" / "swap", SMALL), base / "model.gguf")
    write_manifest(base, build_manifest(base, "tongue@1.0", kind="llm", engine="llama", roles={"model": "model.gguf"}))
    engine = open_engine(base, read_manifest(base), EngineOptions())
    assert isinstance(engine, Generator)
    request = GenerateRequest(PROMPT, tokens_max=TOKENS)

    def golden(of: Path) -> dict[str, str]:
        return write_prompt_golden(of, [(PROMPT, generate_all(engine, request)[0])])

    roles = {"model": "model.gguf", **golden(base)}
    ref = write_manifest(base, build_manifest(base, "tongue@1.0", kind="llm", engine="llama", roles=roles))
    adapters = []
    for number in (1, 2):
        of = folder / f"adapter-{number}"
        of.mkdir()
        make_adapter(of / "adapter.gguf", number)
        engine.attach(of / "adapter.gguf")
        roles = {"adapter": "adapter.gguf", **golden(of)}
        made = build_manifest(of, f"words@1.{number}", kind="lora", engine="llama", roles=roles, base=ref)
        adapters.append((of, write_manifest(of, made)))
    engine.close()
    return base, adapters


def swap_adapters(
    count: int, folder: Path, broker: Broker, bus: Bus, say: Say
) -> tuple[dict[str, float], dict[str, object]]:  # fmt: skip
    """Give a device one adapter for the other, `count` times, while it answers; keys and facts."""
    base, adapters = make_releases(folder)
    took: list[float] = []
    with file_server() as files:
        for of, ref in adapters:
            files.publish(of, ref)
        plan = tables(folder, "bench2", broker, None, host={"url": files.url})
        plan["slots"] = {"tongue": {"seed": base, "probation_s": 0.1}}
        plan["pipelines"] = {"chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}
        with Device(folder, plan) as device:
            asked: list[str] = []
            enough = threading.Event()

            def ask() -> None:
                while not enough.is_set():
                    asked.append(bus.ask("bench2", "chat", generation_prompt=PROMPT, tokens_max=TOKENS))
                    bus.reply(asked[-1], WAIT_S)

            asker = threading.Thread(target=ask, daemon=True)
            asker.start()
            for number in range(count):
                _, ref = adapters[number % 2]
                bus.desire("bench2", number + 1, {"tongue": reference(base)}, adapters={"tongue": ref})

                def there(status: dict[str, Any], ref: ReleaseRef = ref) -> bool:
                    model = status["models"]["tongue"]
                    return (model["adapter"], model["update"]) == (ref.release, "committed")

                status = device.wait(f"{ref.release}, number {number}", there, WAIT_S)
                took.append(status["models"]["tongue"]["swap_ms"])
                if number % 10 == 9:
                    say(f"adapter {number + 1}/{count}: {statistics.median(took):.2f} ms")
            enough.set()
            asker.join(WAIT_S)
    replies = bus.of(InferReply, "bench2")
    times = Counter(request for request, _ in {(reply.request, reply.id) for reply in replies})
    ordered = sorted(took)
    keys = {
        "lost": float(len(set(asked) - times.keys())),
        "failed": float(sum(reply.error is not None for reply in replies)),
        "twice": float(sum(many - 1 for many in times.values())),
        "adapter_swap_ms": statistics.median(took),
    }
    spread = f"p95 {ordered[math.ceil(0.95 * len(ordered)) - 1]:.2f}, at most {ordered[-1]:.2f}"
    return keys, {"adapter_swaps": f"{count}, {spread} ms", "prompts": f"{len(asked)} answered meanwhile"}
