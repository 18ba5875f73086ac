"""Whether a release fits the devices that it is for: size, memory and latency under each profile."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.test_gate import CANDIDATE, CURRENT, HOLDOUT, RULES, failed
from trainer.core.gate import Footprint, Target, judge

PI = Target("pi", file_mib_max=4, memory_mib_max=160)
FAST = Target("fast", file_mib_max=4, memory_mib_max=160, latency_ms_max=20)
NO_CLAIM = Target("tiny", problem="it makes no claim for releases of kind detect")


@pytest.mark.parametrize(
    ("target", "mib", "footprint", "before", "failing", "words"),
    [
        (PI, 3, (150, 10), (150, 9), set(), ""),
        (PI, 5, (150, 10), (150, 9), {"size (pi)"}, "pi: MiB of the model's file (at most): 5, bound 4"),
        (PI, None, (150, 10), (150, 9), {"size (pi)"}, "not measured (None), bound 4"),
        (PI, 3, (170, 10), (150, 9), {"memory (pi)"}, "pi: MiB of its process (at most): 170, bound 160"),
        (PI, 3, (150, 19), (150, 9), {"latency (pi)"}, "over the current release's (at most): 2.111, bound 2"),
        (PI, 3, (150, 19), None, {"latency (pi)"}, "the current release: it was not measured"),
        (PI, 3, None, (150, 9), {"memory (pi)", "latency (pi)"}, "pi: MiB of its process: not measured: killed"),
        (FAST, 3, (150, 19), (150, 1), set(), ""),
        (FAST, 3, (150, 21), (150, 21), {"latency (fast)"}, "fastest answer (at most): 21, bound 20"),
        (FAST, 3, (150, math.nan), (150, 9), {"latency (fast)"}, "not measured (nan), bound 20"),
        (NO_CLAIM, 3, (1, 1), (1, 1), {"size (tiny)", "memory (tiny)"}, "makes no claim for releases of kind detect"),
    ],
)
def test_a_release_must_fit_its_targets(
    target: Target,
    mib: float | None,
    footprint: tuple[float, float] | None,
    before: tuple[float, float] | None,
    failing: set[str],
    words: str,
) -> None:
    def taken(values: tuple[float, float] | None) -> Footprint:
        if values is None:
            return Footprint(target.profile, error="killed")
        return Footprint(target.profile, int(values[0] * 2**20), values[1])

    candidate = replace(
        CANDIDATE, model_bytes=None if mib is None else int(mib * 2**20), footprints=(taken(footprint),)
    )
    current = replace(CURRENT, footprints=() if before is None else (taken(before),))
    result = judge(candidate, current, HOLDOUT, RULES, np.random.default_rng(7), [target])
    assert failed(result) == failing
    assert words in " ".join(result.reasons)
    if footprint is None:
        assert "milliseconds of the fastest answer: not measured: killed" in " ".join(result.reasons)


def test_a_first_release_has_no_latency_to_compare_with_and_must_fit_all_the_same() -> None:
    candidate = replace(CANDIDATE, model_bytes=5 * 2**20, footprints=(Footprint("pi", 170 * 2**20, 5.0),))
    result = judge(candidate, None, HOLDOUT, RULES, np.random.default_rng(7), [PI])
    assert failed(result) == {"size (pi)", "memory (pi)"}
