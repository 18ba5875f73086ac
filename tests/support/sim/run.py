"""Runs seeds of a scenario: `python -m tests.support.sim.run updates 17` or `updates 0:500`.

It starts itself again with the recorder of disk changes preloaded (disk.c).
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

SCENARIOS = ("updates", "samples", "rollouts", "repairs", "ceremonies", "commands", "folders")
MARK = "EDGED_SIM_RECORDER"


def preloaded() -> dict[str, str]:
    """The environment in which a world can be."""
    from tests.support.sim.disk import library

    return {**os.environ, "LD_PRELOAD": str(library()), "PYTHONHASHSEED": "0", MARK: "1"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.sim.run", description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("seeds", help="one, or first:end")
    parser.add_argument("--without", help="file:function:words of an fsync to leave out (mutants.py)")
    parser.add_argument("--trace", action="store_true", help="say what happens, and every change of the disk")
    parser.add_argument("--failures", type=int, default=1, help="end after so many")
    arguments = parser.parse_args()
    if MARK not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "tests.support.sim.run", *sys.argv[1:]], preloaded())
    if arguments.without:
        from tests.support.sim.mutants import Without

        Without(arguments.without).install()
    first, _, end = arguments.seeds.partition(":")
    return _run(arguments, range(int(first), int(end or int(first) + 1)))


def _run(arguments: Any, seeds: range) -> int:
    from tests.support.sim import world as worlds
    from tests.support.sim.disk import Disk

    logging.disable(logging.CRITICAL)
    memory = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(prefix="edged-sim-", dir=memory if memory.is_dir() else None))
    # Before anything of the product is imported: what it binds then (`now=time.time`) is the world's too.
    here, failures, template = worlds.Here(worlds.World("imports", Disk(scratch / "disk"))), 0, None
    scenario = import_module(f"tests.support.sim.{arguments.scenario}")
    try:
        for seed in (None, *seeds):
            disk = Disk(scratch / "disk", arguments.trace and seed is not None)
            world = worlds.World(f"{arguments.scenario}/{seed}", disk)
            here.move_to(world)
            try:
                left = scenario.run(world, scratch / "outside", template)
                if template is None:
                    template = left
                    gc.collect()
                    gc.freeze()  # mostly modules: the collections between two starts need not look at them again
            except Exception as error:
                failures += 1
                if not isinstance(error, worlds.Violation):
                    traceback.print_exc(limit=None if arguments.trace else -3)
                print(f"FAILED seed {seed}: {type(error).__name__}: {error}")
                again = f"{arguments.scenario} {seeds.start if seed is None else seed} --trace"
                print(f"  again: python -m tests.support.sim.run {again}")
            if disk.traced:
                disk.power_off(None)
                print("\n".join([*disk.trace, *world.told]).replace(str(scratch), ""))
            if failures >= arguments.failures:
                break
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    end = seeds.start if seed is None else seed + 1
    print(f"{arguments.scenario}: seeds {seeds.start}:{end}, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
