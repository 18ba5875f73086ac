"""The data path of one pipeline, from an item to everything that follows from its answer. Read it top to bottom.

    source -> queue -> preparer thread: decode, letterbox -> worker thread: lease, infer, confidence, policy, commit, settle

Law: an item is settled (its file moved away, its request acknowledged) only after everything about it is committed. A crash
in between brings the item again, under the same id, and the store takes the repetition for what it is.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edged import images
from edged.clock import Clock
from edged.config import Pipeline as PipelineConfig
from edged.core.confidence import Confidence, answer_probability, probability
from edged.core.policy import Decision, Policy, decide
from edged.engines.base import Detections, EngineError, Prepared, PromptTooLong
from edged.golden import generate_all
from edged.metrics import Window
from edged.outgoing import Outgoing, boxes
from edged.slot import Loaded, Slot, SlotStopped, WrongKind
from edged.sources import Item, Waiting
from edged.store import OutboxFull, OutboxMessage, StorageFull, Store, StoreError
from edged.wire.messages import INLINE_IMAGE_BYTES_MAX

log = logging.getLogger(__name__)

PREPARED_MAX = 2  # one being inferred, one ready: more would only grow old
FULL_RETRY_S = 5.0  # how soon a commit that found the store full is tried again


@dataclass(frozen=True, slots=True)
class Answer:
    """The local answer to one image: boxes, how sure, what the policy makes of it, and how long it took."""

    item: Item
    loaded: Loaded
    found: Detections
    confidence: Confidence
    decision: Decision
    latency_ms: float


@dataclass(slots=True)
class Services:
    """What every pipeline of a daemon shares."""

    store: Store
    outgoing: Outgoing
    clock: Clock
    window: Window
    wait: Callable[[str, Waiting], None]  # for the verdict on this sample
    engine_error: Callable[[str], None]  # slot name: probation wants to know
    wake: Callable[[], None]  # the outbox has something new


class Pipeline:
    """Runs the items of one source through one slot, in order."""

    def __init__(self, name: str, config: PipelineConfig, slot: Slot, services: Services) -> None:
        self.name, self.config, self.slot, self._s = name, config, slot, services
        self.policy: Policy = replace(config.policy, escalate=config.policy.escalate and bool(config.escalate_to))
        self._queue: queue.Queue[Item] = queue.Queue(config.queue_max)
        self._prepared: queue.Queue[tuple[Item, Prepared | None, str]] = queue.Queue(PREPARED_MAX)
        self._stopping = threading.Event()
        self._random = random.Random()
        self._said_too_large = False
        self._threads = [
            threading.Thread(target=self._run, args=(body,), name=f"{what}-{name}", daemon=True)
            for what, body in (("preparer", self._prepare_all), ("worker", self._work_all))
        ]

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            thread.start()

    def put(self, item: Item) -> bool:
        """Queue an item, waiting while the queue is full; false when the pipeline stops."""
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def offer(self, item: Item) -> bool:
        """Queue an item if there is room now."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            return False
        return True

    def finish(self) -> None:
        """Take no further item; whoever waits for room in the queue is turned away."""
        self._stopping.set()

    def stop(self) -> None:
        """Finish the item in hand, leave the rest to their sources, end the threads."""
        self.finish()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def waiting(self) -> int:
        """How many items wait in the queue."""
        return self._queue.qsize()

    def alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def _run(self, body: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                body()
            except SlotStopped:
                return
            except Exception:  # the threads outlive every bug
                log.exception("pipeline %s", self.name)
                self._s.store.count("pipeline_faults")

    # Preparer thread.

    def _prepare_all(self) -> None:
        while not self._stopping.is_set():
            try:
                item = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            self._see_through(item, partial(self._prepare, item))

    def _prepare(self, item: Item) -> None:
        if item.prompt is not None:
            self._hand_on((item, None, ""))
            return
        try:
            image = images.decode(item.image)
        except images.BadImage as error:
            self._reject(item, "bad_image", str(error))
            return
        with self.slot.lease() as loaded:
            prepared = loaded.detector.prepare(image)
            self._hand_on((item, prepared, loaded.ref.sha256))

    def _hand_on(self, ready: tuple[Item, Prepared | None, str]) -> None:
        while not self._stopping.is_set():
            try:
                self._prepared.put(ready, timeout=0.2)
                return
            except queue.Full:
                continue

    # Worker thread.

    def _work_all(self) -> None:
        while not self._stopping.is_set():
            try:
                ready = self._prepared.get(timeout=0.2)
            except queue.Empty:
                continue
            item, prepared, prepared_for = ready
            if prepared is None:
                self._see_through(item, partial(self._handle_prompt, item))
            else:
                self._see_through(item, partial(self._handle_image, item, prepared, prepared_for))
            self._s.wake()

    def _see_through(self, item: Item, act: Callable[[], None]) -> None:
        """Do `act` for an item until it is done or the item is set aside: no error leaves an item in nobody's hands.

        What the store could not take is tried again: every commit knows its repetition by the item's id.
        """
        given_up = False
        while True:
            try:
                act()
                return
            except EngineError as error:
                act = partial(self._refuse, item, error)
            except StoreError as error:
                self._s.store.count("store_errors")
                log.error("pipeline %s: %s waits: %s", self.name, item.name, error)
                if self._stopping.wait(self._s.clock.real(FULL_RETRY_S)):
                    raise SlotStopped(self.name) from None
            except SlotStopped:
                raise
            except Exception as error:  # a bug of ours costs this item its answer, never the pipeline
                log.exception("pipeline %s: %s", self.name, item.name)
                self._s.store.count("pipeline_faults")
                reason = f"{type(error).__name__}: {error}"
                if given_up:
                    item.settle(reason)
                    return
                given_up, act = True, partial(self._reject, item, "fault", reason)

    def _refuse(self, item: Item, error: EngineError) -> None:
        """The engine did not answer; probation hears of it unless the item is to blame."""
        unsuitable = isinstance(error, PromptTooLong | WrongKind)
        if not unsuitable:
            self._s.engine_error(self.slot.name)
        if item.asked is not None:
            # Nothing is wrong with the sample: no verdict. Its owner keeps the question and asks again.
            self._s.store.count("escalations_unanswered")
            log.warning("pipeline %s: %s is not answered: %s", self.name, item.name, error)
            item.settle("")
            return
        self._reject(item, "unsuitable" if unsuitable else "engine_error", str(error))

    def _go_on(self) -> None:
        if self._stopping.is_set():  # the request is not settled: it comes again
            raise SlotStopped(self.name)

    def _handle_image(self, item: Item, prepared: Prepared, prepared_for: str) -> None:
        answer = self._answer(item, prepared, prepared_for)
        if item.asked is not None:
            self._commit_verdict(answer)
        else:
            self._commit_answer(answer)

    def _answer(self, item: Item, prepared: Prepared, prepared_for: str) -> Answer:
        started = self._s.clock.monotonic()
        with self.slot.lease() as loaded:
            if prepared_for != loaded.ref.sha256:  # a swap came between: the new model may want another input
                prepared = loaded.detector.prepare(prepared.image)
            with loaded.use:
                found = loaded.detector.infer([prepared])[0]
        manifest = loaded.manifest
        confidence = probability(found, manifest.thresholds, prepared.stats, manifest.calibration)
        decision = decide(confidence, self.policy, self._random.random())
        latency_ms = (self._s.clock.monotonic() - started) * 1000
        return Answer(item, loaded, found.above(manifest.thresholds.score), confidence, decision, latency_ms)

    def _commit_answer(self, answer: Answer) -> None:
        s, config, item = self._s, self.config, answer.item
        release = answer.loaded.ref.release
        labelled = boxes(answer.found, answer.loaded.manifest.labels)
        kept = answer.decision.action != "accept" and self._capture(answer, labelled)
        s.window.answer(
            self.name, release, answer.decision.action, answer.decision.reason, answer.confidence.p, answer.latency_ms
        )
        if config.results == "durable":
            self._enqueue(
                s.outgoing.result(
                    self.name, item=item.name, release=release, prediction=labelled, confidence=answer.confidence.p,
                    decision=answer.decision.action, reason=answer.decision.reason,
                    sample=item.id if kept else None, latency_ms=answer.latency_ms,
                )
            )  # fmt: skip
        if item.request is not None:
            reply = {"prediction": labelled, "confidence": answer.confidence.p, "release": release,
                     "decided_by": s.outgoing.device}  # fmt: skip
            if kept:
                s.wait(item.id, Waiting(item.request, reply, s.clock.now() + config.answer_by_s, item.settle))
                return
            self._enqueue(s.outgoing.reply(item.request, **reply))
        item.settle("")

    def _capture(self, answer: Answer, labelled: list[Any]) -> bool:
        """Keep the item as a sample, with its question to the next tier in the same transaction; false when the store has
        no room, which is counted and said, while answering goes on."""
        s, item, config = self._s, answer.item, self.config
        now = s.clock.now()
        tier = config.escalate_to
        too_large = len(item.image) > INLINE_IMAGE_BYTES_MAX
        if too_large:
            s.store.count("escalations_too_large")
            if not self._said_too_large:
                self._said_too_large = True
                text = (
                    f"{self.name}: {item.name} has {len(item.image)} bytes; up to {INLINE_IMAGE_BYTES_MAX} can be "
                    "escalated: use smaller or more compressed images"
                )
                self._enqueue(s.outgoing.event("escalation_too_large", text))
        sample = s.outgoing.sample(
            item, self.name, config.task, self.slot.name, answer.loaded.ref.release, answer.decision,
            answer.confidence.p, labelled, escalated=tier is not None and not too_large,
            answer_by=now + config.answer_by_s, label_by=now + config.label_by_s,
        )  # fmt: skip
        question = s.outgoing.escalation(sample, item.image, tier) if tier and not too_large else None
        try:
            try:
                s.store.capture(sample, item.image, question)
            except StorageFull:
                s.store.evict(len(item.image))
                s.store.capture(sample, item.image, question)
        except (StorageFull, OutboxFull) as error:
            s.store.count("samples_not_kept")
            log.warning("pipeline %s: %s: not kept as a sample: %s", self.name, item.name, error)
            return False
        return question is not None

    def _commit_verdict(self, answer: Answer) -> None:
        asked = answer.item.asked
        assert asked is not None
        manifest = answer.loaded.manifest
        label = boxes(answer.found, manifest.labels)
        self._enqueue(self._s.outgoing.verdict(asked, "labelled", label, answer.confidence.p, manifest.release, ""))
        self._s.window.answer(
            self.name, manifest.release, "accept", "confident", answer.confidence.p, answer.latency_ms
        )
        answer.item.settle("")

    def _handle_prompt(self, item: Item) -> None:
        s = self._s
        assert item.prompt is not None
        started = s.clock.monotonic()
        with self.slot.lease() as loaded, loaded.use:
            text, end = generate_all(loaded.generator, item.prompt, self._go_on)
            adapter = loaded.adapter.release if loaded.adapter else None
        p = answer_probability(end.mean_logprob)
        latency_ms = (s.clock.monotonic() - started) * 1000
        s.store.record_request(
            id=item.id, pipeline=self.name, release=loaded.ref.release, adapter=adapter or "", prompt=item.prompt.prompt,
            answer=text, confidence=p, outcome="ok", ts=s.clock.now(),
        )  # fmt: skip
        s.window.answer(self.name, adapter or loaded.ref.release, "accept", "confident", p, latency_ms)
        if item.request is not None:
            self._enqueue(
                s.outgoing.reply(
                    item.request, generation_prompt=item.prompt.prompt, generated_response=text, confidence=p,
                    release=loaded.ref.release, adapter=adapter, decided_by=s.outgoing.device,
                )
            )  # fmt: skip
        item.settle("")

    def _reject(self, item: Item, counter: str, reason: str) -> None:
        """An item that cannot be answered: counted, said, answered with the error where somebody waits, and set aside."""
        s = self._s
        live = self.slot.live
        release = live.ref.release if live else ""
        s.store.count(f"items_{counter}")
        s.window.error(self.name, release)
        log.warning("pipeline %s: %s: %s", self.name, item.name, reason)
        if item.asked is not None:
            self._enqueue(s.outgoing.verdict(item.asked, "rejected", [], 0.0, release, reason))
        elif item.request is not None:
            prompt = item.prompt.prompt if item.prompt else None
            self._enqueue(s.outgoing.reply(item.request, error=reason, generation_prompt=prompt, release=release))
        elif self.config.results == "durable":
            self._enqueue(
                s.outgoing.result(
                    self.name,
                    item=item.name,
                    release=release or "none",
                    confidence=0.0,
                    decision="accept",
                    error=reason,
                )
            )
        item.settle(reason)

    def _enqueue(self, message: OutboxMessage) -> None:
        """Into the outbox; when that is full, wait: the item in hand is not settled before, so nothing is lost."""
        while True:
            try:
                self._s.store.enqueue(message, self._s.clock.now())
                return
            except (OutboxFull, StorageFull) as error:
                self._s.store.count("outbox_full_waits")
                log.error("pipeline %s waits: %s", self.name, error)
                if self._stopping.wait(self._s.clock.real(FULL_RETRY_S)):
                    raise SlotStopped(self.name) from None
