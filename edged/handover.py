"""The trainer's commands about samples: move them between states, and hand their pixels over.

They run on a thread of their own, beside the control loop: an upload of hundreds of images takes a while.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from edged.fetch import FetchError, WrongContent
from edged.files import sha256_of
from edged.outgoing import Outgoing
from edged.store import Moved, OutboxFull, OutboxMessage, Sample, Store, StoreError
from edged.uploads import Uploads
from edged.wire import messages

log = logging.getLogger(__name__)

STOPPING = "the device is stopping: ask again"
LISTED_MAX = 100_000  # samples of one listing
PAGE_MAX = 200  # catalogue entries that enter the outbox in one transaction
FREE_SHARE = 0.5  # of the outbox's free rows that a page may take: everything else is on its way too
ROOM_S_MAX = 600.0  # that a listing waits for room in the outbox, page by page
ROOM_LOOK_S = 0.2
MOVE_MAX = 500  # samples that are moved in one transaction: no capture waits long for it


class Handover:
    """Carries out `down/cmd/samples`. Every command may come again and ends the same way each time."""

    def __init__(
        self, store: Store, outgoing: Outgoing, uploads: Uploads, host: Callable[[], str | None],
        enqueue: Callable[[OutboxMessage], None],
    ) -> None:  # fmt: skip
        """`host`: the trainer's address as it is known now; `enqueue`: into the outbox, for what may be given up."""
        self._store, self._outgoing, self._uploads = store, outgoing, uploads
        self._host, self._enqueue = host, enqueue
        self._under_way: set[str] = set()
        self._ending: dict[str, messages.SamplesCommand] = {}  # what ends claims and has not had its turn
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._waited = 0.0  # seconds that a listing has now waited for room
        self._work = ThreadPoolExecutor(max_workers=1, thread_name_prefix="handover")

    def submit(self, command_id: str, command: messages.SamplesCommand) -> None:
        """Carry it out soon; a repetition while it is under way changes nothing."""
        with self._lock:
            if command_id in self._under_way:
                return
            self._under_way.add(command_id)
            if command.action in ("release", "used"):
                self._ending[command_id] = command
        self._work.submit(self._run, command_id, command)

    def close(self) -> None:
        """Begin nothing more; what is under way ends after the image in hand."""
        self._closing.set()
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
                self._ending.pop(command_id, None)

    def _move(self, command: messages.SamplesCommand) -> dict[str, Any]:
        if command.action == "list":
            return self._list()
        done: dict[str, Any] = {"moved": [], "unknown": [], "refused": {}}
        for first in range(0, len(command.samples), MOVE_MAX):
            moved = self._move_some(command, command.samples[first : first + MOVE_MAX])
            done["moved"] += [sample.id for sample in moved.samples]
            done["unknown"] += moved.unknown
            done["refused"] |= moved.refused
        return done

    def _move_some(self, command: messages.SamplesCommand, samples: list[str]) -> Moved:
        store = self._store
        if command.action == "used":
            return store.used(samples, command.release)
        if command.action == "release":
            return store.unclaim(samples, command.job)
        if command.action == "archive":
            return store.archive(samples)
        moved = store.claim(samples, command.job)
        if command.upload_url:
            gone = [s for s in moved.samples if not self._upload(s, command.upload_url)]
        else:
            gone = self._answer(moved.samples, command.job)
        for sample in gone:  # the others are handed over all the same
            moved.samples.remove(sample)
            moved.refused[sample.id] = "its image is gone or damaged"
        return moved

    def _list(self) -> dict[str, Any]:
        """The whole catalogue, oldest first, page by page as the outbox has room: a listing pushes nothing else out."""
        self._waited = 0.0
        store, outgoing = self._store, self._outgoing
        listed, after = 0, (-math.inf, "")
        while listed < LISTED_MAX:
            page = store.samples(limit=min(PAGE_MAX, LISTED_MAX - listed, self._room()), after=after)
            if not page:
                break
            try:
                store.enqueue_many([outgoing.catalogue(sample) for sample in page], outgoing.stamp.clock.now())
            except OutboxFull:  # by its bytes, or somebody was faster
                self._pause()
                continue
            self._waited = 0.0
            listed += len(page)
            after = (page[-1].captured, page[-1].id)
        return {"listed": listed, "of": sum(store.counts().values())}

    def _room(self) -> int:
        """How many entries the outbox may take now, at least one; waits for it."""
        while not (room := math.ceil(self._store.rows_free() * FREE_SHARE)):
            self._pause()
        return room

    def _pause(self) -> None:
        if self._waited >= ROOM_S_MAX:
            raise FetchError(f"the outbox has had no room for {ROOM_S_MAX:.0f} s: ask again for the whole catalogue")
        if self._closing.wait(ROOM_LOOK_S):
            raise FetchError(STOPPING)
        self._waited += ROOM_LOOK_S

    def _upload(self, sample: Sample, url: str) -> bool:
        """Hand one image over; false when there is nothing to hand over. Raises FetchError for now or ValueError."""
        if self._closing.is_set():
            raise FetchError(STOPPING)
        host = self._host()
        # A command only points: pixels go to the trainer that this device knows, and nowhere else.
        if not host or not url.startswith(host.rstrip("/") + "/"):
            raise ValueError(f"upload_url {url!r} does not belong to the trainer at {host}: nothing was sent")
        path = self._store.blob(sample.sha256)
        try:
            if path is None:
                raise WrongContent(f"sample {sample.id}: its image is gone")
            self._uploads.put(url, path, sample.sha256)
        except WrongContent as error:
            log.error("%s", error)
            self._store.count("samples_damaged")
            return False
        self._store.count("samples_uploaded")
        return True

    def _answer(self, claimed: list[Sample], job: str) -> list[Sample]:
        """Give the trainer the blocks that it asks for; the samples that have none. It ends when the trainer gives all of
        them back: it has them, or wants them no more, and what said so was lost. Raises FetchError."""
        whole: dict[str, Path] = {}
        gone = []
        for sample in claimed:
            path = self._store.blob(sample.sha256)
            if path is not None and sha256_of(path) == sample.sha256:
                whole[sample.sha256] = path
            else:
                log.error("sample %s: its image is gone or damaged", sample.id)
                self._store.count("samples_damaged")
                gone.append(sample)
        ids = {sample.id for sample in claimed}
        try:
            self._uploads.answer(whole, lambda: self._closing.is_set() or self._given_back(job, ids))
        except FetchError:
            if not self._given_back(job, ids):
                raise
            return gone
        self._store.count("samples_uploaded", len(whole))
        return gone

    def _given_back(self, job: str, ids: set[str]) -> bool:
        """Whether what waits for its turn ends the claim of a job on all of these samples."""
        with self._lock:
            ended = {each for command in self._ending.values() if command.job == job for each in command.samples}
        return bool(ids) and ids <= ended

    def _say(
        self, command_id: str, state: Literal["accepted", "done", "failed"], reason: str, detail: dict[str, Any]
    ) -> None:
        self._enqueue(self._outgoing.command_state("samples", command_id, state, reason, detail))
