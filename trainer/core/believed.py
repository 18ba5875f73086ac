"""What of a device's words is believed: counts that fit together, times that can be, text that stays on its line. Pure.

A device may be broken, or somebody else's by now. What types and bounds alone tell is in `edged.wire`; here is what takes
the rest of the message, or the time of receipt, to tell. Devices make only what passes here, whatever their clocks say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json

from edged.wire.measured import COUNT_MAX
from edged.wire.messages import Box, CommandState, Event, Message, Metrics, Reported, SampleEntry, State, Text

DAY_S = 86400.0
AHEAD_S_MAX = DAY_S  # a clock that is further ahead than this is not believed: the time of receipt counts
LENGTH_S_MAX = 7 * DAY_S  # of a window; what is longer began before the device's clock was set
LENGTH_S_MIN, LENGTH_S_UNKNOWN = 60.0, 3600.0  # with which a window's rate is judged
ITEMS_A_SECOND_MAX = 10_000
INCLUSION_MIN = 1e-6  # of an answer that was checked: with less, one answer would weigh more than a fleet's
REV_MAX = 1 << 30  # of a desired state: what a device says it has seen above this was never told by a trainer
NAME_MAX, KIND_MAX, REASON_MAX, TEXT_MAX = 128, 64, 500, 2000  # characters
SLOTS_MAX, CAPABILITIES_MAX = 64, 64
DETAIL_BYTES_MAX, HEALTH_BYTES_MAX, WINDOW_BYTES_MAX = 16 << 10, 64 << 10, 32 << 10  # as JSON
LATENCY_MS_MAX, MEMORY_MIB_MAX, CELSIUS_MAX = 1e9, 1e9, 1000.0


class Unbelievable(ValueError):
    """What a message says cannot be; the message names the field, the value and what could be."""


def believed(message: Message, now: float) -> Message:
    """The message as it may be taken in at `now` (seconds since the epoch): changed where a part of it can be left out or
    set right. Raises Unbelievable."""
    _clean(message)
    _short(message, "boot")
    message.ts = _time(message.ts, now)
    check = _CHECKS.get(type(message))
    if check is not None:
        check(message, now)
    return message


def on_one_line(text: str) -> str:
    """The text with a space for every character that moves the cursor, ends a line or turns the direction of writing."""
    return text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)


_AS_IT_IS = {Text: ("text",), Box: ("box", "score", "polygons")}  # answers in words, and numbers that are typed


def _clean(part: BaseModel) -> None:
    """Every text but answers in words on one line, and no number that JSON does not have."""
    for fields in (part.__dict__, part.__pydantic_extra__ or {}):
        for name, value in fields.items():
            if type(value) not in (int, bool) and name not in _AS_IT_IS.get(type(part), ()):
                fields[name] = _cleaned(value)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return on_one_line(value)
    if isinstance(value, BaseModel):
        _clean(value)
    elif isinstance(value, dict):
        return {on_one_line(str(key)): _cleaned(each) for key, each in value.items()}
    elif isinstance(value, list) and value and not all(type(each) is int for each in value):
        return [_cleaned(each) for each in value]
    elif isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _short(part: BaseModel, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None and len(value) > NAME_MAX:
            raise Unbelievable(f"{name}: {len(value)} characters ({value[:20]!r}...), at most {NAME_MAX} name anything")


def _time(value: float, now: float) -> float:
    return max(0.0, value if value <= now + AHEAD_S_MAX else now)


def _size(value: Any) -> int:
    return len(to_json(value, inf_nan_mode="constants"))


def _state(message: State, _now: float) -> None:
    message.tier, message.profile = message.tier[:NAME_MAX], message.profile[:NAME_MAX]
    message.capabilities = [each[:NAME_MAX] for each in message.capabilities[:CAPABILITIES_MAX]]


def _reported(message: Reported, _now: float) -> None:
    if len(message.models) > SLOTS_MAX:
        raise Unbelievable(f"models: {len(message.models)} slots, a device has at most {SLOTS_MAX}")
    message.desired_rev = min(message.desired_rev, COUNT_MAX)
    for slot, report in message.models.items():
        if len(slot) > NAME_MAX:
            raise Unbelievable(f"models: a slot of {len(slot)} characters ({slot[:20]!r}...), at most {NAME_MAX}")
        _short(report, "active", "previous", "staged", "adapter", "update", "pinned", "held")
        _short(report, "adapter_pinned", "adapter_held")
        report.reason = report.reason[:REASON_MAX]
        if report.__pydantic_extra__ and _size(report.__pydantic_extra__) > DETAIL_BYTES_MAX:
            report.__pydantic_extra__.clear()
    if _size(message.health) > HEALTH_BYTES_MAX:
        message.health = {}


def _metrics(message: Metrics, now: float) -> None:
    _short(message, "pipeline", "release")
    if _size(message) > WINDOW_BYTES_MAX:
        raise Unbelievable(f"a window of {_size(message)} bytes, at most {WINDOW_BYTES_MAX}")
    items, decided = message.items, message.accepted + message.audited + message.escalated
    parts = {
        "accepted + audited + escalated": decided,
        "confidence_histogram": sum(message.confidence_histogram),
        "latency_histogram": sum(message.latency_histogram),
        "reasons": sum(message.reasons.values()),
        "suppressed": sum(message.suppressed.values()),
    }
    for name, count in parts.items():
        if count > items:
            raise Unbelievable(f"{name}: {count} of {items} items")
    length = message.end - message.start
    if not 0 < length <= LENGTH_S_MAX:  # the clock was set meanwhile; the counts are right all the same
        message.start = message.end
    seconds = max(LENGTH_S_MIN, length) if 0 < length <= LENGTH_S_MAX else LENGTH_S_UNKNOWN
    for name in ("items", "errors"):
        if getattr(message, name) > ITEMS_A_SECOND_MAX * seconds:
            raise Unbelievable(
                f"{name}: {getattr(message, name)} in {seconds:.0f} s, at most {ITEMS_A_SECOND_MAX} a second"
            )
    length = message.end - message.start
    message.end = _time(message.end, now)
    message.start = max(0.0, message.end - length)
    message.latency_ms_p50 = min(max(message.latency_ms_p50, 0.0), LATENCY_MS_MAX)
    message.latency_ms_p95 = min(max(message.latency_ms_p95, 0.0), LATENCY_MS_MAX)
    _machine(message.machine)


def _machine(machine: Any) -> None:
    """A sensor that shows what cannot be shows nothing."""
    for name, low, high in (("memory_mib_max", 0.0, MEMORY_MIB_MAX), ("temperature_c_max", -CELSIUS_MAX, CELSIUS_MAX)):
        value = getattr(machine, name)
        if value is not None and not low <= value <= high:
            setattr(machine, name, None)


def _sample(message: SampleEntry, now: float) -> None:
    _short(message, "sample", "pipeline", "task", "model", "release", "state", "decision")
    if message.provenance is not None:
        _short(message.provenance, "who", "release")
    for each in message.opinions:
        _short(each, "who", "release", "tier")
    message.reason = message.reason[:REASON_MAX]
    message.captured = _time(message.captured, now)


def _event(message: Event, now: float) -> None:
    """An event from the future would stand before all others until then."""
    message.ts = min(message.ts, now)
    message.kind, message.text = message.kind[:KIND_MAX], message.text[:TEXT_MAX]
    if _size(message.detail) > DETAIL_BYTES_MAX:
        message.detail = {}


def _command_state(message: CommandState, _now: float) -> None:
    message.reason = message.reason[:REASON_MAX]
    for name in ("moved", "unknown"):
        value = message.detail.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise Unbelievable(f"detail.{name}: {str(value)[:80]!r} is no list of samples")
    given = message.detail.get("refused", {})
    said = [*given, *given.values()] if isinstance(given, dict) else given
    if not isinstance(said, list) or not all(isinstance(each, str) for each in said):
        raise Unbelievable(f"detail.refused: {str(given)[:80]!r} says of no samples why they are not given")
    if isinstance(given, dict) and given:
        message.detail["refused"] = {sample: reason[:REASON_MAX] for sample, reason in given.items()}


_CHECKS: dict[type[Message], Callable[[Any, float], None]] = {
    State: _state, Reported: _reported, Metrics: _metrics, SampleEntry: _sample, Event: _event,
    CommandState: _command_state,
}  # fmt: skip
