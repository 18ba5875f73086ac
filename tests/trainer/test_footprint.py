"""What a release takes under a profile: measured by the device's own proof, in a process that may die of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.models import make_release
from tests.support.planted import make_crashing, without_golden_set
from trainer.core.targets import MIB
from trainer.footprint import Profile, measure, measure_all, read_profile

OURS = """
name = "ours"
[slot]
threads = 1
providers = ["cpu"]
prove_s_max = 40.0
[slot.vision]
latency_ms_max = 25.0
extra = { spin = false, arena = false }
[carries]
machine_mib = 512
precision = "int8"
image_size = 320
detect = { model = "yolo11n", file_mib = 4, memory_mib = 160 }
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    path = tmp_path_factory.mktemp("profiles") / "ours.toml"
    path.write_text(OURS)
    return read_profile(str(path), "detect")


def test_a_profile_is_read_as_the_device_reads_it(ours: Profile) -> None:
    target = ours.target
    assert (target.file_mib_max, target.memory_mib_max, target.latency_ms_max, target.problem) == (4, 160, 25, "")
    assert ours.options == {"threads": 1, "providers": ["cpu"], "extra": {"spin": False, "arena": False}}
    assert ours.prove_s_max == 40


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("raspberry-pi-4", "llm", "it makes no claim for releases of kind llm"),
        ("toaster", "detect", "no profile 'toaster': use one of generic-arm64"),
    ],
)
def test_a_profile_that_claims_nothing_is_a_problem(name: str, kind: str, problem: str) -> None:
    profile = read_profile(name, kind)  # type: ignore[arg-type]
    assert profile.target.problem.startswith(problem)
    assert measure(Path("/nowhere"), profile).error == profile.target.problem


def test_an_adapter_is_held_against_the_claim_for_language_models() -> None:
    target = read_profile("raspberry-pi-5", "lora").target
    assert (target.file_mib_max, target.memory_mib_max) == (1720, 3400)


@pytest.mark.alone
def test_a_release_is_measured_with_its_libraries(ours: Profile, tmp_path: Path) -> None:
    make_release(tmp_path / "a", "toy@1.0")
    (found,) = measure_all(tmp_path / "a", [ours])
    assert not found.error
    assert found.process_bytes is not None
    assert 40 * MIB < found.process_bytes < 300 * MIB, "an engine's libraries alone take more than 40 MiB"
    assert found.fastest_ms is not None
    assert found.fastest_ms > 0


def test_what_goes_wrong_in_the_process_is_the_reason(ours: Profile, tmp_path: Path) -> None:
    make_crashing(tmp_path / "crash", "toy@1.1")
    make_release(tmp_path / "liar", "toy@1.2", golden_label=1)
    without_golden_set(tmp_path / "bare", "toy@1.3")
    make_release(tmp_path / "slow", "toy@1.4")
    errors = {name: measure(tmp_path / name, ours) for name in ("crash", "liar", "bare", "gone")}
    errors["slow"] = measure(tmp_path / "slow", replace(ours, prove_s_max=0.01))
    assert all(
        (each.profile, each.process_bytes, each.fastest_ms) == (ours.target.profile, None, None)
        for each in errors.values()
    )
    assert "the proving process ended with status -8" in errors["crash"].error
    assert "toy@1.2: golden input 0: expected class 1" in errors["liar"].error
    assert "no golden set" in errors["bare"].error
    assert "gone/release.json" in errors["gone"].error
    assert errors["slow"].error == "it did not prove itself within 0 s"
