"""`trainer serve` as a process of its own tells a server of releases, and is killed while it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.device import until
from tests.support.models import write_manifest
from tests.support.told_server import Told
from trainer.database import Database
from trainer.registration import listing
from trainer.releases import Registry, build_manifest

CONFIG = """
data_dir = "data"
[http]
port = 0
[broker]
port = 1
[[registration]]
name = "farm"
url = "{url}"
timeout_s = 20
retry_s = 0.2
retry_s_max = 0.2
token_file = "farm.key"
"""


def trainer(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *arguments, "--config", str(folder / "trainer.toml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def serve(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer", "serve", "--config", str(folder / "trainer.toml")]
    with (folder / "serve.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))


def rows(folder: Path) -> list[dict[str, Any]]:
    database = Database(folder / "data" / "trainer.sqlite")
    with database.read() as connection:
        found = listing(connection)
    database.close()
    return found


def add(folder: Path, release: str) -> None:
    made = folder / release
    made.mkdir()
    (made / "model.gguf").write_bytes(b"GGUF" + release.encode())
    write_manifest(made, build_manifest(made, release, kind="llm", engine="llama", roles={"model": "model.gguf"}))
    Registry(folder / "data" / "releases").register(made)


def test_a_kill_neither_loses_nor_doubles_what_a_server_is_told(tmp_path: Path) -> None:
    with Told() as told:
        (tmp_path / "trainer.toml").write_text(CONFIG.format(url=told.url))
        (tmp_path / "farm.key").write_text("s3cret-key")
        (tmp_path / "farm.key").chmod(0o600)
        add(tmp_path, "phi@1.0")

        told.hold.clear()  # the server does its work, and its answer does not come
        serving = serve(tmp_path)
        until("the server has the request", lambda: told.requests)
        serving.send_signal(signal.SIGKILL)
        serving.wait()
        (row,) = rows(tmp_path)
        assert (row["state"], row["tries"]) == ("waiting", 0)
        told.hold.set()

        add(tmp_path, "phi@1.1")  # while nobody serves
        serving = serve(tmp_path)
        try:
            until(
                "both are done", lambda: {r["state"] for r in rows(tmp_path)} == {"done"} and len(rows(tmp_path)) == 2
            )
            # Told twice of the first with one key: it knows one model of it.
            assert [request["body"]["model"] for request in told.requests] == ["phi@1.0", "phi@1.0", "phi@1.1"]
            assert len(told.models) == 2
            assert told.requests[0]["body"] == told.requests[1]["body"]

            # A person looks, mends and tries again.
            told.answers.append(422)
            add(tmp_path, "phi@1.2")
            until("it is refused", lambda: any(row["state"] == "refused" for row in rows(tmp_path)))
            shown = trainer(tmp_path, "release", "registrations", "--state", "refused").stdout
            assert "phi@1.2" in shown
            assert "it answered 422" in shown
            again = trainer(tmp_path, "release", "registrations", "--retry", "phi@1.2")
            assert "again: ['farm']" in again.stdout, again.stderr
            until("it is done", lambda: all(row["state"] == "done" for row in rows(tmp_path)))

            # A stop does not wait for a server that hangs.
            told.hold.clear()
            add(tmp_path, "phi@1.3")
            until("the server has the request", lambda: told.requests[-1]["body"]["model"] == "phi@1.3")
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(15) == 0
        finally:
            if serving.poll() is None:
                serving.kill()
                serving.wait()
    log = (tmp_path / "serve.log").read_text()
    assert "s3cret-key" not in log
    assert "Traceback" not in log, log
