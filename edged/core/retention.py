"""Which samples a device gives up to make room: what they are about, what they are still worth, how many of which.

Law of this file: it only ranks and counts what is in EVICTABLE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What may be deleted to make room, in this order. Never escalated, labelled or claimed: the training that needs them is
# still to come. `unresolved` is last: somebody may yet label it.
EVICTABLE: tuple[str, ...] = ("used", "archived", "rejected", "captured", "unresolved")
TEXT = "text"  # the class of every text sample
BETWEEN = "\n"  # joins the labels of one sample
DAY_S = 86400.0
STEADY_S = 600.0  # ages count once the wall clock has kept step with the monotonic one for so long
STEP_S_MAX = 60.0  # what parts the two clocks by more was a correction of the wall clock

# Worth of a sample for another training; what is worth least goes first.
SURE, DOUBTED, CORRECTED = 0, 1, 2


def classes(parts: Sequence[Mapping[str, Any]]) -> str:
    """What a sample is about: the distinct labels of its parts, sorted and joined; empty for an empty frame."""
    return BETWEEN.join(sorted({str(part["label"]) if "label" in part else TEXT for part in parts}))


def worth(
    decision: str, prediction: Sequence[Mapping[str, Any]], label: Sequence[Mapping[str, Any]] | None
) -> int:  # fmt: skip
    """How much a training learns from the sample: CORRECTED where the label contradicts what the model said, DOUBTED where
    the policy escalated it, SURE for what the model accepted and nobody contradicted. `label` None: there is none."""
    if label is not None and _said(label) != _said(prediction):
        return CORRECTED
    return DOUBTED if decision == "escalate" else SURE


def _said(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(str(part.get("label", part.get("text", ""))) for part in parts)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample that may be given up. `shared`: how many samples in all refer to the same blob."""

    id: str
    sha256: str
    bytes: int
    shared: int = 1


def choose(candidates: Iterable[Candidate], bytes_wanted: int) -> tuple[list[Candidate], int]:
    """The first of `candidates` that together free so many bytes, and the bytes; all of them when that is not enough. A
    blob is free with the last sample that refers to it."""
    chosen: list[Candidate] = []
    freed = 0
    left: dict[str, int] = {}
    for candidate in candidates:
        if freed >= bytes_wanted:
            break
        chosen.append(candidate)
        left[candidate.sha256] = left.get(candidate.sha256, candidate.shared) - 1
        if left[candidate.sha256] == 0:
            freed += candidate.bytes
    return chosen, freed


def shortage(wanted: int, used: int, available: int) -> int:
    """Bytes to free before `wanted` more fit beside `used`."""
    return max(wanted + used - available, 0)


def excess(counts: Mapping[str, int], class_max: int) -> dict[str, int]:
    """How many samples to give up, by what they are about (as `classes` says it), so that no label keeps more than
    `class_max`, except in samples that also show a label of which there are few: those stay."""
    totals: dict[str, int] = {}
    for about, n in counts.items():
        for name in about.split(BETWEEN):
            totals[name] = totals.get(name, 0) + n
    out: dict[str, int] = {}
    # What shows one label only goes before what shows several; the most frequent first.
    for about, n in sorted(counts.items(), key=lambda entry: (entry[0].count(BETWEEN), -entry[1], entry[0])):
        names = about.split(BETWEEN)
        surplus = min(n, *(totals[name] - class_max for name in names))
        if surplus > 0:
            out[about] = surplus
            for name in names:
                totals[name] -= surplus
    return out


def too_old(age_days: Mapping[str, float], now: float) -> dict[str, float]:
    """state -> the time of capture before which its samples are given up; states without a limit are not in it."""
    return {state: now - days * DAY_S for state, days in age_days.items() if days > 0}


@dataclass(frozen=True, slots=True)
class ClockPace:
    """How far apart the two clocks were when last seen, and since when that has not changed."""

    apart: float
    since: float


def keep_pace(last: ClockPace | None, now: float, monotonic: float) -> ClockPace:
    """The pace as it is now: it begins anew when the wall clock was corrected. A device without a battery clock may start
    years ahead, and must not take all it keeps for old."""
    apart = now - monotonic
    if last is None or abs(apart - last.apart) > STEP_S_MAX:
        return ClockPace(apart, monotonic)
    return last


def steady(pace: ClockPace, monotonic: float) -> bool:
    """Whether the wall clock can be believed about ages."""
    return monotonic - pace.since >= STEADY_S
