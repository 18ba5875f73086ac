"""What simulated devices do: how often they are right, unsure, or go back from a release. Pure: chance is an argument.

Law of this file: whatever is a matter of a device and a release (is it worse there, does it go back) follows from their
names and the seed, so that the same fleet behaves in the same way however many processes it is spread over.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from math import erf, log, sqrt

import numpy as np
from numpy.typing import NDArray

from edged.wire.measured import CONFIDENCE_BINS, LATENCY_BOUNDS_MS

LATENCY_MS, LATENCY_SPREAD = 40.0, 0.25  # median of an answer's latency, and the deviation of its logarithm
UNSURE_RIGHT = 0.6  # how often an answer that is escalated is right, of how often an accepted one is


@dataclass(frozen=True, slots=True)
class Nature:
    """What a fleet is like. Shares are from 0 to 1.

    `first`: the release that every device runs at the beginning. Of any other one: on `bad_share` of the devices it is
    right less often by `bad_loss`, and `revert_share` of the devices find it unhealthy and go back.
    """

    classes: tuple[str, ...]
    first: str
    seed: int = 0
    items: int = 20  # answers in a window
    escalate_share: float = 0.05
    audit_share: float = 0.02  # of what is not escalated, where desired state says nothing else
    accuracy: float = 0.9
    bad_share: float = 0.0
    bad_loss: float = 0.3
    revert_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Counted:
    """What a window counted."""

    accepted: int
    audited: int
    escalated: int
    confidence: list[int]
    latency: list[int]


def draw(seed: int, *names: str) -> float:
    """An even lot from 0 to 1 that these names always draw."""
    digest = sha256("\0".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def worse(nature: Nature, device: str, release: str) -> bool:
    """Whether this release is a bad one on this device."""
    return release != nature.first and draw(nature.seed, "bad", device, release) < nature.bad_share


def reverts(nature: Nature, device: str, release: str) -> bool:
    """Whether this device goes back from this release."""
    return release != nature.first and draw(nature.seed, "revert", device, release) < nature.revert_share


def accuracy(nature: Nature, device: str, release: str) -> float:
    """How often an accepted answer of this release is right on this device."""
    return max(0.0, nature.accuracy - (nature.bad_loss if worse(nature, device, release) else 0.0))


def truth(content: bytes, classes: tuple[str, ...]) -> str:
    """What a picture shows: a simulated one is bytes, and its hash decides."""
    return classes[sha256(b"truth" + content).digest()[0] % len(classes)]


def answer(content: bytes, classes: tuple[str, ...], chance: float, lot: float) -> str:
    """What a model sees that is right with this `chance`; `lot` from 0 to 1 decides."""
    right = truth(content, classes)
    if lot < chance or len(classes) == 1:
        return right
    others = [name for name in classes if name != right]
    return others[int((lot - chance) / max(1e-9, 1 - chance) * len(others)) % len(others)]


def window(nature: Nature, chance: float, audit_share: float, rng: np.random.Generator) -> Counted:
    """The counts of one window of answers that are right with `chance`."""
    escalated = int(rng.binomial(nature.items, nature.escalate_share))
    audited = int(rng.binomial(nature.items - escalated, min(1.0, max(0.0, audit_share))))
    return Counted(
        nature.items - escalated - audited, audited, escalated,
        rng.multinomial(nature.items, _confidence_shares(chance)).tolist(),
        _short(rng.multinomial(nature.items, _LATENCY_SHARES).tolist()),
    )  # fmt: skip


def _confidence_shares(chance: float) -> NDArray[np.float64]:
    """Probabilities that pile up at the upper end, the more so the better the model."""
    bins = (np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS
    shares = bins ** (8.0 * max(chance, 0.05))
    return np.asarray(shares / shares.sum(), np.float64)


def _latency_shares() -> NDArray[np.float64]:
    """A log-normal latency in the protocol's bins."""
    edges = [0.5 * (1 + erf(log(bound / LATENCY_MS) / (LATENCY_SPREAD * sqrt(2)))) for bound in LATENCY_BOUNDS_MS]
    shares = np.diff(np.array([0.0, *edges, 1.0]))
    return np.asarray(shares / shares.sum(), np.float64)


def _short(counts: list[int]) -> list[int]:
    while counts and not counts[-1]:
        counts.pop()
    return counts


def name_of(number: int, prefix: str) -> str:
    """The device of a number, from 1 on."""
    return f"{prefix}{number:05d}"


def shares(devices: int, processes: int) -> list[range]:
    """The numbers of the devices that each process has, as even as can be; no process without any."""
    count = min(devices, processes)
    cuts = [1 + devices * place // count for place in range(count + 1)]
    return [range(cuts[place], cuts[place + 1]) for place in range(count)]


_LATENCY_SHARES = _latency_shares()
