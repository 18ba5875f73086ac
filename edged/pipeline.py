"""The data path of one pipeline, from an item to everything that follows from its answer. Read it top to bottom.

    source -> queue -> preparer thread: decode, letterbox -> worker thread: lease, infer, confidence, policy, commit, settle

Law: an item is settled (its file moved away, its request acknowledged) only after everything about it is committed. A crash
in between brings the item again, under the same id, and the store takes the repetition for what it is.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from edged import images, regions
from edged.answers import Answers
from edged.capture import Admission, Capture, Kept
from edged.cases import Answer, Case, of_image
from edged.config import WHOLE
from edged.config import Pipeline as PipelineConfig
from edged.core.policy import Policy, judge, lot
from edged.core.tracks import Lost, Track, follow
from edged.engines.base import Detections, EngineError, Prepared
from edged.in_hand import PREPARER, WORKER
from edged.outgoing import boxes
from edged.prompts import Prompts
from edged.recent import Seen
from edged.refusals import Refusals
from edged.services import Services
from edged.slot import Loaded, Slot, SlotStopped
from edged.sources import Item, Unsure, Waiting
from edged.store import OutboxFull, OutboxMessage, StorageFull, StoreError
from edged.wire.messages import INLINE_BYTES_MAX

log = logging.getLogger(__name__)

PREPARED_MAX = 2  # one being inferred, one ready: more would only grow old
MODEL_WAIT_S = 5.0  # between two signs of life of who waits for a model
STILL_S_MAX = 120.0  # for one image, or one token: longer than this an engine is no more at work but hangs
FULL_RETRY_S = 5.0  # how soon a commit that found the store full is tried again


class Ready(NamedTuple):
    """An item on its way to the worker. Of an image: prepared for the model with this SHA-256, and where the pixels that
    the model sees lie in it (left, top)."""

    item: Item
    prepared: Prepared | None = None
    prepared_for: str = ""
    corner: tuple[int, int] = (0, 0)


class Pipeline:
    """Runs the items of one source through one slot, in order."""

    def __init__(
        self, name: str, config: PipelineConfig, slot: Slot, services: Services, workers: int = 1
    ) -> None:  # fmt: skip
        """`workers`: so many other devices' prompts are answered at once; more than one where a server answers them."""
        self.name, self.config, self.slot, self._s = name, config, slot, services
        self.policy: Policy = replace(config.policy, escalate=config.policy.escalate and bool(config.escalate_to))
        self._queue: queue.Queue[Item] = queue.Queue(config.queue_max)
        self._prepared: queue.Queue[Ready] = queue.Queue(PREPARED_MAX)
        self._stopping = threading.Event()
        self._left: list[Item] = []  # what a stop has taken out of a thread's hands
        self.answers = Answers(config.answer_by_s)
        self._capture = Capture(
            name, config, slot.name, services.store, services.outgoing, services.clock, self.answers
        )
        self._tracks: tuple[Track, ...] | None = None
        self._tracked_for = ""
        self._prompts = Prompts(
            name, slot, services, lambda: self.policy, self._must_stop, self._enqueue, self._see_through, self._capture,
            self._may_wait, self._wait,
        )  # fmt: skip
        self._said_too_large = False
        self._in_hand = services.in_hand.of(name, slot, self._must_stop)
        self._refusals = Refusals(
            name, lambda: self.config.results == "durable", slot, services, self._prompts, self._in_hand, self._enqueue
        )
        self._threads = [
            threading.Thread(target=self._run, args=(body,), name=f"{what}-{name}", daemon=True)
            for what, body in (("preparer", self._prepare_all), ("worker", self._work_all))
        ]
        self._threads += [
            threading.Thread(target=self._run, args=(self._work_all,), name=f"worker-{name}-{number}", daemon=True)
            for number in range(2, workers + 1)
        ]

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            self._s.beats.watch(thread.name, STILL_S_MAX)
            thread.start()

    def put(self, item: Item) -> bool:
        """Queue an item, waiting while the queue is full; false when the pipeline stops."""
        while not self._stopping.is_set():
            self._beat()  # of the source: it waits for us
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

    def stop(self, seconds_max: float | None = None) -> list[Item]:
        """Finish the item in hand, end the threads; what is left, for its source. After `seconds_max` `alive` may hold."""
        self.finish()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(seconds_max)
            self._s.beats.forget(thread.name)
        self._in_hand.close()
        queued = [*(ready.item for ready in self._prepared.queue), *self._queue.queue]
        return list({item.id: item for item in (*self._left, *queued)}.values())

    def waiting(self) -> int:
        """How many items wait in the queue."""
        return self._queue.qsize()

    def alive(self) -> bool:
        """Whether both threads run."""
        return len(self.running()) == len(self._threads)

    def running(self) -> list[str]:
        """The names of the threads that run."""
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _beat(self) -> None:
        """The calling thread moves."""
        self._s.beats.beat(threading.current_thread().name)

    def _must_stop(self) -> bool:
        """Whether the daemon is about to end; asked between the steps of long work."""
        self._beat()
        return self._stopping.is_set()

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
        while not self._must_stop():
            try:
                item = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            self._see_through(item, partial(self._prepare, item))

    def _prepare(self, item: Item) -> None:
        if reason := self._in_hand.turned_away(item):
            self._refusals.reject(item, "quarantined", reason)
            return
        if self._in_hand.last(item) and self.waiting() and self.offer(item):
            return  # it is behind the others now
        if item.prompt is not None:
            self._hand_on(Ready(item))
            return
        try:
            with self._in_hand.held(item, PREPARER):
                whole = images.decode(item.image) if item.frame is None else item.frame
                image, corner = regions.cut(whole, self.config.roi)
        except images.BadImage as error:
            self._refusals.reject(item, "bad_image", str(error))
            return
        while not self.slot.wait(MODEL_WAIT_S):  # for the first model, which may be days away
            if self._must_stop():
                raise SlotStopped(self.name)
        with self.slot.lease() as loaded, self._in_hand.held(item, PREPARER):
            ready = Ready(item, loaded.detector.prepare(image), loaded.ref.sha256, corner)
        self._hand_on(ready)  # without the lease: a swap must not wait until the worker has room

    def _hand_on(self, ready: Ready) -> None:
        while not self._must_stop():
            try:
                self._prepared.put(ready, timeout=0.2)
                return
            except queue.Full:
                continue
        self._left.append(ready.item)

    # Worker thread.

    def _work_all(self) -> None:
        while not self._must_stop():
            try:
                ready = self._prepared.get(timeout=0.2)
            except queue.Empty:
                continue
            self._s.pace.begin()
            if ready.prepared is None:
                self._see_through(ready.item, partial(self._handle_prompt, ready.item))
            else:
                self._see_through(ready.item, partial(self._handle_image, ready, ready.prepared))
            self._s.wake()
            self._s.pace.rest(self._stopping, self._beat)

    def _see_through(self, item: Item, act: Callable[[], None]) -> None:
        """Do `act` for an item until it is done or the item is set aside: no error leaves an item in nobody's hands.

        What the store could not take is tried again: every commit knows its repetition by the item's id.
        """
        given_up = False
        while True:
            self._beat()
            try:
                act()
                return
            except EngineError as error:
                act = partial(self._refusals.engine_failed, item, error)
            except StoreError as error:
                self._s.store.count("store_errors")
                log.error("pipeline %s: %s waits: %s", self.name, item.name, error)
                if self._s.pace.wait(FULL_RETRY_S, self._stopping):
                    self._left.append(item)
                    raise SlotStopped(self.name) from None
            except SlotStopped:
                self._left.append(item)
                raise
            except Exception as error:  # a bug of ours costs this item its answer, never the pipeline
                log.exception("pipeline %s: %s", self.name, item.name)
                self._s.store.count("pipeline_faults")
                reason = f"{type(error).__name__}: {error}"
                if given_up:
                    item.settle(reason)
                    return
                given_up, act = True, partial(self._refusals.reject, item, "fault", reason)

    def _handle_prompt(self, item: Item) -> None:
        with self._in_hand.held(item, WORKER):
            self._prompts.handle(item)

    def _handle_image(self, ready: Ready, prepared: Prepared) -> None:
        answer = self._answer(ready, prepared)
        if answer.item.asked is not None:
            self._commit_verdict(answer)
            return
        case = None
        if answer.judged.decision.action != "accept":
            case = of_image(answer, whole=self.config.roi == WHOLE)
        admission = self._capture.admit(case) if case else None
        # From here on only the store can fail: what was decided and spent is neither decided nor spent again.
        self._see_through(answer.item, partial(self._commit_answer, answer, case, admission))

    def _answer(self, ready: Ready, prepared: Prepared) -> Answer:
        started = self._s.clock.monotonic()
        with self._s.pace.admitted(self.slot.lease()) as loaded, self._in_hand.held(ready.item, WORKER):
            if ready.prepared_for != loaded.ref.sha256:  # a swap came between: the new model may want another input
                prepared = loaded.detector.prepare(prepared.image)
            with self._s.pace.admitted(loaded.use):
                found = loaded.detector.infer([prepared])[0]
        policy, draw = self.policy, lot(ready.item.id)
        lost = self._follow(found, prepared, loaded) if self.config.ordered else ()
        judged = judge(found, prepared.stats, loaded.manifest, policy, draw, bool(lost))
        latency_ms = (self._s.clock.monotonic() - started) * 1000
        return Answer(ready.item, loaded, prepared, ready.corner, found, policy, draw, lost, judged, latency_ms)

    def _follow(self, found: Detections, prepared: Prepared, loaded: Loaded) -> tuple[Lost, ...]:
        """What should be in this frame by those before it."""
        if self._tracked_for != loaded.ref.sha256:  # what another model saw says nothing about what this one misses
            self._tracks, self._tracked_for = None, loaded.ref.sha256
        height, width = prepared.image.shape[:2]
        self._tracks, lost = follow(self._tracks, found, loaded.manifest.thresholds.score, (height, width))
        return lost

    def _commit_answer(self, answer: Answer, case: Case | None, admission: Admission | None) -> None:
        s, item, decision = self._s, answer.item, answer.judged.decision
        kept = self._capture.keep(case, admission) if case and admission else Kept(None, "")
        waits = self._may_wait(item, kept)
        if kept.suppressed == "too_large" and case:
            self._say_too_large(item.name, len(case.content))
        manifest = answer.loaded.manifest
        local: dict[str, Any] = {
            "prediction": boxes(regions.shifted(answer.answered, answer.corner), manifest.labels),
            "confidence": answer.judged.confidence.p,
            "release": manifest.release,
        }
        if self.config.results == "durable":
            self._enqueue(
                s.outgoing.result(
                    self.name, item, **local, decision=decision.action, reason=decision.reason,
                    sample=kept.sample, suppressed=kept.suppressed or None, latency_ms=answer.latency_ms,
                )
            )  # fmt: skip
        reply = {**local, "decided_by": s.outgoing.device}
        if item.request is not None and not waits:
            self._enqueue(s.outgoing.reply(item.request, **reply))
        # Once: what the store did not take is done again from the top.
        s.window.answer(
            self.name, manifest.release, decision.action, decision.reason, answer.judged.confidence.p, answer.latency_ms,
            suppressed=kept.suppressed, unheard=kept.asked and item.request is not None and not waits,
        )  # fmt: skip
        self._tally(answer)
        if s.recent is not None:
            seen = Seen(
                item.name, s.clock.now(), local["prediction"], local["confidence"], decision.action, manifest.release
            )
            s.recent.add(self.name, seen)
        if waits:
            self._wait(item, reply, answer.corner)
        else:
            item.settle("")

    def _tally(self, answer: Answer) -> None:
        """For the probation of the release that answered, or of its successor."""
        self._s.tallies.answer(
            self.slot.name, answer.loaded.manifest.release, reason=answer.judged.decision.reason,
            empty=not len(answer.answered), latency_ms=answer.latency_ms,
        )  # fmt: skip

    def _may_wait(self, item: Item, kept: Kept) -> bool:
        """Whether whoever asked for the item is kept waiting for the next tier's answer."""
        return kept.asked and item.request is not None and self.answers.may_wait(self._s.clock.monotonic())

    def _wait(self, item: Item, reply: dict[str, Any], corner: tuple[int, int] = (0, 0)) -> None:
        """Keep whoever asked for the item waiting; `reply` is the local answer, for when it is late."""
        assert item.request is not None
        wanted = item.prompt.halt if item.prompt else lambda: ""
        answer_by = self._s.clock.monotonic() + self.config.answer_by_s
        self._s.wait(item.id, Waiting(item.request, reply, answer_by, item.settle, corner, wanted))

    def _say_too_large(self, name: str, size: int) -> None:
        self._s.store.count("escalations_too_large")
        if self._said_too_large:
            return
        self._said_too_large = True
        text = (
            f"{self.name}: {name} has {size} bytes; up to {INLINE_BYTES_MAX} can be escalated: use smaller or more "
            "compressed images, or a smaller roi, which is kept as PNG"
        )
        self._enqueue(self._s.outgoing.event("escalation_too_large", text))

    def _commit_verdict(self, answer: Answer) -> None:
        asked = answer.item.asked
        assert asked is not None
        manifest = answer.loaded.manifest
        s, decision, p = self._s, answer.judged.decision, answer.judged.confidence.p
        label = boxes(answer.answered, manifest.labels)
        s.window.answer(self.name, manifest.release, decision.action, decision.reason, p, answer.latency_ms)
        self._tally(answer)
        if decision.action == "accept":
            self._enqueue(s.outgoing.verdict(asked, "labelled", label, p, manifest.release, ""))
            answer.item.settle("")
            return
        own = s.outgoing.opinion(asked, "labelled", label, p, manifest.release)
        s.unsure(Unsure(asked, own, decision.reason, answer.item.settle))

    def _enqueue(self, message: OutboxMessage) -> None:
        """Into the outbox; when that is full, wait: the item in hand is not settled before, so nothing is lost."""
        while True:
            self._beat()
            try:
                self._s.store.enqueue(message, self._s.clock.now())
                return
            except (OutboxFull, StorageFull) as error:
                self._s.store.count("outbox_full_waits")
                log.error("pipeline %s waits: %s", self.name, error)
                if self._s.pace.wait(FULL_RETRY_S, self._stopping):
                    raise SlotStopped(self.name) from None
