"""What every layer of tests shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.models import make_release


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


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment of whoever runs the tests configures a device."""
    for name in [name for name in os.environ if name.startswith("EDGED_")]:
        monkeypatch.delenv(name)
