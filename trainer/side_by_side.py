"""How long answers of several models take on one machine, so that they can be compared while it has other work: the models
take turns, and of each question the fastest answer counts, for other work only makes answers slower."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from edged.engines.base import Detector, EngineError, EngineOptions, Image, open_engine
from edged.wire.manifest import ReleaseManifest
from trainer.evaluate import observe

Times = dict[str, float | None]  # whose answer -> milliseconds; None where nothing was answered

IMAGES_MAX = 16  # whose answers are timed
# Rounds go on until none of so many has made an answer faster by more than a share, and no longer than so many.
QUIET_ROUNDS, GAIN, ROUNDS_MAX = 2, 0.02, 12


def settled(measure: Callable[[], Times], rounds_max: int = ROUNDS_MAX) -> Times:
    """What `measure` finds in the end: every call adds a round, and gives the fastest so far."""
    found: Times = {}
    quiet = 0
    for _ in range(rounds_max):
        before, found = found, measure()
        quiet = 0 if _faster(before, found) else quiet + 1
        if quiet == QUIET_ROUNDS:
            break
    return found


def _faster(before: Times, now: Times) -> bool:
    """Whether the last round made the answer of anyone faster."""
    return any((old := before.get(name)) is None or new < old * (1 - GAIN) for name, new in now.items() if new)


def detector_latencies(sides: Mapping[str, tuple[Path, ReleaseManifest]], images: Sequence[Image]) -> Times:
    """Milliseconds that each release takes to prepare and answer one image: medians over the first IMAGES_MAX images.

    Raises EngineError.
    """
    some = images[:IMAGES_MAX]
    with ExitStack() as stack:
        engines: dict[str, Detector] = {}
        for name, (folder, manifest) in sides.items():
            engine = open_engine(folder, manifest, EngineOptions())
            stack.callback(engine.close)
            if not isinstance(engine, Detector):
                raise EngineError(f"release {manifest.release} is of kind {manifest.kind}; it answers no images")
            engines[name] = engine
            observe(engine, some[:1])  # the first answer of an engine takes longer
        fastest = {name: [math.inf] * len(some) for name in sides}

        def measure() -> Times:
            for number, image in enumerate(some):
                for name, engine in engines.items():
                    (seen,) = observe(engine, [image])
                    fastest[name][number] = min(fastest[name][number], seen.latency_ms)
            return {name: statistics.median(times) if times else None for name, times in fastest.items()}

        return settled(measure)
