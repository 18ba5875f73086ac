from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.split import SIDES, SplitRules, Times, side

RULES = SplitRules(calibration=0.15, gate=0.2, test=0.1, block_s=60.0, guard_s=5.0)
DIGEST = "0" * 64
BLOCK_0 = 1_700_000_040.0  # a whole number of blocks


@settings(max_examples=500)
@given(st.sampled_from(["d1", "d2", "cam-7"]), st.integers(0, 10**7), st.floats(-12, 12), st.floats(-9.99, 9.99))
def test_what_a_device_takes_close_together_never_falls_on_two_sides(
    device: str, block: int, from_border: float, apart: float
) -> None:
    """Twice the guard: it is kept free on both sides of a border."""
    at = 1e9 // 60 * 60 + 60 * block + from_border
    sides = {side(RULES, DIGEST, device, time) for time in (at, at + apart)} - {None}
    assert len(sides) <= 1


@given(st.floats(1e9, 2e9), st.floats(0, 1))
def test_a_block_of_a_device_falls_on_one_side(at: float, share: float) -> None:
    start = at // 60.0 * 60.0
    sides = {side(RULES, DIGEST, "d1", time) for time in (start + 6, start + 30, start + 6 + share * 48)}
    assert len(sides) == 1
    assert sides <= set(SIDES)


def test_the_shares_are_kept_over_many_blocks() -> None:
    for device, digest in (("d1", DIGEST), ("", "")):
        found = [
            side(RULES, digest or f"{number * 2654435761 % 2**32:08x}", device, BLOCK_0 + 60 * number + 30)
            for number in range(4000)
        ]
        for name, share in (("training", 0.55), ("calibration", 0.15), ("gate", 0.2), ("test", 0.1)):
            assert found.count(name) / len(found) == pytest.approx(share, abs=0.03)  # type: ignore[arg-type]


PINNED = [
    "calibration",
    "calibration",
    "training",
    "gate",
    "training",
    "training",
    "calibration",
    "training",
    "calibration",
    "training",
    "calibration",
    "training",
]


def test_sides_are_stable() -> None:
    """These are pinned: another rule would move samples that have trained to where they judge."""
    found = [side(RULES, DIGEST, "d1", BLOCK_0 + 60 * number + 30) for number in range(12)]
    assert found == PINNED
    assert side(RULES, "20" + DIGEST[2:]) == "calibration"
    assert side(RULES, "80" + DIGEST[2:]) == "training"
    assert side(RULES, "c0" + DIGEST[2:]) == "gate"
    assert side(RULES, "f0" + DIGEST[2:]) == "test"


@pytest.mark.parametrize("captured", [None, 0.0, float("nan"), float("inf")])
def test_without_a_time_the_bytes_decide(captured: float | None) -> None:
    assert side(RULES, "20" + DIGEST[2:], "d1", captured) == "calibration"


@given(st.floats(1e9, 2e9), st.floats(0.0, 0.5))
def test_more_calibration_moves_nothing_of_what_judges(at: float, calibration: float) -> None:
    judges = ("gate", "test")
    before = side(SplitRules(0.05, 0.2, 0.1, 60.0, 0.0), DIGEST, "d1", at)
    after = side(SplitRules(calibration, 0.2, 0.1, 60.0, 0.0), DIGEST, "d1", at)
    assert (before in judges) == (after in judges)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gate": 0.8, "test": 0.2}, "are more than 1 together"),
        ({"calibration": -0.1}, "calibration=-0.1"),
        ({"calibration": float("nan")}, "calibration=nan"),
        ({"block_s": 0.0}, "block_s=0.0"),
        ({"block_s": 60.0, "guard_s": 31.0}, "guard_s=31.0"),
    ],
)
def test_rules_that_cannot_be_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SplitRules(**values)


def test_beside_what_was_taken() -> None:
    times = Times([("d1", 100.0), ("d1", 200.0), ("d2", 150.0), ("", 500.0), ("d1", None)])
    found = [times.beside(*asked, 5.0) for asked in [("d1", 104.9), ("d1", 195.1), ("d1", 105.0), ("d1", 150.0)]]
    assert found == [True, True, False, False]
    assert not times.beside("d3", 100.0, 5.0)
    assert not times.beside("", 500.0, 5.0)
    assert not times.beside("d1", None, 5.0)
