"""A broker with somebody who listens, and engines in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.engines.base import EngineOptions
from edged.engines.host import Patience, ProcessGenerator
from tests.support.device import Bus
from tests.support.hosted import QUICK, Start, manifest
from tests.system.broker import Broker


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def bus(broker: Broker) -> Iterator[Bus]:
    listening = Bus(broker)
    yield listening
    listening.close()


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi of random weights that has seconds of work with a long prompt, and then does not stop talking."""
    from tests.trainer.tiny_phi import save_phi3
    from trainer.export.gguf import export_gguf

    folder = tmp_path_factory.mktemp("slow")
    size = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    length = {"max_position_embeddings": 8192, "original_max_position_embeddings": 8192}
    save_phi3(folder / "checkpoint", **size, **length)
    return export_gguf(folder / "checkpoint", folder / "slow.gguf")


@pytest.fixture
def start(phi: dict[str, Path]) -> Iterator[Start]:
    """Starts engines, and closes them at the end of the test."""
    started: list[ProcessGenerator] = []

    def begin(path: Path = phi["model_gguf"], patience: Patience = QUICK, **options: Any) -> ProcessGenerator:
        started.append(ProcessGenerator(path.parent, manifest(path), EngineOptions(**options), patience=patience))
        return started[-1]

    yield begin
    for engine in started:
        engine.close()
