"""What the trainer's block connection answers about metadata that is being replaced while devices ask."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

from trainer.blocks import METADATA_S, Blocks
from trainer.config import TrainerConfig
from trainer.releases import Registry


def test_who_has_not_heard_of_the_new_metadata_still_gets_what_was_announced_before(tmp_path: Path) -> None:
    file = tmp_path / "timestamp.json"
    config = TrainerConfig(name="host", site="plant", data_dir=tmp_path)
    blocks = Blocks(
        config, Registry(config.releases), claimed=lambda _digest: False, arrived=lambda _digest: None,
        metadata=lambda: {"timestamp.json": file},
    )  # fmt: skip
    link = SimpleNamespace(publish=lambda *_: True)
    contents = (b"first", b"second", b"third")
    for content in contents:
        file.write_bytes(content)
        blocks._looked -= 2 * METADATA_S
        blocks._announce(link)  # type: ignore[arg-type]
    asked = [blocks._read((hashlib.sha256(content).hexdigest(), 0)) for content in contents]
    assert asked == [None, b"second", b"third"]
