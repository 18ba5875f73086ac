"""What a process of simulated devices has done so far, as it tells the one that started it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import IO

from edged.wire import topics

# What a coordinator takes in: a report. The rest of what a device says is for responders, or asks for blocks.
REPORTS = {
    topics.STATE: "births", topics.REPORTED: "reported", topics.SAMPLE: "samples", topics.METRICS: "windows",
    topics.EVENT: "events", topics.COMMAND_STATE: "commands",
}  # fmt: skip


class Tally:
    """Counters by name, the devices' update states, and the trail: the ids of all reports that the broker has taken."""

    def __init__(self, trail: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.updates: Counter[str] = Counter()  # update state -> devices
        self._trail: IO[str] | None = trail.open("a", buffering=1) if trail is not None else None

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter."""
        self.counts[name] += n

    def moved(self, before: str, after: str) -> None:
        """A device's update went on."""
        self.updates[before] -= 1
        self.updates[after] += 1

    def taken(self, kind: str, identifier: str) -> None:
        """The broker has answered for a report."""
        self.counts[kind] += 1
        self.counts["reports"] += 1
        if self._trail is not None:
            self._trail.write(identifier + "\n")

    def told(self) -> dict[str, dict[str, int]]:
        """Both, without what is nought."""
        return {"counts": dict(+self.counts), "updates": dict(+self.updates)}

    def close(self) -> None:
        """Write the trail out."""
        if self._trail is not None:
            self._trail.close()
