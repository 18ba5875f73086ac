"""The configuration: what is wrong is named with key, value and fix; the environment wins; the example is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from edged import config
from edged.config import ConfigError, Settings, load
from edged.config_sources import DirectorySource, MqttSource
from edged.core.policy import Policy
from edged.core.probation import Criteria

EXAMPLE = Path(__file__).parents[2] / "docs" / "edged.example.toml"
MINIMAL = """
[device]
id = "dev1"
[slots.eye]
[pipelines.line]
slot = "eye"
source = { type = "directory", path = "/in" }
"""


def loaded(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "edged.toml"
    path.write_text(text)
    return load(path)


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, text)
    return str(raised.value).replace(str(tmp_path / "edged.toml"), "FILE")


def test_a_minimal_configuration_has_sensible_defaults(tmp_path: Path) -> None:
    settings = loaded(tmp_path, MINIMAL)
    assert settings.device.site == "default"
    assert (settings.broker.host, settings.broker.port) == ("127.0.0.1", 8883)
    line = settings.pipelines["line"]
    assert line.source == DirectorySource(path=Path("/in"))
    assert line.policy == Policy()
    assert line.escalate_to == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "FILE: device is missing: add it"),
        ("[device]", "FILE: device.id is missing: add it"),
        ("[device]\nid = 'a b'", "FILE: device.id = 'a b': String should match pattern"),
        ("[device]\nid = 'd'\nname = 'x'", "FILE: device.name is no known key: remove it or correct its spelling"),
        ("[device]\nid = 'd'\n[brokers]", "FILE: brokers is no known key: remove it or correct its spelling"),
        ("[device]\nid = 'd'\n[broker]\nport = 70000", "FILE: broker.port = 70000: Input should be less than or equal"),
        (
            "[device]\nid = 'd'\n[broker]\nhost = 'far'",
            "FILE: broker: host 'far' without `ca`: traffic off this machine",
        ),
        ("[device]\nid = 'd'\n[slots.eye]\nthreads = 0", "FILE: slots.eye.threads = 0: Input should be greater than"),
        (
            MINIMAL.replace('slot = "eye"', 'slot = "ear"'),
            "pipelines.line.slot='ear': no such slot; add [slots.ear] (known: eye)",
        ),
        (
            MINIMAL + "[responders.r]\ntier = 'big'\nslot = 'eye'\nescalate_to = ['plant', 'big']",
            "FILE: responders.r: escalate_to names its own tier 'big': name the next one",
        ),
        (
            MINIMAL + "[responders.r]\ntier = 'big'\nslot = 'eye'\npolicy = { risk = 1 }",
            "FILE: responders.r.policy: unknown key 'risk'",
        ),
        (
            MINIMAL + "[responders.r]\ntier = 'big'\nslot = 'no'",
            "responders.r.slot='no': no such slot; add [slots.no] (known: eye)",
        ),
        (
            MINIMAL + "[pipelines.line.policy]\nrisk = 0.1",
            "FILE: pipelines.line.policy: unknown key 'risk'; known: target_risk, audit_share, empty_share,",
        ),
        (MINIMAL + "[pipelines.line.policy]\nbytes_per_day = 0.5", "bytes_per_day=0.5: must be a whole number between"),
        (
            MINIMAL + "roi = [0.5, 0.0, 0.25, 1.0]",
            "FILE: pipelines.line.roi = [0.5, 0.0, 0.25, 1.0]: left, top, right, bottom are shares of the frame's sides: "
            "0 <= left < right <= 1 and 0 <= top < bottom <= 1, for example [0.25, 0.0, 0.75, 1.0]",
        ),
        (MINIMAL + "roi = [0, 0, 640, 480]", "line.roi = [0, 0, 640, 480]: left, top, right, bottom are shares"),
        (MINIMAL + "roi = [0.0, 0.0, nan, 1.0]", "pipelines.line.roi = [0.0, 0.0, nan, 1.0]: left, top, right"),
        (MINIMAL + "roi = [0.0, 0.5]", "line.roi = [0.0, 0.5]: must be four numbers: left, top, right, bottom"),
        (MINIMAL + "roi = 'left'", "pipelines.line.roi = 'left': must be four numbers"),
        (MINIMAL + "ordered = 2", "pipelines.line.ordered = 2: Input should be a valid boolean"),
        (MINIMAL + "[pipelines.line.policy]\ntarget_risk = 2", "target_risk=2: must be a number between 0 and 1"),
        (MINIMAL + "[pipelines.line.policy]\ntarget_risk = 'low'", "target_risk='low': must be a number between"),
        (MINIMAL + "[pipelines.line.policy]\nescalate = 'no'", "escalate='no': must be true or false"),
        (MINIMAL.replace("directory", "pigeon"), "'pigeon'"),
        (MINIMAL.replace(', path = "/in"', ""), "FILE: pipelines.line.source.path is missing: add it"),
        ("[device\n", "FILE: not TOML: "),
    ],
)
def test_what_is_wrong_is_named_with_its_key_value_and_fix(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("written", "tiers"), [("'line'", ("line",)), ("['line', 'plant']", ("line", "plant")), ("[]", ())]
)
def test_one_tier_or_several_in_order_may_be_asked(tmp_path: Path, written: str, tiers: tuple[str, ...]) -> None:
    text = MINIMAL.replace("[pipelines.line]", f"[pipelines.line]\nescalate_to = {written}")
    assert loaded(tmp_path, text).pipelines["line"].escalate_to == tiers


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    lines = complaint(tmp_path, "[device]\n[broker]\nport = 0\n[slots.eye]\nthread = 1").splitlines()
    assert len(lines) == 3


def test_a_missing_file_points_to_the_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file; docs/edged\.example\.toml"):
        load(tmp_path / "none.toml")


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_BROKER__HOST", "localhost")
    monkeypatch.setenv("EDGED_BROKER__PORT", "1999")
    monkeypatch.setenv("EDGED_SLOTS__EYE__THREADS", "3")
    monkeypatch.setenv("EDGED_PIPELINES__LINE__POLICY__TARGET_RISK", "0.25")
    monkeypatch.setenv("EDGED_CONFIG", "/somewhere.toml")  # the command line's own, and no key
    settings = loaded(tmp_path, MINIMAL + "[broker]\nhost = '127.0.0.1'\nport = 1\nkeepalive_s = 7")
    assert (settings.broker.host, settings.broker.port, settings.broker.keepalive_s) == ("localhost", 1999, 7)
    assert settings.slots["eye"].threads == 3
    assert settings.pipelines["line"].policy.target_risk == 0.25


def test_an_environment_variable_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_BROKER__PORT", "many")
    assert "broker.port = 'many'" in complaint(tmp_path, MINIMAL)


def test_the_example_loads() -> None:
    settings = load(EXAMPLE)
    assert settings.pipelines["line"].escalate_to == ("big",)
    assert isinstance(settings.pipelines["chat"].source, MqttSource)


def uncommented() -> dict[str, Any]:
    """The example with every commented key in force."""
    text = re.sub(r"(?m)^# (?=[a-z_]+ = |\[)", "", EXAMPLE.read_text())
    return tomllib.loads(text)


def test_every_key_is_in_the_example_with_its_default_and_a_word_about_it() -> None:
    tables = uncommented()
    settings = Settings(**tables)
    sections: list[tuple[str, BaseModel, dict[str, Any]]] = [
        (name, getattr(settings, name), tables[name]) for name in ("device", "broker", "host", "store", "delivery")
    ]
    sections += [
        ("slots.eye", settings.slots["eye"], tables["slots"]["eye"]),
        ("pipelines.line", settings.pipelines["line"], tables["pipelines"]["line"]),
        ("responders.big", settings.responders["big"], tables["responders"]["big"]),
        ("agents.inspector", settings.agents["inspector"], tables["agents"]["inspector"]),
        ("agents.inspector.limits", settings.agents["inspector"].limits, tables["agents"]["inspector"]["limits"]),
        ("peers.stock", settings.peers["stock"], tables["peers"]["stock"]),
    ]
    server = settings.slots["farm"].server
    assert server is not None
    sections.append(("slots.farm.server", server, tables["slots"]["farm"]["server"]))
    elsewhere = {"slots.eye": {"server"}, "slots.farm.server": {"api_key_env"}}  # they exclude other keys
    for name, section, written in sections:
        found = written.keys() | elsewhere.get(name, set())
        assert found == type(section).model_fields.keys(), f"[{name}] lacks a key, or has one too many"
    assert tables["pipelines"]["line"]["policy"].keys() == Policy.__dataclass_fields__.keys()
    assert tables["slots"]["eye"]["health"].keys() == Criteria.__dataclass_fields__.keys()
    assert settings.slots["eye"].health == Criteria()
    assert tables.keys() == Settings.model_fields.keys()

    # A commented key shows the default: putting all of them in force changes nothing.
    plain = load(EXAMPLE)
    for name in ("store", "delivery"):
        assert getattr(settings, name) == getattr(plain, name)
    assert settings.pipelines["line"] == plain.pipelines["line"]
    same = {"url", "group", "overrides", "extra", "bulk_certificate", "bulk_key", "metered_hours"}  # have no default
    for name in ("device", "broker", "host"):
        before, after = getattr(plain, name).model_dump(), getattr(settings, name).model_dump()
        assert {key: value for key, value in before.items() if key not in same} == {
            key: value for key, value in after.items() if key not in same
        }


def test_the_classes_of_the_configuration_refuse_unknown_keys() -> None:
    sections = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, BaseModel)]
    assert {c.__name__ for c in sections if c.model_config.get("extra") != "forbid"} <= {"BaseModel", "BaseSettings"}
