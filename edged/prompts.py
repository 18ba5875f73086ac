"""Language requests in a pipeline's hands: generated, streamed while they are made, answered and recorded.

Law: a request that the daemon's own end interrupts is neither answered nor recorded: it is not settled, so it comes again.
Every other end is an answer and a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edged.core.confidence import accept_threshold, answer_probability
from edged.core.policy import Doubt, Hints, Policy, doubt
from edged.engines.base import Finished, GenerateRequest, generate_all
from edged.link import TooLarge
from edged.slot import Loaded, Slot, SlotStopped
from edged.sources import Item
from edged.store import LanguageRequest, OutboxMessage
from edged.wire import messages, topics
from edged.wire.manifest import Calibration

if TYPE_CHECKING:
    from edged.pipeline import Services

PARTIAL_S = 0.05  # pieces of one answer are at least this far apart: a fast model must not flood a broker
MODEL_WAIT_S = 60.0  # for a model on its way; longer than this no broker keeps a request
REFUSED_CHARS_MAX = 2000  # of a prompt that was refused, perhaps for its length
# Reasons of `Finished` that are no whole answer; each is also the reply's error and the record's outcome.
UNFINISHED = ("truncated", "cancelled", "deadline")


@dataclass(frozen=True, slots=True)
class _Made:
    """What the model made of a request, and which model it was."""

    text: str
    end: Finished
    release: str
    adapter: str | None
    confidence: float | None  # of a whole answer
    doubt: Doubt | None  # why the policy would not accept it by itself
    latency_ms: float


class Prompts:
    """Answers the prompts and conversations of one pipeline. All calls on its worker thread."""

    def __init__(
        self, pipeline: str, slot: Slot, services: Services, policy: Callable[[], Policy], stopping: Callable[[], bool],
        enqueue: Callable[[OutboxMessage], None], see_through: Callable[[Item, Callable[[], None]], None],
    ) -> None:  # fmt: skip
        """`policy`: as it is now; `stopping`: the daemon is about to end; `enqueue`: into the outbox, waiting while it is
        full; `see_through`: do something for an item, again and again while the store does not take it."""
        self._pipeline, self._slot, self._s = pipeline, slot, services
        self._policy, self._stopping, self._enqueue, self._see_through = policy, stopping, enqueue, see_through

    def handle(self, item: Item) -> None:
        """Answer the item and settle it. Raises EngineError, or SlotStopped when the daemon ends first."""
        assert item.prompt is not None
        made = self._make(item, item.prompt)
        if made.confidence is None:
            self._s.store.count(f"requests_{made.end.reason}")
        else:
            # Nobody is asked about a text yet: it is accepted, and the metrics say with which doubt.
            self._s.window.answer(
                self._pipeline, made.adapter or made.release, "accept", made.doubt or "confident", made.confidence,
                made.latency_ms,
            )  # fmt: skip
        # From here on only the store can fail: what was written is not written again.
        self._see_through(item, partial(self._commit, item, item.prompt, made))

    def _commit(self, item: Item, request: GenerateRequest, made: _Made) -> None:
        s, reason = self._s, made.end.reason
        error = reason if reason in UNFINISHED else ""
        s.store.record_request(
            LanguageRequest(
                item.id, self._pipeline, s.clock.now(), request.prompt, [asdict(m) for m in request.messages],
                _options(request), made.text, made.confidence, error or "ok", "", reason, made.end.prompt_tokens,
                made.end.answer_tokens, made.latency_ms, made.release, made.adapter or "",
            )
        )  # fmt: skip
        if item.request is not None:
            text = made.text or (None if error else "")
            self._enqueue(
                s.outgoing.reply(
                    item.request, generation_prompt=request.prompt or None, generated_response=text,
                    confidence=made.confidence, doubt=made.doubt, release=made.release, adapter=made.adapter,
                    decided_by=s.outgoing.device, finish_reason=reason, prompt_tokens=made.end.prompt_tokens,
                    answer_tokens=made.end.answer_tokens, error=error or None,
                )
            )  # fmt: skip
        item.settle("")

    def refused(self, item: Item, release: str, reason: str) -> None:
        """Record a request that could not be answered."""
        assert item.prompt is not None
        turns = [asdict(m) | {"content": m.content[:REFUSED_CHARS_MAX]} for m in item.prompt.messages]
        self._s.store.record_request(
            LanguageRequest(
                item.id, self._pipeline, self._s.clock.now(), item.prompt.prompt[:REFUSED_CHARS_MAX], turns,
                _options(item.prompt), outcome="error", reason=reason, release=release,
            )
        )  # fmt: skip

    def _make(self, item: Item, request: GenerateRequest) -> _Made:
        s = self._s
        stream = _Stream(s, item.request) if item.stream and item.request else None
        started = s.clock.monotonic()
        with self._slot.lease(MODEL_WAIT_S) as loaded, loaded.use:
            text, end = self._generate(loaded, request, stream)
            adapter = loaded.adapter.release if loaded.adapter else None
        p, doubted = None, None
        if end.reason not in UNFINISHED:
            # What was fitted on the bare base says nothing about its answers with an adapter.
            calibration = loaded.manifest.calibration if adapter is None else Calibration()
            confidence = answer_probability(end.mean_logprob, calibration)
            p, doubted = (
                confidence.p,
                doubt(confidence, accept_threshold(calibration, self._policy().target_risk), Hints()),
            )
        latency_ms = (s.clock.monotonic() - started) * 1000
        return _Made(text, end, loaded.ref.release, adapter, p, doubted, latency_ms)

    def _generate(self, loaded: Loaded, request: GenerateRequest, stream: _Stream | None) -> tuple[str, Finished]:
        late = request.halt()
        if late:  # while it waited for its turn
            return "", Finished(late, 0, 0, 0.0)
        interrupted = False

        def halt() -> str:
            nonlocal interrupted
            interrupted = self._stopping()
            return "cancelled" if interrupted else request.halt()

        hear = stream.add if stream else None
        text, end = generate_all(loaded.generator, replace(request, halt=halt), hear)
        if interrupted:
            raise SlotStopped(self._pipeline)
        if stream:
            stream.close()
        return text, end


class _Stream:
    """The text of one answer, on its way while it is made. What the link has no room for waits for the next piece; what
    it never took is dropped and counted, because the reply holds the whole text."""

    def __init__(self, services: Services, request: str) -> None:
        self._s, self._request = services, request
        self._text, self._index = "", 0
        self._next = services.clock.monotonic()

    def add(self, text: str) -> None:
        """The answer goes on."""
        self._text += text
        if self._s.clock.monotonic() >= self._next:
            self._send()

    def close(self) -> None:
        """The answer is whole."""
        self._send()
        if self._text:
            self._s.store.count("partials_dropped")

    def _send(self) -> None:
        if not self._text:
            return
        outgoing = self._s.outgoing
        address = topics.PARTIAL(site=outgoing.site, dev=outgoing.device, id=self._request)
        body = messages.Partial(**outgoing.stamp(), request=self._request, index=self._index, text=self._text)
        self._next = self._s.clock.monotonic() + PARTIAL_S
        try:
            if self._s.publish(address, messages.encode(body)):
                self._text, self._index = "", self._index + 1
        except TooLarge:
            self._s.store.count("partials_dropped")
            self._text = ""


def _options(request: GenerateRequest) -> dict[str, Any]:
    """The options that differ from their defaults, as a request sets them."""
    options = {"tokens_max": request.tokens_max, "temperature": request.temperature, "seed": request.seed,
               "stop": list(request.stop), "schema": request.schema}  # fmt: skip
    return {name: value for name, value in options.items() if value}
