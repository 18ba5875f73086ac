"""Where the daemon's log goes: to systemd's journal with all fields, to people as text, to machines as JSON lines.

Law of this file: logging never ends or stalls the daemon, never shows a password, and never fills a disk: alike warnings
are counted and summed up, and what the journal does not take goes to standard error.
"""

from __future__ import annotations

import array
import atexit
import errno
import fcntl
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from edged.core.repeats import PERIOD_S, Repeats, Summary, kind
from edged.core.secrecy import hide

JOURNAL_SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "edged"
SEND_S_MAX = 1.0  # a journal that hangs costs a line this much, and then nothing until RETRY_S is over
RETRY_S = 10.0
MESSAGE_BYTES_MAX = 256 << 10  # of one entry; the rest is cut, which is said
CUT = " [cut: {} bytes]"
FORMATS = ("auto", "journald", "text", "json")
FIELDS = ("pipeline", "slot", "release", "item")  # what a caller may pass in `extra`
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # syslog(3)


def priority(level: int) -> int:
    """The syslog priority of a level of `logging`."""
    return next((number for least, number in PRIORITIES if level >= least), 7)


def is_journal(descriptor: int, environment: Mapping[str, str]) -> bool:
    """Whether this file is the journal, as systemd says in JOURNAL_STREAM (device:inode; systemd.exec(5))."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def set_up(level: str, form: str, stream: TextIO | None = None) -> None:
    """Log everything from now on. `form`: auto, journald, text or json."""
    stream = stream or sys.stderr
    if form == "auto":
        form = "journald" if is_journal(stream.fileno(), os.environ) else "text"
    handler: logging.Handler
    if form == "journald":
        handler = JournalHandler(stream)
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    handler.addFilter(redacted)
    limiter = Limiter(handler.handle)
    handler.addFilter(limiter)
    atexit.register(limiter.sum_up, all_of_them=True)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a line that cannot be written is lost; its complaint would be too
    threading.excepthook = _unhandled


def _unhandled(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread else "a thread"
        caught = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger(__name__).critical("%s ended", name, exc_info=caught)


def redacted(record: logging.LogRecord) -> bool:
    """A filter that hides what is secret in a record, wherever it goes from here."""
    try:
        text = record.getMessage()
    except Exception as error:  # a call with the wrong arguments is a bug of ours, and still a line for people
        text = f"{record.msg} (and its arguments do not fit: {error})"
    record.msg, record.args = hide(text), None
    if record.exc_info and not record.exc_text:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    if record.exc_text:
        record.exc_text = hide(record.exc_text)
    for field in FIELDS:
        value = getattr(record, field, None)
        if isinstance(value, str):
            setattr(record, field, hide(value))
    return True


class Limiter:
    """A filter that holds alike warnings and errors back, and sums them up at the end of their minute."""

    def __init__(
        self, emit: Callable[[logging.LogRecord], Any], monotonic: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        """`emit` writes the sums."""
        self._emit, self._monotonic = emit, monotonic
        self._repeats = Repeats()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written now."""
        if getattr(record, "sums_up", False) or not logging.WARNING <= record.levelno < logging.CRITICAL:
            return True
        text = record.getMessage()
        with self._lock:
            now = self._monotonic()
            over = self._repeats.due(now)
            admitted = self._repeats.admit((record.name, record.levelno, kind(text)), text, now)
            if not admitted and self._timer is None:
                # So that the sum is written even when nothing else ever is.
                self._timer = threading.Timer(PERIOD_S, self.sum_up)
                self._timer.daemon = True
                self._timer.start()
        self._write(over)
        return admitted

    def sum_up(self, *, all_of_them: bool = False) -> None:
        """Write what was held back in periods that are over."""
        with self._lock:
            over = self._repeats.due(self._monotonic(), all_of_them=all_of_them)
            self._timer = None
            if self._repeats.holds_back() and not all_of_them:
                self._timer = threading.Timer(PERIOD_S, self.sum_up)
                self._timer.daemon = True
                self._timer.start()
        self._write(over)

    def _write(self, sums: list[Summary]) -> None:
        for each in sums:
            name, level, _ = each.key
            text = f"{each.count} more like this were not logged; the last: {each.last}"
            record = logging.LogRecord(name, level, __file__, 0, text, None, None)
            record.sums_up = True
            self._emit(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """ts (ISO 8601, UTC), level, logger, thread, message, and what the caller passed; exception when there is one."""
        row: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        row |= {field: value for field in FIELDS if (value := getattr(record, field, None)) is not None}
        if record.exc_text:
            row["exception"] = record.exc_text
        return json.dumps(row, default=str, ensure_ascii=False)


class JournalHandler(logging.Handler):
    """Sends each record to the journal in its native protocol; to standard error, with its priority, when that fails."""

    def __init__(self, fallback: TextIO, path: str = JOURNAL_SOCKET, monotonic: Callable[[], float] = time.monotonic):
        super().__init__()
        self._fallback, self._path, self._monotonic = fallback, path, monotonic
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(SEND_S_MAX)
        self._again = float("-inf")  # monotonic: the journal is not asked before
        self._hangs = False
        self.lost = 0  # lines that a journal that hangs did not take

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            fields = fields_of(record)
            if self.lost and self._sent(_about_lost(self.lost)):
                self.lost = 0
            if not self._sent(fields):
                if self._hangs:  # standard error leads to the same journal, and would wait for it without end
                    self.lost += 1
                    return
                text = "\n".join([str(fields["MESSAGE"]), *([record.exc_text] if record.exc_text else [])])
                lines = text.splitlines() or [""]
                self._fallback.write("".join(f"<{fields['PRIORITY']}>{line}\n" for line in lines))
                self._fallback.flush()
        except Exception:
            self.handleError(record)

    def _sent(self, fields: Mapping[str, str | int]) -> bool:
        now = self._monotonic()
        if now < self._again:
            return False
        entry = pack(fields)
        try:
            try:
                self._socket.sendto(entry, self._path)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                self._send_file(entry)
        except OSError as error:
            self._again, self._hangs = now + RETRY_S, isinstance(error, TimeoutError)
            return False
        self._hangs = False
        return True

    def _send_file(self, entry: bytes) -> None:
        """What does not fit a datagram goes as a sealed memory file (systemd's native protocol, `Data Format`)."""
        file = os.memfd_create("edged-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(file, entry)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
            self._socket.sendmsg([b""], rights, 0, self._path)
        finally:
            os.close(file)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def _about_lost(count: int) -> dict[str, str | int]:
    text = f"{count} lines were lost: the journal did not take them"
    return {"MESSAGE": text, "PRIORITY": 4, "SYSLOG_IDENTIFIER": IDENTIFIER, "LOGGER": __name__}


def fields_of(record: logging.LogRecord) -> dict[str, str | int]:
    """The journal's fields of a record (systemd.journal-fields(7)); an exception follows its message."""
    text = record.getMessage()
    if record.exc_text:
        text = f"{text}\n{record.exc_text}"
    size = len(text.encode(errors="replace"))
    if size > MESSAGE_BYTES_MAX:
        text = text.encode(errors="replace")[:MESSAGE_BYTES_MAX].decode(errors="ignore") + CUT.format(size)
    fields: dict[str, str | int] = {
        "MESSAGE": text,
        "PRIORITY": priority(record.levelno),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "LOGGER": record.name,
        "THREAD_NAME": record.threadName or "",
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName or "",
    }
    extra = {f"EDGED_{name.upper()}": getattr(record, name, None) for name in FIELDS}
    return fields | {name: str(value) for name, value in extra.items() if value is not None}


def pack(fields: Mapping[str, str | int]) -> bytes:
    """The bytes of one entry: `NAME=value`, or, where the value has a line break, NAME, its length and the value."""
    out = bytearray()
    for name, value in fields.items():
        data = str(value).encode(errors="replace")
        if b"\n" in data:
            out += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            out += name.encode() + b"=" + data + b"\n"
    return bytes(out)
