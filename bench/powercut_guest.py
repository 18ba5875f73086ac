"""What runs inside the virtual machine of `make powercut`: looks at the disk, then runs the daemon and feeds it.

    python powercut_guest.py STOCK BOOT

By the package's own Python, as root, of the standard library and edged alone. It tells the host in lines of JSON:
`found` (before the daemon starts, and after it ended in order), `put` (a picture that no power cut can take away any
more), `at` (where the daemon is, at every change), `ended` (the daemon did, by itself). Told `enough`, it puts no more
pictures; told `stop`, it ends everything in order.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edged.core.update import State
from edged.files import sync
from edged.releases import BadRelease, Releases, verify
from edged.status_socket import ask_status
from edged.store import Store, StoreError
from edged.store.integrity import set_asides
from edged.update_record import Record

STATE = Path("/var/lib/edged")
SPOOL = Path("/var/spool/edged/line")
CONFIG = Path("/mnt/edged.toml")
MEMORY = Path("/run")
VERIFIED = {State.PROVING, State.STAGED, State.SWITCHED}  # the files of a candidate have been found whole
PUT_S = 1.0  # between two pictures
POLL_S = 0.3
STOP_S_MAX = 240.0  # of the daemon: every instruction is emulated


def say(what: str, value: Any) -> None:
    """One line to the host."""
    sys.stdout.write(json.dumps({what: value}) + "\n")
    sys.stdout.flush()


def found(state: Path, spool: Path, memory: Path) -> dict[str, Any]:
    """What lies on the disk; the daemon does not run. Nothing is changed: the database is read from a copy in `memory`,
    because SQLite would take the write-ahead log away that a power cut left."""
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        for path in state.glob("edged.db*"):
            if path.is_file():
                shutil.copy2(path, scratch)
        (Path(scratch) / "blobs").mkdir()
        for folder in (state / "blobs").glob("*"):
            (Path(scratch) / "blobs" / folder.name).symlink_to(folder)
        try:
            store = Store(Path(scratch))
        except StoreError as error:
            return {"broken": str(error)}
        try:
            rows = store.samples(limit=1 << 30)
            bad_blobs = store.verify().bad_blobs
            records = [Record.model_validate(record) for record in store.updates().values()]
        except StoreError as error:
            return {"broken": str(error)}
        finally:
            store.close()
    damaged = []
    refs = [ref for record in records for ref in (record.active, record.previous) if ref is not None]
    refs += [record.candidate for record in records if record.candidate and record.state in VERIFIED]
    releases = Releases(state / "releases") if refs else None  # it would make the folder, for root alone
    for ref in refs:
        try:
            assert releases is not None
            verify(releases.folder(ref), ref)
        except BadRelease as error:
            damaged.append(str(error))
    return {
        "samples": [[row.id, row.item, row.state, row.sha256] for row in rows],
        "bad_blobs": bad_blobs,
        "damaged": damaged,
        "set_aside": [path.name for path in set_asides(state)],
        "updates": {record.target: [record.state, record.active and record.active.release] for record in records},
        **{name: sorted(path.name for path in folder.glob("*.png") if not path.name.startswith("."))
           for name, folder in (("waiting", spool), ("done", spool / "done"), ("rejected", spool / "rejected"))},
    }  # fmt: skip


class Feeder:
    """Puts pictures into the source's folder as a careful writer does: flushed, renamed, and the name flushed."""

    def __init__(self, stock: Path, boot: int) -> None:
        self._stock, self._boot = sorted(stock.glob("*.png")), boot
        self._count = 0

    def put(self) -> str:
        """The next picture of the stock; its name says which boot and which picture it is."""
        source = self._stock[(self._boot * 101 + self._count) % len(self._stock)]
        name = f"b{self._boot:02d}-{self._count:04d}-{source.name}"
        self._count += 1
        beside = SPOOL / f".{name}"
        shutil.copyfile(source, beside)
        sync(beside)
        beside.rename(SPOOL / name)
        sync(SPOOL)
        return name


def where() -> dict[str, Any]:
    """Where the daemon is; empty while it does not answer."""
    status = ask_status(STATE)
    if status is None:
        return {}
    model = status["models"].get("eye", {})
    return {
        "update": model.get("update", "idle"),
        "active": model.get("active"),
        "asking": status["samples"].get("escalated", 0) > 0,
        "outbox": status["outbox"]["messages"] > 0,
    }


def told(seconds: float) -> list[str]:
    """What the host says within this time, in words."""
    # Not sys.stdin, which would keep a second word to itself where select() does not see it.
    ready, _, _ = select.select([0], [], [], seconds)
    return os.read(0, 4096).decode().split() if ready else []


def main() -> None:
    """Look, run, feed, stop, look again."""
    stock, boot = Path(sys.argv[1]), int(sys.argv[2])
    say("found", found(STATE, SPOOL, MEMORY))
    # The console gets what it logs.
    daemon = subprocess.Popen(
        ["setpriv", "--reuid=edged", "--regid=edged", "--init-groups", "/usr/bin/edged", "run", "-c", str(CONFIG)],
        stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr, cwd="/",
    )  # fmt: skip
    say("at", {})
    feeder = Feeder(stock, boot)
    last: dict[str, Any] = {}
    next_put = time.monotonic()
    while "stop" not in (orders := told(POLL_S)):
        if "enough" in orders:
            next_put = math.inf
        if daemon.poll() is not None:
            say("ended", daemon.returncode)
            return
        if (now := where()) != last:
            last = now
            say("at", now)
        if time.monotonic() >= next_put:
            next_put = time.monotonic() + PUT_S
            say("put", feeder.put())
    daemon.terminate()
    say("stopped", daemon.wait(STOP_S_MAX))
    say("found", found(STATE, SPOOL, MEMORY))


if __name__ == "__main__":
    main()
