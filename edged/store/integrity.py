"""A start that heals: the database is checked, set aside with its blobs when it is broken, and a new one begins.

How much is checked: up to CHECK_ALWAYS_BYTES the whole file, at every start (PRAGMA quick_check reads every page: a GiB took
5.5 s from a disk of 170 MiB/s and would take half a minute from an SD card). A larger file only after an end that was not in
order, which is when damage is made; the marker file says so. After damage was met in service: integrity_check, which also
compares every index with its table. `edged samples verify` does that at any time.

Law of this file: nothing that may still be read is deleted, but for the oldest of more than BROKEN_MAX broken databases.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edged.files import sync
from edged.store import BrokenStore, Store, StoreLimits, SweepReport

log = logging.getLogger(__name__)

DATABASE = "edged.db"
BLOBS = "blobs"
MARKER = "edged.db.in-use"
SUSPECT = "damaged"  # what the marker says when damage was met in service
RESERVE = "edged.reserve"
BROKEN = f"{DATABASE}.broken-"
BROKEN_MAX = 3
BLOBS_SUFFIX = ".blobs"
_BESIDE = ("", "-wal", "-shm")


@dataclass(frozen=True, slots=True)
class SetAside:
    """Where a broken database and its blobs lie now, and why. `database` may not exist: only its blobs were left."""

    database: Path
    reason: str

    @property
    def blobs(self) -> Path:
        """The folder of its blobs."""
        return blobs_of(self.database)

    def describe(self) -> str:
        """What to say about it, with the fix."""
        if not self.database.exists():
            return f"{self.reason}. The blobs without a row were moved to {self.blobs}"
        return (
            f"{self.reason}. It lies at {self.database} now, its blobs in {self.blobs}, and a new one was begun: stop edged "
            "and run `edged samples recover`, which takes over what can still be read"
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """A store that is ready for the daemon."""

    store: Store
    swept: SweepReport
    broken: SetAside | None


def blobs_of(database: Path) -> Path:
    """The folder of the blobs that were set aside with this database."""
    return database.with_name(database.name + BLOBS_SUFFIX)


def set_asides(folder: Path) -> list[Path]:
    """The databases that were set aside, newest first; of one or the other only the blobs may be there."""
    names = {_stem(path.name) for path in folder.glob(f"{BROKEN}*")}
    return [folder / name for name in sorted(names, reverse=True)]


def _stem(name: str) -> str:
    for suffix in (BLOBS_SUFFIX, *_BESIDE[1:]):
        name = name.removesuffix(suffix)
    return name


def open_store(folder: Path, limits: StoreLimits, now: float) -> Opened:
    """Open the store of this folder for the daemon, which must hold its lock. Raises StoreError when not even a new one
    can be opened."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    ended = marker.read_text() if marker.exists() else None
    rows_lost = _rows_lost(folder, unclean=ended is not None)
    broken: SetAside | None = None
    try:
        store = Store(folder, limits, None if ended is None else "full" if ended == SUSPECT else "quick")
    except BrokenStore as error:
        broken = set_aside(folder, str(error), now)
        store = Store(folder, limits)
    _mark(marker, "")
    if rows_lost and broken is None:
        broken = SetAside(_name(folder, now), rows_lost)
    # Blobs without a row: with the rows just lost they are all that is left of them.
    swept = store.sweep(broken.blobs if broken and rows_lost else None)
    if broken and not swept.orphans and not broken.database.exists():
        broken = None
    if broken:
        store.count("store_broken")
        if broken.database.exists():
            _keep_facts(store, broken.database)
    _prune(folder)
    store.hold_reserve(folder / RESERVE)
    store.marks_with(lambda damaged: _mark(marker, SUSPECT) if damaged else marker.unlink(missing_ok=True))
    return Opened(store, swept, broken)


def _rows_lost(folder: Path, unclean: bool) -> str:
    """Why rows are missing although what there is of the database may be whole; empty when nothing tells so."""
    database = folder / DATABASE
    if not database.exists():
        return f"{database} is gone" if any((folder / BLOBS).glob("*/*")) else ""
    if unclean and not database.with_name(f"{DATABASE}-wal").exists():
        return f"{database}-wal is gone, and with it what was written last"
    return ""


def _mark(marker: Path, text: str) -> None:
    # Beside and renamed: writing over it would lose for a moment that damage was met before.
    beside = marker.with_name(f"{marker.name}.new")
    beside.write_text(text)
    sync(beside)
    beside.replace(marker)
    sync(marker.parent)


def _name(folder: Path, now: float) -> Path:
    """A name for what is set aside now: they sort by time."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    taken = {path.name for path in set_asides(folder)}
    number = 0
    while (name := f"{BROKEN}{stamp}" + (f"-{number}" if number else "")) in taken:
        number += 1
    return folder / name


def set_aside(folder: Path, reason: str, now: float) -> SetAside:
    """Rename the database and its blobs, so that a new one can begin."""
    aside = SetAside(_name(folder, now), reason)
    # The blobs first: a crash in between finds the broken file again; the other way round their rows would be gone
    # before them.
    if (folder / BLOBS).exists():
        (folder / BLOBS).rename(aside.blobs)
    for suffix in reversed(_BESIDE):
        path = folder / f"{DATABASE}{suffix}"
        if path.exists():
            path.rename(aside.database.with_name(aside.database.name + suffix))
    sync(folder)
    return aside


def _prune(folder: Path) -> None:
    for database in set_asides(folder)[BROKEN_MAX:]:
        log.warning("%s: deleted with its blobs: %d newer broken databases are kept", database, BROKEN_MAX)
        shutil.rmtree(blobs_of(database), ignore_errors=True)
        for suffix in _BESIDE:
            database.with_name(database.name + suffix).unlink(missing_ok=True)


def _keep_facts(store: Store, database: Path) -> None:
    """Which release each slot runs and which must never run again: without them the device would go back to its seeds."""
    from edged.store import recover

    try:
        updates, bad = recover.facts(database)
        for target, record in updates.items():
            store.save_update(target, record)
        for row in bad:
            store.remember_bad(*row)
    except OSError as error:
        log.error("%s: %s: which releases ran is not known", database, error)
    else:
        log.warning("%s: kept the state of %d updates and %d bad releases", database, len(updates), len(bad))
