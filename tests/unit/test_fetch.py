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
from edged.part import Part
from edged.wire.blocks import BLOCK_BYTES
from edged.wire.manifest import FileEntry

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
        ends = [int(n) for n in re.findall(r"\d+", asked)] if asked and server.mode != "no_range" else []
        start, end = (ends[0], min(ends[1] + 1, len(server.content))) if ends else (0, len(server.content))
        body, headers = server.content[start:end], {}
        if ends:
            shown = start - 5 if server.mode == "wrong_range" else start
            headers["Content-Range"] = f"bytes {shown}-{end - 1}/{len(server.content)}"
        status = 206 if ends else 200
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


ENTRY = FileEntry.of("m", len(CONTENT), [CONTENT[n : n + BLOCK_BYTES] for n in range(0, len(CONTENT), BLOCK_BYTES)])
LAST = len(ENTRY.blocks) - 1


def fetch(fetcher: Fetcher, url: str, folder: Path, entry: FileEntry = ENTRY) -> set[int]:
    """One pass over what is missing of `m`, which is finished when it is whole; the blocks that came wrong."""
    with Part(folder / "m", entry) as part:
        wrong = fetcher.blocks(url, part, lambda _: None, lambda: False)
        if not part.missing:
            part.finish()
        return wrong


def interrupt(fetcher: Fetcher, server: Server, folder: Path) -> None:
    """Leave half of the blocks behind, as a broken connection does."""
    server.mode = "truncate"
    with pytest.raises(FetchError, match=r"after|closed"):
        fetch(fetcher, f"{server.url}/m", folder)
    server.mode = "good"
    server.ranges.clear()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_under_its_name(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    assert fetch(fetcher, f"{server.url}/m", tmp_path) == set()
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert left(tmp_path) == ["m"]


@pytest.mark.parametrize("mode", ["truncate", "unannounced_end"])
def test_a_broken_connection_is_resumed_at_the_block(
    server: Server, fetcher: Fetcher, tmp_path: Path, mode: str
) -> None:
    server.mode = mode
    with pytest.raises(FetchError):
        fetch(fetcher, f"{server.url}/m", tmp_path)
    server.mode, server.ranges = "good", []
    fetch(Fetcher(), f"{server.url}/m", tmp_path)  # another process: what is here is found in the bytes
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF // BLOCK_BYTES * BLOCK_BYTES}-{len(CONTENT) - 1}"]


def test_holes_are_asked_for_one_by_one(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    with Part(tmp_path / "m", ENTRY) as part:
        for number in (0, 2):
            assert part.put(number, [CONTENT[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]])
    fetch(fetcher, f"{server.url}/m", tmp_path)
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert server.ranges == [
        f"bytes={BLOCK_BYTES}-{2 * BLOCK_BYTES - 1}", f"bytes={3 * BLOCK_BYTES}-{len(CONTENT) - 1}"
    ]  # fmt: skip


def test_a_server_without_ranges_costs_bytes_and_nothing_else(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    interrupt(fetcher, server, tmp_path)
    server.mode = "no_range"
    fetch(fetcher, f"{server.url}/m", tmp_path)
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_bytes_from_another_place_than_asked_are_not_believed(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    interrupt(fetcher, server, tmp_path)
    server.mode = "wrong_range"
    start = HALF // BLOCK_BYTES * BLOCK_BYTES
    with pytest.raises(FetchError, match=f"asked for bytes from {start}, got them from {start - 5}"):
        fetch(fetcher, f"{server.url}/m", tmp_path)


@pytest.mark.parametrize(
    "spoil", [b"\0" * HALF, CONTENT[:-1] + b"?", CONTENT + b"too long"], ids=["zeros", "last", "long"]
)
def test_a_part_spoilt_by_a_power_cut_costs_the_spoilt_blocks_and_blames_nobody(
    server: Server, fetcher: Fetcher, tmp_path: Path, spoil: bytes
) -> None:
    interrupt(fetcher, server, tmp_path)
    (tmp_path / left(tmp_path)[0]).write_bytes(spoil)
    assert fetch(fetcher, f"{server.url}/m", tmp_path) == set()
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_part_of_an_older_version_is_not_continued(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    interrupt(fetcher, server, tmp_path)
    server.content = bytes(reversed(CONTENT))
    parts = [server.content[n : n + BLOCK_BYTES] for n in range(0, len(CONTENT), BLOCK_BYTES)]
    fetch(fetcher, f"{server.url}/m", tmp_path, FileEntry.of("m", len(CONTENT), parts))
    assert server.ranges == [f"bytes=0-{len(CONTENT) - 1}"]
    assert left(tmp_path) == ["m"]


def test_wrong_blocks_are_named_and_the_right_ones_kept(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.content = CONTENT[:BLOCK_BYTES] + b"?" + CONTENT[BLOCK_BYTES + 1 : -1] + b"?"
    assert fetch(fetcher, f"{server.url}/m", tmp_path) == {1, LAST}
    server.content, server.ranges = CONTENT, []
    assert fetch(fetcher, f"{server.url}/m", tmp_path) == set()
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_another_size_is_named_before_anything_is_loaded(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.content = CONTENT * 2
    with pytest.raises(WrongContent, match=f"expected {len(CONTENT)} bytes, the server has {2 * len(CONTENT)}"):
        fetch(fetcher, f"{server.url}/m", tmp_path)


def test_endless_data_is_not_read_beyond_the_size(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.mode = "endless"
    fetch(fetcher, f"{server.url}/m", tmp_path)
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_cancelled_fetch_stops_and_keeps_what_it_has(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    come: list[int] = []
    with Part(tmp_path / "m", ENTRY) as part, pytest.raises(FetchCancelled, match="cancelled"):
        fetcher.blocks(f"{server.url}/m", part, come.append, lambda: sum(come) >= HALF)
    server.ranges.clear()
    fetch(fetcher, f"{server.url}/m", tmp_path)
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert server.ranges[0] is not None and not server.ranges[0].startswith("bytes=0-")


def test_a_server_in_trouble_is_quoted_with_its_status(server: Server, fetcher: Fetcher, tmp_path: Path) -> None:
    server.mode = "error"
    with pytest.raises(FetchError, match="503: down for a minute") as failed:
        fetch(fetcher, f"{server.url}/m", tmp_path)
    assert failed.value.status == 503


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/m", "http://no.such.host.invalid/m", "no url", "ftp://x/m"])
def test_an_address_that_does_not_answer_is_a_plain_error(fetcher: Fetcher, tmp_path: Path, url: str) -> None:
    with pytest.raises(FetchError, match=re.escape(url)) as failed:
        fetch(fetcher, url, tmp_path)
    assert failed.value.status is None


def test_small_documents_are_read_up_to_a_limit(server: Server, fetcher: Fetcher) -> None:
    server.content = b'{"a": [1, 2]}'
    assert fetcher.get_bytes(server.url, 100) == server.content
    with pytest.raises(WrongContent, match="at most 5 bytes"):
        fetcher.get_bytes(server.url, 5)


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
