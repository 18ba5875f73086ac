"""What the store takes and gives back, its limits, its errors, and the legal moves of a sample as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edged.core.retention import EVICTABLE as EVICTABLE  # what may be deleted, in this order

Json = dict[str, Any]
Status = Literal["labelled", "unresolved", "rejected"]
Keep = Literal["ack", "verdict"]

# (state, verdict) -> state. A late verdict still labels; what is not listed changes nothing.
VERDICTS: Mapping[tuple[str, str], str] = {
    ("escalated", "labelled"): "labelled",
    ("escalated", "unresolved"): "unresolved",
    ("escalated", "rejected"): "rejected",
    ("unresolved", "labelled"): "labelled",
    ("unresolved", "rejected"): "rejected",
}
# The same for a model's verdict with more opinions behind it than the model's verdict that gave the label: the late answer
# of a higher tier, up to the claim of a training. Opinions only grow, so whatever order verdicts come in, the best stays.
IMPROVEMENTS: Mapping[tuple[str, str], str] = {**VERDICTS, ("labelled", "labelled"): "labelled"}
# The same for a person's verdict, who may also correct a label until a training has claimed it.
CORRECTIONS: Mapping[tuple[str, str], str] = {
    **VERDICTS,
    ("labelled", "labelled"): "labelled",
    ("labelled", "unresolved"): "unresolved",
    ("labelled", "rejected"): "rejected",
}
# The trainer's moves: name -> (from, to).
MOVES: Mapping[str, tuple[str, str]] = {
    "claim": ("labelled", "claimed"),
    "used": ("claimed", "used"),
    "unclaim": ("claimed", "labelled"),
    "archive": ("used", "archived"),
}
# The states in which a sample has a label.
LABELLED: tuple[str, ...] = ("labelled", "claimed", "used", "archived")


class StoreError(Exception):
    """The store could not do what was asked; the message names the file and the reason. Nothing was half done."""


class StorageFull(StoreError):
    """No room for another blob or row: `evict`, then try again, or stop capturing and say so."""


class OutboxFull(StoreError):
    """The outbox is at its limit of rows or bytes; the caller decides what to give up."""


class BrokenStore(StoreError):
    """The database file is damaged; the message names the file and the fix."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Every table and folder ends somewhere. Bytes are bytes on disk without file system overhead."""

    blob_bytes_max: int = 4 << 30
    outbox_rows_max: int = 20_000
    outbox_bytes_max: int = 1 << 30
    seen_max: int = 20_000
    requests_max: int = 10_000
    requests_bytes_max: int = 64 << 20  # of their texts
    executions_max: int = 10_000  # runs of agents
    executions_bytes_max: int = 64 << 20
    free_bytes_min: int = 0  # of the file system: samples never take the last of it
    age_days: Mapping[str, float] = field(
        default_factory=dict
    )  # evictable state -> days since the capture; none: for ever
    class_max: int = 0  # evictable samples that show the same label; 0: as many as there is room for


@dataclass(frozen=True, slots=True)
class NewSample:
    """An item worth keeping. Times are seconds since the epoch; `prediction` are boxes as in `wire.messages.Box`."""

    id: str
    pipeline: str
    task: str
    model: str  # the slot
    release: str
    state: Literal["captured", "escalated"]
    reason: str
    decision: str
    confidence: float
    inclusion_probability: float
    sha256: str
    bytes: int
    prediction: list[Json]
    item: str
    captured: float
    answer_by: float | None = None
    label_by: float | None = None
    evidence: Json = field(default_factory=dict)  # what the decision was made of, for `edged why`


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample as it stands. `changed` tells whether the call that returned it moved it."""

    id: str
    pipeline: str
    task: str
    model: str
    release: str
    state: str
    reason: str
    decision: str
    confidence: float
    inclusion_probability: float
    sha256: str
    bytes: int
    prediction: list[Json]
    item: str
    captured: float
    answer_by: float | None
    label_by: float | None
    label: list[Json]
    label_confidence: float
    provenance: Json | None
    label_reason: str
    labelled: float | None  # when the verdict came
    job: str  # the training that claimed it
    used_by: str  # the release that it trained
    opinions: list[Json]  # who said what of it, as in `wire.messages.Opinion`
    evidence: Json  # what the decision was made of, for `edged why`
    changed: bool = False


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a verdict says of a sample."""

    sample: str
    status: Status
    label: list[Json]
    confidence: float
    provenance: Json
    reason: str = ""
    opinions: Sequence[Json] = ()


@dataclass(frozen=True, slots=True)
class Moved:
    """The outcome of a move of many samples: those now in the wanted state, and why the others are not."""

    samples: list[Sample]
    unknown: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # id -> the state it is in


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """A message that must reach the broker.

    `expires` is absolute (None: never). `keep` says what settles it: the broker's acknowledgement, or the verdict on
    `sample` (until its deadline), because an acknowledged escalation can still die with the broker's queue.
    """

    id: str
    topic: str
    qos: int
    retain: bool
    expires: float | None
    payload: bytes
    keep: Keep = "ack"
    sample: str | None = None
    correlation: bytes | None = None


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A stored message with its history; `attempts` counts how often it was handed to the link."""

    message: OutboxMessage
    seq: int
    enqueued: float
    due: float
    attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that can never be delivered, with the reason; long payloads are cut, `bytes` is the full size."""

    id: str
    topic: str
    sample: str | None
    payload: bytes
    bytes: int
    reason: str
    enqueued: float


@dataclass(frozen=True, slots=True)
class KnownBad:
    """A release that must not run here again, by its SHA-256, and why."""

    release: str
    sha256: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class LanguageRequest:
    """A prompt (or conversation) that a pipeline took on, kept for fine-tuning with what became of it.

    `outcome`: ok, truncated, invalid, cancelled, deadline, or error with its `reason`. `finish_reason` is the engine's,
    empty when it never ran. `options` are those that the request set: tokens_max, temperature, seed, stop, schema.
    """

    id: str
    pipeline: str
    ts: float  # when it was answered, seconds since the epoch
    prompt: str = ""
    messages: list[Json] = field(default_factory=list)  # of {role, content}; instead of `prompt`
    options: Json = field(default_factory=dict)
    answer: str = ""
    confidence: float | None = None
    outcome: str = "ok"
    reason: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    latency_ms: float = 0.0
    release: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class AgentRun:
    """A run of an agent. `record` is what it was asked, did and answered (`edged.agents.recorded`); `feedback` what people
    said of it, the oldest first."""

    id: str
    agent: str
    ts: float  # when it ended, seconds since the epoch
    record: Json
    feedback: list[Json] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Evicted:
    """What `evict` deleted."""

    samples: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Storage:
    """How full the store is. `full`: why nothing more is captured, or empty; `broken`: what damage was met since the
    start, or empty."""

    bytes: int
    bytes_max: int
    free: int  # of the file system
    free_min: int
    full: str
    broken: str


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a start found and repaired."""

    temporary: int  # half-written files of a crash, removed
    orphans: int  # blobs without a row, removed or set aside
    missing: list[str]  # samples whose blob is gone, now rejected


@dataclass(slots=True)
class Recovered:
    """What `recover` made of a broken database. `lost`: reason -> samples; `states`: state -> samples taken over."""

    file: str
    samples: int = 0
    already: int = 0  # were there from an earlier run, or captured again
    states: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    lost_ids: list[str] = field(default_factory=list)
    requests: int = 0
    damaged: int = 0  # rows and pages that are nothing any more


@dataclass(frozen=True, slots=True)
class Verified:
    """How many samples and blobs were looked at, and the blobs that are gone or not what their name says."""

    samples: int
    blobs: int
    bad_blobs: list[str]


# A message to send about a sample that just moved, or how to make it from the moved sample.
Announce = OutboxMessage | Callable[[Sample], OutboxMessage]
