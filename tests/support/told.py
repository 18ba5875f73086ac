"""What `trainer release make --json` tells a script, held against what lies in the folder."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any


def assert_files_are_there(release: Path, told: dict[str, Any]) -> None:
    """Every file by its role, with its size and hash, and nothing else but the release.json that `sha256` pins."""
    here = {path.name: path.read_bytes() for path in release.iterdir()}
    assert sha256(here.pop("release.json")).hexdigest() == told["sha256"]
    assert {
        file["path"]: (file["bytes"], file["sha256"]) for file in told["files"].values()
    } == {name: (len(data), sha256(data).hexdigest()) for name, data in here.items()}  # fmt: skip
    assert told["bytes"] == told["files"]["model"]["bytes"]
