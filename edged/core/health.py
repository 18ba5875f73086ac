"""Whether the daemon is ready, what is wrong with it, and whether it may go on, from what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DISK_FREE_BYTES_MIN = 16 << 20  # the store's log may take as much between two checkpoints
BROKER_CHARS_MAX = 60  # of why there is no connection, in the summary

Awaits = Literal["nothing", "seed", "release"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a person should look at. `fatal`: only a restart can help, so the watchdog is not fed."""

    what: str  # a part of the daemon, and its name: `slot eye`
    text: str
    fix: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """`live`: the release that answers, if any; `awaits`: where it would come from: the device's own `seed`, or a
    `release` that is active."""

    live: str | None = None
    awaits: Awaits = "nothing"


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. `looped`: the control loop came round. `stalled`: loop -> seconds that it stood still, of those that
    did for too long. `ended`: threads that have ended by themselves. `network`: the link's thread runs. `broker`:
    "connected", or why not; None before the first try. `disk_free`: bytes; None: it cannot be told. `write_errors`: the
    store did not take something lately. `store_error`: why it cannot be read. `config_error`: why the newest configuration
    is not in use. `refused`: topics that the broker does not send us. `more`: problems that other parts report of
    themselves."""

    looped: bool = True
    stalled: Mapping[str, float] = field(default_factory=dict)
    ended: tuple[str, ...] = ()
    network: bool = True
    broker: str | None = None
    refused: tuple[str, ...] = ()
    slots: Mapping[str, SlotFacts] = field(default_factory=dict)
    disk_free: int | None = None
    state_dir: str = ""
    write_errors: bool = False
    store_error: str = ""
    config_error: str = ""
    more: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Health:
    """`ready`: every model that this device has answers. `moves`: the watchdog may be fed. `summary`: one line."""

    ready: bool
    moves: bool
    problems: tuple[Problem, ...]
    summary: str

    def document(self) -> dict[str, Any]:
        """As `edged status` and `up/reported` show it."""
        problems = [{"what": p.what, "text": p.text, "fix": p.fix} for p in self.problems]
        return {"ready": self.ready, "summary": self.summary, "problems": problems}


def assess(facts: Facts) -> Health:
    """What the facts mean."""
    problems = (*_threads(facts), *_slots(facts), *_storage(facts), *_others(facts), *facts.more)
    moves = not any(problem.fatal for problem in problems)
    waiting = [name for name, slot in facts.slots.items() if slot.live is None and slot.awaits != "nothing"]
    ready = facts.looped and not waiting
    return Health(ready, moves, problems, _summary(facts, ready, waiting, len(problems)))


def _threads(facts: Facts) -> list[Problem]:
    restart = "edged is restarted by the service manager's watchdog; without one: systemctl restart edged"
    out = [
        Problem(f"thread {name}", f"{name} has stood still for {seconds:.0f} s", restart, fatal=True)
        for name, seconds in sorted(facts.stalled.items())
    ]
    out += [Problem(f"thread {name}", f"{name} has ended by itself", restart, fatal=True) for name in facts.ended]
    if not facts.network:
        out.append(Problem("thread network", "the MQTT network thread is dead", restart, fatal=True))
    return out


def _slots(facts: Facts) -> list[Problem]:
    fixes = {
        "seed": "see the log; `edged check` proves the seed",
        "release": "see the log; `edged models list` shows what is damaged; the fleet may desire another release",
    }
    return [
        Problem(f"slot {name}", f"{name}: no model answers", fixes[slot.awaits])
        for name, slot in sorted(facts.slots.items())
        if slot.live is None and slot.awaits != "nothing"
    ]


def _storage(facts: Facts) -> list[Problem]:
    out = []
    if facts.store_error:
        out.append(Problem("store", facts.store_error, "see the log: is the disk there, and is it sound?"))
    if facts.disk_free is not None and facts.disk_free < DISK_FREE_BYTES_MIN:
        text = f"{facts.disk_free >> 20} MiB free at {facts.state_dir}; at least {DISK_FREE_BYTES_MIN >> 20} are needed"
        out.append(Problem("disk", text, "free some, or give state_dir a larger disk"))  # a restart would not help
    elif facts.write_errors:
        text = f"the store at {facts.state_dir} did not take everything: what waits is tried again"
        out.append(Problem("store", text, "see the log: the disk may be full or failing, or the outbox at its limit"))
    return out


def _others(facts: Facts) -> list[Problem]:
    out = []
    if facts.broker not in (None, "connected"):
        fix = "`edged check` tries the address and the certificates; items are answered without it too"
        out.append(Problem("broker", f"not connected: {facts.broker}", fix))
    if facts.refused:
        text = f"the broker refuses to send {', '.join(sorted(facts.refused))} to this device"
        out.append(Problem("broker rights", text, "correct the broker's access list, then restart edged"))
    if facts.config_error:
        text = f"the newest configuration is refused, the one before is in use: {facts.config_error}"
        out.append(Problem("config", text, "correct the file (`edged check`); it is loaded again when it changes"))
    return out


def _summary(facts: Facts, ready: bool, waiting: list[str], problems: int) -> str:
    serving = sum(slot.live is not None for slot in facts.slots.values())
    if not facts.looped:
        head = "starting"
    elif not ready:
        head = f"not ready: no model answers in {', '.join(sorted(waiting))}"
    elif not serving:
        head = "ready; no model yet"
    else:
        head = f"serving {serving} model{'s' if serving > 1 else ''}"
    broker = facts.broker or "not connected yet"
    if len(broker) > BROKER_CHARS_MAX:
        broker = broker[: BROKER_CHARS_MAX - 3] + "..."
    tail = f"; {problems} problem{'s' if problems > 1 else ''}" if problems else ""
    return f"{head}; broker: {broker}{tail}"
