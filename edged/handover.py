"""The trainer's commands about samples: move them between states, and hand their pixels over.

They run on a thread of their own, beside the control loop: an upload of hundreds of images takes a while.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from edged.carrier import HttpCarrier
from edged.fetch import FetchError, WrongContent
from edged.outgoing import Outgoing
from edged.store import OutboxMessage, Sample, Store, StoreError
from edged.wire import messages

log = logging.getLogger(__name__)

LISTED_MAX = 100_000


class Handover:
    """Carries out `down/cmd/samples`. Every command may come again and ends the same way each time."""

    def __init__(
        self, store: Store, outgoing: Outgoing, carrier: HttpCarrier, host: Callable[[], str | None],
        enqueue: Callable[[OutboxMessage], None],
    ) -> None:  # fmt: skip
        """`host`: the trainer's address as it is known now; `enqueue`: into the outbox, for what may be given up."""
        self._store, self._outgoing, self._carrier = store, outgoing, carrier
        self._host, self._enqueue = host, enqueue
        self._under_way: set[str] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._work = ThreadPoolExecutor(max_workers=1, thread_name_prefix="handover")

    def submit(self, command_id: str, command: messages.SamplesCommand) -> None:
        """Carry it out soon; a repetition while it is under way changes nothing."""
        with self._lock:
            if command_id in self._under_way:
                return
            self._under_way.add(command_id)
        self._work.submit(self._run, command_id, command)

    def close(self) -> None:
        """Begin nothing more; what is under way ends after the image in hand."""
        self._closing = True
        self._work.shutdown(wait=False, cancel_futures=True)

    def _run(self, command_id: str, command: messages.SamplesCommand) -> None:
        try:
            self._say(command_id, "done", "", self._move(command))
        except (FetchError, WrongContent, StoreError, ValueError) as error:
            self._store.count("commands_failed")
            self._say(command_id, "failed", str(error), {})
        except Exception as error:  # a bug of ours is an answer too: the trainer waits for one
            log.exception("command %s", command_id)
            self._store.count("handover_faults")
            self._say(command_id, "failed", f"{type(error).__name__}: {error}", {})
        finally:
            with self._lock:
                self._under_way.discard(command_id)

    def _move(self, command: messages.SamplesCommand) -> dict[str, Any]:
        store = self._store
        if command.action == "list":
            listed = store.samples(limit=LISTED_MAX)
            for sample in listed:
                self._enqueue(self._outgoing.catalogue(sample))
            return {"listed": len(listed)}
        if command.action == "claim":
            moved = store.claim(command.samples, command.job)
            gone = [s for s in moved.samples if not self._upload(s, command.upload_url)]
            for sample in gone:  # the others are handed over all the same
                moved.samples.remove(sample)
                moved.refused[sample.id] = "its image is gone or damaged"
        elif command.action == "used":
            moved = store.used(command.samples, command.release)
        elif command.action == "release":
            moved = store.unclaim(command.samples, command.job)
        else:
            moved = store.archive(command.samples)
        return {"moved": [s.id for s in moved.samples], "unknown": moved.unknown, "refused": moved.refused}

    def _upload(self, sample: Sample, url: str) -> bool:
        """Hand one image over; false when there is nothing to hand over. Raises FetchError for now or ValueError."""
        if self._closing:
            raise FetchError("the device is stopping: ask again")
        host = self._host()
        # A command only points: pixels go to the trainer that this device knows, and nowhere else.
        if not host or not url.startswith(host.rstrip("/") + "/"):
            raise ValueError(f"upload_url {url!r} does not belong to the trainer at {host}: nothing was sent")
        path = self._store.blob(sample.sha256)
        try:
            if path is None:
                raise WrongContent(f"sample {sample.id}: its image is gone")
            self._carrier.upload(url, path, sample.sha256)
        except WrongContent as error:
            log.error("%s", error)
            self._store.count("samples_damaged")
            return False
        self._store.count("samples_uploaded")
        return True

    def _say(
        self, command_id: str, state: Literal["accepted", "done", "failed"], reason: str, detail: dict[str, Any]
    ) -> None:
        self._enqueue(self._outgoing.command_state("samples", command_id, state, reason, detail))
