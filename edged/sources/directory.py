"""Files that appear in a folder become items. Never drops: a file leaves the folder only after its item is committed."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from edged.beats import Beats
from edged.clock import Clock
from edged.images import IMAGE_BYTES_MAX
from edged.sources import Item
from edged.wire.ids import uuid7

log = logging.getLogger(__name__)

RESCAN_S = 2.0  # a lost notification (queue overflow, network file system) costs this much, never a file
SETTLED_S = 0.5  # a file whose close was not seen counts as whole when it has not changed for this long,
STALLED_S = 10.0  # and for this long when it was seen being written: its writer may only be slow
STILL_S_MAX = 300.0  # for one look at the folder, or one file: a network file system that takes longer is gone
PARTIAL = (".part", ".tmp", ".crdownload")


class DirectorySource(FileSystemEventHandler):
    """Watches `path`. Files whose names begin with a dot or end in .part or .tmp are not looked at: write such a name, then
    rename."""

    def __init__(
        self, path: Path, after: str, put: Callable[[Item], bool], clock: Clock, beats: Beats | None = None
    ) -> None:
        self._beats = beats or Beats(clock)
        self._path, self._after, self._put, self._clock = path, after, put, clock
        self._taken: set[str] = set()  # handed over, not settled yet
        self._whole: set[str] = set()  # closed or moved here: no need to wait until it settles
        self._writing: set[str] = set()  # changed, and not closed yet
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._observer = Observer()
        self._thread = threading.Thread(target=self._run, name=f"source-{path}", daemon=True)

    def start(self) -> None:
        """Create the folders if they are missing and begin; raises OSError when they cannot be made."""
        for folder in (self._path, self._path / "rejected", self._path / "done"):
            folder.mkdir(parents=True, exist_ok=True)
        self._observer.schedule(self, str(self._path), recursive=False)
        self._observer.start()
        self._beats.watch(self._thread.name, STILL_S_MAX)
        self._thread.start()

    def stop(self) -> None:
        """End both threads; files not settled yet stay where they are."""
        self._stopping = True
        self._beats.forget(self._thread.name)
        self._wake.set()
        for thread in (self._observer, self._thread):
            if thread.ident is not None:  # it was started
                if thread is self._observer:
                    self._observer.stop()
                thread.join()

    def alive(self) -> bool:
        """Whether both threads run."""
        return self._thread.is_alive() and self._observer.is_alive()

    def on_modified(self, event: FileSystemEvent) -> None:
        """Somebody writes to a file."""
        if not event.is_directory:
            with self._lock:
                self._writing.add(Path(str(event.src_path)).name)

    def on_closed(self, event: FileSystemEvent) -> None:
        """A writer closed a file: it is whole."""
        self._note(event.src_path)

    def on_moved(self, event: FileSystemEvent) -> None:
        """A file was renamed here: it is whole."""
        with self._lock:  # a writer that renames what it still holds open closes it under the new name
            self._writing.discard(Path(str(event.src_path)).name)
        self._note(event.dest_path)

    def _note(self, path: str | bytes) -> None:
        name = Path(str(path)).name
        with self._lock:
            self._whole.add(name)
            self._writing.discard(name)
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            self._beats.beat(self._thread.name)
            try:
                waiting = self._scan()
            except OSError as error:
                log.error("%s: %s; trying again in %.0f s", self._path, error, RESCAN_S)
                waiting = False
            self._wake.wait(SETTLED_S / 2 if waiting else RESCAN_S)

    def _scan(self) -> bool:
        """Hand over what is ready, oldest first; true when something is still being written."""
        waiting = False
        with self._lock:
            whole, self._whole = self._whole, set()
        rows = []
        for path in self._path.iterdir():
            if path.name.startswith(".") or path.name.endswith(PARTIAL) or not path.is_file():
                continue
            stat = path.stat()
            rows.append((stat.st_mtime_ns, path.name, stat.st_size))
        now = self._clock.now()
        for mtime_ns, name, size in sorted(rows):
            self._beats.beat(self._thread.name)
            with self._lock:
                if self._stopping or name in self._taken:
                    continue
                quiet_s = STALLED_S if name in self._writing else SETTLED_S
                if name not in whole and 0 <= now - mtime_ns / 1e9 < quiet_s:
                    waiting = True
                    continue
                self._taken.add(name)
                self._writing.discard(name)
            if not self._hand_over(self._path / name, mtime_ns, size):
                with self._lock:
                    self._taken.discard(name)
                return False
        return waiting

    def _hand_over(self, path: Path, mtime_ns: int, size: int) -> bool:
        # The id follows from the file alone, so that the same file after a crash is the same sample.
        entropy = hashlib.sha256(f"{path.name}\0{mtime_ns}\0{size}".encode()).digest()[:10]
        try:
            # What is too large is read one byte past the limit: enough for the decoder to refuse it by its size.
            with path.open("rb") as file:
                data = file.read(IMAGE_BYTES_MAX + 1)
        except OSError as error:  # gone again, or not readable now: the next scan sees
            if not isinstance(error, FileNotFoundError):
                log.error("%s: %s; trying again in %.0f s", path, error.strerror, RESCAN_S)
            with self._lock:
                self._taken.discard(path.name)
            return True
        return self._put(
            Item(
                id=uuid7(max(0, mtime_ns // 1_000_000), entropy),
                name=path.name,
                captured=mtime_ns / 1e9,
                image=data,
                settle=lambda reason: self._settle(path, mtime_ns, reason),
            )
        )

    def _settle(self, path: Path, mtime_ns: int, reason: str) -> None:
        try:
            if path.stat().st_mtime_ns != mtime_ns:
                log.info("%s: written anew while it was answered: it is another item", path)
            elif reason:
                path.replace(self._path / "rejected" / path.name)
            elif self._after == "delete":
                path.unlink(missing_ok=True)
            else:
                path.replace(self._path / "done" / path.name)
        except FileNotFoundError:
            log.warning("%s: answered, but somebody else has taken it away", path)
        except OSError as error:
            # It stays in `_taken`, so it is not answered twice in this run; after a restart it is answered again.
            log.error("%s: answered, but it cannot be moved away: %s", path, error)
            return
        with self._lock:
            self._taken.discard(path.name)
