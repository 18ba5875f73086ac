"""An adapter that was trained on this machine reaches the running daemon through its overrides file, and leaves with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edged.releases import reference
from edged.wire.messages import Event
from tests.support.device import Bus, Device, tables, until
from tests.support.files import file_server
from tests.support.hosted import ADAPTED, PLAIN, PROMPT, clerk
from tests.support.models import make_release, write_manifest
from tests.system.broker import Broker
from trainer.golden import write_prompt_golden
from trainer.overrides import activate
from trainer.releases import build_manifest


@pytest.fixture
def base(tmp_path: Path, phi: dict[str, Path]) -> Path:
    return clerk(tmp_path / "base", phi["model_gguf"])


def adapter(
    folder: Path, phi: dict[str, Path], base: Path, name: str = "clerk-terse@1.0", answer: str = ADAPTED
) -> Path:
    folder.mkdir()
    (folder / "adapter.gguf").write_bytes(phi["adapter_gguf"].read_bytes())
    roles = {"adapter": "adapter.gguf", **write_prompt_golden(folder, [(PROMPT, answer)])}
    made = build_manifest(folder, name, kind="lora", engine="llama", roles=roles, base=reference(base))
    write_manifest(folder, made)
    return folder


def plan(folder: Path, broker: Broker, base: Path) -> dict[str, Any]:
    configured = tables(folder, "dev1", broker, None)
    configured["device"]["overrides"] = folder / "overrides.toml"
    configured["slots"] = {"tongue": {"seed": base, "probation_s": 0.5}}
    configured["pipelines"] = {"chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}
    return configured


def serves(name: str | None) -> Any:
    return lambda status: status["models"]["tongue"]["adapter"] == name


def answer(bus: Bus) -> str | None:
    return bus.reply(bus.ask("dev1", "chat", generation_prompt=PROMPT)).generated_response


@pytest.mark.timeout(240)
def test_the_file_appears_and_the_daemon_answers_with_the_adapter_until_it_goes(
    tmp_path: Path, broker: Broker, bus: Bus, base: Path, phi: dict[str, Path]
) -> None:
    overrides, terse = tmp_path / "overrides.toml", adapter(tmp_path / "terse", phi, base)
    make_release(tmp_path / "no-adapter")
    with Device(tmp_path, plan(tmp_path, broker, base)) as device:
        assert answer(bus) == PLAIN
        activate(overrides, "tongue", terse)
        device.wait(
            "the adapter", lambda s: serves("clerk-terse@1.0")(s) and s["models"]["tongue"]["update"] == "committed"
        )
        assert answer(bus) == ADAPTED

        # What is wrong with the file costs nothing: the adapter stays.
        bad = [
            "no toml",
            '[broker]\nhost = "evil.example"\n',
            f'[slots.tongue]\nadapter = "{tmp_path / "no-adapter"}"\n',
        ]
        for number, text in enumerate(bad, 1):
            overrides.write_text(text)
            refused = device.counted("configs_refused", number)["config"]["refused"]
            assert str(overrides) in refused or "name the release of a LoRA adapter" in refused
            assert answer(bus) == ADAPTED
        until("it is said", lambda: sum(event.kind == "config_refused" for event in bus.of(Event)) == len(bad))

        # A start with the file as it is wrong now serves what it has, and says why.
        assert device.stop() == 0
        overrides.write_text("no toml")
        device.start()
        device.wait("it says why", lambda s: "not TOML" in (s["config"]["refused"] or ""))
        activate_again(overrides, terse)
        device.wait("the adapter again", lambda s: serves("clerk-terse@1.0")(s) and not s["config"]["refused"])
        assert answer(bus) == ADAPTED

        # A restart keeps it; without the file the bare base answers, also when the file goes while nothing runs.
        assert device.stop() == 0
        device.start()
        device.wait("it is still there", serves("clerk-terse@1.0"))
        assert answer(bus) == ADAPTED
        overrides.unlink()
        device.wait("the bare base", serves(None))
        assert answer(bus) == PLAIN
        activate(overrides, "tongue", terse)
        device.wait(
            "and back", lambda s: serves("clerk-terse@1.0")(s) and s["models"]["tongue"]["update"] == "committed"
        )
        assert device.stop() == 0
        overrides.unlink()
        device.start()
        device.wait("taken off at the start", serves(None))
        assert answer(bus) == PLAIN


def activate_again(overrides: Path, terse: Path) -> None:
    """As a person does who mends the file."""
    overrides.unlink()
    activate(overrides, "tongue", terse)


@pytest.mark.timeout(180)
def test_an_adapter_that_does_not_answer_as_promised_never_serves(
    tmp_path: Path, broker: Broker, bus: Bus, base: Path, phi: dict[str, Path]
) -> None:
    liar = adapter(tmp_path / "liar", phi, base, "clerk-liar@1.0", answer="PASS nine")
    good = adapter(tmp_path / "terse", phi, base)
    with Device(tmp_path, plan(tmp_path, broker, base)) as device:
        activate(tmp_path / "overrides.toml", "tongue", liar)
        status = device.wait("it failed", lambda s: s["models"]["tongue"]["update"] == "failed")
        assert "PASS nine" in status["models"]["tongue"]["reason"]
        assert answer(bus) == PLAIN
        activate(tmp_path / "overrides.toml", "tongue", good)
        device.wait("a good one", serves("clerk-terse@1.0"))
        assert answer(bus) == ADAPTED


@pytest.mark.timeout(180)
def test_the_fleets_word_goes_before_the_file(
    tmp_path: Path, broker: Broker, bus: Bus, base: Path, phi: dict[str, Path]
) -> None:
    own = adapter(tmp_path / "own", phi, base, "clerk-own@1.0")
    fleets = adapter(tmp_path / "fleets", phi, base, "clerk-fleet@1.0")
    with file_server() as files:
        files.publish(fleets, reference(fleets))
        configured = plan(tmp_path, broker, base)
        configured["host"] = {"fetch_retry_s": 1.0, "url": files.url}
        activate(tmp_path / "overrides.toml", "tongue", own)
        with Device(tmp_path, configured) as device:
            device.wait("the file's", serves("clerk-own@1.0"))
            bus.desire("dev1", 1, {"tongue": reference(base)}, adapters={"tongue": reference(fleets)})
            device.wait(
                "the fleet's", lambda s: serves("clerk-fleet@1.0")(s) and s["models"]["tongue"]["update"] == "committed"
            )
            bus.desire("dev1", 2, {"tongue": reference(base)})
            device.wait("the file's again", serves("clerk-own@1.0"))
            assert answer(bus) == ADAPTED
