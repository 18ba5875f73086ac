"""The process that ultralytics runs in, kept from the network and from the user's home."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile


def prepare_process() -> None:
    """Keep ultralytics from the network and from the user's home; call before the first import of it or of torch."""
    if "YOLO_CONFIG_DIR" not in os.environ:
        config = tempfile.mkdtemp(prefix="edged-ultralytics-")
        atexit.register(shutil.rmtree, config, ignore_errors=True)
        os.environ["YOLO_CONFIG_DIR"] = config
    os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_VERBOSE="false")
    # Threads that wait for each other sleep: spinning, they would starve whatever else runs on the trainer's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
