"""Light where it must be light: help costs no heavy import, and the device's environment holds nothing of the trainer's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build"
DEVICE, TRAINER = BUILD / "venv-device" / "bin" / "python", BUILD / "venv-trainer" / "bin" / "python"
HEAVY = {
    "torch", "onnxruntime", "cv2", "llama_cpp", "sqlite_utils", "paho", "ultralytics", "transformers", "numpy", "pandas",
    "httpx", "watchdog", "onnx", "peft", "sklearn", "matplotlib", "uvicorn", "sqlalchemy", "mcp", "apprise", "psycopg",
}  # fmt: skip  # not pydantic: typer itself loads it where it is installed


def loaded_by(python: Path, statement: str) -> set[str]:
    """The top-level modules in memory after a statement."""
    code = f"""
import json, sys
try:
    {statement}
except SystemExit:
    pass
print()
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["samples", "--help"]])
def test_help_of_the_device_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = loaded_by(DEVICE, f"from edged.cli import app; app({arguments!r})")
    assert "edged" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["mcp", "--help"], ["fleet", "--help"]])
def test_help_of_the_trainer_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = loaded_by(TRAINER, f"from trainer.cli import app; app({arguments!r})")
    assert "trainer" in modules
    assert not HEAVY & modules


def test_a_running_device_does_not_load_what_only_some_devices_need() -> None:
    modules = loaded_by(DEVICE, "import edged.daemon, edged.engines.onnx_detect")
    assert {"onnxruntime", "cv2", "paho"} <= modules
    assert not {"llama_cpp", "httpx", "torch", "pandas", "typer"} & modules


def test_the_contract_is_pure() -> None:
    modules = loaded_by(DEVICE, "import edged.wire.messages, edged.core.policy, edged.core.update")
    assert not {"paho", "sqlite3", "onnxruntime", "cv2", "httpx", "sqlite_utils"} & modules


def test_the_devices_environment_holds_nothing_of_the_trainers() -> None:
    names = ["torch", "transformers", "ultralytics", "peft", "onnx", "pandas", "sqlalchemy"]
    code = f"from importlib.util import find_spec; print([n for n in {names} if find_spec(n)])"
    found = subprocess.run([DEVICE, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert found.strip() == "[]"
