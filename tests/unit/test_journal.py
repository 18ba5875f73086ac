"""The log: what the journal, people and machines get of it, what nobody gets, and what happens when it cannot be written."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged import journal
from edged.core.repeats import ALIKE_MAX, KINDS_MAX, PERIOD_S, Repeats, kind
from edged.core.secrecy import cleaned, hide, secrets_in, without
from edged.journal import JournalHandler, JsonFormatter, Limiter, is_journal, pack, redacted

PASSWORD = "correct-horse"


def unpack(entry: bytes) -> dict[str, str]:
    """An entry of the journal's native protocol, as journald reads it."""
    fields, rest = {}, entry
    while rest:
        line, _, rest = rest.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = struct.unpack("<Q", rest[:8])[0]
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        fields[name.decode()] = value.decode()
    return fields


class Journal:
    """A socket as journald's."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(20)

    def entry(self) -> dict[str, str]:
        data, files, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        if files:
            with os.fdopen(files[0], "rb") as file:
                file.seek(0)
                data = file.read()
        return unpack(data)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(tmp_path / "socket")
    yield found
    found.close()


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger of its own, that keeps what is logged from everybody else."""
    found = logging.getLogger("tests.journal")
    found.propagate, found.handlers = False, []
    found.setLevel(logging.DEBUG)
    yield found
    found.handlers = []


def handled(log: logging.Logger, handler: logging.Handler) -> logging.Handler:
    handler.addFilter(redacted)
    log.addHandler(handler)
    return handler


def test_the_journal_gets_every_field(listening: Journal, log: logging.Logger) -> None:
    handled(log, JournalHandler(io.StringIO(), listening.path))
    log.warning("item %d failed", 7, extra={"pipeline": "line", "slot": "eye", "release": "toy@1.0", "item": "a.png"})
    entry = listening.entry()
    expected = {
        "MESSAGE": "item 7 failed", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "edged", "LOGGER": "tests.journal",
        "THREAD_NAME": "MainThread", "CODE_FILE": __file__, "CODE_FUNC": "test_the_journal_gets_every_field",
        "EDGED_PIPELINE": "line", "EDGED_SLOT": "eye", "EDGED_RELEASE": "toy@1.0", "EDGED_ITEM": "a.png",
    }  # fmt: skip
    assert {name: entry.get(name) for name in expected} == expected
    assert entry["CODE_LINE"].isdigit()


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, "7"), (logging.INFO, "6"), (logging.WARNING, "4"), (logging.ERROR, "3"), (logging.CRITICAL, "2")],
)
def test_levels_are_syslogs(listening: Journal, log: logging.Logger, level: int, priority: str) -> None:
    handled(log, JournalHandler(io.StringIO(), listening.path))
    log.log(level, "x")
    assert listening.entry()["PRIORITY"] == priority


def test_an_exception_follows_its_message_in_one_entry(listening: Journal, log: logging.Logger) -> None:
    handled(log, JournalHandler(io.StringIO(), listening.path))
    try:
        raise RuntimeError(f"rtsp://admin:{PASSWORD}@camera/1 is gone")
    except RuntimeError:
        log.exception("line one\nline two")
    text = listening.entry()["MESSAGE"]
    assert text.startswith("line one\nline two\nTraceback ")
    assert "RuntimeError" in text
    assert PASSWORD not in text


@given(st.dictionaries(st.from_regex(r"\A[A-Z_]{1,20}\Z"), st.text(max_size=50), min_size=1))
def test_whatever_is_logged_comes_back_as_it_was(fields: dict[str, str]) -> None:
    want = {name: value.encode(errors="replace").decode() for name, value in fields.items()}
    assert unpack(pack(fields)) == want


@pytest.mark.parametrize(("size", "cut"), [(200_000, False), (journal.MESSAGE_BYTES_MAX + 1, True)])
def test_what_no_datagram_holds_goes_as_a_file_and_too_much_is_cut(
    listening: Journal, log: logging.Logger, size: int, cut: bool
) -> None:
    handler = JournalHandler(io.StringIO(), listening.path)
    handler._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    handled(log, handler)
    log.info("x" * size)
    text = listening.entry()["MESSAGE"]
    assert text.endswith(f"[cut: {size} bytes]") is cut
    assert text.count("x") == min(size, journal.MESSAGE_BYTES_MAX)


def test_without_a_journal_standard_error_gets_the_lines_with_their_priority(
    tmp_path: Path, log: logging.Logger
) -> None:
    stream, now = io.StringIO(), [0.0]
    path = tmp_path / "socket"
    handled(log, JournalHandler(stream, str(path), lambda: now[0]))
    log.error("first\nsecond")
    assert stream.getvalue() == "<3>first\n<3>second\n"
    journal_is_back = Journal(path)
    now[0] += journal.RETRY_S
    log.error("third")
    assert journal_is_back.entry()["MESSAGE"] == "third"
    assert "third" not in stream.getvalue()
    journal_is_back.close()


def test_a_journal_that_hangs_stalls_nobody_for_long(
    listening: Journal, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEND_S_MAX", 0.05)
    stream, now = io.StringIO(), [0.0]
    handler = JournalHandler(stream, listening.path, lambda: now[0])
    handled(log, handler)
    taken = 0
    while not handler.lost:  # nobody takes them out: the socket is full after some
        log.info("line %d", taken)
        taken += 1
    log.info("not even tried")
    assert (handler.lost, stream.getvalue()) == (2, ""), "standard error is the same journal: it would hang there"
    for _ in range(taken - 1):
        listening.entry()
    now[0] += journal.RETRY_S
    log.info("back")
    assert listening.entry()["MESSAGE"] == "2 lines were lost: the journal did not take them"
    assert listening.entry()["MESSAGE"] == "back"


def test_machines_get_one_object_a_line(log: logging.Logger) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handled(log, handler)
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("a\nb", extra={"pipeline": "line"})
    log.info("ümlaut %s", 1)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["message"], first["level"], first["pipeline"]) == ("a\nb", "error", "line")
    assert "ValueError: no" in first["exception"]
    assert (second["message"], second["logger"], second["thread"]) == ("ümlaut 1", "tests.journal", "MainThread")
    assert second["ts"].endswith("+00:00")


def test_the_journal_is_known_by_the_file_that_standard_error_is() -> None:
    read, write = os.pipe()
    found = os.fstat(write)
    assert is_journal(write, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
    assert not is_journal(write, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
    assert not is_journal(write, {})
    os.close(read)
    os.close(write)
    assert not is_journal(write, {"JOURNAL_STREAM": "0:0"})


@pytest.mark.parametrize(
    "text",
    [
        f"no connection to mqtt://plant:{PASSWORD}@broker:1883", f"rtsp://admin:{PASSWORD}@10.0.0.7:554/1?x=1",
        f"RTSP://10.0.0.7/user=admin&password={PASSWORD}", f"https://a:{PASSWORD}@x@host/path",
        f"password={PASSWORD}, port=1",
        f"{{'api_key': '{PASSWORD}', 'port': 1}}", f'"mqtt_password": "{PASSWORD}"', f"Authorization: Bearer {PASSWORD}",
        f"/x?token={PASSWORD}&y=1", f"-----BEGIN RSA PRIVATE KEY-----\n{PASSWORD}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{PASSWORD}",
    ],
)  # fmt: skip
def test_no_line_shows_a_password(log: logging.Logger, text: str) -> None:
    stream = io.StringIO()
    handled(log, logging.StreamHandler(stream))
    log.info("before %s after", text)
    log.info("before %s after", text, extra={"item": text})
    assert PASSWORD not in stream.getvalue()
    assert "***" in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:9416/metrics", "toy@1.0 -> toy@1.1", "answer_tokens: 12", "mail a@b.c", "key=/etc/edged/k"],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide(text) == text


def test_a_configuration_is_cleaned_by_the_names_of_its_keys() -> None:
    tables = {
        "broker": {"host": "b", "password": PASSWORD, "port": 1}, "list": [{"token": 12345}], "url": "https://u:pw12@h/x",
        "empty": {"secret": ""}, "answer_tokens": 5,
    }  # fmt: skip
    assert cleaned(tables) == {
        "broker": {"host": "b", "password": "***", "port": 1}, "list": [{"token": "***"}], "url": "https://***@h/x",
        "empty": {"secret": ""}, "answer_tokens": 5,
    }  # fmt: skip
    assert secrets_in(tables) == {PASSWORD, "u:pw12", "pw12"}
    assert without(f"a {PASSWORD} b", secrets_in(tables)) == "a *** b"


def test_a_call_with_wrong_arguments_is_still_a_line() -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "one %s two %s", ("only one",), None)
    assert redacted(record)
    assert record.getMessage().startswith("one %s two %s (and its arguments do not fit")


@pytest.fixture
def limited(log: logging.Logger) -> tuple[list[str], list[float], Limiter]:
    """What is written, the clock, and the limiter."""
    lines: list[str] = []
    now = [0.0]

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = handled(log, Collect())
    limiter = Limiter(handler.handle, lambda: now[0])
    handler.addFilter(limiter)
    return lines, now, limiter


def test_a_broken_camera_does_not_fill_the_journal(
    log: logging.Logger, limited: tuple[list[str], list[float], Limiter]
) -> None:
    lines, now, _ = limited
    for number in range(100):
        log.warning("camera line: frame %d is broken", number)
    log.warning("something else")
    log.info("frame 5 is broken")
    assert len(lines) == ALIKE_MAX + 2
    now[0] += PERIOD_S
    log.warning("camera line: frame 100 is broken")
    assert lines[-2:] == [
        "90 more like this were not logged; the last: camera line: frame 99 is broken",
        "camera line: frame 100 is broken",
    ]


def test_the_sum_is_written_even_when_nothing_follows(
    log: logging.Logger, limited: tuple[list[str], list[float], Limiter]
) -> None:
    lines, now, limiter = limited
    for _ in range(ALIKE_MAX + 3):
        log.error("gone")
    now[0] += PERIOD_S
    limiter.sum_up()  # as its timer does
    assert lines[-1] == "3 more like this were not logged; the last: gone"
    limiter.sum_up()
    assert len(lines) == ALIKE_MAX + 1


def test_critical_lines_and_the_sums_themselves_are_never_held_back(
    log: logging.Logger, limited: tuple[list[str], list[float], Limiter]
) -> None:
    lines, _, _ = limited
    for _ in range(3 * ALIKE_MAX):
        log.critical("the end is near")
    assert len(lines) == 3 * ALIKE_MAX


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("frame 1 of 9", "frame 23 of 9", True),
        ("sample 018f3a2b-0000-7000-8000-aaaaaaaaaaaa", "sample 018f3a2c-1111-7000-8000-bbbbbbbbbbbb", True),
        ("at 0x7f01", "at 0x7f02", True), ("camera a", "camera b", False),
    ],
)  # fmt: skip
def test_alike_is_what_differs_in_numbers_only(one: str, other: str, alike: bool) -> None:
    assert (kind(one) == kind(other)) is alike


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 30)), max_size=300))
def test_every_line_is_written_or_summed_up(events: list[tuple[int, float]]) -> None:
    repeats, now, written, summed = Repeats(), 0.0, 0, 0
    for number, pause in events:
        now += pause
        summed += sum(each.count for each in repeats.due(now))
        written += repeats.admit(("log", 30, str(number)), "text", now)
    summed += sum(each.count for each in repeats.due(now, all_of_them=True))
    assert written + summed == len(events)


def test_the_kinds_that_are_counted_are_bounded() -> None:
    repeats = Repeats()
    for number in range(3 * KINDS_MAX):
        repeats.admit(("log", 30, str(number)), "x", 0.0)
        repeats.due(0.0)
    assert len(repeats._runs) <= KINDS_MAX


def run(code: str, **environment: str) -> Any:
    import subprocess

    return subprocess.run(
        [sys.executable, "-c", f"from edged import journal\nimport logging, threading\n{code}"],
        capture_output=True, text=True, timeout=60, check=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_thread_that_dies_is_logged_like_everything_else() -> None:
    done = run(
        "journal.set_up('info', 'json')\n"
        f"def end(): raise RuntimeError('password={PASSWORD}')\n"
        "thread = threading.Thread(target=end, name='eye'); thread.start(); thread.join()"
    )
    row = json.loads(done.stderr)
    assert (row["level"], row["message"]) == ("critical", "eye ended")
    assert "RuntimeError" in row["exception"]
    assert PASSWORD not in done.stderr


def test_what_was_held_back_is_said_at_the_end_of_the_process() -> None:
    done = run(f"journal.set_up('warning', 'text')\nfor _ in range({ALIKE_MAX} + 4): logging.warning('again')")
    lines = done.stderr.splitlines()
    assert len(lines) == ALIKE_MAX + 1
    assert lines[-1].endswith("4 more like this were not logged; the last: again")


def test_text_is_for_people_and_auto_is_text_on_a_pipe() -> None:
    done = run("journal.set_up('info', 'auto')\nlogging.getLogger('edged.x').info('hello')\nlogging.debug('no')")
    assert done.stderr.rstrip().endswith("INFO edged.x: hello")
