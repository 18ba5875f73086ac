from __future__ import annotations

import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from tests.support.models import write_manifest
from trainer.releases import Registry, build_manifest
from trainer.server import Server, ServerOptions

MODEL = bytes(range(256)) * 40
PIXELS = b"pixels of a claimed sample"
CLAIMED = sha256(PIXELS).hexdigest()
BLOB = f"/blobs/{sha256(MODEL).hexdigest()}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    source = tmp_path / "in"
    source.mkdir()
    (source / "model.onnx").write_bytes(MODEL)
    registry = Registry(tmp_path / "releases")
    roles = {"model": "model.onnx"}
    write_manifest(source, build_manifest(source, "digits@1.0", kind="detect", engine="onnx_detect", roles=roles))
    registry.register(source)
    served = Server(
        ServerOptions("127.0.0.1", 0, sample_bytes_max=1000),
        registry,
        tmp_path / "samples",
        claimed=lambda digest: digest == CLAIMED,
        status=lambda: {"jobs": []},
        arrived=lambda _digest: None,
    )
    served.start()
    yield served
    served.stop()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        yield client


def test_a_release_is_found_by_name_and_its_files_by_hash(http: httpx.Client) -> None:
    manifest = http.get("/releases/digits@1.0/release.json")
    assert manifest.json()["release"] == "digits@1.0"
    assert manifest.headers["etag"] == f'"{sha256(manifest.content).hexdigest()}"'
    whole = http.get(BLOB)
    assert whole.content == MODEL
    assert whole.headers["etag"] == f'"{sha256(MODEL).hexdigest()}"'


@pytest.mark.parametrize(
    ("wanted", "expected", "content_range"),
    [
        ("bytes=10-19", MODEL[10:20], "bytes 10-19/10240"),
        ("bytes=10000-", MODEL[10000:], "bytes 10000-10239/10240"),
        ("bytes=-5", MODEL[-5:], "bytes 10235-10239/10240"),
        ("bytes=10000-99999", MODEL[10000:], "bytes 10000-10239/10240"),
    ],
)
def test_a_part_of_a_file(http: httpx.Client, wanted: str, expected: bytes, content_range: str) -> None:
    part = http.get(BLOB, headers={"Range": wanted})
    assert part.status_code == 206
    assert part.content == expected
    assert part.headers["content-range"] == content_range


def test_a_part_behind_the_end_names_the_size(http: httpx.Client) -> None:
    part = http.get(BLOB, headers={"Range": "bytes=10240-"})
    assert part.status_code == 416
    assert part.headers["content-range"] == "bytes */10240"


def test_a_part_of_another_version_is_the_whole(http: httpx.Client) -> None:
    part = http.get(BLOB, headers={"Range": "bytes=10-19", "If-Range": '"another"'})
    assert (part.status_code, part.content) == (200, MODEL)


def test_head_tells_the_size_without_the_bytes(http: httpx.Client) -> None:
    head = http.head(BLOB)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "10240", b"")


@pytest.mark.parametrize(
    "path", [f"/blobs/{'0' * 64}", "/blobs/model.onnx", "/blobs/..%2f..%2fetc%2fpasswd", "/releases/digits@2.0/release.json",
             "/releases/..%2f../release.json", "/releases/nonsense/release.json"],
)  # fmt: skip
def test_what_is_not_there_is_said(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 404


def test_a_claimed_sample_is_taken_once(http: httpx.Client, tmp_path: Path) -> None:
    assert http.put(f"/samples/{CLAIMED}", content=PIXELS).status_code == 201
    assert http.put(f"/samples/{CLAIMED}", content=PIXELS).status_code == 200
    assert [path.name for path in (tmp_path / "samples").iterdir()] == [CLAIMED]
    assert (tmp_path / "samples" / CLAIMED).read_bytes() == PIXELS


def test_other_bytes_are_refused_naming_both_hashes(http: httpx.Client, tmp_path: Path) -> None:
    answer = http.put(f"/samples/{CLAIMED}", content=b"tampered")
    assert answer.status_code == 422
    assert CLAIMED in answer.json()["error"]
    assert sha256(b"tampered").hexdigest() in answer.json()["error"]
    assert list((tmp_path / "samples").iterdir()) == []


def test_what_no_job_claims_is_refused(http: httpx.Client, tmp_path: Path) -> None:
    other = b"something else"
    assert http.put(f"/samples/{sha256(other).hexdigest()}", content=other).status_code == 403
    assert http.put("/samples/..%2fevil", content=other).status_code == 404
    assert list((tmp_path / "samples").iterdir()) == []


def test_an_endless_body_is_cut_off(http: httpx.Client, tmp_path: Path) -> None:
    assert http.put(f"/samples/{CLAIMED}", content=b"x" * 1001).status_code == 413

    def unannounced() -> Iterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    assert http.put(f"/samples/{CLAIMED}", content=unannounced()).status_code == 413
    assert list((tmp_path / "samples").iterdir()) == []


def test_an_upload_that_breaks_off_leaves_nothing(server: Server, http: httpx.Client, tmp_path: Path) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"PUT /samples/{CLAIMED} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PIXELS)}\r\n\r\n"
        raw.sendall(head.encode() + PIXELS[:5])
    assert http.put(f"/samples/{CLAIMED}", content=PIXELS).status_code == 201  # the next try is as good as the first
    assert [path.name for path in (tmp_path / "samples").iterdir() if not path.name.startswith(".")] == [CLAIMED]


def test_an_address_in_use_is_said(server: Server, tmp_path: Path) -> None:
    second = Server(
        ServerOptions("127.0.0.1", server.port, 1000),
        Registry(tmp_path / "releases"),
        tmp_path / "samples",
        claimed=lambda _digest: False,
        status=dict,
        arrived=lambda _digest: None,
    )
    with pytest.raises(OSError, match=f"127.0.0.1:{server.port}: cannot listen"):
        second.start()
