"""Prove a release in a throw-away process: load it, let it answer its golden set, measure. `python -m edged.prove FOLDER`.

A model that crashes or eats the memory kills this process, not the daemon. Prints one JSON object; exit status 0 when the
release is good.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from edged.engines.base import EngineError, EngineOptions

NICENESS = 10  # items in hand go first
POLL_S = 0.5  # how soon a proof that nobody wants any more ends


class ProveFailed(Exception):
    """The candidate did not prove itself; the message says how."""


class ProveCancelled(Exception):
    """Nobody wants to know any more."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What proving measured: seconds to load, seconds for the golden set, number of golden inputs."""

    load_s: float
    golden_s: float
    golden: int


def prove(
    folder: Path, options: EngineOptions, seconds_max: float, base: Path | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Proof:  # fmt: skip
    """Prove the release in `folder` in a niced child; `base` is the folder of an adapter's base.

    Raises ProveFailed, or ProveCancelled soon after `cancelled` said so.
    """
    command = [sys.executable, "-m", "edged.prove", str(folder), "--options", json.dumps(asdict(options))]
    if base is not None:
        command += ["--base", str(base)]
    deadline = time.monotonic() + seconds_max
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while True:
            try:
                stdout, stderr = child.communicate(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                if cancelled():
                    child.kill()
                    raise ProveCancelled(str(folder)) from None
                if time.monotonic() > deadline:
                    child.kill()
                    raise ProveFailed(f"it did not prove itself within {seconds_max:.0f} s") from None
    try:
        answer = json.loads(stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise ProveFailed(f"the proving process ended with status {child.returncode}: {last[0][:300]}") from None
    if child.returncode != 0:
        raise ProveFailed(str(answer.get("error", "unknown reason")))
    return Proof(**answer)


def _main() -> int:
    from edged import golden, releases
    from edged.engines.base import Generator, open_engine

    parser = argparse.ArgumentParser(prog="edged.prove", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    os.nice(NICENESS)
    options = EngineOptions(**arguments.options)
    try:
        started = time.monotonic()
        manifest = releases.read_manifest(arguments.folder)
        loaded_folder = arguments.base or arguments.folder
        loaded = manifest if arguments.base is None else releases.read_manifest(arguments.base)
        engine = open_engine(loaded_folder, loaded, options)
        if arguments.base is not None:
            if not isinstance(engine, Generator):
                raise EngineError(f"{loaded.release} takes no adapter (kind {loaded.kind})")
            engine.attach(arguments.folder / manifest.files["adapter"].path)
        loaded_at = time.monotonic()
        count = golden.check(engine, arguments.folder, manifest)
    except (EngineError, releases.BadRelease, OSError, KeyError, ValueError) as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps({"load_s": loaded_at - started, "golden_s": time.monotonic() - loaded_at, "golden": count}))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
