"""What a comparison of an exported file with what it was made of found, as `trainer.export` tells the gate."""

from __future__ import annotations

from typing import NamedTuple


class Parity(NamedTuple):
    what: str
    value: float
    tolerance: float
    passed: bool


SAME = Parity("scores", 0.01, 0.05, True)
