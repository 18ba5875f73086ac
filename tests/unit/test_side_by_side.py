"""When rounds of timing end: never while an answer still gets faster, and never late."""

from __future__ import annotations

import pytest

from trainer.side_by_side import ROUNDS_MAX, Times, settled


@pytest.mark.parametrize(
    ("rounds", "ends_after"),
    [
        ([4.0, 4.0, 4.0, 1.0], 3),
        ([4.0, 3.99, 3.98, 1.0], 3),  # a hundredth is no gain
        ([9.0, 9.0, 4.0, 4.0, 4.0, 1.0], 5),  # two rounds without a gain, one after the other
        ([2.0**-n for n in range(40)], ROUNDS_MAX),
        ([None, None, None, 1.0], 3),  # nothing is answered
        ([None, 4.0, 4.0, 4.0, 1.0], 4),
    ],
)
def test_rounds_go_on_while_answers_get_faster(rounds: list[float | None], ends_after: int) -> None:
    given = iter(rounds)
    seen: list[Times] = []

    def measure() -> Times:
        seen.append({"candidate": 1.0, "current": next(given)})
        return seen[-1]

    assert settled(measure) == seen[-1]
    assert len(seen) == ends_after
