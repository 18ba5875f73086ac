"""`edged status` for people: what is wrong first, with its fix, then what runs; one screen, from the status document."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edged.status_socket import STATUS_SOCKET

EVENTS_SHOWN = 5
WATCH_S = 2.0
TITLE = 10  # characters of the longest: responders
OUTBOX_SHARE_MAX = 0.9
PACE_MIN = 0.98  # slower than this is worth a line
UNDER_WAY = ("accepted", "downloading", "verifying", "proving", "staged", "switched", "reverting")
BOLD, RED, YELLOW, GREEN, PLAIN = "\033[1m", "\033[31m", "\033[33m", "\033[32m", "\033[0m"

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """`what`: the part that has it."""

    what: str
    text: str
    fix: str


def whereabouts(config: Path) -> tuple[Path, str]:
    """The state folder that a configuration names, and what is wrong with the file: a daemon may run on with what it
    said before."""
    import tomllib

    from edged.config import ConfigError, Device, load

    try:
        return load(config).device.state_dir, ""
    except ConfigError as error:
        wrong = str(error)
    try:
        named = os.environ.get("EDGED_DEVICE__STATE_DIR") or tomllib.loads(config.read_text())["device"]["state_dir"]
        return Path(named), wrong
    except (OSError, ValueError, KeyError, TypeError):
        return Path(Device.model_fields["state_dir"].default), wrong


def problems(status: Document) -> list[Problem]:
    """Everything that a person should look at: what the daemon says of itself, and what its figures say."""
    health = status.get("health") or {}
    found = [Problem(p["what"], p["text"], p.get("fix", "")) for p in health.get("problems", [])]
    known = {problem.what for problem in found}
    found += [problem for problem in (*_parts(status), *_updates(status), *_room(status)) if problem.what not in known]
    return found


def _parts(status: Document) -> Iterator[Problem]:
    restart = "see the log, and restart the daemon: systemctl restart edged"
    if status.get("broker") != "connected":
        fix = "`edged check` tries the address and the certificates; items are answered without it too"
        yield Problem("broker", f"not connected: {status.get('broker')}", fix)
    for loop, seconds in (status.get("stalled") or {}).items():
        yield Problem(f"thread {loop}", f"{loop} has stood still for {seconds:.0f} s", restart)
    for kind in ("pipelines", "responders"):
        for name, pipeline in (status.get(kind) or {}).items():
            what = f"{kind[:-1]} {name}"
            if not pipeline.get("alive", True):
                yield Problem(what, f"{name}: its threads have ended", restart)
            if not pipeline.get("source_alive", True):
                yield Problem(f"source of {name}", f"{name}: its source has ended", restart)
            if pipeline.get("breaker") == "open":
                fix = "start a responder of its tier, or see why none answers; until then nobody is kept waiting"
                yield Problem(f"{what}: questions", f"{name}: nobody answers its questions", fix)


def _updates(status: Document) -> Iterator[Problem]:
    for name, model in (status.get("models") or {}).items():
        if not model.get("active") and model.get("update") not in UNDER_WAY and _used(status, name):
            fix = "set `seed` in its slot, or let the fleet desire a release for it"
            yield Problem(f"slot {name}", f"{name}: no model answers", fix)
        if model.get("update") in ("failed", "reverted") and not model.get("held"):
            text = f"{name}: the last update {model['update']}: {model.get('reason') or 'no reason known'}"
            yield Problem(f"update of {name}", text, "desire another release; the one before goes on serving")


def _used(status: Document, slot: str) -> bool:
    users = [*(status.get("pipelines") or {}).values(), *(status.get("responders") or {}).values()]
    return any(user.get("slot", slot) == slot for user in users)


def _room(status: Document) -> Iterator[Problem]:
    limits, outbox = status.get("outbox_limits") or {}, status.get("outbox") or {}
    for unit, key in (("messages", "outbox_rows_max"), ("bytes", "outbox_bytes_max")):
        most = limits.get(unit)
        if most and outbox.get(unit, 0) >= OUTBOX_SHARE_MAX * most:
            text = f"{outbox[unit]} of {most} {unit} wait to be sent: what finds it full is dropped or waits"
            yield Problem("outbox", text, f"connect the broker, or raise {key} in [store]")
            break
    if (status.get("storage") or {}).get("full"):
        fix = "let the trainer use and archive samples, or raise blob_bytes_max in [store]"
        yield Problem("store", "nothing is left to evict: no samples are captured", fix)
    share = status.get("pace", 1.0)
    if share < PACE_MIN:
        why = (status.get("limits") or {}).get("why") or "its limits"
        fix = "cool the device, give it more memory or cores, or lower the frame rate"
        yield Problem("pace", f"works {share:.0%} of the time, because of {why}", fix)


def rounds(*, again: bool) -> Iterator[None]:
    """Once, or every WATCH_S on a cleared screen until Ctrl-C."""
    yield
    while again:
        try:
            time.sleep(WATCH_S)
        except KeyboardInterrupt:
            return
        print("\033[2J\033[H", end="")
        yield


def silence(state_dir: Path, config: Path) -> str:
    """Why no daemon answers, and the fix."""
    path = state_dir / STATUS_SOCKET
    if not os.access(state_dir if state_dir.exists() else state_dir.parent, os.X_OK):
        return (
            f"{state_dir}: user {os.geteuid()} may not look into it; run this as root, or as the user that runs edged"
        )
    if path.exists() and not os.access(path, os.W_OK):
        return f"{path}: user {os.geteuid()} may not ask; run this as root, or as the user that runs edged"
    return f"no edged runs with state_dir {state_dir}; start it with `edged run --config {config}`"


def render(status: Document, *, colour: bool = False, zone: Any = None) -> list[str]:
    """The lines of the screen. `zone`: of the times (None: the machine's)."""
    paint = _Paint(colour)
    found = problems(status)
    lines = [paint(BOLD, _headline(status))]
    summary = (status.get("health") or {}).get("summary", "")
    if found:
        lines.append(
            paint(RED, f"{len(found)} problem{'s' if len(found) > 1 else ''}") + (f"   {summary}" * bool(summary))
        )
        for problem in found:
            lines.append(f"  {paint(RED, '!')} {problem.what}: {problem.text}")
            lines += [f"      fix: {problem.fix}"] * bool(problem.fix)
    else:
        lines.append(paint(GREEN, "healthy") + (f"   {summary}" * bool(summary)))
    lines.append(_line("broker", status.get("broker")))
    lines += _models(status, paint)
    for kind in ("pipelines", "responders"):
        lines += _pipelines(kind, status.get(kind) or {})
    lines += _streams(status.get("streams") or {})
    lines += _store(status)
    lines += _trust(status)
    lines += _machine(status)
    events = (status.get("events") or [])[-EVENTS_SHOWN:]
    for number, event in enumerate(reversed(events)):
        when = datetime.fromtimestamp(event["at"], zone)
        lines.append(_line("" if number else "events", f"{when:%m-%d %H:%M:%S}  {event['kind']}: {event['text']}"))
    return lines


def _line(title: str, text: Any) -> str:
    return f"{title:<{TITLE}} {text}"


def _streams(rows: Document) -> Iterator[str]:
    for number, (name, row) in enumerate(rows.items()):
        why = f": {row['why']}" if row.get("why") and row.get("state") != "streaming" else ""
        age = f"   newest frame {row['frame_age_s']:.0f} s ago" if row.get("frame_age_s") is not None else ""
        yield _line("" if number else "streams", f"{name}: {row.get('stream')}   {row.get('state')}{why}{age}")


class _Paint:
    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, code: str, text: str) -> str:
        return f"{code}{text}{PLAIN}" if self._colour else text


def _headline(status: Document) -> str:
    parts = [f"{status.get('device')} ({status.get('site')})", f"edged {status.get('version', '?')}"]
    if status.get("profile"):
        parts.append(f"profile {status['profile']}")
    parts.append(f"pid {status.get('pid')}")
    if status.get("since") and status.get("now"):
        parts.append(f"up {duration(status['now'] - status['since'])}")
    return "   ".join(parts)


def _models(status: Document, paint: _Paint) -> Iterator[str]:
    for number, (name, model) in enumerate((status.get("models") or {}).items()):
        active = model.get("active") or "none"
        adapter = f" + {model['adapter']}" if model.get("adapter") else ""
        update = str(model.get("update", "idle"))
        if model.get("staged"):
            update += f" {model['staged']}"
        if update.startswith(UNDER_WAY):
            update = paint(YELLOW, update)
        for word, key in (("pinned to", "pinned"), ("holds off", "held"), ("adapter pinned to", "adapter_pinned"),
                          ("holds off", "adapter_held")):  # fmt: skip
            update += f"   {word} {model[key]}" if model.get(key) else ""
        swap = f"   last swap {model['swap_ms']:.0f} ms" if model.get("swap_ms") is not None else ""
        yield _line("" if number else "models", f"{name}: {active}{adapter}   update: {update}{swap}")


def _pipelines(kind: str, rows: Document) -> Iterator[str]:
    for number, (name, row) in enumerate(rows.items()):
        totals = row.get("totals") or {}
        items, decisions = totals.get("items", 0), totals.get("decisions") or {}
        asked = sum((decisions.get("escalate") or {}).values())
        share = f", {asked / items:.1%} escalated" if items else ""
        errors = totals.get("errors", 0)
        breaker = "" if row.get("breaker", "closed") == "closed" else f"   breaker {row['breaker']}"
        text = f"{name}: {row.get('source', '?')} -> {row.get('slot', '?')}   {row.get('waiting', 0)} waiting, "
        yield _line("" if number else kind, f"{text}{items} answered{share}, {errors} errors{breaker}")


def _store(status: Document) -> Iterator[str]:
    store, samples = status.get("storage") or {}, status.get("samples") or {}
    kept = ", ".join(f"{name} {count}" for name, count in samples.items() if count) or "none"
    if "bytes" in store:
        full = "   FULL" if store.get("full") else ""
        used = f"{size(store['bytes'])} of {size(store.get('bytes_max', 0))} used"
        yield _line("store", f"{used}, {size(store.get('free', 0))} free on the disk{full}")
    yield _line("samples", kept)
    outbox = status.get("outbox") or {}
    yield _line("outbox", f"{outbox.get('messages', 0)} messages, {size(outbox.get('bytes', 0))}")


def _trust(status: Document) -> Iterator[str]:
    trust, now = status.get("trust") or {}, status.get("now") or 0.0
    if trust.get("mode") == "signed" and "at" in trust:
        ends = min(trust["expires"].values(), default=0.0)
        until = f"good for {duration(ends - now)}" if ends > now else "expired since, renewed with the next install"
        text = f"root {trust['root_version']}, metadata checked {duration(now - trust['at'])} ago, {until}"
    else:
        text = {
            "signed": "signed releases only; no metadata was checked yet",
            "unsigned": "unsigned: whatever desired state names is installed",
            "closed": "no root: every release is refused; enrol this device",
        }.get(str(trust.get("mode")), "")
    if text:
        yield _line("trust", text)


def _machine(status: Document) -> Iterator[str]:
    usage, limits = status.get("usage") or {}, status.get("limits") or {}
    parts = []
    if usage:
        memory = sum(usage[part].get("pss_bytes", 0) for part in ("daemon", "engines") if part in usage)
        parts.append(f"{size(memory)} of memory")
    degrees = (limits.get("temperature") or {}).get("c")
    if degrees is not None:
        parts.append(f"{degrees:.0f} °C")
    if "pace" in status:
        parts.append(f"works {status['pace']:.0%} of the time")
    if parts:
        yield _line("machine", ", ".join(parts))


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """The two greatest units of a time span."""
    whole = max(0, int(seconds))
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((i for i, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2])
