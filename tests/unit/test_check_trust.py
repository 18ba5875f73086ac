"""What `edged check` says about whose releases a device accepts."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from edged.check_trust import trust
from edged.config import Settings
from edged.findings import Finding, Look
from edged.trust import REFRESHED
from tests.support.trusted import DAY_S, Owner


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return Owner(tmp_path_factory.mktemp("owner"))


def look(folder: Path, now: float, **tables: Any) -> list[Finding]:
    settings = Settings(device={"id": "dev1", "state_dir": folder / "state"}, trust=tables)  # type: ignore[arg-type]
    return list(trust(Look(settings, now)))


def refreshed(folder: Path, at: float, root_version: int) -> None:
    (folder / "state" / "trust").mkdir(parents=True)
    state = {"at": at, "root_version": root_version, "expires": {}}
    (folder / "state" / "trust" / REFRESHED).write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("tables", "said", "fix"),
    [({}, "every release that the fleet desires is refused; seeds work", "enrol this device"),
     ({"unsigned": True}, "whoever may publish desired state may install anything", "enrol this device")],
)  # fmt: skip
def test_a_device_without_a_root(tmp_path: Path, tables: dict[str, Any], said: str, fix: str) -> None:
    (finding,) = look(tmp_path, time.time(), **tables)
    assert finding.level == "warning"
    assert said in finding.text
    assert fix in finding.fix


def test_a_root_is_read_and_checked(tmp_path: Path, owner: Owner) -> None:
    now, root = time.time(), tmp_path / "root.json"
    (finding,) = look(tmp_path, now, root=root)
    assert (finding.level, "No such file" in finding.text, bool(finding.fix)) == ("error", True, True)
    for data in (
        b"{",
        owner.repository.read("timestamp.json"),
        owner.repository.root().read_bytes().replace(b'"version":1', b'"version":2'),
    ):
        root.write_bytes(data or b"")
        (finding,) = look(tmp_path, now, root=root)
        assert (finding.level, "root.json is no root: " in finding.text) == ("error", True)
    shutil.copyfile(owner.repository.root(), root)
    (finding,) = look(tmp_path, now, root=root)
    assert (finding.level, finding.text) == ("ok", "releases must be signed by what root 1 names")


def test_a_root_that_ended_is_no_matter_where_a_newer_one_was_seen(tmp_path: Path, owner: Owner) -> None:
    later = time.time() + 400 * DAY_S
    (finding,) = look(tmp_path, later, root=owner.repository.root())
    assert (finding.level, finding.fix) == ("warning", "extend it with `trainer keys renew root`")
    refreshed(tmp_path, later - 60, 2)
    (finding,) = look(tmp_path, later, root=owner.repository.root())
    assert (finding.level, "checked against root 2 before" in finding.text) == ("ok", True)


def test_a_clock_before_the_last_check_is_an_error(tmp_path: Path, owner: Owner) -> None:
    now = time.time()
    refreshed(tmp_path, now, 1)
    findings = look(tmp_path, now - DAY_S, root=owner.repository.root())
    assert [finding.level for finding in findings] == ["ok", "error"]
    assert "nothing can be installed" in findings[1].text
    assert findings[1].fix == "set the clock, best by a time server"
