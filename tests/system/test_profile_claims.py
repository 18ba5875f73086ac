"""Every profile really runs what it claims to carry: a release of each claimed kind, precision and size, made on the spot,
is proven by the device's own environment with exactly the options that the profile gives a slot, and its memory is measured.

What this shows of a board: that the options are good, that the models load and answer with them, and what they take on
this machine. It shows nothing of the board's speed, its GPU or its heat. A language model of the claimed size cannot be
made here: Phis of two small shapes show that the formula for the memory holds, and the claim is held against the formula.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edged import profiles
from edged.check_profile import beyond
from edged.config import MIB, Slot, load
from edged.core.detect import Facts
from edged.engines.base import EngineOptions
from edged.profiles import Claim
from edged.releases import read_manifest
from tests.support.boards import BOARDS, Board
from tests.support.claimed import SHAPES, SMALL, language_release, vision_release

pytestmark = pytest.mark.timeout(900)  # the first one of each kind makes its release

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "firmware_profiles"
EDGED = ROOT / "build" / "venv-device" / "bin" / "edged"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))
PROVE_S = 120.0
# A parent of its own: the kernel keeps the highest memory of all children of a process.
MEASURE = """
import json, resource, sys
from pathlib import Path
from edged.engines.base import EngineOptions
from edged.prove import prove
options = json.loads(sys.argv[2])
options["providers"] = tuple(options["providers"])
proof = prove(Path(sys.argv[1]), EngineOptions(**options), float(sys.argv[3]))
print(json.dumps({"golden": proof.golden, "mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}))
"""

_proven: dict[str, dict[str, Any]] = {}


def proven(folder: Path, options: EngineOptions) -> dict[str, Any]:
    """What proving a release took: golden inputs, and the highest memory of the proving process in MiB."""
    python = EDGED.with_name("python")
    told = json.dumps(
        {"threads": options.threads, "providers": options.providers, "extra": options.extra}, sort_keys=True
    )
    if folder.name + told not in _proven:
        done = subprocess.run(
            [str(python), "-c", MEASURE, str(folder), told, str(PROVE_S)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        _proven[folder.name + told] = json.loads(done.stdout)
    return _proven[folder.name + told]


@pytest.fixture
def slots(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Slot]:
    """The slots of a device with this profile, one for vision and one for language, on this machine."""
    monkeypatch.setattr(profiles, "folders", lambda: (SHIPPED,))
    path = tmp_path / "edged.toml"
    path.write_text(
        f'[device]\nid = "d"\nprofile = "{request.param}"\n[slots.eye]\n[slots.tongue]\n'
        '[pipelines.line]\nslot = "eye"\ntask = "detect"\nsource = { type = "directory", path = "/in" }\n'
        '[pipelines.chat]\nslot = "tongue"\ntask = "generate"\nsource = { type = "mqtt" }\n'
    )
    return load(path).slots


def claims(slot_kinds: tuple[str, ...]) -> list[Any]:
    found = []
    for name in NAMES:
        carries = profiles.read(SHIPPED / f"{name}.toml").carries
        assert carries is not None
        for kind in slot_kinds:
            claim = carries.claim(kind)
            if claim is not None:
                found.append(pytest.param(name, kind, claim, id=f"{name}-{kind}"))
    return found


def options_of(slot: Slot) -> EngineOptions:
    return EngineOptions(slot.threads, tuple(slot.providers), slot.extra)


@pytest.mark.parametrize(("slots", "kind", "claim"), claims(("detect", "segment", "classify")), indirect=["slots"])
def test_a_vision_release_as_claimed_is_proven_within_its_memory(
    slots: dict[str, Slot], kind: str, claim: Claim, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["slots"]
    assert claim.precision is not None and claim.image_size is not None
    folder = vision_release(kind, claim.model, claim.precision, claim.image_size)
    slot = slots["eye"]
    assert slot.providers == profiles.find(name).slot.providers, "asked for in the profile's order, here or not"
    measured = proven(folder, options_of(slot))
    assert measured["golden"] > 0
    assert measured["mib"] <= claim.memory_mib, f"{measured['mib']:.0f} MiB measured"
    manifest = read_manifest(folder)
    machine = Facts("", 4, claim.machine_mib or 0)
    assert not list(beyond(claim, slot.model_copy(update={"seed": folder}), manifest, machine)), "`edged check` agrees"


@pytest.mark.parametrize("size", list(SMALL))
@pytest.mark.parametrize(("slots", "kind", "claim"), claims(("llm",)), indirect=["slots"])
def test_the_memory_of_a_language_model_is_what_the_formula_says(
    slots: dict[str, Slot], kind: str, claim: Claim, size: str
) -> None:
    assert claim.context is not None
    folder = language_release(size)
    slot = slots["tongue"]
    assert (slot.extra["context_max"], slot.isolation) == (claim.context, "process")
    measured = proven(folder, options_of(slot))
    said = SMALL[size].process_mib((folder / "model.gguf").stat().st_size / MIB, claim.context)
    assert measured["mib"] <= said <= 1.5 * measured["mib"], f"{measured['mib']:.0f} MiB measured, {said:.0f} expected"
    assert SHAPES[claim.model].process_mib(claim.file_mib, claim.context) <= claim.memory_mib


def test_what_is_larger_than_a_claim_is_named() -> None:
    carries = profiles.read(SHIPPED / "raspberry-pi-4.toml").carries
    assert carries is not None and carries.llm is None
    claim = carries.claim("detect")
    assert claim is not None
    large = vision_release("detect", "yolo11n", "fp32", 640)
    reasons = list(beyond(claim, Slot(seed=large), read_manifest(large), Facts("arm64", 4, 900)))
    assert [reason.split(",")[0] for reason in reasons] == [
        "the machine has 900 MiB", "its model has 10.1 MiB", "it takes pictures of 640 pixels", "it is not int8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("board", "expected"), [row[1:] for row in BOARDS if row[0] in ("pi 5 of 8 GiB", "RISC-V", "pi 4 of 2 GiB")]
)
def test_the_installed_command_detects_from_a_file_tree(tmp_path: Path, board: Board, expected: str | None) -> None:
    tree = board.write(tmp_path / "tree")
    command = [str(EDGED), "profile", "detect", "--json", "--root", str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if expected is None else 0), done.stderr
    assert json.loads(done.stdout)["profile"] == expected


def test_auto_in_a_configuration_is_what_the_command_detects(tmp_path: Path) -> None:
    config = tmp_path / "edged.toml"
    config.write_text(f'[device]\nid = "d"\nprofile = "auto"\nstate_dir = "{tmp_path}/state"\n[slots.eye]\n')
    detected = subprocess.run([str(EDGED), "profile", "detect", "--json"], capture_output=True, text=True, check=True)
    code = f"from edged.config import load; print(load(__import__('pathlib').Path({str(config)!r})).device.profile)"
    found = subprocess.run(
        [str(EDGED.with_name("python")), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == json.loads(detected.stdout)["profile"]
