"""What the soak found: is anything growing, was anything lost, and the report of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP_SHARE = 0.25  # of the time, in which caches and pools fill
UNITS = {
    "rss_mib": "memory (RSS), MiB", "pss_mib": "memory (PSS), MiB", "fds": "file descriptors", "threads": "threads",
}  # fmt: skip
# How much the trend line may rise from the end of the warm-up to the end of the run. PSS is not judged: it says as much
# about the other processes of the machine as about these.
ALLOWED = {"rss_mib": 8.0, "fds": 3.0, "threads": 2.0}
MEMORY = """\
RSS is judged: all that is resident in these processes, each library counted in each of them. PSS is what they cost the
machine, and is only shown: a library's pages are divided among all processes that have them mapped, so it moves by up to
20 MiB when another one with the same libraries starts or ends, while these go on as before.

The first swap takes 7 MiB for good: 5 of them are the HTTP library, which only an update needs and imports. What still fills
up has an end: the holes in the allocator's arenas (8 a core; each unloading gives back what it can), the newest events, the
latencies of the open metrics window, the looks within one de-duplication window. Each request and each escalation leaves
nothing behind. SQLite holds 2 MiB from the beginning on, and peaks of 32 MiB are files that are too large.
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the daemon and its engines' processes, `at` seconds into the run."""

    at: float
    rss_mib: float
    pss_mib: float
    fds: int
    threads: int


@dataclass(frozen=True, slots=True)
class Trend:
    """A quantity's median, highest value and rise, by its trend line, after the warm-up; `rise` may be `allowed` (None:
    it is shown, and not judged)."""

    median: float
    highest: float
    rise: float
    allowed: float | None

    @property
    def flat(self) -> bool:
        """Whether it does not grow, or is not judged. What falls is no leak."""
        return self.allowed is None or self.rise <= self.allowed


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs of points (Theil 1950, Sen 1968): a few outliers do not move it."""
    slopes = [(y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 > x1]
    return statistics.median(slopes) if slopes else 0.0


def trends(readings: Sequence[Reading], seconds: float) -> dict[str, Trend]:
    """Of every quantity, after the warm-up."""
    late = [reading for reading in readings if reading.at >= WARM_UP_SHARE * seconds]
    out = {}
    for name in UNITS:
        values = [float(getattr(reading, name)) for reading in late]
        points = list(zip([reading.at for reading in late], values, strict=True))
        rise = slope(points) * (points[-1][0] - points[0][0]) if points else 0.0
        out[name] = Trend(statistics.median(values), max(values), rise, ALLOWED.get(name))
    return out


def plot(path: Path, readings: Sequence[Reading], events: Sequence[tuple[float, str]]) -> None:
    """The readings over time, the disturbances as marks across them; the format follows from the name of `path`."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, axes = pyplot.subplots(len(UNITS), 1, figsize=(9, 8), sharex=True)
    colours = {"broker": "#c0392b", "reload": "#2980b9", "swap": "#27ae60"}
    minutes = [reading.at / 60 for reading in readings]
    for axis, name in zip(axes, UNITS, strict=True):
        axis.plot(minutes, [getattr(reading, name) for reading in readings], color="#333333", linewidth=1.2)
        axis.set_ylabel(UNITS[name], fontsize=8)
        axis.set_ylim(0, 1.15 * max(getattr(reading, name) for reading in readings))
        axis.grid(alpha=0.3)
        for kind, colour in colours.items():
            at = [when / 60 for when, what in events if what.startswith(kind)]
            for when in at:
                axis.axvline(when, color=colour, alpha=0.35, linewidth=0.8)
    handles = [Line2D([], [], color=colour, label=kind) for kind, colour in colours.items()]
    axes[0].legend(handles=handles, loc="lower right", fontsize=7, ncols=3)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def markdown(result: dict[str, Any], plot_name: str) -> str:
    """The report."""
    verdict = "passed" if result["passed"] else "FAILED: " + "; ".join(result["failures"])
    lines = [
        "# Soak",
        "",
        f"`make soak` ran for {result['minutes']:g} minutes on {result['machine']}: **{verdict}**.",
        "",
        "One `edged run` with a folder of pictures, requests with pictures, requests for text (a small Phi in a process of "
        f"its own){', a camera' if result['camera'] else ''}, and a second device that answers what it escalates. Meanwhile "
        "the broker was stopped or killed, the configuration reloaded (good and bad), the release swapped, and bad items "
        "came in. After the warm-up (the first quarter) nothing may grow: the rise of the trend line (Theil-Sen) over the "
        "rest is compared with an allowance.",
        "",
        f"![Memory, file descriptors and threads over time]({plot_name})",
        "",
        "| daemon and its engines' processes | median | highest | rise | allowed | flat |",
        "|---|---|---|---|---|---|",
    ]
    for name, trend in result["trends"].items():
        judged = f"{trend['allowed']:g} | {'yes' if trend['flat'] else 'NO'}" if name in ALLOWED else "not judged | "
        lines.append(
            f"| {UNITS[name]} | {trend['median']:.1f} | {trend['highest']:.1f} | {trend['rise']:+.2f} | {judged} |"
        )
    lines += ["", MEMORY.rstrip()]
    for title, key in (("Put in", "put_in"), ("Came out", "came_out"), ("Disturbed by", "disturbed")):
        lines += ["", f"| {title} | |", "|---|---|", *(f"| {name} | {count} |" for name, count in result[key].items())]
    lines += ["", "Counters of the device at the end:", "", "```"]
    lines += [f"{name} {count}" for name, count in result["counters"].items()]
    return "\n".join([*lines, "```", ""])
