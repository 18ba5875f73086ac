"""The process that ultralytics runs in, kept from the network and the user's home; and its place among several."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass

_LAUNCHED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE")


def prepare_process() -> None:
    """Keep ultralytics from the network and from the user's home; call before the first import of it or of torch."""
    if "YOLO_CONFIG_DIR" not in os.environ:
        config = tempfile.mkdtemp(prefix="edged-ultralytics-")
        atexit.register(shutil.rmtree, config, ignore_errors=True)
        os.environ["YOLO_CONFIG_DIR"] = config
    os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_VERBOSE="false")
    # Threads that wait for each other sleep: spinning, they would starve whatever else runs on the trainer's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those that train together: its number of all, its number on its host, the host's number.

    `count` is 1 for a training alone. torchrun and `accelerate launch` say it in the environment.
    """

    rank: int = 0
    local_rank: int = 0
    host: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Place:
        """As the launcher's environment says it."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        rank, local, host, count = (int(os.environ.get(name, "0")) for name in _LAUNCHED)
        return cls(rank, local, host, count)

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process, be it as the only one: ultralytics then divides its data."""
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ
