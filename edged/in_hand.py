"""Which item is in hand, remembered across a crash of the process; an item in hand at two crashes is quarantined.

In hand is an item while it is decoded, letterboxed or answered: while it is in native code. Each pipeline has a small file
for that in `state_dir/in_hand`, written without an fsync: the kernel keeps what a process wrote that died (SIGSEGV, SIGKILL,
out of memory). A power cut may lose it, and then it says nothing: a file of an earlier boot blames nobody.

Law: whoever was in hand at a crash is in hand alone from then on, so that a second crash has one culprit. A stop that was
asked for blames nobody. Who is to blame is decided in `core/quarantine.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from edged.core import quarantine
from edged.core.quarantine import CRASHES_MAX, Blame, Crash
from edged.core.update import State
from edged.slot import Loaded, Slot, SlotStopped
from edged.sources import Item
from edged.store import Store, StoreError
from edged.wire.manifest import ReleaseRef

log = logging.getLogger(__name__)

ITEMS_MAX = 256  # suspects and quarantined items that are remembered, the newest
CRASHES_KEPT = 8  # of one item
ANSWERED_MAX = 16  # releases that are known to have answered something here
RECORD_BYTES = 1024
NAME_CHARS_MAX = 100
WAIT_S = 0.5  # between two looks at whether the daemon ends, of who has to wait for his turn
VALUE = "in_hand"  # the store's key
# The records of a pipeline's file: what each of its threads has in hand, the release that answered last, the boot.
PREPARER, WORKER, ANSWERED, BOOT = range(4)
_MARKED, _FREE, _END = b"1", b"0", b"\n"


class Mark(NamedTuple):
    """What was in hand: the item, and the slot with what it served."""

    key: str
    item: str
    what: str
    pipeline: str
    slot: str
    release: str
    sha: str
    adapter: str
    adapter_sha: str

    @property
    def crash(self) -> Crash:
        """The crash that it was in hand at."""
        name = f"{self.release} + {self.adapter}" if self.adapter else self.release
        return Crash(name or "no release", tuple(sha for sha in (self.sha, self.adapter_sha) if sha))


@dataclass(slots=True)
class _Entry:
    """What is known of one item."""

    item: str
    pipeline: str
    crashes: list[Crash] = field(default_factory=list)
    quarantined: bool = False


def boot_id() -> str:
    """Which start of the machine this is; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class InHand:
    """The marks of all pipelines, and what earlier crashes said. Safe to use from any thread."""

    def __init__(
        self, folder: Path | None = None, store: Store | None = None, say: Callable[..., None] = lambda *_, **__: None,
        boot: str | None = None,
    ) -> None:  # fmt: skip
        """Judge what the last run left in `folder`; without one nothing is remembered. `say`: an event for people."""
        self._folder, self._store, self._say = folder, store, say
        self._boot = boot_id() if boot is None else boot
        self._changed = threading.Condition()  # guards the marks, and who may be in hand
        self._held, self._alone = 0, False
        self._ledger = threading.Lock()  # guards what follows
        self._entries: dict[str, _Entry] = {}
        self._answered: list[tuple[str, ...]] = []
        self._numbers = itertools.count()
        self._in_hand, self._culprits = 0, 0  # of the crash before this start
        if folder is not None:
            self._recall()
            self._judge(self._collect(folder))

    def of(self, pipeline: str, slot: Slot, must_stop: Callable[[], bool]) -> Hands:
        """The hands of one pipeline. `must_stop`: whether the daemon is about to end; asked while they wait."""
        file = None
        if self._folder is not None:
            path = self._folder / f"{next(self._numbers)}-{pipeline}"
            try:
                file = FileIO(path, "w")
                # Written whole, so that a mark needs no new room on the disk.
                file.write(bytes(BOOT * RECORD_BYTES) + self._boot.encode().ljust(RECORD_BYTES, b"\0"))
            except OSError as error:
                log.error("%s: %s: a crash will not be traced to its item", path, error.strerror)
        return Hands(self, pipeline, slot, must_stop, file)

    def excuses(self, update: State) -> bool:
        """Whether the crash before this start does not count against the update that was under way."""
        return not quarantine.counts_against(update, self._in_hand, bool(self._culprits))

    def close(self) -> None:
        """A stop was asked for: what is in hand from now on is not remembered, however the stop goes."""
        if self._folder is not None:
            for path in self._folder.iterdir():
                path.unlink(missing_ok=True)

    # What the last run left.

    def _recall(self) -> None:
        known = (self._store and self._store.value(VALUE)) or {}
        for key, row in known.get("items", {}).items():
            crashes = [Crash(crash["release"], tuple(crash["shas"])) for crash in row["crashes"]]
            self._entries[key] = _Entry(row["item"], row["pipeline"], crashes, row["quarantined"])
        self._answered = [tuple(shas) for shas in known.get("answered", [])]

    def _collect(self, folder: Path) -> list[Mark]:
        """What was in hand when the process ended without having been asked to."""
        folder.mkdir(parents=True, exist_ok=True)
        marks: list[Mark] = []
        for path in sorted(folder.iterdir()):
            try:
                data = path.read_bytes()
            except OSError as error:
                log.error("%s: %s", path, error.strerror)
                continue
            records = [data[n * RECORD_BYTES : (n + 1) * RECORD_BYTES] for n in range(BOOT + 1)]
            if records[BOOT].rstrip(b"\0").decode(errors="replace") != self._boot:
                continue
            marks += [mark for record in records[:ANSWERED] if (mark := _read(record)) is not None]
            answered = _read(records[ANSWERED])
            if answered is not None:
                self._note_answered(answered.crash.shas)
        return marks

    def _judge(self, marks: list[Mark]) -> None:
        self._in_hand = len(marks)
        if marks:
            # The exclusive hand may be marked twice: it is one item all the same.
            alone = len({mark.key for mark in marks}) == 1
            updates = self._updates()
            self._culprits = sum(self._blame(mark, alone, updates) is Blame.QUARANTINED for mark in marks)
            self._save()
        self.close()

    def _blame(self, mark: Mark, alone: bool, updates: list[tuple[State, str]]) -> Blame:
        """Note a crash with `mark` in hand during `updates`; what the item is from now on."""
        entry = self._entries.pop(mark.key, None) or _Entry(mark.item, mark.pipeline)
        self._entries[mark.key] = entry  # the newest are at the end
        while len(self._entries) > ITEMS_MAX:
            del self._entries[next(iter(self._entries))]
        earlier = quarantine.standing(entry.crashes, self._bad)
        own = {state for state, sha in updates if sha in mark.crash.shas}
        how = quarantine.trial(own, {state for state, _ in updates}, mark.crash.shas in self._answered)
        found = quarantine.blame(how, len(earlier), alone)
        entry.crashes = [*earlier, mark.crash][-CRASHES_KEPT:]
        entry.quarantined = found is Blame.QUARANTINED
        text = f"{mark.pipeline}: {mark.item} was in hand ({mark.what}, {mark.crash.release}) at a crash"
        log.warning("%s, its crash number %d: %s", text, len(entry.crashes), found)
        if self._store is not None:
            self._store.count("items_in_hand_at_crash")
        if entry.quarantined:
            self._report(mark)
        return found

    def _report(self, mark: Mark) -> None:
        text = (
            f"{mark.pipeline}: {mark.item} was in hand ({mark.what}) at {CRASHES_MAX} crashes, the last under "
            f"{mark.crash.release}: it is rejected when it comes again"
        )
        try:
            self._say("item_quarantined", text, item=mark.item, pipeline=mark.pipeline, release=mark.crash.release)
        except StoreError as error:
            log.error("%s (not reported: %s)", text, error)

    def _updates(self) -> list[tuple[State, str]]:
        """How the update of each target stood, and the SHA-256 of its candidate."""
        records = self._store.updates().values() if self._store is not None else ()
        return [(_on_trial(record), (record.get("candidate") or {}).get("sha256", "")) for record in records]

    def _bad(self, sha: str) -> bool:
        return self._store is not None and self._store.bad(sha) is not None

    def _save(self) -> None:
        if self._store is None:
            return
        try:
            items = {key: asdict(entry) for key, entry in self._entries.items()}
            self._store.set_value(VALUE, {"items": items, "answered": self._answered})
        except StoreError as error:
            self._store.count("store_errors")
            log.error("what was in hand at a crash is not kept: %s", error)

    # For the hands of the pipelines.

    def known(self, key: Callable[[], str]) -> tuple[bool, int]:
        """Of an item: whether it is quarantined, and how many crashes still count."""
        if not self._entries:
            return False, 0
        with self._ledger:
            entry = self._entries.get(key())
            crashes = len(quarantine.standing(entry.crashes, self._bad)) if entry else 0
            return entry is not None and entry.quarantined and crashes >= CRASHES_MAX, crashes

    def ended(self, mark: Mark) -> bool:
        """The engine's own process has ended with this in hand; true when the item is to blame for it."""
        switched = [update for update in self._updates() if update[0] is State.SWITCHED]
        with self._ledger:  # whatever is being loaded now is loaded in another process
            found = self._blame(mark, True, switched)
            self._save()
        return found is Blame.QUARANTINED

    def answered(self, key: str, shas: tuple[str, ...]) -> None:
        """An item was answered: its release answers, and of the item nothing is suspected any more."""
        with self._ledger:
            self._note_answered(shas)
            if self._entries.pop(key, None) is not None:
                self._save()

    def _note_answered(self, shas: tuple[str, ...]) -> None:
        if shas not in self._answered:
            self._answered = [*self._answered, shas][-ANSWERED_MAX:]

    def enter(self, alone: bool, must_stop: Callable[[], bool], mark: Callable[[], None]) -> None:
        """Wait for a turn, then `mark`: who must be alone waits until nothing else is in hand, and everybody waits for
        him. Raises SlotStopped when the daemon ends first."""
        with self._changed:
            while self._alone:
                self._wait(must_stop)
            self._alone = alone
            try:
                while alone and self._held:
                    self._wait(must_stop)
                mark()
            except BaseException:
                self._alone = False
                self._changed.notify_all()
                raise
            self._held += 1

    def leave(self, alone: bool, clear: Callable[[], None]) -> None:
        """The item is out of hand."""
        with self._changed:
            clear()
            self._held -= 1
            if self._alone:  # him, or somebody waits to be
                self._alone = not alone
                self._changed.notify_all()

    def _wait(self, must_stop: Callable[[], bool]) -> None:
        if must_stop():
            raise SlotStopped("in hand")
        self._changed.wait(WAIT_S)


def _on_trial(record: dict[str, Any]) -> State:
    """The state of an update; a release that was committed a moment ago is on trial still."""
    return State(record["state"]) if record.get("settled", True) else State.SWITCHED


class _Serving:
    """What a slot serves, for the marks of a pipeline."""

    __slots__ = ("adapter", "live", "shas", "tail")

    def __init__(self, live: Loaded | None, adapter: ReleaseRef | None, pipeline: str, slot: str) -> None:
        self.live, self.adapter = live, adapter
        release, sha = (live.ref.release, live.ref.sha256) if live else ("", "")
        fields = (pipeline, slot, release, sha, *((adapter.release, adapter.sha256) if adapter else ("", "")))
        self.shas = tuple(sha for sha in (sha, adapter.sha256 if adapter else "") if sha)
        self.tail = "\0".join(fields).encode() + _END


class Hands:
    """The hands of one pipeline: its preparer and its worker have one item each."""

    def __init__(
        self, owner: InHand, pipeline: str, slot: Slot, must_stop: Callable[[], bool], file: FileIO | None
    ) -> None:
        self._owner, self._pipeline, self._slot, self._must_stop = owner, pipeline, slot, must_stop
        self._file = file
        self._serving = _Serving(None, None, pipeline, slot.name)
        self._last: tuple[str, ...] = ()  # the release that answered last
        self._put_off: set[str] = set()  # suspects that have gone to the end of the queue once; at most ITEMS_MAX

    def turned_away(self, item: Item) -> str:
        """Why the item is not to be touched, or empty."""
        quarantined, crashes = self._owner.known(lambda: _key(item))
        return f"quarantined: in hand at {crashes} crashes" if quarantined else ""

    def last(self, item: Item) -> bool:
        """Whether others should be answered before this one, because it was in hand at a crash; says so once an item, and
        not before there is a model: then the others are there too."""
        if item.id in self._put_off or not self._owner.known(lambda: _key(item))[1] or len(self._put_off) >= ITEMS_MAX:
            return False
        self._put_off.add(item.id)
        while not self._slot.wait(WAIT_S):
            if self._must_stop():
                raise SlotStopped(self._slot.name)
        return True

    @contextmanager
    def held(self, item: Item, record: int) -> Iterator[None]:
        """The item is in hand until the block ends. `record`: PREPARER or WORKER, which thread's hand."""
        live = self._slot.live
        if item.prompt is not None and live is not None and not live.here:
            # In another process's or machine's hands: when that ends, `ended` or an error says so. This one does not.
            shas = self._served().shas
            yield
            self._owner.answered(_key(item), shas)
            return
        alone = self._owner.known(lambda: _key(item))[1] > 0
        serving, offset = self._served(), record * RECORD_BYTES
        mark = _record(item, "answering" if record == WORKER else "preparing", serving)
        self._owner.enter(alone, self._must_stop, lambda: self._write(offset, mark))
        try:
            yield
        finally:
            self._owner.leave(alone, lambda: self._write(offset, _FREE))
        if record == WORKER and (alone or serving.shas != self._last):
            self._last = serving.shas  # a release's first answer, in the file: it outlives a crash too
            self._write(ANSWERED * RECORD_BYTES, mark)
            self._owner.answered(_key(item), serving.shas)

    def ended(self, item: Item) -> bool:
        """The engine's own process has ended with this item in hand; true when the item is to blame for it."""
        mark = _read(_record(item, "answering", self._served()))
        return mark is not None and self._owner.ended(mark)

    def close(self) -> None:
        """Nothing is in hand any more: the pipeline has ended."""
        file, self._file = self._file, None
        if file is not None:
            Path(file.name).unlink(missing_ok=True)
            file.close()

    def _served(self) -> _Serving:
        """What the slot serves now; made anew only when that has changed, because it is asked for at every step."""
        live = self._slot.live
        adapter = live.adapter if live else None
        if self._serving.live is not live or self._serving.adapter is not adapter:
            self._serving = _Serving(live, adapter, self._pipeline, self._slot.name)
        return self._serving

    def _write(self, offset: int, data: bytes) -> None:
        if self._file is None:
            return
        try:
            os.pwrite(self._file.fileno(), data, offset)
        except OSError as error:  # no reason to stop answering
            log.error("in_hand of %s: %s: a crash will not be traced to its item", self._pipeline, error.strerror)
            self._file = None


def _key(item: Item) -> str:
    """What an item is known by when it comes again. A prompt by its content: who is told of an error asks again, under
    another id."""
    if item.prompt is None:
        return item.id
    turns = [part for turn in item.prompt.messages for part in (turn.role, turn.content)]
    text = "\0".join((item.prompt.prompt, repr(item.prompt.schema), *turns))
    return f"prompt-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _record(item: Item, what: str, serving: _Serving) -> bytes:
    head = f"{_key(item)}\0{item.name[:NAME_CHARS_MAX]}\0{what}\0".encode(errors="replace").replace(_END, b" ")
    return _MARKED + head + serving.tail


def _read(record: bytes) -> Mark | None:
    """What is marked in a record; None when nothing is."""
    if not record.startswith(_MARKED):
        return None
    fields = record[1:].partition(_END)[0].decode(errors="replace").split("\0")
    if len(fields) != len(Mark._fields):
        log.warning("a mark of what was in hand cannot be read: %s", record[:80])
        return None
    return Mark(*fields)
