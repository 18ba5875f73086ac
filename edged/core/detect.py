"""Which profile fits a machine: facts in, a profile's name and the reasons out.

Law of this file: a profile fits when every condition that it states holds. Of those that fit, the one whose conditions say
most about the machine is chosen: the name of a board says more than a GPU, a GPU more than a word of the maker, that more
than numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

# What the kernel calls an architecture, and what profiles call it. Others keep the kernel's name.
ARCHITECTURES = {"aarch64": "arm64", "arm64": "arm64", "x86_64": "x86-64", "amd64": "x86-64"}

SHOWN_MAX = 4  # of the words that a condition allows, where it does not hold
Topic = Literal["architecture", "model", "tegra", "nvidia", "hints", "cores", "memory"]
# How much a condition says about a machine. Each weighs more than all after it together.
WEIGHTS: dict[Topic, int] = {
    "model": 64, "tegra": 32, "nvidia": 16, "hints": 8, "cores": 4, "memory": 2, "architecture": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about a machine. Empty texts and zeros mean: not known, or not there."""

    architecture: str  # arm64, x86-64, or the kernel's name of another
    cores: int  # that this process may use
    memory_mib: int  # that this process may use
    model: str = ""  # the board, as its device tree names it
    hints: tuple[str, ...] = ()  # maker, product, board and kind of case (DMI)
    processor: str = ""  # for people: a hardened service cannot read it
    tegra: str = ""  # the release of NVIDIA's Linux for Tegra
    nvidia: str = ""  # an NVIDIA GPU on the bus, not the one inside a Tegra
    narrowed: tuple[str, ...] = ()  # what makes the process see less than the whole machine, in words


@dataclass(frozen=True, slots=True)
class Rule:
    """The machines that a profile is for. A condition that is empty or None is none; of a tuple one entry is enough."""

    architecture: tuple[str, ...] = ()
    model: tuple[str, ...] = ()  # parts of the board's name
    hints: tuple[str, ...] = ()  # parts of what `Facts.hints` says, upper and lower case alike
    tegra: bool | None = None
    nvidia: bool | None = None
    cores_min: int | None = None
    cores_max: int | None = None
    memory_mib_min: int | None = None
    memory_mib_max: int | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition held against one machine."""

    topic: Topic
    holds: bool
    text: str


@dataclass(frozen=True, slots=True)
class Other:
    """A profile that was not chosen: whether it fits too, and why not it."""

    name: str
    fits: bool
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The profile that fits best (None: none does), why, and the others, best first."""

    name: str | None
    reasons: tuple[str, ...]
    others: tuple[Other, ...]


def choose(rules: Mapping[str, Rule], facts: Facts) -> Choice:
    """The profile for a machine; of two that say as much, the first by name."""
    held = {name: tuple(conditions(rule, facts)) for name, rule in rules.items()}

    def order(name: str) -> tuple[bool, int, int, str]:
        # What fits misses nothing. Of the others the nearest comes first, and of another architecture none is near.
        missed = [condition.topic for condition in held[name] if not condition.holds]
        says = sum(WEIGHTS[condition.topic] for condition in held[name])
        return "architecture" in missed, sum(WEIGHTS[topic] for topic in missed), -says, name

    ranked = sorted(rules, key=order)
    best = ranked[0] if ranked and all(condition.holds for condition in held[ranked[0]]) else None
    others = tuple(_other(name, held[name]) for name in ranked if name != best)
    return Choice(best, tuple(c.text for c in held[best]) if best is not None else (), others)


def _other(name: str, held: tuple[Condition, ...]) -> Other:
    missed = tuple(condition.text for condition in held if not condition.holds)
    return Other(name, not missed, missed or ("fits too, but says less about this machine",))


def conditions(rule: Rule, facts: Facts) -> Iterator[Condition]:
    """Every condition of `rule`, held against `facts`."""
    if rule.architecture:
        holds = facts.architecture in rule.architecture
        yield Condition("architecture", holds, _told("architecture", facts.architecture, holds, rule.architecture))
    if rule.model:
        holds = any(part.lower() in facts.model.lower() for part in rule.model)
        yield Condition("model", holds, _told("board", facts.model, holds, rule.model))
    if rule.tegra is not None:
        yield _presence("tegra", "Linux for Tegra", facts.tegra, rule.tegra)
    if rule.nvidia is not None:
        yield _presence("nvidia", "NVIDIA GPU", facts.nvidia, rule.nvidia)
    if rule.hints:
        found = [hint for hint in facts.hints if any(part.lower() in hint.lower() for part in rule.hints)]
        said = ", ".join(found or facts.hints)
        yield Condition("hints", bool(found), _told("hardware", said, bool(found), rule.hints))
    yield from _numbers("cores", facts.cores, " cores", rule.cores_min, rule.cores_max)
    yield from _numbers("memory", facts.memory_mib, " MiB of memory", rule.memory_mib_min, rule.memory_mib_max)


def _told(what: str, value: str, holds: bool, wanted: tuple[str, ...]) -> str:
    said = f"{what} {value!r}" if value else f"{what} unknown"
    more = f" or {len(wanted) - SHOWN_MAX} more" if len(wanted) > SHOWN_MAX else ""
    return said if holds else f"{said}; it is for {' or '.join(map(repr, wanted[:SHOWN_MAX]))}{more}"


def _presence(topic: Topic, what: str, found: str, wanted: bool) -> Condition:
    holds = bool(found) == wanted
    said = f"{what} {found!r}" if found else f"no {what}"
    return Condition(
        topic, holds, said if holds else f"{said}; it is for machines {'with' if wanted else 'without'} it"
    )


def _numbers(topic: Topic, value: int, unit: str, least: int | None, most: int | None) -> Iterator[Condition]:
    if least is None and most is None:
        return
    if value <= 0:
        yield Condition(topic, False, f"unknown number of{unit}")
        return
    holds = (least is None or value >= least) and (most is None or value <= most)
    bounds = " and ".join([f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None))
    said = f"{value}{unit}"
    yield Condition(topic, holds, f"{said}, {bounds} asked for" if holds else f"{said}; it is for {bounds}")
