"""What every layer of tests shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.databases import each_database, postgres
from tests.support.models import make_release

__all__ = ["each_database", "postgres"]

ROOT = Path(__file__).parents[1]

# The same examples in every run, however slow the machine is. HYPOTHESIS_PROFILE=default looks for others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
if os.environ.get("HYPOTHESIS_PROFILE") != "default":
    settings.load_profile("same")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release `toy@1.0` that finds a cat in every picture. Not to be changed."""
    folder = tmp_path_factory.mktemp("releases") / "toy-1.0"
    make_release(folder)
    return folder


@pytest.fixture(scope="session")
def toy2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its successor `toy@1.1`, which finds a dog. Not to be changed."""
    folder = tmp_path_factory.mktemp("releases") / "toy-1.1"
    make_release(folder, "toy@1.1", 1)
    return folder


@pytest.fixture(scope="session")
def phi() -> dict[str, Path]:
    """The demo's Phi: paths `base` (folder), `model_gguf` and `adapter_gguf`; kept below build/, so that only the first run
    trains."""
    command = [sys.executable, "-m", "bench.demo.phi", str(ROOT / "build" / "test-phi"), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Path(path) for name, path in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment of whoever runs the tests configures a device."""
    for name in [name for name in os.environ if name.startswith("EDGED_")]:
        monkeypatch.delenv(name)
