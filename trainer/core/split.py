"""Which side of a split a sample falls on: by its device and the time it was taken, and the same for ever.

A side follows from a sample alone, never from what else there is, so more data moves nothing. Time is cut into blocks of
`block_s`; all that a device takes in one block falls on one side, because frames that follow each other show the same
thing. Where two blocks with different sides meet, what was taken within `guard_s` of the border falls on neither, so that
two samples of one device on different sides are at least twice `guard_s` apart (the embargo of M. Lopez de Prado,
"Advances in financial machine learning", 2018, section 7.4).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

Side = Literal["training", "calibration", "gate", "test"]
SIDES: tuple[Side, ...] = ("training", "calibration", "gate", "test")


@dataclass(frozen=True, slots=True)
class SplitRules:
    """Shares of the blocks; training has the rest. Changing a share, `block_s` or `guard_s` moves samples: the shares lie
    so that calibration's may grow without moving what is in gate or test, and gate's without moving calibration.

    Raises ValueError naming the value that cannot be.
    """

    calibration: float = 0.15
    gate: float = 0.0
    test: float = 0.0
    block_s: float = 60.0
    guard_s: float = 5.0

    def __post_init__(self) -> None:
        shares = {"calibration": self.calibration, "gate": self.gate, "test": self.test}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"split {name}={share!r}: must be a share between 0 and 1, for example 0.15")
        if sum(shares.values()) > 1 + 1e-9:
            said = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ValueError(f"split shares {said} are more than 1 together: nothing is left to train on; lower one")
        if not (math.isfinite(self.block_s) and self.block_s > 0):
            raise ValueError(f"split block_s={self.block_s!r}: must be seconds above 0, for example 60")
        if not 0 <= self.guard_s <= self.block_s / 2:
            raise ValueError(
                f"split guard_s={self.guard_s!r}: must be between 0 and half of block_s={self.block_s:g}, "
                "or every sample lies at a border"
            )


def side(rules: SplitRules, sha256_hex: str, device: str = "", captured: float | None = None) -> Side | None:
    """The side of a sample taken by `device` at `captured` (seconds since the epoch); None at a border of two sides.

    Without a device or a time (None, 0 or not finite: an imported picture) the hash of its bytes decides.
    """
    if not device or not captured or not math.isfinite(captured):
        return _drawn(rules, int(sha256_hex[:8], 16) / 2**32)
    block = math.floor(captured / rules.block_s)
    own = _of_block(rules, device, block)
    into = captured - block * rules.block_s
    if into < rules.guard_s and _of_block(rules, device, block - 1) != own:
        return None
    if rules.block_s - into <= rules.guard_s and _of_block(rules, device, block + 1) != own:
        return None
    return own


def unit(rules: SplitRules, sha256_hex: str, device: str = "", captured: float | None = None) -> str:
    """What of a data set stays together: a device's block, or an image alone where device or time are not known."""
    if not device or not captured or not math.isfinite(captured):
        return sha256_hex
    return f"{device}\0{math.floor(captured / rules.block_s)}"


def held_back(units: Sequence[str], share: float) -> list[int]:
    """The rows of some units, drawn by a hash of their names, one unit after the other until they are `share` of all rows.

    At least one unit, when there are two, and never the last one that is left; a unit of more than half of all is not
    drawn. What is drawn depends on the units alone, not on their order.
    """
    rows = Counter(units)
    order = sorted(rows, key=lambda name: sha256(f"held back\0{name}".encode()).digest())
    chosen: set[str] = set()
    count = 0
    for name in order:
        if count >= share * len(units) or len(chosen) + 1 == len(rows):
            break
        if 2 * rows[name] <= len(units):
            chosen.add(name)
            count += rows[name]
    return [row for row, name in enumerate(units) if name in chosen]


def _of_block(rules: SplitRules, device: str, block: int) -> Side:
    drawn = sha256(f"{device}\0{block}".encode()).digest()[:8]
    return _drawn(rules, int.from_bytes(drawn, "big") / 2**64)


def _drawn(rules: SplitRules, draw: float) -> Side:
    """Calibration from 0 upwards, test from 1 downwards, gate below test."""
    if draw < rules.calibration:
        return "calibration"
    if draw >= 1.0 - rules.test:
        return "test"
    return "gate" if draw >= 1.0 - rules.test - rules.gate else "training"


class Times:
    """When devices took something: asked whether another of their samples lies beside."""

    def __init__(self, taken: Iterable[tuple[str, float | None]]) -> None:
        found: dict[str, list[float]] = {}
        for device, captured in taken:
            if device and captured and math.isfinite(captured):
                found.setdefault(device, []).append(captured)
        self._taken: Mapping[str, list[float]] = {device: sorted(times) for device, times in found.items()}

    def beside(self, device: str, captured: float | None, guard_s: float) -> bool:
        """Whether the device took one of them less than `guard_s` before or after `captured`; false without a time."""
        times = self._taken.get(device)
        if not times or not captured or not math.isfinite(captured):
            return False
        place = bisect.bisect_left(times, captured)
        return any(abs(times[index] - captured) < guard_s for index in (place - 1, place) if 0 <= index < len(times))
