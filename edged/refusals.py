"""What becomes of an item that a pipeline cannot answer: nobody waits in vain, and nothing is set aside in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edged.engines.base import EngineError, Unanswered, Unsuitable
from edged.engines.host import EngineEnded
from edged.in_hand import Hands
from edged.prompts import Prompts
from edged.services import Services
from edged.slot import Slot
from edged.sources import Item
from edged.store import OutboxMessage

log = logging.getLogger(__name__)


class Refusals:
    """Of one pipeline. All calls on its threads."""

    def __init__(
        self, name: str, durable: Callable[[], bool], slot: Slot, services: Services, prompts: Prompts, in_hand: Hands,
        enqueue: Callable[[OutboxMessage], None],
    ) -> None:  # fmt: skip
        """`durable`: whether every item has a result, also one that says why there is none."""
        self._name, self._durable, self._slot, self._s = name, durable, slot, services
        self._prompts, self._in_hand, self._enqueue = prompts, in_hand, enqueue

    def engine_failed(self, item: Item, error: EngineError) -> None:
        """The engine did not answer; probation hears of it unless the item is to blame."""
        unsuitable = isinstance(error, Unsuitable)
        to_blame = isinstance(error, EngineEnded) and self._in_hand.ended(item)
        if not unsuitable and not to_blame and not isinstance(error, Unanswered):
            self._s.engine_error(self._slot.name, ended=isinstance(error, EngineEnded))
        if item.asked is not None and unsuitable:  # asked again, it would be as unsuitable
            live = self._slot.live
            release = live.ref.release if live else ""
            self._enqueue(self._s.outgoing.verdict(item.asked, "unresolved", [], 0.0, release, str(error)))
            self._s.store.count("escalations_unsuitable")
            item.settle("")
            return
        if item.asked is not None:
            # Nothing is wrong with the sample: no verdict. Its owner keeps the question and asks again.
            self._s.store.count("escalations_unanswered")
            log.warning("pipeline %s: %s is not answered: %s", self._name, item.name, error)
            item.settle("")
            return
        self.reject(item, "unsuitable" if unsuitable else "engine_error", str(error))

    def reject(self, item: Item, counter: str, reason: str) -> None:
        """An item that cannot be answered: counted, said, answered with the error where somebody waits, and set aside."""
        s = self._s
        live = self._slot.live
        release = live.ref.release if live else ""
        s.store.count(f"items_{counter}")
        # As answers are counted (edged.prompts): an adapter's errors are its own.
        s.window.error(self._name, live.adapter.release if live and live.adapter else release)
        about = {"pipeline": self._name, "slot": self._slot.name, "release": release, "item": item.name}
        log.warning("pipeline %s: %s: %s", self._name, item.name, reason, extra=about)
        if item.asked is not None:
            self._enqueue(s.outgoing.verdict(item.asked, "rejected", [], 0.0, release, reason))
        elif item.request is not None:
            if item.prompt is not None:
                self._prompts.refused(item, release, reason)
            prompt = (item.prompt and item.prompt.prompt) or None
            self._enqueue(s.outgoing.reply(item.request, error=reason, generation_prompt=prompt, release=release))
        elif self._durable():
            refusal = s.outgoing.result(self._name, item, release=release or "none", confidence=0.0,
                                        decision="accept", error=reason)  # fmt: skip
            self._enqueue(refusal)
        item.settle(reason)
