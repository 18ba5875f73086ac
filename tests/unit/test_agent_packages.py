"""Where a package that agents need is missing, it is said with the extra that brings it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.device import toml

WITHOUT = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jsonschema":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
"""


def without_jsonschema(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that cannot import the package."""
    command = [sys.executable, "-c", WITHOUT + code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_agents_without_jsonschema_name_the_extra() -> None:
    for module in ("edged.agents", "edged.agents.schemas", "edged.agents.browser"):
        done = without_jsonschema(
            f"try:\n    import {module}\nexcept ImportError as error:\n    print(error.name, error)\n"
        )
        assert done.stdout == (
            "jsonschema agents need the package jsonschema, which is not installed; install the extra: "
            "pip install edged[agents]\n"
        ), done.stderr


def test_a_device_whose_agents_lack_it_is_told_before_it_runs(tmp_path: Path) -> None:
    tables = {
        "device": {"id": "dev1", "state_dir": tmp_path / "state"},
        "slots": {"tongue": {"probation_s": 1.0}},
        "trust": {"unsigned": True},
        "agents": {"clerk": {"slot": "tongue"}},
    }
    config = tmp_path / "edged.toml"
    config.write_text(toml(tables))
    done = without_jsonschema("from edged.cli import main\nmain()\n", "check", "--config", str(config))
    assert done.returncode != 0
    assert "agents are configured, and a package is missing: jsonschema" in done.stdout + done.stderr
    assert "extra `agents`" in done.stdout + done.stderr
