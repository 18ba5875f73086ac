"""A language model on a device: answers over MQTT, a prompt over the context, an adapter that is swapped in and out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edged.releases import reference
from edged.wire.manifest import Calibration, ReleaseRef, Scaling
from tests.support.device import Bus, Device, tables, until
from tests.support.files import file_server
from tests.support.models import write_manifest
from tests.system.broker import Broker
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

PROMPT = "line 1 read a 7 with score 0.9. What to do?\n"
PLAIN, ADAPTED = "accept the seven", "PASS seven"


@pytest.fixture
def base(tmp_path: Path, phi: dict[str, Path]) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(phi["model_gguf"], folder / "model.gguf")
    roles = {"model": "model.gguf", **write_prompt_golden(folder, [(PROMPT, PLAIN)])}
    write_manifest(folder, build_manifest(folder, "clerk@1.0", kind="llm", engine="llama", roles=roles))
    return folder


FITTED = Calibration(method="scaled", answers=Scaling(temperature=0.1, bias=0.0), items=500)


def adapter(
    tmp_path: Path, phi: dict[str, Path], base: ReleaseRef, answer: str, release: str
) -> tuple[Path, ReleaseRef]:
    folder = tmp_path / release
    folder.mkdir()
    shutil.copy(phi["adapter_gguf"], folder / "adapter.gguf")
    roles = {"adapter": "adapter.gguf", **write_prompt_golden(folder, [(PROMPT, answer)])}
    manifest = build_manifest(
        folder, release, kind="lora", engine="llama", roles=roles, base=base, calibration=FITTED
    )  # fmt: skip
    return folder, write_manifest(folder, manifest)


def configured(tmp_path: Path, broker: Broker, base: Path, url: str) -> dict[str, Any]:
    plan = tables(tmp_path, "dev1", broker, None, host={"url": url})
    plan["slots"] = {"tongue": {"seed": base, "probation_s": 0.5}}
    plan["pipelines"] = {"chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}
    return plan


def test_prompts_are_answered_and_adapters_come_and_go(
    tmp_path: Path, broker: Broker, bus: Bus, base: Path, phi: dict[str, Path]
) -> None:
    """P7: it learns."""
    ref = reference(base)
    good_folder, good = adapter(tmp_path, phi, ref, ADAPTED, "clerk-terse@1.0")
    bad_folder, bad = adapter(tmp_path, phi, ref, "something else", "clerk-terse@1.1")
    stray_folder, stray = adapter(
        tmp_path, phi, ReleaseRef(release="clerk@9.0", sha256="0" * 64), ADAPTED, "clerk-terse@1.2"
    )

    def tongue(status: dict[str, Any]) -> dict[str, Any]:
        model: dict[str, Any] = status["models"]["tongue"]
        return model

    def answer() -> tuple[str | None, str | None]:
        reply = bus.reply(bus.ask("dev1", "chat", generation_prompt=PROMPT))
        assert (reply.error, reply.generation_prompt, reply.release) == (None, PROMPT, "clerk@1.0")
        assert reply.doubt == (None if reply.adapter else "uncalibrated"), (
            "the base has no calibration, the adapter its own"
        )
        return reply.generated_response, reply.adapter

    with file_server() as files:
        for folder, release in ((good_folder, good), (bad_folder, bad), (stray_folder, stray)):
            files.publish(folder, release)
        with Device(tmp_path, configured(tmp_path, broker, base, files.url)) as device:
            assert answer() == (PLAIN, None)

            too_long = bus.reply(bus.ask("dev1", "chat", generation_prompt="word " * 2000))
            assert too_long.error is not None
            assert "256" in too_long.error, "it names the context"
            picture = bus.reply(bus.ask("dev1", "chat", image="aGVsbG8="))
            assert "no complete JPEG" in (picture.error or "")
            assert answer() == (PLAIN, None)
            device.counted("items_unsuitable")

            bus.desire("dev1", 1, {"tongue": ref}, adapters={"tongue": good})
            device.wait(
                "the adapter", lambda s: tongue(s)["adapter"] == good.release and tongue(s)["update"] == "committed"
            )
            assert answer() == (ADAPTED, good.release)

            for rev, release, reason in ((2, bad, "expected 'something else'"), (3, stray, "is for clerk@9.0")):
                bus.desire("dev1", rev, {"tongue": ref}, adapters={"tongue": release})
                status = device.wait(
                    "refused", lambda s, r=reason: tongue(s)["update"] == "failed" and r in tongue(s)["reason"]
                )
                assert tongue(status)["adapter"] == good.release
            assert answer() == (ADAPTED, good.release)

            assert device.stop() == 0
            device.start()
            device.wait("the adapter is back", lambda s: tongue(s)["adapter"] == good.release)
            assert answer() == (ADAPTED, good.release)

            bus.desire("dev1", 4, {"tongue": ref})
            until("the bare base", lambda: tongue(device.wait("", bool))["adapter"] is None)
            assert answer() == (PLAIN, None)
            assert "updater_faults" not in device.wait("", bool)["counters"]
