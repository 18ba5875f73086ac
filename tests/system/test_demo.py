"""The demo at a reduced size: the loop makes the fleet better, and without its parts it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(1800)]  # the first one trains base and teacher

TOP = [
    "escalation_rate_before", "escalation_rate_after", "accuracy_before", "accuracy_after", "accuracy_teacher",
    "accepted_error_before", "accepted_error_after", "frames_in", "frames_out", "frames_lost", "labels_used", "canary",
    "devices",
]  # fmt: skip


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.demo", "--reduced", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1700)


def report_of(out: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((out / "report.json").read_text())
    return value


def no_process_left(out: Path) -> bool:
    found = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True, check=False)
    return found.stdout.strip() == ""


def test_the_loop_makes_the_fleet_better(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(tmp_path / "demo")
    assert [key for key in TOP if report.get(key) is None] == []
    assert report["frames_in"] == report["frames_out"]
    assert report["frames_lost"] == 0
    devices = report["devices"]
    assert isinstance(devices, dict)
    assert {name: device["versions"] for name, device in devices.items()} == {
        name: ["digits@1.0", "digits@1.1"] for name in ("cam1", "cam2", "cam3")
    }
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert no_process_left(tmp_path / "demo")


@pytest.mark.parametrize("part", ["train", "labels"])
def test_without_a_part_of_the_loop_it_fails_and_says_so(tmp_path: Path, part: str) -> None:
    done = demo(tmp_path / "demo", "--ablate", part)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {check["name"]: check["text"] for check in report_of(tmp_path / "demo")["checks"] if not check["passed"]}  # type: ignore[index, attr-defined]
    assert {"released", "accuracy", "escalations"} <= failed.keys()
    assert "refused" in failed["released"]
    assert no_process_left(tmp_path / "demo")
