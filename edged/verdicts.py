"""Verdicts on this device's samples: those that came together are one transaction. All calls on the control loop.

Law: acknowledged after the commit. A crash before it means that a verdict comes again, never that it is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from edged.clock import Clock
from edged.link import Inbound, Link
from edged.outgoing import Outgoing, fits, plain
from edged.questions import Questions
from edged.store import Ruling, Sample, Store, StoreError
from edged.wire.messages import Verdict

log = logging.getLogger(__name__)

Taken = tuple[Inbound, Verdict]


def _ruling(verdict: Verdict) -> Ruling:
    return Ruling(
        verdict.sample, verdict.status, plain(verdict.label), verdict.confidence, verdict.provenance.model_dump(mode="json"),
        verdict.reason, [opinion.model_dump(mode="json") for opinion in verdict.opinions],
    )  # fmt: skip


class Verdicts:
    """Takes verdicts in, and labels with all of them at once."""

    def __init__(
        self, store: Store, link: Link, outgoing: Outgoing, clock: Clock, questions: Questions,
        guarded: Callable[[str, Callable[[], None]], None],
    ) -> None:  # fmt: skip
        """`guarded`: does something under a name, and counts its error."""
        self._store, self._link, self._outgoing, self._clock = store, link, outgoing, clock
        self._questions, self._guarded = questions, guarded
        self._taken: list[Taken] = []  # at most what the broker may send

    def take(self, message: Inbound, verdict: Verdict) -> None:
        """Keep a verdict for the next `commit`, if it is one that its sample can have."""
        if verdict.status == "labelled":
            task = self._store.task(verdict.sample)
            if task is not None and not fits(task, verdict.label):
                self._store.count("verdicts_unfit")
                log.warning("verdict of %s on %s: not what a sample of task %s can be labelled with; it is asked again",
                            verdict.provenance.who, verdict.sample, task)  # fmt: skip
                self._link.acknowledge(message)
                return
        self._taken.append((message, verdict))

    def commit(self) -> list[Inbound]:
        """Label, acknowledge, and answer whoever waits. What found the store failing, to be handed in again later."""
        taken, self._taken = self._taken, []
        return self._commit(taken) if taken else []

    def _commit(self, taken: list[Taken]) -> list[Inbound]:
        try:
            rulings = [_ruling(verdict) for _, verdict in taken]
            samples = self._store.label_many(rulings, self._clock.now(), self._outgoing.catalogue)
        except StoreError as error:
            self._store.count("store_errors")
            log.error("verdicts: %s", error)
            return [message for message, _ in taken]
        except Exception:
            if len(taken) > 1:  # what is wrong with one must not hold up the others
                return [message for one in taken for message in self._commit([one])]
            self._store.count("control_faults")
            log.exception("verdict on %s", taken[0][1].sample)
            return []
        for (message, verdict), sample in zip(taken, samples, strict=True):
            self._guarded("verdict", partial(self._tell, message, verdict, sample))
        return []

    def _tell(self, message: Inbound, verdict: Verdict, sample: Sample | None) -> None:
        self._link.acknowledge(message)
        if sample is None:
            self._store.count("verdicts_unknown")
            return
        self._store.count("verdicts" if sample.changed else "verdicts_repeated")
        self._questions.decided(verdict, sample.pipeline)
