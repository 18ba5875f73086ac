"""Fetching and uploading against a real HTTP server that misbehaves in every way a network does."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edged.fetch import FetchCancelled, Fetcher, FetchError, FetchOptions, WrongContent
from edged.files import sha256_of

CONTENT = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(10_000))  # 320 kB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Server(ThreadingHTTPServer):
    """Serves `content` in the way that `mode` says; remembers Range headers and uploads."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.mode = "good"
        self.ranges: list[str | None] = []
        self.uploads: dict[str, tuple[bytes, str]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up in the middle are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if server.mode == "error":
            return self._answer(503, b"down for a minute", {})
        start = int(re.findall(r"\d+", asked)[0]) if asked and server.mode != "no_range" else 0
        if server.mode == "refuse_range" and asked:
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(server.content)}"})
        body, headers = server.content[start:], {}
        if start:
            shown = start - 5 if server.mode == "wrong_range" else start
            headers["Content-Range"] = f"bytes {shown}-{len(server.content) - 1}/{len(server.content)}"
        status = 206 if start else 200
        if server.mode == "truncate":
            self._answer(status, body[: len(body) // 2], headers | {"Content-Length": str(len(body))})
            self.close_connection = True
        elif server.mode in ("endless", "unannounced_end"):
            self._head(status, headers | {"Connection": "close"})
            self.close_connection = True
            try:
                self.wfile.write(body if server.mode == "endless" else body[: len(body) // 2])
                while server.mode == "endless":
                    self.wfile.write(b"more" * 1000)
            except OSError:
                pass
        else:
            self._answer(status, body, headers)
        return None

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.mode == "error":
            return self._answer(507, b"quota of this device is used up", {})
        self.server.uploads[self.path] = (body, self.headers["Content-Digest"])
        return self._answer(201, b"", {})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, {"Content-Length": str(len(body))} | headers)
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.mode = "stopped"
        running.shutdown()
        thread.join()


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    opened = Fetcher(FetchOptions(connect_s=5, read_s=5))
    yield opened
    opened.close()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupt(fetcher: Fetcher, server: Server, target: Path) -> None:
    """Leave the first half of the content beside `target`."""
    server.mode = "truncate"
    with pytest.raises(FetchError, match=r"127\.0\.0\.1"):
        fetcher.fetch(f"{server.url}/m", target, SHA256, len(CONTENT))
    server.mode = "good"
    server.ranges.clear()
    assert not target.exists()
    assert len(left(target.parent)) == 1


def test_a_file_arrives_whole_with_progress_and_is_not_fetched_twice(
    server: Server, fetcher: Fetcher, tmp_path: Path
) -> None:
    target, seen = tmp_path / "new" / "model.onnx", []
    for _ in range(2):
        fetcher.fetch(f"{server.url}/m", target, SHA256, len(CONTENT), lambda *at: seen.append(at))
    assert target.read_bytes() == CONTENT
    assert left(target.parent) == ["model.onnx"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert len(server.ranges) == 1


def test_a_broken_connection_resumes_where_it_stopped_even_in_a_new_process(
    server: Server, fetcher: Fetcher, tmp_path: Path
) -> None:
    interrupt(fetcher, server, tmp_path / "m")
    fresh = Fetcher()
    fresh.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    fresh.close()
    assert server.ranges == [f"bytes={HALF}-"]
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_connection_that_ends_without_a_promise_of_length_is_resumed_too(
    server: Server, fetcher: Fetcher, tmp_path: Path
) -> None:
    server.mode = "unannounced_end"
    with pytest.raises(FetchError, match=f"ended after {HALF} of {len(CONTENT)} bytes"):
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    server.mode = "good"
    fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_a_server_that_ignores_ranges_restarts_cleanly(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    interrupt(fetcher, server, tmp_path / "m")
    server.mode = "no_range"
    fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert server.ranges == [f"bytes={HALF}-"]
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_refused_range_starts_over_at_the_next_try(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    interrupt(fetcher, server, tmp_path / "m")
    server.mode = "refuse_range"
    with pytest.raises(FetchError, match="cannot continue") as refused:
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert refused.value.status == 416
    fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_bytes_from_another_place_than_asked_are_not_believed(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    interrupt(fetcher, server, tmp_path / "m")
    server.mode = "wrong_range"
    with pytest.raises(FetchError, match=f"asked for bytes from {HALF}, got them from {HALF - 5}"):
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))


@pytest.mark.parametrize(
    "spoil", [b"\0" * HALF, CONTENT[:-1] + b"?", CONTENT + b"too long"], ids=["zeros", "last", "long"]
)
def test_a_part_spoilt_by_a_power_cut_is_fetched_again_instead_of_blaming_the_release(
    server: Server, fetcher: Fetcher, tmp_path: Path, spoil: bytes
) -> None:
    interrupt(fetcher, server, tmp_path / "m")
    (tmp_path / left(tmp_path)[0]).write_bytes(spoil)
    fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_part_of_an_older_version_is_not_continued(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    interrupt(fetcher, server, tmp_path / "m")
    server.content = bytes(reversed(CONTENT))
    fetcher.fetch(f"{server.url}/m", tmp_path / "m", hashlib.sha256(server.content).hexdigest(), len(CONTENT))
    assert server.ranges == [None]
    assert left(tmp_path) == ["m"]


def test_wrong_bytes_are_named_and_nothing_stays(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"?"
    got = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(WrongContent, match=f"expected sha256 {SHA256}, got {got}"):
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert left(tmp_path) == []


def test_another_size_is_named_before_anything_is_loaded(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.content = CONTENT * 2
    with pytest.raises(WrongContent, match=f"expected {len(CONTENT)} bytes, the server has {2 * len(CONTENT)}"):
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert left(tmp_path) == []


def test_endless_data_is_cut_off_at_the_size(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.mode = "endless"
    with pytest.raises(WrongContent, match=f"expected {len(CONTENT)} bytes, more are coming"):
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert left(tmp_path) == []


def test_a_cancelled_fetch_stops_and_keeps_what_it_has(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    with pytest.raises(FetchCancelled, match="cancelled after"):
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT), cancelled=lambda: True)
    assert 0 < (tmp_path / left(tmp_path)[0]).stat().st_size < len(CONTENT)
    fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert server.ranges[1] is not None


def test_a_server_in_trouble_is_quoted_with_its_status(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.mode = "error"
    with pytest.raises(FetchError, match="503: down for a minute") as failed:
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, len(CONTENT))
    assert failed.value.status == 503


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/m", "http://no.such.host.invalid/m", "no url", "ftp://x/m"])
def test_an_address_that_does_not_answer_is_a_plain_error(fetcher: Fetcher, tmp_path: Path, url: str) -> None:
    with pytest.raises(FetchError, match=re.escape(url)) as failed:
        fetcher.fetch(url, tmp_path / "m", SHA256, len(CONTENT))
    assert failed.value.status is None


def test_no_room_on_the_disk_is_said_before_the_transfer(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"needs {1 << 60} bytes"):
        fetcher.fetch(f"{server.url}/m", tmp_path / "m", SHA256, 1 << 60)
    assert server.ranges == []


def test_small_documents_are_read_up_to_a_limit(server: Server, fetcher: Fetcher) -> None:
    server.content = b'{"a": [1, 2]}'
    assert fetcher.get_json(server.url, 100) == {"a": [1, 2]}
    with pytest.raises(WrongContent, match="at most 5 bytes"):
        fetcher.get_bytes(server.url, 5)
    server.content = b"<html>"
    with pytest.raises(WrongContent, match="expected JSON, got b'<html>'"):
        fetcher.get_json(server.url, 100)


def test_an_upload_carries_the_file_with_its_digest_and_may_be_repeated(
    server: Server, fetcher: Fetcher, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    for _ in range(2):
        fetcher.upload(f"{server.url}/samples/{SHA256}", path, sha256_of(path))
    digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
    assert server.uploads == {f"/samples/{SHA256}": (CONTENT, f"sha-256=:{digest}:")}


def test_an_upload_of_a_changed_or_missing_file_is_refused_here(
    server: Server, fetcher: Fetcher, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(b"other")
    with pytest.raises(WrongContent, match=f"expected sha256 {SHA256}, the file has"):
        fetcher.upload(f"{server.url}/x", tmp_path / "image", SHA256)
    with pytest.raises(WrongContent, match="No such file"):
        fetcher.upload(f"{server.url}/x", tmp_path / "gone", SHA256)
    assert server.uploads == {}


def test_a_refused_upload_says_why(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(CONTENT)
    server.mode = "error"
    with pytest.raises(FetchError, match="507: quota of this device is used up"):
        fetcher.upload(f"{server.url}/x", tmp_path / "image", SHA256)


def test_unusable_certificates_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(ValueError, match=r"ca\.pem"):
        Fetcher(FetchOptions(ca=tmp_path / "ca.pem"))
