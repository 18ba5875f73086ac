"""Firmware profiles: what edged knows about a kind of device, in one TOML file each.

A profile gives defaults that lie beneath the device's configuration: what the configuration says wins, key by key.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from edged import profile_facts
from edged.config import Provider
from edged.config_sources import Name, Seconds, Section
from edged.core import lay
from edged.core.detect import Choice, Facts, Other, Rule, choose
from edged.core.lay import AUTO, BUILT_IN

PROFILES_MAX = 256  # files that are looked at in one folder
Threads = Annotated[int, Field(ge=1, le=256)] | Literal["auto"]
Mib = Annotated[int, Field(ge=1)]


def folders() -> tuple[Path, ...]:
    """Where profiles are looked for; the first that has a name has it: the operator's own, the system package's, a
    checkout's, an installed wheel's."""
    return (
        Path("/etc/edged/profiles"),
        Path("/usr/share/edged/profiles"),
        Path(__file__).parents[1] / "firmware_profiles",
        Path(sys.prefix) / "share" / "edged" / "profiles",
    )


class ProfileError(Exception):
    """A profile cannot be found or used; the message names the profile, the key, the value and the fix."""


class Detect(Section):
    """The machines that a profile is for, see core.detect.Rule."""

    architecture: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    tegra: bool | None = None
    nvidia: bool | None = None
    cores_min: int | None = None
    cores_max: int | None = None
    memory_mib_min: int | None = None
    memory_mib_max: int | None = None

    @property
    def rule(self) -> Rule:
        """The same for the decision."""
        return Rule(**self.model_dump())


class DeviceDefaults(Section):
    """Defaults of [device]."""

    tier: Name = "device"


class KindDefaults(Section):
    """Defaults of the slots for one kind of model."""

    isolation: Literal["process", "daemon"] | None = None
    swap: Literal["beside", "replace"] | None = None  # None: as every slot
    latency_ms_max: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = (
        None  # for an answer in proving; None: any
    )
    extra: dict[str, Any] = {}


class SlotDefaults(Section):
    """Defaults of every slot. `threads`: "auto" is the slot's share of the cores; a number is the most of that share."""

    providers: list[Provider] = ["cpu"]
    threads: Threads = "auto"
    swap: Literal["beside", "replace"] = "beside"
    prove_s_max: Seconds = 60.0
    probation_s: Seconds = 60.0
    vision: KindDefaults = KindDefaults()
    language: KindDefaults = KindDefaults(isolation="process")

    @model_validator(mode="after")
    def _vision_in_the_daemon(self) -> SlotDefaults:
        if self.vision.isolation == "process":
            raise ValueError('vision.isolation = "process": only language models run in a process of their own')
        return self


class LimitsDefaults(Section):
    """Defaults of [limits]. `memory_mib`: "auto" is three quarters of what the machine has; a number is never more."""

    memory_mib: Mib | Literal["auto"] | None = None
    temperature_soft_c: Annotated[float, Field(gt=0, lt=150)] | None = None
    temperature_hard_c: Annotated[float, Field(gt=0, lt=150)] | None = None
    cpu_share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _soft_below_hard(self) -> LimitsDefaults:
        soft, hard = self.temperature_soft_c, self.temperature_hard_c
        if soft is not None and hard is not None and soft >= hard:
            raise ValueError(f"temperature_soft_c = {soft} must be below temperature_hard_c = {hard}")
        return self


class HostDefaults(Section):
    """Defaults of [host]."""

    carrier: Literal["https"] = "https"


class Claim(Section):
    """The largest model of one kind that a profile claims to carry: its network, its file, and the memory of a process
    that holds it alone."""

    model: str
    file_mib: Annotated[float, Field(gt=0)]
    memory_mib: Mib
    precision: str | None = None  # None: as [carries] says
    image_size: int | None = None
    context: int | None = None  # tokens, language models only
    machine_mib: Mib | None = None  # None: as [carries] says


class Carries(Section):
    """What a profile claims to carry on a machine with `machine_mib` of memory or more: a model of vision, and beside it the
    language model. A kind that is missing is not claimed."""

    machine_mib: Mib
    precision: Literal["int8", "fp32"]
    image_size: Annotated[int, Field(ge=32, le=8192)]  # pixels, the longer side of the model's input
    detect: Claim | None = None
    segment: Claim | None = None
    classify: Claim | None = None
    llm: Claim | None = None

    def claim(self, kind: str) -> Claim | None:
        """The claim about releases of `kind` with everything filled in; None: there is none."""
        found: Claim | None = getattr(self, kind, None) if kind in KINDS else None
        if found is None:
            return None
        own: dict[str, Any] = {"machine_mib": found.machine_mib or self.machine_mib}
        if kind != "llm":
            own |= {"precision": found.precision or self.precision, "image_size": found.image_size or self.image_size}
        return found.model_copy(update=own)


KINDS = ("detect", "segment", "classify", "llm")


class Profile(Section):
    """One profile."""

    name: Name
    description: str = ""
    detect: Detect = Detect()
    device: DeviceDefaults = DeviceDefaults()
    slot: SlotDefaults = SlotDefaults()
    limits: LimitsDefaults = LimitsDefaults()
    host: HostDefaults = HostDefaults()
    carries: Carries | None = None

    @model_validator(mode="after")
    def _no_reserved_name(self) -> Profile:
        if self.name in (BUILT_IN, AUTO):
            raise ValueError(f"name = {self.name!r} means something else already: choose another name")
        return self


def read(path: Path) -> Profile:
    """The profile in a file; raises ProfileError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"profile {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise ProfileError(f"profile {path}: not TOML: {error}") from None
    try:
        return Profile(**tables)
    except (ValidationError, TypeError) as error:
        raise ProfileError(f"profile {path}: {_first(error)}") from None


def _first(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    item = error.errors(include_url=False)[0]
    key = ".".join(map(str, item["loc"]))
    value = item.get("input")
    shown = "" if isinstance(value, Mapping) or item["type"] == "missing" else f" = {value!r}"
    return f"{key}{shown}: {item['msg'].removeprefix('Value error, ')}"


def paths(where: Iterable[Path] | None = None) -> dict[str, Path]:
    """Every profile's file by its name (the file's, without .toml), sorted."""
    found: dict[str, Path] = {}
    for folder in folders() if where is None else where:
        for path in sorted(folder.glob("*.toml"))[:PROFILES_MAX]:
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def path_of(wanted: str, where: Iterable[Path] | None = None) -> Path:
    """The file of a profile, by its name or by the path itself; raises ProfileError."""
    if "/" in wanted or wanted.endswith(".toml"):
        return Path(wanted)
    known = paths(where)
    if wanted in known:
        return known[wanted]
    said = ", ".join(known) or "none found"
    raise ProfileError(
        f"no profile {wanted!r}: use one of {said}, the path of a file, {AUTO!r} or {BUILT_IN!r} (built-in defaults)"
    )


def find(wanted: str, where: Iterable[Path] | None = None) -> Profile:
    """A profile by its name, or by the path of its file; raises ProfileError."""
    path = path_of(wanted, where)
    found = read(path)
    if path != Path(wanted) and found.name != wanted:
        raise ProfileError(f"profile {path}: name = {found.name!r}: a profile is named like its file, {wanted!r}")
    return found


def detect(facts: Facts, where: Iterable[Path] | None = None) -> Choice:
    """The profile for a machine, and why. A file that cannot be used is one of the others, with the error as the reason."""
    rules: dict[str, Rule] = {}
    broken: list[Other] = []
    for name in paths(where):
        try:
            rules[name] = find(name, where).detect.rule
        except ProfileError as error:
            broken.append(Other(name, False, (str(error),)))
    choice = choose(rules, facts)
    return replace(choice, others=(*choice.others, *broken))


def chosen(wanted: str, facts: Facts, where: Iterable[Path] | None = None) -> Profile | None:
    """The profile that `device.profile` asks for, None for the built-in defaults; raises ProfileError."""
    if wanted == BUILT_IN:
        return None
    if wanted != AUTO:
        return find(wanted, where)
    choice = detect(facts, where)
    if choice.name is None:
        raise ProfileError(no_fit(choice, facts))
    return find(choice.name, where)


def no_fit(choice: Choice, facts: Facts) -> str:
    """What to say where no profile fits."""
    nearest = f"; the nearest is {choice.others[0].name}: {'; '.join(choice.others[0].why)}" if choice.others else ""
    return (
        f"no profile fits this machine ({described(facts)}){nearest}; write one (docs/profiles.md) and give its path, or "
        f"use {BUILT_IN!r}, the built-in defaults"
    )


def described(facts: Facts) -> str:
    """A machine in one line."""
    board = [facts.model or ", ".join(facts.hints[:2])]
    more = [f"GPU {facts.nvidia}" if facts.nvidia else "", f"Tegra {facts.tegra}" if facts.tegra else ""]
    numbers = [facts.architecture, f"{facts.cores} cores", f"{facts.memory_mib} MiB"]
    return ", ".join(text for text in (*numbers, *board, *more) if text)


def as_json(choice: Choice, facts: Facts) -> dict[str, Any]:
    """A choice for scripts."""
    return {"profile": choice.name, "reasons": list(choice.reasons), "machine": asdict(facts),
            "others": [asdict(other) for other in choice.others]}  # fmt: skip


def laid(
    tables: dict[str, Any], environment: dict[str, Any], known: Container[str], facts: Facts | None = None,
    where: Iterable[Path] | None = None,
) -> tuple[Profile | None, dict[str, Any]]:  # fmt: skip
    """The profile that a configuration file's `tables` ask for, and those tables with the profile beneath them.

    `environment` are the tables that will lie above both; `known` are the names of the tables that a configuration has.
    `facts`: this machine's by default. Raises ProfileError.
    """
    view = lay.beneath(tables, environment)
    device, slots = _table(view, "device"), _table(view, "slots")
    slots = {name: slot for name, slot in slots.items() if isinstance(slot, Mapping)}
    wanted = str(device.get("profile", BUILT_IN))
    facts = facts or profile_facts.facts()
    profile = chosen(wanted, facts, where)
    out = tables
    if profile is not None:
        below = _defaults(profile, facts) | {"slots": {name: _slot_defaults(profile, name, view) for name in slots}}
        out = lay.beneath({name: table for name, table in below.items() if name in known}, tables)
    for name, threads in _threads(profile, slots, facts).items():
        out = lay.beneath(out, {"slots": {name: {"threads": threads}}})
    return profile, out


def _table(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tables.get(name)
    return found if isinstance(found, Mapping) else {}  # anything else is refused by the configuration itself


def _defaults(profile: Profile, facts: Facts) -> dict[str, Any]:
    limits = profile.limits.model_dump(exclude_none=True)
    memory = lay.memory_limit(limits.pop("memory_mib", None), facts.memory_mib)
    if memory is not None:
        limits["memory_mib"] = memory
    return {"device": profile.device.model_dump(), "host": profile.host.model_dump(), "limits": limits}


def _slot_defaults(profile: Profile, slot: str, view: Mapping[str, Any]) -> dict[str, Any]:
    own = profile.slot.model_dump(exclude={"threads", "vision", "language"})
    kind = lay.slot_kind(slot, view, _seed_kind(view["slots"][slot].get("seed")))
    if kind is not None and not view["slots"][slot].get("server"):  # whose model is another machine's
        table: KindDefaults = getattr(profile.slot, kind)
        own |= table.model_dump(exclude_none=True)
    return own


def _seed_kind(seed: Any) -> str | None:
    """The kind of the release in a folder; None where there is none that can be read."""
    from edged.releases import BadRelease, read_manifest

    if not isinstance(seed, str | Path):
        return None
    try:
        return read_manifest(Path(seed)).kind
    except (BadRelease, OSError, ValueError):
        return None  # `edged check` and the daemon say what is wrong with it


def _threads(profile: Profile | None, slots: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, int]:
    """Threads of every slot for which the configuration gives no number."""
    fixed: dict[str, int] = {}
    asked = []
    for name, slot in slots.items():
        wanted = slot.get("threads", AUTO if profile is not None else 1)
        if wanted == AUTO:
            asked.append(name)
        elif str(wanted).isdigit():  # anything else is refused by the configuration itself
            fixed[name] = int(wanted)
    most = None if profile is None or profile.slot.threads == "auto" else profile.slot.threads
    shares = lay.share_cores(facts.cores, (*asked, *fixed), fixed, most)
    return {name: shares[name] for name in asked}
