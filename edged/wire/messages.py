"""Every payload of the system. Unknown fields are kept, so that old and new devices can talk to each other."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from edged.wire import topics
from edged.wire.commands import COMMANDS as COMMANDS
from edged.wire.commands import CancelCommand as CancelCommand
from edged.wire.commands import CommandState as CommandState
from edged.wire.commands import ForgetCommand as ForgetCommand
from edged.wire.commands import PinCommand as PinCommand
from edged.wire.commands import RollbackCommand as RollbackCommand
from edged.wire.commands import SamplesCommand as SamplesCommand
from edged.wire.commands import SlotCommand as SlotCommand
from edged.wire.commands import UnpinCommand as UnpinCommand
from edged.wire.delivered import MIRRORS_MAX as MIRRORS_MAX
from edged.wire.delivered import AskBlocks as AskBlocks
from edged.wire.delivered import HostState as HostState
from edged.wire.delivered import Metadata as Metadata
from edged.wire.delivered import MetadataFile as MetadataFile
from edged.wire.delivered import Progress as Progress
from edged.wire.delivered import Want as Want
from edged.wire.invoked import Invocation as Invocation
from edged.wire.invoked import Invoked as Invoked
from edged.wire.manifest import SHA256, ReleaseRef
from edged.wire.measured import ConfidenceHistogram, Count, LatencyHistogram, Reasons
from edged.wire.measured import Machine as Machine
from edged.wire.parts import Finite, Id, Part, Prompt
from edged.wire.parts import Message as Message

INLINE_BYTES_MAX = 256 * 1024  # of a question's image or prompt
BEAT_S_MAX = 3600.0  # between two heartbeats of a responder: a dead one is believed for three of them
BAD_MAX = 16  # releases that a report names as bad
NUMBER_MAX = (1 << 53) - 1  # bytes and revisions: the largest that every language reads exactly
HOPS_MAX = 3  # of a question, from one responder to the next; the first question of all is hop 0
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


PARTS_MAX, POINTS_MAX = 16, 256  # of an outline, and of each of its parts
Polygons = Annotated[
    list[Annotated[list[Finite], Field(min_length=6, max_length=2 * POINTS_MAX)]],
    Field(min_length=1, max_length=PARTS_MAX),
]


class InvalidPayload(ValueError):
    """A payload that is not what its topic promises; the message names the topic, the field and the value."""


class Box(Part):
    """One labelled box: `box` is x1 y1 x2 y2 in pixels of the image; `polygons`, of a segment, the parts of its outline as
    x y x y ... in pixels, each filled by the even-odd rule."""

    label: str
    box: tuple[Finite, Finite, Finite, Finite]
    score: Probability = 1.0
    polygons: Polygons | None = Field(default=None, exclude_if=lambda value: value is None)


class Text(Part):
    """An answer in words."""

    text: str


# What a model or a person says of an image (no box: nothing is there), or of a prompt.
Label = list[Box] | Annotated[list[Text], Field(max_length=1)]
_LABEL: TypeAdapter[list[Box] | list[Text]] = TypeAdapter(Label)


def label_of(rows: list[dict[str, Any]]) -> list[Box] | list[Text]:
    """The label that `rows` are the JSON of; raises ValueError."""
    return _LABEL.validate_python(rows)


class State(Message):
    """Birth of a device, or its Will. An `offline` whose boot is not the last birth's is ignored."""

    state: Literal["online", "offline"]
    device: str
    profile: str = ""
    tier: str = ""
    models: dict[str, str] = {}
    capabilities: list[str] = []
    labels: dict[str, str] = {}  # what people call this device by, for choosing among many


class ModelReport(Part):
    """What one slot runs and how its update stands. `progress`: of the release that is being fetched."""

    active: str | None = None
    previous: str | None = None
    staged: str | None = None
    adapter: str | None = None
    update: str = "idle"
    reason: str = ""
    swap_ms: float | None = None  # how long the flip and the drain of the last swap took
    since: Finite = 0.0
    progress: Progress | None = None
    pinned: str | None = None  # by a person: this release, whatever desired state says
    held: str | None = None  # a person rolled back: this one is not installed until desired state names another
    adapter_pinned: str | None = None
    adapter_held: str | None = None


class BadReport(Part):
    """A release that this device does not install again, and why."""

    release: str
    sha256: SHA256
    reason: str = ""
    at: Finite = 0.0


class Reported(Message):
    """What the device runs now; retained."""

    desired_rev: Annotated[int, Field(ge=0, le=NUMBER_MAX)] = 0
    models: dict[str, ModelReport] = {}
    health: dict[str, Any] = {}
    bad: Annotated[list[BadReport], Field(max_length=BAD_MAX)] = []  # the newest


class Desired(Message):
    """What a device shall run: a state, never a sequence of commands; retained. The higher `rev` wins."""

    rev: Annotated[int, Field(ge=0)]
    models: dict[str, ReleaseRef] = {}
    adapters: dict[str, ReleaseRef] = {}  # slot -> LoRA release; a slot without one runs its bare base
    policy: dict[str, dict[str, Any]] = {}  # pipeline -> keys of core.policy.Policy


class Escalation(Message):
    """A prediction that the device is unsure of, for the next tier."""

    sample: Id
    pipeline: str
    task: str
    release: str
    reason: str
    confidence: Probability
    image: str | None = None  # base64 of the file's bytes, up to INLINE_BYTES_MAX before encoding
    prompt: str | None = None  # instead of an image: the JSON of a Prompt, up to INLINE_BYTES_MAX of UTF-8
    sha256: SHA256  # of the image's or the prompt's bytes
    prediction: Label = []
    label_by: Finite
    answer_by: Finite | None = None  # by the origin's clock, when somebody waits there for the answer
    answer_within_s: Finite | None = None  # what is left of it when this hop asks: clocks differ
    origin: str  # the device that saw the item
    hops: Annotated[int, Field(ge=0, le=HOPS_MAX)] = 0
    path: Annotated[list[str], Field(max_length=HOPS_MAX + 1)] = []  # the devices that have had it, the origin first


class Waybill(BaseModel):
    """What of an Escalation tells its way, read without the rest: the image is most of it."""

    pipeline: str
    answer_by: Finite | None = None


class Provenance(Part):
    """Who says so: a model (with its release) or a person."""

    kind: Literal["model", "person"]
    who: str
    release: str = ""


class Opinion(Part):
    """What one responder made of a question."""

    who: str
    release: str = ""
    tier: str = ""
    status: Literal["labelled", "unresolved", "rejected"]
    confidence: Probability = 0.0
    label: Label = []


class Verdict(Message):
    """The answer to an escalation, or a person's later correction.

    `provenance` names whose label it is; `opinions` is who said what on the way to it, the first who was asked first.
    """

    sample: str
    status: Literal["labelled", "unresolved", "rejected"]
    label: Label = []
    confidence: Probability = 0.0
    provenance: Provenance
    reason: str = ""
    opinions: Annotated[list[Opinion], Field(max_length=HOPS_MAX + 1)] = []


class SampleEntry(Message):
    """Catalogue entry: a sample that a device keeps; its pixels or its prompt stay there until a manifest names it.

    `prediction`, `decision` and `inclusion_probability` are what live accuracy is reckoned from (docs/policy.md).
    """

    sample: str
    pipeline: str
    task: str
    model: str
    release: str
    state: str
    sha256: SHA256
    bytes: Annotated[int, Field(ge=0, le=NUMBER_MAX)]
    prediction: Label = []
    confidence: Probability = 0.0
    decision: str = ""
    inclusion_probability: Probability = 1.0
    label: Label = []
    label_confidence: Probability = 0.0
    provenance: Provenance | None = None
    opinions: Annotated[list[Opinion], Field(max_length=HOPS_MAX + 1)] = []
    captured: Finite
    reason: str = ""


class Result(Message):
    """One answered item of a pipeline."""

    pipeline: str
    item: str  # the source's name of the item: a file name, a request id
    release: str
    prediction: list[Box] = []
    confidence: Probability
    decision: Literal["accept", "audit", "escalate"]
    reason: str = ""
    sample: str | None = None
    suppressed: str | None = None  # why nobody is asked although the policy wants it (docs/policy.md)
    error: str | None = None
    latency_ms: Finite = 0.0


class Metrics(Message):
    """Counters of one closed window, per pipeline and release: never sums since the start."""

    start: Finite
    end: Finite
    pipeline: str
    release: str
    items: Count = 0
    accepted: Count = 0
    audited: Count = 0
    escalated: Count = 0  # wanted by the policy, before any budget
    errors: Count = 0
    reasons: Reasons = {}
    suppressed: Reasons = {}  # reason -> escalations and audits that the policy wanted and a limit held back
    unheard: Count = 0  # requests answered at once because nobody answers the questions of this pipeline
    confidence_histogram: ConfidenceHistogram = []  # ten bins over 0..1
    latency_ms_p50: Finite = 0.0
    latency_ms_p95: Finite = 0.0
    latency_histogram: LatencyHistogram = []  # measured.LATENCY_BOUNDS_MS; what no window alone can say follows from sums
    machine: Machine = Machine()
    counters: dict[str, int] = {}


class Event(Message):
    """Something that a person should see."""

    kind: str
    text: str
    detail: dict[str, Any] = {}


class InferRequest(Message, Prompt):
    """A request to a pipeline: exactly one of an image (base64), a prompt and a conversation. Whatever else a Prompt has,
    and these, are for language.

    `deadline_s`: seconds from its arrival at the device; what is not done by then ends with the error `deadline`.
    `stream`: the text comes on `up/partial/{id}` too, as it is made.
    """

    image: str | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stream: bool = False


class Partial(Message):
    """The next piece of an answer that is being made; `index` counts from 0. Whoever misses one finds the whole text in
    the reply."""

    request: str
    index: Annotated[int, Field(ge=0)]
    text: str


class InferReply(Message):
    """The answer to an InferRequest: detections, or the prompt with what follows, or an error that names the fix.

    The errors `truncated`, `invalid`, `cancelled` and `deadline` are these words; what was written until then is in
    `generated_response`. `finish_reason` says why an answer ended: `stop`, `length` or one of these words.
    """

    request: str
    generation_prompt: str | None = None
    generated_response: str | None = None
    prediction: list[Box] | None = None
    confidence: Probability | None = None
    doubt: str | None = None  # of a local text: why the policy does not accept it by itself (`unsure`, `uncalibrated`)
    release: str = ""
    adapter: str | None = None
    decided_by: str = ""  # the device, or the responder whose verdict came before `answer_by`
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    error: str | None = None


class ResponderState(Message):
    """A responder's heartbeat, the next one in `every_s` seconds; retained, until it expires. Whose heart has missed
    three beats is gone."""

    state: Literal["online", "offline"]
    release: str = ""
    device: str = ""
    every_s: Annotated[float, Field(gt=0, le=BEAT_S_MAX, allow_inf_nan=False)] = 30.0


PAYLOADS: dict[topics.Route, type[Message]] = {
    topics.STATE: State,
    topics.REPORTED: Reported,
    topics.ESCALATION: Escalation,
    topics.SAMPLE: SampleEntry,
    topics.RESULT: Result,
    topics.METRICS: Metrics,
    topics.EVENT: Event,
    topics.REPLY: InferReply,
    topics.PARTIAL: Partial,
    topics.COMMAND_STATE: CommandState,
    topics.DESIRED: Desired,
    topics.GROUP_DESIRED: Desired,
    topics.VERDICT: Verdict,
    topics.INFER: InferRequest,
    topics.HOST: HostState,
    topics.RESPONDER: ResponderState,
    topics.METADATA: Metadata,
    topics.WANT: Want,
    topics.ASK_BLOCKS: AskBlocks,
    topics.INVOKE: Invocation,
    topics.INVOKED: Invoked,
}


def decode(topic: str, payload: bytes) -> tuple[topics.Route, dict[str, str], Message]:
    """The message on `topic`; raises InvalidPayload when the topic is not ours or the payload does not validate."""
    parsed = topics.parse(topic)
    if parsed is None:
        raise InvalidPayload(f"{topic}: no topic of this protocol")
    route, fields = parsed
    if route.raw:
        raise InvalidPayload(f"{topic}: bytes of a file, no message")
    model = COMMANDS.get(fields["type"]) if route is topics.COMMAND else PAYLOADS.get(route)
    if model is None:
        raise InvalidPayload(f"{topic}: unknown command; known: {', '.join(sorted(COMMANDS))}")
    try:
        return route, fields, model.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "payload"
        raise InvalidPayload(f"{topic}: {where}: {first['msg']} (got {str(first.get('input'))[:80]!r})") from None


def readable_id(payload: bytes) -> str | None:
    """The `id` of a payload that does not validate, when at least that can be read."""
    try:
        value = from_json(payload, cache_strings="none")
    except ValueError:
        return None
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str) and re.fullmatch(topics.LEVEL, found) else None


def encode(message: Message) -> bytes:
    """The JSON bytes of a message; what is None is left out."""
    return message.model_dump_json(exclude_none=True).encode()


def json_schema() -> dict[str, Any]:
    """JSON Schema of every payload by topic template, so that a client in any language can join."""
    schemas = {route.template: model.model_json_schema() for route, model in PAYLOADS.items()}
    for kind, model in COMMANDS.items():
        schemas[topics.COMMAND.template.replace("{type}", kind)] = model.model_json_schema()
    return schemas
