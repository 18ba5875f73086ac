"""What was heard of a device against what lies on its disk: all of it must be there, once, and nothing moved back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# How far a sample is; a state may only be followed by one that is as far or farther.
FAR = {"captured": 0, "escalated": 0, "unresolved": 1, "rejected": 2, "labelled": 2}
UNLABELLED = ("escalated", "unresolved")
STRANGE_MARK = "-strange"  # in the name of a picture that the device asks about
SHOWN_MAX = 5  # names of each kind of finding
UNDER_WAY = ("downloading", "proving", "switched")
LOOPED = "restarted too often"
AT_REST = {"idle", "committed", "reverted", "failed"}


@dataclass(slots=True)
class Known:
    """What the device has said, or was told that it has: nothing of it may be lost from then on."""

    put: set[str] = field(default_factory=set)  # pictures whose name and bytes were on the disk
    samples: dict[str, str] = field(default_factory=dict)  # id -> the farthest state that was heard or found
    items: dict[str, set[str]] = field(default_factory=dict)  # item -> ids of its results
    sha256: Mapping[str, str] = field(default_factory=dict)  # the end of a picture's name -> hash of its bytes

    def result(self, item: str, id: str, sample: str | None) -> None:
        """A Result was heard."""
        self.items.setdefault(item, set()).add(id)
        if sample is not None:
            self.samples.setdefault(sample, "captured")

    def sample(self, id: str, state: str) -> None:
        """A sample was heard or found to be in this state."""
        if FAR[state] >= FAR[self.samples.get(id, "captured")]:
            self.samples[id] = state


def phases(at: Mapping[str, Any] | None) -> set[str]:
    """The phases that a device is in, from what the guest last said of it."""
    if not at:
        return {"start"}
    return {"any", at["update"]} | ({"escalation"} if at["asking"] else set())


def phase_of(at: Mapping[str, Any] | None, wanted: str) -> str:
    """The one phase that a cut counts for: the one that was waited for, if the device is in it; `rest`: in none."""
    now = phases(at)
    of_note = now & {"start", *UNDER_WAY, "escalation"}
    return wanted if wanted in of_note else min(of_note, default="rest")


def blamed(kind: str, text: str) -> bool:
    """Whether this event takes a release back. All are good; but one under which the power was cut too often may go."""
    return kind == "update_reverted" and LOOPED not in text


def missing(known: Known, found: Mapping[str, Any]) -> dict[str, list[str]]:
    """What must not be, by kind; of each the names. `found` is what powercut_guest.found returned."""
    if "broken" in found:
        return {"databases that cannot be read": [found["broken"]]}
    states = {row[0]: row[2] for row in found["samples"]}
    hashes = {row[1]: row[3] for row in found["samples"] if row[1] in known.put}
    times = Counter(row[1] for row in found["samples"] if row[1])
    places = Counter(name for place in ("waiting", "done", "rejected") for name in found[place])
    strange = [name for name in found["done"] if STRANGE_MARK in name]
    wrong = {
        "pictures that are gone": known.put - places.keys(),
        "pictures in two places": [name for name, count in places.items() if count > 1],
        "pictures that were rejected": found["rejected"],
        "acknowledged samples that are gone": known.samples.keys() - states.keys(),
        "samples that moved back": [
            id for id, state in known.samples.items() if FAR[states.get(id, state)] < FAR[state]
        ],
        "done pictures without their sample": [name for name in strange if name not in times],
        "samples twice": [item for item, count in times.items() if count > 1],
        "samples with other bytes than their picture": [
            item for item, sha256 in hashes.items() if sha256 != known.sha256[picture_of(item)]
        ],
        "blobs that are not what their hash says": found["bad_blobs"],
        "damaged releases": found["damaged"],
        "databases set aside": found["set_aside"],
    }
    return named(wrong)


def unfinished(known: Known, found: Mapping[str, Any]) -> dict[str, list[str]]:
    """What must not be left once everything has come out."""
    if "broken" in found:
        return {}
    return named({
        "pictures that still wait": found["waiting"],
        "pictures without a result": known.put - known.items.keys(),
        "pictures with two results": [item for item, ids in known.items.items() if len(ids) > 1],
        "questions without a label": [id for id, _, state, _ in found["samples"] if state in UNLABELLED],
    })  # fmt: skip


def named(wrong: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Without what was not found, in order."""
    return {what: sorted(names) for what, names in wrong.items() if names}


def picture_of(item: str) -> str:
    """The picture of the stock that an item was made from: its name without the boot and the number before it."""
    return item.split("-", 2)[2]


def as_text(wrong: Mapping[str, list[str]]) -> list[str]:
    """One line for each kind of finding."""
    return [
        f"{what}: {len(names)} ({', '.join(names[:SHOWN_MAX])}{', ...' if len(names) > SHOWN_MAX else ''})"
        for what, names in wrong.items()
    ]
