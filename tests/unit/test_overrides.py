"""The overrides file: what it may say, what is refused, and that the trainer writes what the device reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edged.config import BadOverrides, ConfigError, load
from edged.overrides import BYTES_MAX, read
from edged.reload import Refused, decide
from tests.support.models import make_release, write_manifest
from trainer.overrides import OverridesError, activate
from trainer.releases import build_manifest

CONFIG = """
[device]
id = "d1"
state_dir = "{folder}/state"
overrides = "{folder}/overrides.toml"
[slots.clerk]
threads = 2
[slots.eye]
adapter = "/from/the/configuration"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "edged.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def adapter(folder: Path, name: str = "terse@1.0") -> Path:
    folder.mkdir()
    (folder / "adapter.gguf").write_bytes(b"adapter")
    base = make_release(folder.with_name(folder.name + "-base"), "clerk@1.0")
    roles = {"adapter": "adapter.gguf"}
    write_manifest(folder, build_manifest(folder, name, kind="lora", engine="llama", roles=roles, base=base))
    return folder


def test_what_the_trainer_writes_is_laid_over_the_configuration(config: Path, tmp_path: Path) -> None:
    assert load(config).slots["clerk"].adapter is None
    overrides = tmp_path / "overrides.toml"
    activate(overrides, "clerk", tmp_path / "one")
    activate(overrides, "eye", tmp_path / "two")
    settings = load(config)
    assert {name: slot.adapter for name, slot in settings.slots.items()} == {
        "clerk": tmp_path / "one", "eye": tmp_path / "two",
    }  # fmt: skip
    assert settings.slots["clerk"].threads == 2
    activate(overrides, "clerk", tmp_path / "three")
    assert read(overrides) == {"clerk": tmp_path / "three", "eye": tmp_path / "two"}
    overrides.unlink()
    assert load(config).slots["eye"].adapter == Path("/from/the/configuration")


def test_the_environment_wins(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(tmp_path / "overrides.toml", "clerk", tmp_path / "one")
    monkeypatch.setenv("EDGED_SLOTS", '{"clerk": {"adapter": "/from/the/environment"}}')
    assert load(config).slots["clerk"].adapter == Path("/from/the/environment")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no toml", "not TOML"),
        ("\xff", "not TOML"),
        ('[slots.nose]\nadapter = "x"', "slots.nose: no such slot; the configuration has clerk, eye"),
        ('[slots.clerk]\nseed = "x"', "may be overridden"),
        ('[slots.clerk]\nadapter = "x"\nthreads = 9', "slots.clerk.threads: only slots.NAME.adapter"),
        ('[broker]\nhost = "evil.example"', "broker: only slots.NAME.adapter may be overridden"),
        ("[trust]\nunsigned = true", "trust: only slots.NAME.adapter may be overridden"),
        ("[slots.clerk]\nadapter = 3", "slots.clerk.adapter"),
        ("#" * (BYTES_MAX + 1), f"more than {BYTES_MAX} bytes"),
    ],
)
def test_it_may_name_adapters_and_nothing_else(config: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "overrides.toml").write_bytes(text.encode("latin-1"))
    if "seed" in text:
        said = "slots.clerk"
    with pytest.raises(BadOverrides) as refused:
        load(config)
    assert said in str(refused.value)
    assert str(tmp_path / "overrides.toml") in str(refused.value)
    assert isinstance(refused.value, ConfigError)
    assert load(config, overridden=False).slots["clerk"].adapter is None


def test_a_folder_that_holds_no_adapter_is_refused_whole(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text().replace('[slots.eye]\nadapter = "/from/the/configuration"\n', ""))
    old = load(config)
    overrides, good = tmp_path / "overrides.toml", adapter(tmp_path / "terse")
    activate(overrides, "clerk", good)
    change = decide(old, load(config))
    assert (change.keys, change.restart, change.slots.adjusted) == (("slots.clerk.adapter",), (), ("clerk",))
    activate(overrides, "clerk", tmp_path / "nowhere")
    with pytest.raises(Refused, match=r"slots\.clerk\.adapter: .*nowhere"):
        decide(old, load(config))
    activate(overrides, "clerk", tmp_path / "terse-base")
    with pytest.raises(Refused, match="of kind detect; name the release of a LoRA adapter"):
        decide(old, load(config))
    half = tmp_path / "half"
    shutil.copytree(good, half)
    (half / "adapter.gguf").write_bytes(b"ada")
    activate(overrides, "clerk", half)
    with pytest.raises(Refused, match="not there with its 7 bytes"):
        decide(old, load(config))


@pytest.mark.parametrize("text", ["no toml", '[broker]\nhost = "x"', "[slots.clerk]\nadapter = 'x'\nmore = 1"])
def test_the_trainer_does_not_write_over_what_it_does_not_know(tmp_path: Path, text: str) -> None:
    path = tmp_path / "overrides.toml"
    path.write_text(text)
    with pytest.raises(OverridesError):
        activate(path, "clerk", tmp_path)
    assert path.read_text() == text
