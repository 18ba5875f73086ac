"""Profiles: what lies beneath a configuration, and what `edged check` says about it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edged import profile_facts, profiles
from edged.check_profile import DAEMON_MIB, findings
from edged.cli import app
from edged.config import ConfigError, Settings, load
from edged.core import lay
from edged.core.detect import Facts
from edged.core.providers import PROVIDERS, long_name
from edged.engines.llama import _LlamaKeys
from edged.engines.ort import _Keys, choose_providers
from edged.profiles import Profile, ProfileError
from tests.support.boards import Board, gpu
from tests.support.models import make_release

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "firmware_profiles"
NAMES = [
    "generic-arm64",
    "generic-x86-64",
    "gpu-host",
    "jetson-orin-nano",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "x86-gateway",
]
DOCS = (ROOT / "docs" / "profiles.md").read_text()
CONFIG = """
[device]
id = "dev1"
profile = "PROFILE"
[slots.eye]
[slots.tongue]
[pipelines.line]
slot = "eye"
source = { type = "directory", path = "/in" }
[pipelines.chat]
slot = "tongue"
task = "generate"
source = { type = "mqtt" }
"""
PI = Facts("arm64", 4, 8062, "Raspberry Pi 5 Model B Rev 1.0")
_facts = profile_facts.facts


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiles of this checkout, whatever is installed on the machine, which is a Raspberry Pi 5."""
    monkeypatch.setattr(profiles, "folders", lambda: (SHIPPED,))
    monkeypatch.setattr(profile_facts, "facts", lambda *_: PI)


def loaded(tmp_path: Path, text: str = CONFIG, profile: str = "raspberry-pi-5") -> Settings:
    path = tmp_path / "edged.toml"
    path.write_text(text.replace("PROFILE", profile))
    return load(path)


@pytest.mark.parametrize(
    ("cores", "slots", "fixed", "most", "expected"),
    [
        (4, "a", {}, None, {"a": 4}),
        (4, "a", {}, 3, {"a": 3}),
        (2, "a", {}, 3, {"a": 2}),
        (4, "ab", {}, None, {"a": 2, "b": 2}),
        (4, "ab", {}, 3, {"a": 2, "b": 2}),
        (5, "abc", {}, None, {"a": 2, "b": 2, "c": 1}),
        (4, "abc", {"b": 3}, None, {"a": 1, "c": 1}),
        (8, "abc", {"b": 2}, None, {"a": 3, "c": 3}),
        (1, "ab", {}, None, {"a": 1, "b": 1}),
        (0, "a", {}, None, {"a": 1}),
        (4, "a", {"a": 9}, None, {}),
    ],
)
def test_slots_share_the_cores(
    cores: int, slots: str, fixed: dict[str, int], most: int | None, expected: dict[str, int]
) -> None:
    assert lay.share_cores(cores, slots, fixed, most) == expected


@pytest.mark.parametrize(
    ("wanted", "machine", "expected"),
    [
        (1000, 8000, 1000),
        (1000, 1000, 750),
        ("auto", 1000, 750),
        ("auto", 0, None),
        (1000, 0, 1000),
        (None, 8000, None),
    ],
)
def test_the_memory_limit_is_never_more_than_the_machine_can_spare(
    wanted: int | str | None, machine: int, expected: int | None
) -> None:
    assert lay.memory_limit(wanted, machine) == expected


@pytest.mark.parametrize(
    ("pipeline", "seed", "expected"),
    [
        ({"source": {"type": "directory"}}, None, "vision"),
        ({"source": {"type": "mqtt"}, "task": "generate"}, None, "language"),
        ({"source": {"type": "mqtt"}, "task": "classify"}, None, "vision"),
        ({"source": {"type": "mqtt"}}, None, None),
        ({"source": {"type": "mqtt"}}, "llm", "language"),
        ({"source": {"type": "mqtt"}, "task": "generate"}, "detect", "vision"),
        ({"source": 3}, None, None),
    ],
)
def test_the_kind_of_a_slot_is_never_guessed(pipeline: dict[str, Any], seed: str | None, expected: str | None) -> None:
    tables = {"pipelines": {"p": {"slot": "s", **pipeline}, "other": {"slot": "t", "source": {"type": "camera"}}}}
    assert lay.slot_kind("s", tables, seed) == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_whole(tmp_path: Path, name: str) -> None:
    assert sorted(path.stem for path in SHIPPED.iterdir()) == NAMES
    text = (SHIPPED / f"{name}.toml").read_text()
    tables = tomllib.loads(text)
    assert {"name", "description", "detect", "device", "slot", "limits", "host", "carries"} == tables.keys()
    assert {"providers", "threads", "swap", "prove_s_max", "vision", "language"} <= tables["slot"].keys()
    assert {"memory_mib", "temperature_soft_c", "temperature_hard_c", "cpu_share"} == tables["limits"].keys()
    profile = profiles.find(name)
    assert profile.slot.language.isolation == "process"
    _Keys.parse(profile.slot.vision.extra)
    _LlamaKeys.parse(profile.slot.language.extra)
    everything = [provider for provider, _ in PROVIDERS.values()]
    assert choose_providers(profile.slot.providers, everything) == [long_name(each) for each in profile.slot.providers]
    assert f"`{name}`" in DOCS

    settings = loaded(tmp_path, profile=name)
    assert settings.device.profile == name
    assert settings.profile == profile
    assert settings.device.tier == profile.device.tier
    assert settings.host.carrier == profile.host.carrier
    assert settings.slots["eye"].extra == profile.slot.vision.extra
    assert settings.slots["tongue"].extra == profile.slot.language.extra
    assert (settings.slots["eye"].isolation, settings.slots["tongue"].isolation) == (None, "process")
    assert settings.slots["eye"].threads == settings.slots["tongue"].threads == 2, "four cores for two slots"
    assert settings.limits.temperature_soft_c == profile.limits.temperature_soft_c


@pytest.mark.parametrize("name", NAMES)
def test_what_a_profile_carries_fits_its_memory_limit(name: str) -> None:
    profile = profiles.find(name)
    carries = profile.carries
    assert carries is not None
    rule = profile.detect
    assert rule.memory_mib_min is None or carries.machine_mib <= rule.memory_mib_min, (
        "a machine that gets it can carry it"
    )
    claims = {kind: claim for kind in profiles.KINDS if (claim := carries.claim(kind)) is not None}
    vision = max(claim.memory_mib for kind, claim in claims.items() if kind != "llm")
    for kind, claim in claims.items():
        defaults = profile.slot.language if kind == "llm" else profile.slot.vision
        times = 2 if (defaults.swap or profile.slot.swap) == "beside" else 1
        eyes = 2 if (profile.slot.vision.swap or profile.slot.swap) == "beside" else 1
        needed = DAEMON_MIB + vision * eyes + (claim.memory_mib * times if kind == "llm" else 0)
        limit = lay.memory_limit(profile.limits.memory_mib, claim.machine_mib or 0)
        assert limit is not None
        assert needed <= limit, f"{kind} beside vision needs {needed} MiB of {limit}"
        if kind == "llm":
            assert profile.slot.language.extra["context_max"] == claim.context
        assert re.search(rf"{re.escape(claim.model)}\b", DOCS), "the documents name every model that is claimed"


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_of_the_documents_are_what_the_files_say(name: str) -> None:
    profile = profiles.find(name)
    slot, limits, carries = profile.slot, profile.limits, profile.carries
    assert carries is not None
    swaps = ", ".join(kind.swap or slot.swap for kind in (slot.vision, slot.language))
    numbers = f"{limits.temperature_soft_c:g}, {limits.temperature_hard_c:g} | {limits.cpu_share:g}"
    first = (profile.device.tier, ", ".join(slot.providers), str(slot.threads), swaps, str(limits.memory_mib), numbers)
    claimed = []
    for kind in profiles.KINDS:
        claim = carries.claim(kind)
        if claim is None:
            claimed.append("no")
            continue
        more = f", from {claim.machine_mib}" if kind == "llm" else ""
        size = f"{claim.context or claim.image_size}, {claim.file_mib:g}, {claim.memory_mib}"
        claimed.append(f"{claim.model} {claim.precision}: {size}{more}")
    rows = [row for row in DOCS.splitlines() if row.startswith(f"| `{name}` |")]
    assert len(rows) == 2
    assert rows[0].endswith(f" | {' | '.join(first)} |")
    assert rows[1] == f"| `{name}` | {carries.machine_mib} | {' | '.join(claimed)} |"


def test_the_example_of_the_documents_is_a_profile(tmp_path: Path) -> None:
    example = DOCS.split('    name = "ours"')[1].split("\nOnly `name`")[0]
    (tmp_path / "ours.toml").write_text(re.sub(r"(?m)^    ", "", '    name = "ours"' + example))
    ours = profiles.read(tmp_path / "ours.toml")
    for table in (ours, ours.detect, ours.slot, ours.limits, ours.host, ours.carries):
        assert table is not None
        optional = {"cores_max", "memory_mib_max", "segment", "classify"}
        assert type(table).model_fields.keys() - table.model_fields_set <= optional, "every key has a word"


def test_the_configuration_wins_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIG.replace("[slots.eye]", "[slots.eye]\nprobation_s = 5.0\nextra = { spin = true }\nthreads = 1")
    text += "[limits]\ntemperature_soft_c = 60.0\n[slots.third]\nprove_s_max = 7.0\n"
    monkeypatch.setenv("EDGED_SLOTS__TONGUE__SWAP", "beside")
    monkeypatch.setenv("EDGED_SLOTS__FOURTH__PROBATION_S", "9")
    monkeypatch.setenv("EDGED_LIMITS__CPU_SHARE", "0.5")
    settings = loaded(tmp_path, text)
    eye, tongue = settings.slots["eye"], settings.slots["tongue"]
    assert (eye.threads, eye.probation_s, eye.prove_s_max) == (1, 5.0, 120.0)
    assert eye.extra == {"spin": True, "arena": True, "graph": "all"}
    assert tongue.swap == "beside"
    assert tongue.extra == {"context_max": 1024}
    assert (settings.slots["third"].prove_s_max, settings.slots["third"].extra) == (7.0, {})
    assert settings.slots["fourth"].prove_s_max == 120.0, "a slot that only the environment names"
    limits = settings.limits
    assert (limits.temperature_soft_c, limits.temperature_hard_c, limits.cpu_share) == (60.0, 83.0, 0.5)
    assert limits.memory_mib == 8062 * 3 // 4
    assert [slot.threads for slot in settings.slots.values()] == [1, 1, 1, 1], "three cores are left for three slots"


def test_the_profile_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_DEVICE__PROFILE", "raspberry-pi-4")
    settings = loaded(tmp_path)
    assert settings.device.profile == "raspberry-pi-4"
    assert settings.slots["eye"].prove_s_max == 180.0


def test_auto_is_what_detect_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(tmp_path, profile="auto").device.profile == "raspberry-pi-5"
    monkeypatch.setattr(profile_facts, "facts", lambda *_: Facts("riscv64", 4, 8000, "VisionFive 2"))
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, profile="auto")
    said = str(raised.value)
    assert "device.profile: no profile fits this machine (riscv64, 4 cores, 8000 MiB, VisionFive 2)" in said
    assert "architecture 'riscv64'; it is for" in said
    assert "'generic', the built-in defaults" in said


def test_without_a_profile_nothing_lies_beneath(tmp_path: Path) -> None:
    settings = loaded(tmp_path, CONFIG.replace('profile = "PROFILE"\n', ""))
    assert settings.profile is None
    assert settings.device.profile == "generic"
    assert settings.slots["eye"].threads == 1
    assert settings.limits.memory_mib is None


def test_threads_may_be_auto_without_a_profile(tmp_path: Path) -> None:
    text = CONFIG.replace("[slots.eye]", '[slots.eye]\nthreads = "auto"')
    settings = loaded(tmp_path, text, "generic")
    assert (settings.slots["eye"].threads, settings.slots["tongue"].threads) == (3, 1)


def test_the_kind_of_a_seed_decides_what_a_slot_gets(tmp_path: Path) -> None:
    make_release(tmp_path / "seed")
    text = f'[device]\nid = "d"\nprofile = "raspberry-pi-5"\n[slots.eye]\nseed = "{tmp_path}/seed"\n'
    assert loaded(tmp_path, text).slots["eye"].extra == {"spin": False, "arena": True, "graph": "all"}


OWN = 'name = "own"\n[slot]\nthreads = 2\n[limits]\nmemory_mib = 900\n'


def test_an_own_profile_is_used_by_its_path_and_announced_by_its_name(tmp_path: Path) -> None:
    own = tmp_path / "file.toml"
    own.write_text(OWN)
    settings = loaded(tmp_path, profile=str(own))
    assert settings.device.profile == "own"
    assert settings.slots["eye"].threads == 2
    assert settings.limits.memory_mib == 900


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = 'x'\n[slot]\nthreads = 0", "slot.threads"),
        ("name = 'x'\n[slot]\nprovider = ['cpu']", "slot.provider"),
        ("name = 'x'\n[slot]\nproviders = ['npu']", "slot.providers.0 = 'npu': execution provider 'npu' is unknown"),
        ("name = 'x'\n[slot.vision]\nisolation = 'process'", "only language models run in a process of their own"),
        (
            "name = 'x'\n[limits]\ntemperature_soft_c = 90.0\ntemperature_hard_c = 80.0",
            "temperature_soft_c = 90.0 must be below",
        ),
        ("name = 'x'\n[host]\ncarrier = 'pigeon'", "host.carrier = 'pigeon'"),
        ("name = 'auto'", "name = 'auto' means something else already"),
        ("", "name: Field required"),
        ("[slot", "not TOML"),
        ("name = 'x'\n[carries]\nmachine_mib = 9\nprecision = 'int4'\nimage_size = 320", "carries.precision = 'int4'"),
    ],
)
def test_a_profile_that_cannot_be_used_is_named_with_key_and_value(tmp_path: Path, text: str, said: str) -> None:
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, profile=str(own))
    assert f"device.profile: profile {own}: " in str(raised.value)
    assert said in str(raised.value)


def test_an_unknown_profile_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile 'pi5': use one of generic-arm64, .*, 'auto' or 'generic'"):
        loaded(tmp_path, profile="pi5")
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        loaded(tmp_path, profile=str(tmp_path / "none.toml"))


def test_the_first_folder_that_has_a_profile_has_it(tmp_path: Path) -> None:
    (tmp_path / "raspberry-pi-4.toml").write_text('name = "raspberry-pi-4"\ndescription = "ours"')
    where = (tmp_path / "none", tmp_path, SHIPPED)
    assert profiles.find("raspberry-pi-4", where).description == "ours"
    assert list(profiles.paths(where)) == NAMES
    (tmp_path / "renamed.toml").write_text(OWN)
    with pytest.raises(ProfileError, match=r"name = 'own': a profile is named like its file, 'renamed'"):
        profiles.find("renamed", where)


def told(settings: Settings, facts: Facts = PI) -> dict[str, list[tuple[str, str]]]:
    out: dict[str, list[tuple[str, str]]] = {}
    for finding in findings(settings, facts):
        assert finding.level == "ok" or finding.fix
        out.setdefault(finding.name, []).append((finding.level, finding.text))
    return out


def test_check_says_whether_the_machine_is_the_profiles(tmp_path: Path) -> None:
    settings = loaded(tmp_path)
    assert told(settings)["profile"][0][0] == "ok"
    pi4 = Facts("arm64", 4, 3793, "Raspberry Pi 4 Model B")
    assert told(settings, pi4)["profile"] == [
        ("warning", "raspberry-pi-5 is for another machine: board 'Raspberry Pi 4 Model B'; it is for 'Raspberry Pi 5' or "
                    "'Compute Module 5'")
    ]  # fmt: skip
    assert [level for level, _ in told(settings, Facts("x86-64", 4, 900))["profile"]] == ["error", "warning", "warning"]
    plain = loaded(tmp_path, profile="generic")
    assert told(plain)["profile"][0][0] == "ok"


def test_check_says_when_slots_have_more_threads_than_cores(tmp_path: Path) -> None:
    settings = loaded(tmp_path, CONFIG.replace("[slots.eye]", "[slots.eye]\nthreads = 4"))
    assert told(settings)["threads"] == [("warning", "the slots have 5 threads together, and there are 4 cores")]
    assert "threads" not in told(loaded(tmp_path))


def test_check_holds_the_seeds_against_what_the_profile_carries(tmp_path: Path) -> None:
    make_release(tmp_path / "seed")  # a float network of 64 pixels
    settings = loaded(tmp_path, CONFIG.replace("[slots.eye]", f'[slots.eye]\nseed = "{tmp_path}/seed"'))
    said = told(settings)
    assert said["slots.eye"] == [("warning", "raspberry-pi-5 makes no claim for toy@1.0: it is not int8")]
    assert said["limits.memory_mib"][0][0] == "ok"
    tight = Settings(**settings.model_dump() | {"limits": {"memory_mib": 300}}).under(settings.profile)
    assert told(tight)["limits.memory_mib"][0][0] == "warning"
    gpu_host = loaded(tmp_path, CONFIG.replace("[slots.eye]", f'[slots.eye]\nseed = "{tmp_path}/seed"'), "gpu-host")
    here = _facts(Board("x86_64", cores=8, memory_mib=64000, files=gpu("NVIDIA L4")).write(tmp_path / "tree"))
    assert told(gpu_host, here)["slots.eye"] == [("ok", "gpu-host claims to carry toy@1.0")]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_the_commands_print_for_people_and_for_scripts() -> None:
    assert [row["name"] for row in json.loads(run("list", "--json").stdout)] == NAMES
    assert "raspberry-pi-5" in run("list").stdout
    assert json.loads(run("show", "raspberry-pi-5", "--json").stdout)["slot"]["probation_s"] == 60.0
    assert Profile(**tomllib.loads(run("show", "raspberry-pi-5").stdout)).name == "raspberry-pi-5"
    done = run("show", "pi5")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "no profile 'pi5'" in done.stderr
