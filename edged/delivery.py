"""Releases here, samples there: what is needed, over which carrier, how fast, and how far it is.

Law of this file: a release is fetched by what its manifest says, and the manifest by its hash; only what is not on this
device is fetched, and whatever has arrived is kept for the next try.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from edged.carriers import Carrier, Count
from edged.clock import Clock
from edged.config_host import Host
from edged.core.bandwidth import Bucket, Metered
from edged.fetch import ABSENT, Cancelled, FetchCancelled, FetchError, WrongContent
from edged.files import sha256_of, sync
from edged.part import Part
from edged.releases import MANIFEST, MANIFEST_BYTES_MAX, BadRelease, Releases, read_manifest
from edged.wire.manifest import FileEntry, ReleaseRef
from edged.wire.messages import Progress

log = logging.getLogger(__name__)

MQTT_BYTES_MAX = 64 << 20  # of a release over MQTT when the configuration leaves the choice
REPORT_S = 5.0  # between two reports of how far a transfer is
WAIT_S = 0.25  # between two questions whether anybody still wants it, while bandwidth is waited for
T = TypeVar("T")

Admit = Callable[[ReleaseRef, Cancelled], int]


class Delivery:
    """Fetches releases. `fetch` and `metadata` are called by one thread, the updater's worker; `pace` by any."""

    def __init__(
        self, carriers: dict[str, Carrier], host: Callable[[], Host], releases: Releases, clock: Clock, count: Count,
        report: Callable[[], None],
        free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:  # fmt: skip
        """`carriers`: `mqtt` and `https`; `host`: the configuration as it is now; `free`: bytes on a file system."""
        self._carriers, self._host, self._releases, self._clock = carriers, host, releases, clock
        self._count, self._report, self._free = count, report, free
        # Set by the composition root: whether a release may be installed, and the signed length of its manifest (raises
        # what `fetch` shall raise). None: nothing is signed.
        self.admit: Admit | None = None
        self._bucket, self._bucket_lock = Bucket(), threading.Lock()
        self._progress: tuple[ReleaseRef, Progress] | None = None
        self._reported = 0.0
        self.closing: list[Callable[[], None]] = []  # what ends with it

    def close(self) -> None:
        """End the connections."""
        for close in self.closing:
            close()

    def fetch(self, ref: ReleaseRef, folder: Path, cancelled: Cancelled) -> None:
        """Bring every file of `ref` into `folder`; what is there and whole is not fetched again. Raises FetchError (try
        later, also when `cancelled` said so), WrongContent or BadRelease (it is not what was promised), and what `admit`
        raises."""
        bytes_max = self.admit(ref, cancelled) if self.admit else MANIFEST_BYTES_MAX
        self._releases.begin(folder)
        self._bring_manifest(ref, folder, bytes_max, cancelled)
        files = list(read_manifest(folder).files.values())
        absent = [entry for entry in files if not self._here(entry, folder / entry.path)]
        with ExitStack() as stack:
            try:
                parts = [stack.enter_context(Part(folder / e.path, e, cancelled)) for e in absent]
                self._check_room(folder, sum(part.missing_bytes for part in parts))
                total = sum(entry.bytes for entry in files)
                self._progressed(ref, total - sum(part.missing_bytes for part in parts), total, now=True)
                self._bring(ref, parts, cancelled)
                sync(folder)  # the names of the manifest and of what was linked; a part's own is kept when it is whole
            except OSError as error:
                raise FetchError(f"{ref.release}: cannot write to {folder}: {error}") from error
            finally:
                self._progress = None

    def metadata(self, name: str, bytes_max: int) -> bytes:
        """A file of signed metadata by its name, not verified. Raises FetchError, with status 404 when one carrier says that
        there is none, and no other one has it."""
        return self._by_any([], lambda carrier: carrier.metadata(name, bytes_max, lambda: False))

    def progress(self, ref: ReleaseRef) -> Progress | None:
        """How far the transfer of a release is; None: it is not under way. Any thread."""
        known = self._progress
        return known[1] if known is not None and known[0] == ref else None

    def pace(self, count: int, cancelled: Cancelled = lambda: False) -> None:
        """`count` bytes have come or go: wait for as long as the bandwidth limit says. Any thread."""
        with self._bucket_lock:
            wait = self._bucket.take(count, self._host().bandwidth_kib_s * 1024.0, self._clock.monotonic())
        until = self._clock.monotonic() + wait
        while (left := until - self._clock.monotonic()) > 0 and not cancelled():
            time.sleep(self._clock.real(min(left, WAIT_S)))

    def _bring_manifest(self, ref: ReleaseRef, folder: Path, bytes_max: int, cancelled: Cancelled) -> None:
        path = folder / MANIFEST
        if path.is_file() and sha256_of(path) == ref.sha256:
            return
        data = self._by_any([], lambda carrier: carrier.manifest(ref, bytes_max, cancelled))
        beside = path.with_name(MANIFEST + ".new")
        beside.write_bytes(data)
        sync(beside)
        beside.replace(path)

    def _bring(self, ref: ReleaseRef, parts: list[Part], cancelled: Cancelled) -> None:
        missing = sum(part.missing_bytes for part in parts)
        host = self._host()
        if host.metered:
            rules = Metered(int(host.metered_mib_max * (1 << 20)), host.metered_hours)
            refusal = rules.refusal(missing, time.localtime(self._clock.now()).tm_hour)
            if refusal:
                self._count("fetches_metered", 1)
                raise FetchError(f"{ref.release}: {refusal}")

        def came(count: int) -> None:
            assert self._progress is not None
            known = self._progress[1]
            self._progressed(ref, min(known.bytes + count, known.total), known.total)
            self.pace(count, cancelled)

        entries = [part.entry for part in parts]
        for part in parts:
            if part.missing:
                self._by_any(entries, lambda carrier, part=part: carrier.bring(part, came, cancelled))  # type: ignore[misc]
            part.finish()

    def _by_any(self, entries: Sequence[FileEntry], act: Callable[[Carrier], T]) -> T:
        """Do it over the carrier that is preferred for these files, else over the next that can be used."""
        failed: list[str] = []
        wrong: WrongContent | None = None
        status: set[int | None] = set()
        for name in self._order(sum(entry.bytes for entry in entries)):
            carrier = self._carriers[name]
            unusable = carrier.unusable(entries)
            if unusable:
                failed.append(f"{name}: {unusable}")
                continue
            try:
                return act(carrier)
            except FetchCancelled:
                raise
            except FetchError as error:
                failed.append(f"{name}: {error}")
                status.add(error.status)
                if error.status != ABSENT:  # else it works, and says so
                    log.warning("%s: %s", name, error)
                    self._count("carrier_failures", 1)
            except WrongContent as error:
                wrong = error
        if wrong is not None and not status:
            raise wrong
        # Who cannot be reached does not take back what another one said: many devices reach nothing but the broker.
        raise FetchError("; ".join([*failed, *([str(wrong)] if wrong else [])]), ABSENT if ABSENT in status else None)

    def _order(self, size: int) -> tuple[str, ...]:
        chosen = self._host().carrier
        if chosen != "auto":
            return (chosen,)
        return ("mqtt", "https") if size <= MQTT_BYTES_MAX else ("https", "mqtt")

    def _check_room(self, folder: Path, missing: int) -> None:
        free = self._free(folder)
        if missing and free < missing:
            raise FetchError(f"{missing} bytes are missing, but only {free} are free at {folder}: free space there")

    def _progressed(self, ref: ReleaseRef, count: int, total: int, *, now: bool = False) -> None:
        self._progress = (ref, Progress(bytes=count, total=total))
        if now or self._clock.monotonic() - self._reported >= REPORT_S:
            self._reported = self._clock.monotonic()
            self._report()

    def _here(self, entry: FileEntry, target: Path) -> bool:
        """Whether this file is here: in its place, or in another release, from which it is hard-linked. What did not
        change is not sent."""
        if target.is_file():
            if target.stat().st_size == entry.bytes and sha256_of(target) == entry.sha256:
                return True
            target.unlink()
        for folder in self._releases.candidates():
            try:
                files = read_manifest(folder).files
            except BadRelease:  # damaged, or just being removed: the bytes come from the trainer then
                continue
            for other in files.values():
                source = folder / other.path
                if other.sha256 == entry.sha256 and source.is_file() and sha256_of(source) == entry.sha256:
                    os.link(source, target)
                    return True
        return False
