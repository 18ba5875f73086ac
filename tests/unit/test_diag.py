"""`edged diag`: what support needs is in the archive, and nothing that is somebody's: secrets, images, prompts, answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edged import diag
from edged.beats import Beats
from edged.cli import app
from edged.clock import SystemClock
from edged.status_socket import StatusSocket
from edged.store import LanguageRequest, NewSample, OutboxMessage, Store
from trainer.ca import issue

IMAGE = b"\x89PNG-recognisable-image-bytes"
ODD = 'config-"odd"'
# Each stands in a place of its own; none may come out.
PLANTED = {
    name: f"planted-{name}-7f3a"
    for name in (
        "prompt", "answer", "turn", "payload", "letter", "url-password", "config-password", "config-token", "env-secret",
        "log-password", "log-quote", "status-password", "error-password", "reason-prompt", "comment", ODD,
    )
}  # fmt: skip


def full_store(folder: Path) -> None:
    """A store with something in every table."""
    store = Store(folder)
    sample = NewSample(
        id="s1", pipeline="line", task="detect", model="eye", release="toy@1.0", state="captured", reason="unsure",
        decision="audit", confidence=0.3, inclusion_probability=1.0, sha256=hashlib.sha256(IMAGE).hexdigest(),
        bytes=len(IMAGE), prediction=[{"label": "cat", "box": [0, 0, 1, 1], "score": 0.3}], item="a.png", captured=5.0,
    )  # fmt: skip
    store.capture(sample, IMAGE)
    store.record_request(
        LanguageRequest(
            "r1", "chat", 6.0, prompt=PLANTED["prompt"], messages=[{"role": "user", "content": PLANTED["turn"]}],
            answer=PLANTED["answer"], reason=PLANTED["reason-prompt"], outcome="error", prompt_tokens=3,
        )
    )  # fmt: skip
    store.enqueue(OutboxMessage("m1", "edged/v1/p/dev1/up/reply/r1", 1, False, None, PLANTED["payload"].encode()), 7.0)
    store.enqueue(
        OutboxMessage("m2", "edged/v1/p/dev1/up/result/line", 1, False, None, PLANTED["letter"].encode()), 8.0
    )
    store.bury("m2", "too large")
    store.save_update("eye", {"target": "eye", "state": "failed", "reason": f"password={PLANTED['error-password']}"})
    store.remember_bad("toy@1.1", "ab" * 32, "it crashed", 9.0)
    store.count("verdicts", 4)
    store.close()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device with secrets wherever they may be, and a journal that shows some."""
    for name in ("dev1", "dev1~blk"):
        issue(tmp_path / "ca", name)
    ca = tmp_path / "ca"
    full_store(tmp_path / "state")
    path = tmp_path / "edged.toml"
    path.write_text(
        f"# {PLANTED['comment']}\n"
        f'[device]\nid = "dev1"\nstate_dir = "{tmp_path / "state"}"\n'
        f'[broker]\nport = 1\nca = "{ca}/ca.crt"\ncertificate = "{ca}/issued/dev1.crt"\nkey = "{ca}/issued/dev1.key"\n'
        f'bulk_certificate = "{ca}/issued/dev1~blk.crt"\nbulk_key = "{ca}/issued/dev1~blk.key"\n'
        f'[host]\nurl = "https://plant:{PLANTED["url-password"]}@trainer:8443"\n'
        f"[slots.tongue]\nextra = {{ pwd = '{PLANTED[ODD]}' }}\n"
        f'[slots.eye]\nextra = {{ api_password = "{PLANTED["config-password"]}", token = "{PLANTED["config-token"]}" }}\n'
    )
    monkeypatch.setenv("EDGED_SLOTS__EYE__EXTRA__OTHER_SECRET", PLANTED["env-secret"])
    tools = tmp_path / "bin"
    tools.mkdir()
    key_line, bulk_line = ((ca / "issued" / name).read_text().splitlines()[1] for name in ("dev1.key", "dev1~blk.key"))
    lines = [
        f"INFO no connection to mqtt://u:{PLANTED['log-password']}@broker",
        f"WARNING dropped an invalid payload: topic: prompt: too long (got '{PLANTED['log-quote']}')",
        f"INFO somehow the key: {key_line} {bulk_line}", f"INFO and the other one {PLANTED['url-password']}",
        f"INFO odd ones {PLANTED[ODD]}", json.dumps({"x": PLANTED[ODD]}), "INFO the last line",
    ]  # fmt: skip
    (tools / "journalctl").write_text(f"#!{sys.executable}\nprint({chr(10).join(lines)!r})\n")
    (tools / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return path


def edged(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["diag", "--config", str(config), *arguments])


def archive(config: Path, *arguments: str) -> dict[str, str]:
    """The files of an archive."""
    path = config.parent / "out.tar.gz"
    done = edged(config, "--output", str(path), *arguments)
    assert done.exit_code == 0, done.output
    found = {}
    with tarfile.open(path) as file:
        for entry in file.getmembers():
            opened = file.extractfile(entry)
            assert opened is not None
            found[Path(entry.name).name] = opened.read().decode()
    return found


def assert_nothing_private(parts: dict[str, str], config: Path) -> None:
    everything = "\n".join(parts.values())
    shown = [*PLANTED.items(), *((name, json.dumps(text)[1:-1]) for name, text in PLANTED.items())]
    assert [name for name, text in shown if text in everything] == []
    assert IMAGE.decode("latin-1")[4:] not in everything
    keys = [config.parent / "ca" / "issued" / name for name in ("dev1.key", "dev1~blk.key")]
    for line in (line for key in keys for line in key.read_text().splitlines()):
        assert "-----" in line or line not in everything, "a line of the private key"
    assert "PRIVATE KEY" not in everything


def test_support_gets_what_it_needs_and_nothing_that_is_private(config: Path) -> None:
    parts = archive(config)
    assert_nothing_private(parts, config)
    assert set(parts) == {
        "about.json", "machine.json", "configuration.json", "certificates.json", "status.json", "check.txt", "store.json",
        "files.json", "log.txt",
    }  # fmt: skip
    assert json.loads(parts["about.json"])["packages"]["numpy"][0].isdigit()
    written = json.loads(parts["configuration.json"])
    assert written["as_written"]["slots"]["eye"]["extra"] == {"api_password": "***", "token": "***"}
    assert written["as_written"]["host"]["url"] == "https://***@trainer:8443"
    assert written["in_force"]["delivery"]["retry_s"] == 20.0
    assert list(written["environment"]) == ["EDGED_SLOTS__EYE__EXTRA__OTHER_SECRET"]
    certificate = json.loads(parts["certificates.json"])["certificate"]
    assert certificate["subject"] == [[["commonName", "dev1"]]]
    assert "notAfter" in certificate
    assert json.loads(parts["certificates.json"])["key"]["mode"] == "0600"
    store = json.loads(parts["store.json"])
    assert store["quick_check"] == ["ok"]
    assert store["samples"][0]["state"] == "captured"
    assert [(row["topic"], row["bytes"]) for row in store["outbox"]] == [
        ("edged/v1/p/dev1/up/reply/r1", len(PLANTED["payload"]))
    ]
    assert store["dead_letters"][0]["reason"] == "too large"
    assert (store["updates"][0]["record"]["state"], store["bad_releases"][0]["release"]) == ("failed", "toy@1.1")
    assert (store["requests"][0]["outcome"], store["requests"][0]["prompt_tokens"]) == ("error", 3)
    assert store["migrations"][0]["name"].startswith("m001")
    assert "FAIL broker: 127.0.0.1:1" in parts["check.txt"]
    assert any(row["file"] == "edged.db" for row in json.loads(parts["files.json"]))
    assert parts["log.txt"].splitlines()[-1] == "INFO the last line"
    assert json.loads(parts["machine.json"])["cores"] == os.cpu_count()
    assert json.loads(parts["status.json"]) == "no daemon answers"


def test_a_running_daemon_is_asked(config: Path, tmp_path: Path) -> None:
    status = {
        "device": "dev1",
        "broker": f"refused: mqtt://u:{PLANTED['status-password']}@h",
        "events": [{"kind": "bad_seed"}],
    }
    server = StatusSocket(tmp_path / "state", lambda: status, Beats(SystemClock()))
    server.start()
    parts = archive(config)
    server.stop()
    assert_nothing_private(parts, config)
    assert json.loads(parts["status.json"])["events"] == [{"kind": "bad_seed"}]


@pytest.mark.parametrize("damage", ["no database", "cut", "zeros", "text"])
def test_a_broken_database_is_told_about(config: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state" / "edged.db"
    for beside in path.parent.glob("edged.db-*"):
        beside.unlink()
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "zeros":
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\0" * 8192)
    elif damage == "text":
        path.write_text("this is no database")
    else:
        path.unlink()
    before = path.read_bytes() if path.exists() else None
    parts = archive(config)
    assert_nothing_private(parts, config)
    found = json.loads(parts["store.json"])
    assert ("there is none" in found) if damage == "no database" else (found["quick_check"] != ["ok"])
    assert (path.read_bytes() if path.exists() else None) == before, "support must find it as it is"


@pytest.mark.parametrize("text", ["[device]\nid = 'a b'\nstate_dir = '{state}'", "no TOML", ""])
def test_a_configuration_that_cannot_be_used_is_no_reason_to_give_up(config: Path, tmp_path: Path, text: str) -> None:
    config.write_text(text.format(state=tmp_path / "state"))
    parts = archive(config)
    assert str(config) in json.loads(parts["configuration.json"])["error"]
    assert "FAIL configuration" in parts["check.txt"]
    if "state_dir" in text:
        assert json.loads(parts["store.json"])["quick_check"] == ["ok"]


def test_the_archive_is_its_owners_and_says_what_is_in_it(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.tar.gz"
    path.write_text("old")
    path.chmod(0o644)
    done = edged(config, "-o", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert done.stdout.splitlines()[0].endswith("bytes  about.json")
    assert done.stdout.splitlines()[-1].startswith(f"{path}: ")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".out")] == []
    refused = edged(config, "-o", str(tmp_path / "none" / "x.tar.gz"))
    assert (refused.exit_code, "name another file with --output" in refused.stderr) == (1, True)


def test_the_default_name_says_which_device_and_when(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert edged(config).exit_code == 0
    assert len(list(tmp_path.glob("edged-diag-dev1-2*Z.tar.gz"))) == 1


def test_no_part_is_large_and_the_log_keeps_its_end(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diag, "PART_BYTES_MAX", 1000)
    monkeypatch.setattr(diag, "_log", lambda _about: "old\n" + "x" * 3000 + "\nthe end")
    monkeypatch.setattr(diag, "_status", lambda _about: {"first": 1, "rest": "x" * 3000})
    parts = archive(config)
    assert parts["log.txt"].startswith("[cut: ")
    assert parts["log.txt"].endswith("the end")
    assert parts["status.json"].startswith('{\n "first": 1')
    assert max(map(len, parts.values())) < 1100
    assert len(parts) < diag.ARCHIVE_MIB_MAX


def test_a_part_that_cannot_be_collected_says_why(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_about: Any) -> None:
        raise ValueError(f"password={PLANTED['error-password']}")

    monkeypatch.setattr(diag, "_machine", broken)
    parts = archive(config)
    assert json.loads(parts["machine.json"]) == "this could not be collected: ValueError: password=***"


def test_without_a_journal_the_log_says_so(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "journalctl" in archive(config)["log.txt"]


def test_a_database_that_somebody_writes_to_is_read(config: Path, tmp_path: Path) -> None:
    store, stop = Store(tmp_path / "state"), threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            store.set_value("x", number := number + 1)

    thread = threading.Thread(target=work)
    thread.start()
    found = json.loads(archive(config)["store.json"])
    stop.set()
    thread.join()
    store.close()
    assert found["quick_check"] == ["ok"]
    assert found["values"][0]["key"] == "x"


def test_the_survey_names_its_columns_and_leaves_out_what_is_private() -> None:
    """A column that somebody adds is not shown by accident."""
    from edged.store import survey

    text = " ".join(survey._TABLES.values())
    assert "*" not in text.replace("count(*)", "")
    columns = {word.strip(",") for word in text.replace("(", " ").replace(")", " ").split()}
    private = {"payload", "prompt", "answer", "messages", "options", "prediction", "label", "evidence", "item", "json"}
    assert columns & private <= {"json"}, "of `value.json` only its length is shown"
    assert {field.name for field in dataclasses.fields(LanguageRequest)} >= {"prompt", "answer", "messages"}
