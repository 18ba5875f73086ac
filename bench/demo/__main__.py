"""The closed loop on one machine, with real parts: `make demo`, or `python -m bench.demo`.

A stream of images shifts; devices become unsure and ask a larger model; the trainer learns from the answers; the new model
goes to a canary, then to all, while frames keep flowing. Exit status 0: the loop made the fleet better. 1: it did not, and
which check says so.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from bench.demo.scenes import SHIFTS

BUILD = Path("build")
MARKER = ".edged-demo"  # in a folder that the demo made, and may make anew


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make demo ARGS='...'", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shift", default=os.environ.get("SHIFT", "mix"), choices=sorted(SHIFTS),
                        help="how the stream changes (default: mix, or $SHIFT)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", "1")),
                        help="everything follows from it (default: 1, or $SEED)")  # fmt: skip
    parser.add_argument("--ablate", default="", choices=["train", "labels"],
                        help="take a part out to show that the result depends on it: `train` ships the old weights "
                        "again, `labels` shuffles the labels; both must end with status 1")  # fmt: skip
    parser.add_argument("--reduced", action="store_true", help="fewer frames, for tests")
    parser.add_argument("--out", type=Path, default=BUILD / "demo", help="folder of the report (default: build/demo)")
    parser.add_argument("--cache", type=Path, default=BUILD / "demo-cache", help="folder of the models that are kept")
    parser.add_argument("--device-python", type=Path, default=BUILD / "venv-device/bin/python",
                        help="the devices' own environment")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Run the demo; the exit status."""
    arguments = _arguments()
    if not arguments.device_python.exists():
        print(f"demo: {arguments.device_python} does not exist: run `make setup`", file=sys.stderr)
        return 2
    # Heavy imports only now: --help answers at once.
    warnings.filterwarnings("ignore", category=FutureWarning)
    from bench.demo.line import LineError
    from bench.demo.prepare import FULL, REDUCED
    from bench.demo.run import Demo

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, interrupt)
    random.seed(arguments.seed)
    work = arguments.out.resolve()
    if work.is_dir() and any(work.iterdir()) and not (work / MARKER).is_file():
        print(f"demo: --out {work}: is not empty and holds no earlier run; name a new folder", file=sys.stderr)
        return 2
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MARKER).touch()
    started = time.monotonic()
    demo = Demo(
        work, arguments.cache.resolve(), arguments.device_python.absolute(), arguments.seed, arguments.shift,
        arguments.ablate, REDUCED if arguments.reduced else FULL,
    )  # fmt: skip
    try:
        passed = demo.run()
    except LineError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped; every process of it has ended", file=sys.stderr)
        return 130
    print(f"report: {work / 'report.html'} and report.json, after {time.monotonic() - started:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
