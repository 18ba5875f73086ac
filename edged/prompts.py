"""Language requests in a pipeline's hands: generated, streamed while they are made, judged, answered and recorded.

Law: a request that the daemon's own end interrupts is neither answered nor recorded: it is not settled, so it comes again.
Every other end is an answer and a record.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from edged.capture import Admission, Capture, Kept
from edged.cases import Case, Written, of_text
from edged.core.confidence import accept_threshold, answer_probability
from edged.core.policy import Hints, Policy, decide, lot
from edged.engines.base import ELSEWHERE, ChatMessage, Finished, GenerateRequest, generate_all
from edged.link import TooLarge
from edged.services import Services
from edged.slot import Loaded, Slot, SlotStopped
from edged.sources import Item, Unsure
from edged.store import LanguageRequest, OutboxMessage
from edged.wire import messages, topics
from edged.wire.messages import Label, Text
from edged.wire.parts import Prompt

PARTIAL_S = 0.05  # pieces of one answer are at least this far apart: a fast model must not flood a broker
MODEL_WAIT_S = 60.0  # for a model on its way; longer than this no broker keeps a request
REFUSED_CHARS_MAX = 2000  # of a prompt that was refused, perhaps for its length
# Reasons of `Finished` that are no whole answer; each is also the reply's error and the record's outcome.
UNFINISHED = ("truncated", "invalid", "cancelled", "deadline")
SURE = ("confident", "audit")  # reasons of a decision that are no doubt


def asked_for(prompt: Prompt, halt: Callable[[], str] = lambda: "") -> GenerateRequest:
    """What a message asks, as the engines take it; `halt` as in GenerateRequest."""
    return GenerateRequest(
        prompt.generation_prompt or "",
        messages=tuple(ChatMessage(turn.role, turn.content) for turn in prompt.messages or ()),
        tokens_max=prompt.tokens_max,
        temperature=prompt.temperature,
        seed=prompt.seed,
        stop=tuple(prompt.stop),
        schema=prompt.answer_schema,
        halt=halt,
    )


class Prompts:
    """Answers the prompts and conversations of one pipeline. All calls on its worker thread."""

    def __init__(
        self, pipeline: str, slot: Slot, services: Services, policy: Callable[[], Policy], stopping: Callable[[], bool],
        enqueue: Callable[[OutboxMessage], None], see_through: Callable[[Item, Callable[[], None]], None],
        capture: Capture, may_wait: Callable[[Item, Kept], bool], wait: Callable[[Item, dict[str, Any]], None],
    ) -> None:  # fmt: skip
        """`policy`: as it is now; `stopping`: the daemon is about to end; `enqueue`: into the outbox, waiting while it is
        full; `see_through`: do something for an item, again and again while the store does not take it; `may_wait`, `wait`:
        keep whoever asked waiting for the next tier's answer, with the local reply for when that is late."""
        self._pipeline, self._slot, self._s = pipeline, slot, services
        self._policy, self._stopping, self._enqueue, self._see_through = policy, stopping, enqueue, see_through
        self._capture, self._may_wait, self._wait = capture, may_wait, wait

    def handle(self, item: Item) -> None:
        """Answer the item and settle it. Raises EngineError, or SlotStopped when the daemon ends first."""
        assert item.prompt is not None
        made = self._make(item, item.prompt)
        if item.asked is not None:
            self._see_through(item, partial(self._commit_verdict, made))
            return
        if made.decision is None:
            self._s.store.count(f"requests_{made.end.reason}")
        case = of_text(made) if made.decision and made.decision.action != "accept" else None
        admission = self._capture.admit(case) if case else None
        # From here on only the store can fail: what was written and spent is neither written nor spent again.
        self._see_through(item, partial(self._commit, made, case, admission))

    def _commit(self, made: Written, case: Case | None, admission: Admission | None) -> None:
        s, item = self._s, made.item
        kept = self._capture.keep(case, admission) if case and admission else Kept(None, "")
        s.store.record_request(self._record(made))
        waits, reply = self._may_wait(item, kept), self._reply(made)
        if item.request is not None and not waits:
            self._enqueue(s.outgoing.reply(item.request, **reply))
        # Once: what the store did not take is done again from the top.
        self._count(made, kept.suppressed, unheard=kept.asked and item.request is not None and not waits)
        if waits:
            self._wait(item, reply)
        else:
            item.settle("")

    def _count(self, made: Written, suppressed: str = "", *, unheard: bool = False) -> None:
        if made.decision is None or made.confidence is None:
            return
        self._s.window.answer(
            self._pipeline, made.adapter or made.release, made.decision.action, made.decision.reason,
            made.confidence.p, made.latency_ms, suppressed=suppressed, unheard=unheard,
        )  # fmt: skip
        self._s.tallies.answer(
            self._slot.name, made.adapter or made.release, reason=made.decision.reason, empty=not made.text.strip(),
            latency_ms=made.latency_ms / max(1, made.end.answer_tokens),
        )  # fmt: skip

    def _reply(self, made: Written) -> dict[str, Any]:
        """The local answer, or why there is none."""
        reason, decision = made.end.reason, made.decision
        error = reason if reason in UNFINISHED else None
        return {
            "generation_prompt": made.request.prompt or None,
            "generated_response": made.text or (None if error else ""),
            "confidence": made.confidence.p if made.confidence else None,
            "doubt": decision.reason if decision and decision.reason not in SURE else None,
            "release": made.release,
            "adapter": made.adapter,
            "decided_by": made.end.who or self._s.outgoing.device,
            "finish_reason": reason,
            "prompt_tokens": made.end.prompt_tokens,
            "answer_tokens": made.end.answer_tokens,
            "error": error,
        }

    def _record(self, made: Written) -> LanguageRequest:
        request, reason = made.request, made.end.reason
        return LanguageRequest(
            made.item.id, self._pipeline, self._s.clock.now(), request.prompt, [asdict(m) for m in request.messages],
            _options(request), made.text, made.confidence.p if made.confidence else None,
            reason if reason in UNFINISHED else "ok", "", reason, made.end.prompt_tokens, made.end.answer_tokens,
            made.latency_ms, made.release, made.adapter or "",
        )  # fmt: skip

    def _commit_verdict(self, made: Written) -> None:
        """The answer to another device's question; where it is unsure, the next tier is asked."""
        asked, release = made.item.asked, made.end.model or made.adapter or made.release
        assert asked is not None
        outgoing = self._s.outgoing
        self._count(made)
        if made.decision is None or made.confidence is None:
            reason = f"its answer ended as {made.end.reason}"
            self._enqueue(outgoing.verdict(asked, "unresolved", [], 0.0, release, reason))
            made.item.settle("")
            return
        label: Label = [Text(text=made.text)]
        if made.decision.action == "accept":
            self._enqueue(outgoing.verdict(asked, "labelled", label, made.confidence.p, release, "", made.end.who))
            made.item.settle("")
            return
        own = outgoing.opinion(asked, "labelled", label, made.confidence.p, release, made.end.who)
        self._s.unsure(Unsure(asked, own, made.decision.reason, made.item.settle))

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

    def _make(self, item: Item, request: GenerateRequest) -> Written:
        s = self._s
        stream = _Stream(s, item.request) if item.stream and item.request else None
        started = s.clock.monotonic()
        with s.pace.admitted(self._slot.lease(MODEL_WAIT_S)) as loaded, s.pace.admitted(loaded.use):
            text, end = self._generate(loaded, request, stream)
            adapter, calibration = loaded.adapter.release if loaded.adapter else None, loaded.calibration
        policy, draw, threshold = self._policy(), lot(item.id), 0.0
        confidence = decision = None
        if end.reason not in UNFINISHED:
            confidence = answer_probability(end.mean_logprob, calibration)
            threshold = accept_threshold(calibration, policy.target_risk)
            decision = decide(confidence, policy, threshold, Hints(), draw)
        latency_ms = (s.clock.monotonic() - started) * 1000
        return Written(
            item, request, text, end, loaded.ref.release, adapter, calibration, policy, draw, confidence, threshold,
            decision, latency_ms,
        )  # fmt: skip

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
        # Another machine's work is none of this one.
        with self._s.pace.waits() if loaded.manifest.engine in ELSEWHERE else nullcontext():
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
