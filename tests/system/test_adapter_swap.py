"""LoRA adapters on a language model that is at work: what has begun ends on the adapter it began with, and nothing of the
old one is left in what comes next."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from edged.engines.base import EngineOptions, GenerateRequest, Token, generate_all, open_engine
from edged.releases import read_manifest, reference
from edged.slot import Slot, load
from edged.wire.manifest import ReleaseRef
from tests.support.device import Bus, Device, tables, until
from tests.support.files import file_server
from tests.support.hosted import ADAPTED, PLAIN, PROMPT, clerk
from tests.support.models import write_manifest
from tests.system.broker import Broker
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

TERSE = ReleaseRef(release="clerk-terse@1.0", sha256="a" * 64)


@pytest.mark.parametrize("isolation", ["process", "daemon"])
def test_an_answer_ends_on_the_adapter_it_began_with(tmp_path: Path, phi: dict[str, Path], isolation: str) -> None:
    base = clerk(tmp_path / "base", phi["model_gguf"])
    slot = Slot("tongue")
    slot.flip(load(reference(base), base, read_manifest(base), EngineOptions(), isolation))
    try:
        for adapter, path, begun in ((TERSE, phi["adapter_gguf"], PLAIN), (None, None, ADAPTED)):
            attached: list[float] = []
            with slot.lease() as loaded, loaded.use:
                events = loaded.generator.generate(GenerateRequest(PROMPT))
                said = [next(events)]  # the answer is under way
                swap = threading.Thread(target=lambda a=adapter, p=path, out=attached: out.append(slot.attach(a, p)))
                swap.start()
                for event in events:
                    assert not attached, "it waits for the end of the answer"
                    said.append(event)
            swap.join(30)
            assert attached
            assert "".join(event.text for event in said if isinstance(event, Token)) == begun
            with slot.lease() as loaded, loaded.use:
                assert loaded.adapter == adapter
                now = generate_all(loaded.generator, GenerateRequest(PROMPT))
            # As an engine answers that has never seen the other adapter: to the last digit of its probabilities.
            fresh = open_engine(base, read_manifest(base), EngineOptions())
            fresh.attach(path)  # type: ignore[union-attr]
            alone = generate_all(fresh, GenerateRequest(PROMPT))  # type: ignore[arg-type]
            fresh.close()
            assert now[0] == alone[0] == (ADAPTED if adapter else PLAIN)
            assert now[1].mean_logprob == alone[1].mean_logprob
            assert now[1].reused_tokens == 0, "keys and values of the other adapter"
    finally:
        slot.stop()


def test_adapters_are_rolled_back_and_pinned_like_models(
    tmp_path: Path, broker: Broker, bus: Bus, phi: dict[str, Path]
) -> None:
    base = clerk(tmp_path / "base", phi["model_gguf"])
    folder = tmp_path / "terse"
    folder.mkdir()
    (folder / "adapter.gguf").write_bytes(phi["adapter_gguf"].read_bytes())
    roles = {"adapter": "adapter.gguf", **write_prompt_golden(folder, [(PROMPT, ADAPTED)])}
    made = build_manifest(
        folder, "clerk-terse@1.0", kind="lora", engine="llama", roles=roles, base=reference(base)
    )  # fmt: skip
    terse = write_manifest(folder, made)

    def tongue(status: dict[str, Any]) -> tuple[str | None, str]:
        model = status["models"]["tongue"]
        return model["adapter"], model["update"]

    def answer() -> str | None:
        return bus.reply(bus.ask("dev1", "chat", generation_prompt=PROMPT)).generated_response

    with file_server() as files:
        files.publish(folder, terse)
        plan = tables(tmp_path, "dev1", broker, None, host={"url": files.url})
        plan["slots"] = {"tongue": {"seed": base, "probation_s": 0.5}}
        plan["pipelines"] = {"chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}
        with Device(tmp_path, plan) as device:
            bus.desire("dev1", 1, {"tongue": reference(base)}, adapters={"tongue": terse})
            device.wait("the adapter", lambda s: tongue(s) == (terse.release, "committed"))
            assert answer() == ADAPTED
            done = device.cli("rollback", "tongue", "--adapter")
            assert done.returncode == 0, done.stderr
            status = device.wait("the bare base", lambda s: tongue(s) == (None, "reverted"))
            assert status["models"]["tongue"]["adapter_held"] == terse.release
            assert answer() == PLAIN
            assert device.stop() == 0
            device.start()
            assert answer() == PLAIN
            assert device.cli("pin", "tongue", "clerk-terse@1.0", "--adapter").returncode == 0
            device.wait("what it is pinned to", lambda s: tongue(s) == (terse.release, "committed"))
            bus.desire("dev1", 2, {"tongue": reference(base)})
            until("it has heard", lambda: device.wait("", bool)["models"]["tongue"]["adapter_pinned"])
            assert answer() == ADAPTED
            assert device.cli("unpin", "tongue", "--adapter").returncode == 0
            device.wait("as the fleet says", lambda s: s["models"]["tongue"]["adapter"] is None)
            assert answer() == PLAIN
