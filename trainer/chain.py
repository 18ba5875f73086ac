"""Files that only ever grow: JSON lines of which each holds the hash of the one before, so that none can be changed, moved
or taken out unseen. One writer at a time, over processes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trainer.files import make_folder

START = "0" * 64  # the hash before the first entry


class Entry(Protocol):
    """What an entry has besides what it says; `number` counts from 0, `previous` is the `hash` of the one before."""

    @property
    def number(self) -> int: ...
    @property
    def previous(self) -> str: ...
    @property
    def hash(self) -> str: ...
    def sealed(self) -> str: ...


T = TypeVar("T", bound=Entry)


def seal(values: Mapping[str, Any]) -> str:
    """The hash of everything in an entry but its own `hash`."""
    kept = {key: value for key, value in values.items() if key != "hash"}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_chain(
    path: Path, make: Callable[[Mapping[str, Any]], T], named: Callable[[T], str], error: Callable[[str], Exception]
) -> list[T]:
    """The entries of a file, none when there is no file; raises `error` naming the line that was changed or that is
    missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path}: {reason}; restore it from a copy") from None
    entries: list[T] = []
    previous = START
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 1}"
        try:
            entry = make(json.loads(line))
        except (ValueError, TypeError, KeyError) as reason:
            raise error(f"{where}: {reason}; restore the ledger from a copy") from None
        if entry.sealed() != entry.hash:
            raise error(f"{where} ({named(entry)}): the entry was changed; restore the ledger from a copy")
        if entry.number != number or entry.previous != previous:
            raise error(
                f"{where} ({named(entry)}): entry {number} is missing or was put elsewhere; restore the ledger from a copy"
            )
        entries.append(entry)
        previous = entry.hash
    return entries


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time, over processes: `trainer holdout extend` beside a training."""
    make_folder(folder)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
