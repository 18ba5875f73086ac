"""An HTTP server whose answers can be wrong on purpose."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from edged.wire.manifest import ReleaseManifest, ReleaseRef

ENDLESS_BYTES = 64 << 20  # more than anybody should take, and little enough for the machine of whoever does


class FileServer:
    """Serves `files` (path -> bytes) whole. A path in `cut` announces the full length and ends the connection after that
    many bytes; a path in `held` comes drop by drop until its event is set; one in `endless` goes on for ENDLESS_BYTES."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.held: dict[str, threading.Event] = {}
        self.endless: set[str] = set()
        self.requested: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requested.append(self.path)
                data = owner.files.get(self.path)
                if self.path in owner.endless:
                    self.send_response(200)
                    self.end_headers()
                    with suppress(OSError):  # until the client hangs up
                        for _ in range(ENDLESS_BYTES >> 16):
                            self.wfile.write(b" " * 65536)
                    self.close_connection = True
                    return
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                end = owner.cut.get(self.path, len(data))
                held = owner.held.get(self.path)
                if held is not None:
                    sent = 0
                    while sent < end - 1 and not held.wait(0.05):
                        self.wfile.write(data[sent : sent + 1])
                        sent += 1
                    self.wfile.write(data[sent:end])
                else:
                    self.wfile.write(data[:end])
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="files", daemon=True)
        self._thread.start()

    def publish(self, folder: Path, ref: ReleaseRef) -> None:
        """Serve the release in `folder` as the trainer does."""
        data = (folder / "release.json").read_bytes()
        self.files[f"/releases/{ref.release}/release.json"] = data
        for entry in ReleaseManifest.model_validate_json(data).files.values():
            self.files[f"/blobs/{entry.sha256}"] = (folder / entry.path).read_bytes()

    def blob(self, folder: Path, role: str = "model") -> str:
        """The path under which a file of the release in `folder` is served."""
        manifest = ReleaseManifest.model_validate_json((folder / "release.json").read_bytes())
        return f"/blobs/{manifest.files[role].sha256}"

    def close(self) -> None:
        """Stop serving."""
        for event in self.held.values():
            event.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A FileServer that is closed in the end."""
    server = FileServer()
    try:
        yield server
    finally:
        server.close()
