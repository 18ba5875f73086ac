"""`edged check`: every way in which a device can be wrong is named with its fix, and what is right is not complained of."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edged import check, check_broker, check_machine
from edged.check_broker import DAY_S, DAYS_LEFT_MIN, broker, certificates, decoded, validity
from edged.check_machine import FREE_BYTES_MIN, clock, disk, mount_of, permissions
from edged.cli import app
from edged.config import Settings, load
from edged.findings import Finding, Look
from trainer.ca import create_ca, issue

NOW = time.time()
LINE = {"slot": "eye", "source": {"type": "directory", "path": "/in"}}


def settings(folder: Path, **tables: Any) -> Settings:
    device = {"id": "dev1", "state_dir": folder / "state", **tables.pop("device", {})}
    return Settings(device=device, **tables)


def look(folder: Path, now: float | None = None, **more: Any) -> Look:
    known = {key: more.pop(key) for key in ("config", "environment", "status", "proving") if key in more}
    return Look(settings(folder, **more), time.time() if now is None else now, **known)


def levels(findings: Iterator[Finding]) -> list[tuple[str, str]]:
    return [(finding.name, finding.level) for finding in findings]


def wrong(findings: Iterator[Finding]) -> list[Finding]:
    """What is not in order; each with a fix."""
    found = [finding for finding in findings if finding.level != "ok"]
    assert all(finding.fix for finding in found)
    return found


# Configuration and environment.


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({}, "nothing to do"),
        ({"slots": {"eye": {}}, "pipelines": {}}, "it: its model only takes memory"),
        (
            {"slots": {"eye": {}}, "pipelines": dict.fromkeys("ab", LINE)},
            "/in is the folder of pipeline a too",
        ),
    ],
)  # fmt: skip
def test_what_validates_and_cannot_be_meant(tmp_path: Path, tables: dict[str, Any], said: str) -> None:
    assert said in " ".join(finding.text for finding in wrong(check.configuration(look(tmp_path, **tables))))


@pytest.mark.parametrize(
    ("variable", "level", "fix"),
    [
        ("EDGED_CONFIG", None, ""), ("HOME", None, ""),
        ("EDGED_BROKER__HOST", "ok", ""), ("edged_broker__host", "ok", ""),
        ("EDGED_BROKER_HOST", "warning", "write EDGED_BROKER__HOST with two underscores"),
        ("EDGED_STORE_BLOB_BYTES_MAX", "warning", "write EDGED_STORE__BLOB_BYTES_MAX"),
        ("EDGED_BROKR__HOST", "warning", "unset it, or correct its spelling"),
    ],
)  # fmt: skip
def test_a_variable_that_does_nothing_is_said(tmp_path: Path, variable: str, level: str | None, fix: str) -> None:
    found = list(check.environment(look(tmp_path, environment={variable: "x"})))
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(fix in finding.fix for finding in found)


# The machine.


def test_a_state_dir_that_is_not_there_yet_is_made_at_the_start_and_not_by_looking(tmp_path: Path) -> None:
    assert levels(permissions(look(tmp_path))) == [("state_dir", "ok")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "level"), [(0o750, "ok"), (0o700, "ok"), (0o755, "warning"), (0o777, "error"), (0o773, "error")]
)
def test_who_may_read_and_change_the_state(tmp_path: Path, mode: int, level: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    assert levels(permissions(look(tmp_path))) == [("state_dir", level)]


def test_a_state_dir_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert wrong(permissions(look(tmp_path)))[0].text == f"{tmp_path / 'state'} is no folder"


@pytest.mark.parametrize(
    ("text", "mode", "level"),
    [
        ("a = 'x'", 0o644, "ok"), ("a = 'mqtt://u:pass@h'", 0o644, "error"), ("a = 'mqtt://u:pass@h'", 0o640, "ok"),
        ("password = 'hunter2'", 0o604, "error"), ("a = 'x'", 0o646, "error"),
    ],
)  # fmt: skip
def test_a_password_is_for_few(tmp_path: Path, text: str, mode: int, level: str) -> None:
    file = tmp_path / "edged.toml"
    file.write_text(text)
    file.chmod(mode)
    assert levels(permissions(look(tmp_path, config=file)))[1] == ("config file", level)


@pytest.mark.parametrize(
    ("owner", "group", "mode", "bits", "allowed"),
    [
        (5, 0, 0o600, os.R_OK, True), (5, 0, 0o200, os.R_OK, False), (0, 7, 0o640, os.R_OK, True),
        (0, 7, 0o600, os.R_OK, False), (0, 0, 0o644, os.R_OK, True), (0, 0, 0o640, os.R_OK, False),
        (5, 7, 0o070, os.R_OK, False), (0, 7, 0o750, os.W_OK | os.X_OK, False), (0, 7, 0o770, os.W_OK | os.X_OK, True),
    ],
)  # fmt: skip
def test_rights_are_the_owners_then_the_groups(owner: int, group: int, mode: int, bits: int, allowed: bool) -> None:
    found = os.stat_result((mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    assert check_machine.may(found, 5, {7}, bits) is allowed
    assert check_machine.may(found, 0, set(), bits)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root looks on behalf of the service's user")
def test_a_key_that_the_service_may_not_read_is_an_error(
    tmp_path: Path, ca: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, key = tmp_path / "edged.toml", tmp_path / "issued" / "dev1.key"
    key.parent.mkdir()
    for path in (config, key, tmp_path / "ca.crt", tmp_path / "issued" / "dev1.crt"):
        path.write_text("")
        path.chmod(0o644)
    monkeypatch.setattr(check_machine, "PACKAGED", config)
    monkeypatch.setattr(check_machine, "SERVICE_USER", "nobody")
    here = look(tmp_path, config=config, broker=tls(tmp_path))
    real = check_machine.may  # pytest's own folders are closed to others
    monkeypatch.setattr(check_machine, "may", lambda found, *more: stat.S_ISDIR(found.st_mode) or real(found, *more))
    assert levels(check_machine.service_user(here)) == [("service user", "ok")]
    key.chmod(0o600)
    found = wrong(check_machine.service_user(here))
    assert [f"may not use {key} (mode 0600)" in finding.text for finding in found] == [True]
    monkeypatch.setattr(check_machine, "SERVICE_USER", "nobody-of-that-name")
    assert "there is no user" in wrong(check_machine.service_user(here))[0].text
    assert list(check_machine.service_user(look(tmp_path, config=tmp_path / "other.toml"))) == []


class Disk:
    """A disk as statvfs(3) tells of it."""

    f_frsize, f_files, f_favail = 4096, 1000, 500

    def __init__(self, free: int, inodes: int = 500) -> None:
        self.f_bavail, self.f_favail = free // 4096, inodes


@pytest.mark.parametrize(
    ("free", "inodes", "found"),
    [
        (8 << 30, 500, [("disk", "ok")]), (FREE_BYTES_MIN - 4096, 500, [("disk", "error")]),
        (1 << 30, 500, [("disk", "warning")]), (8 << 30, 3, [("disk", "ok"), ("inodes", "warning")]),
    ],
)  # fmt: skip
def test_room_is_compared_with_what_the_store_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, inodes: int, found: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(check_machine.os, "statvfs", lambda _path: Disk(free, inodes))
    assert [row for row in levels(disk(look(tmp_path))) if row[0] in ("disk", "inodes")] == found


def test_a_disk_that_takes_no_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(check_machine.os, "fsync", refuse)
    found = [finding for finding in disk(look(tmp_path)) if finding.name == "writing"]
    assert (found[0].level, "Input/output error" in found[0].text) == ("error", True)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


MOUNTS = r"""22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw
23 22 0:5 / /dev rw - devtmpfs devtmpfs rw
30 22 0:30 / /var/lib rw - tmpfs none rw
31 30 0:31 / /var/lib/a\040b rw - ext4 /dev/mmcblk0p2 rw
32 22 0:32 / /srv rw - overlay overlay rw
33 32 0:33 / /srv rw - nfs4 host:/x rw
34 22 0:34 / /media rw - vfat /dev/sda1 rw"""


@pytest.mark.parametrize(
    ("folder", "kind", "device", "level"),
    [
        ("/home/x", "ext4", "/dev/vda", "ok"), ("/var/lib/edged", "tmpfs", "none", "warning"),
        ("/var/lib/a b/c", "ext4", "/dev/mmcblk0p2", "warning"), ("/srv/x", "nfs4", "host:/x", "warning"),
        ("/media/edged", "vfat", "/dev/sda1", "warning"), ("/var/library", "ext4", "/dev/vda", "ok"),
    ],
)  # fmt: skip
def test_the_file_system_is_the_nearest_mount(tmp_path: Path, folder: str, kind: str, device: str, level: str) -> None:
    card = tmp_path / "block" / "mmcblk0" / "device" / "type"
    card.parent.mkdir(parents=True)
    card.write_text("SD\n")
    assert mount_of(MOUNTS, Path(folder)) == (kind, device)
    found = list(check_machine._file_system(Path(folder), MOUNTS, tmp_path))
    assert levels(iter(found)) == [("file system", level)]
    if level != "ok":
        wrong(iter(found))
    card.write_text("MMC\n")  # soldered flash is meant for this
    if device.startswith("/dev/mmcblk"):
        assert levels(check_machine._file_system(Path(folder), MOUNTS, tmp_path)) == [("file system", "ok")]


@pytest.mark.parametrize(
    ("late_s", "kept", "level", "said"),
    [
        (0.0, True, "ok", "plausible"), (0.0, None, "ok", "plausible"), (0.0, False, "warning", "not synchronised"),
        (None, True, "error", "days before this program was installed"),
        (3600.0, True, "warning", "s before the newest file in"),
    ],
)  # fmt: skip
def test_the_clock_must_be_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_s: float | None, kept: bool | None, level: str, said: str
) -> None:
    now = 0.0 if late_s is None else time.time() - late_s
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "edged.db").write_text("")
    monkeypatch.setattr(check_machine, "synchronised", lambda: kept)
    found = list(clock(look(tmp_path, now)))
    assert [finding.level for finding in found] == [level]
    assert said in found[0].text


def test_the_kernel_tells_whether_somebody_keeps_the_clock() -> None:
    assert check_machine.synchronised() in (True, False, None)


# Running, sources, slots.


def test_a_lock_that_nobody_answers_for_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    assert levels(check.running(look(tmp_path))) == [("daemon", "ok")]
    with (tmp_path / "state" / "lock").open("w") as file:
        assert levels(check.running(look(tmp_path))) == [("daemon", "ok")]
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "held by a process that does not answer" in wrong(check.running(look(tmp_path)))[0].text
    assert levels(check.running(look(tmp_path, status={"pid": 1}))) == [("daemon", "ok")]


@pytest.mark.parametrize(
    ("make", "level"),
    [
        (lambda path: None, "ok"), (lambda path: path.mkdir(), "ok"), (lambda path: path.write_text(""), "error"),
    ],
)  # fmt: skip
def test_a_folder_of_items_is_writable(tmp_path: Path, make: Callable[[Path], Any], level: str) -> None:
    make(tmp_path / "in")
    source = {"type": "directory", "path": tmp_path / "in"}
    found = check.sources(look(tmp_path, slots={"eye": {}}, pipelines={"line": {"slot": "eye", "source": source}}))
    assert levels(found) == [("pipelines.line.source", level)]


def test_a_source_that_knows_more_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"type": "rtsp", "url": "rtsp://127.0.0.1:1/x"}
    here = look(tmp_path, slots={"eye": {}}, pipelines={"line": {"slot": "eye", "source": source}})
    kind = type(here.settings.pipelines["line"].source)
    monkeypatch.setattr(kind, "check", lambda self: iter([("error", "no camera", "plug it in")]))
    assert list(check.sources(here)) == [Finding("pipelines.line.source", "error", "no camera", "plug it in")]


def test_seeds_are_whole_and_answer(tmp_path: Path, toy: Path) -> None:
    def one(**slot: Any) -> Finding:
        found = list(check.slots(look(tmp_path, slots={"eye": slot})))
        assert len(found) == 1
        return found[0]

    assert (one().level, "fleet's desired state" in one().text) == ("ok", True)
    assert one(seed=toy).text == "toy@1.0 answers 2 golden inputs as promised"
    slow = one(seed=toy, latency_ms_max=0.001)
    assert (slow.level, "too slow: " in slow.text, "latency_ms_max" in slow.fix) == ("error", True, True)
    assert one(seed=tmp_path / "none").level == "error"
    refused = one(seed=toy, isolation="process")
    assert (refused.level, refused.fix) == ("error", 'take isolation = "process" out of this slot')


# Certificates and broker.


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority that issued for dev1, dev2 and the broker, and another one in `stranger`."""
    folder = tmp_path_factory.mktemp("ca")
    for name in ("dev1", "dev2", "broker"):
        issue(folder, name)
    create_ca(folder / "stranger")
    return folder


def tls(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "ca": folder / "ca.crt",
        "certificate": folder / "issued/dev1.crt",
        "key": folder / "issued/dev1.key",
        **more,
    }


def test_good_certificates_are_dated(tmp_path: Path, ca: Path) -> None:
    found = list(certificates(look(tmp_path, broker=tls(ca))))
    assert [(finding.name, finding.level) for finding in found] == [
        ("CA certificate", "ok"), ("client certificate", "ok"), ("certificates", "ok"),
    ]  # fmt: skip
    assert "dev1 is valid for 824 more days" in found[1].text or "dev1 is valid for 825 more days" in found[1].text


@pytest.mark.parametrize(
    ("tables", "name", "said"),
    [
        ({"ca": "none.crt"}, "certificates", "broker.ca=none.crt: No such file"),
        ({"key": None}, "certificates", "`ca` is set and `key` is not"),
        ({"key": "issued/dev2.key"}, "certificates", "do not belong together"),
        ({"key": "issued/dev1.crt"}, "certificates", "issued/dev1.crt"),
        ({"certificate": "issued/dev1.key"}, "certificates", "is none"),
        ({"ca": "issued/dev1.key"}, "certificates", "is no certificate"),
        ({"ca": "issued/dev1.crt"}, "certificates", "no certificate of an authority"),
        (
            {"certificate": "issued/dev2.crt", "key": "issued/dev2.key"},
            "client certificate",
            "the certificate is dev2's and the device is",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_named(
    tmp_path: Path, ca: Path, monkeypatch: pytest.MonkeyPatch, tables: dict[str, Any], name: str, said: str
) -> None:
    monkeypatch.chdir(ca)
    found = wrong(certificates(look(tmp_path, broker=tls(Path(), **tables))))
    assert [finding.name for finding in found if said in finding.text] == [name]


def test_a_key_that_everybody_reads_is_an_error(tmp_path: Path, ca: Path) -> None:
    key = tmp_path / "dev1.key"
    key.write_bytes((ca / "issued/dev1.key").read_bytes())
    for mode, level in ((0o640, []), (0o644, ["private key"])):
        key.chmod(mode)
        assert [finding.name for finding in wrong(certificates(look(tmp_path, broker=tls(ca, key=key))))] == level


@pytest.mark.parametrize(
    ("days", "level", "said"),
    [
        (0, "ok", "more days"), (825 - DAYS_LEFT_MIN + 1, "warning", "more days"), (826, "error", "ended 1 days ago"),
        (-2, "error", "is not yet"),
    ],
)  # fmt: skip
def test_certificates_end(ca: Path, days: float, level: str, said: str) -> None:
    found = validity("client certificate", decoded(ca / "issued/dev1.crt"), NOW + days * DAY_S)
    assert (found.level, said in found.text) == (level, True)
    assert bool(found.fix) is (level != "ok")


@contextmanager
def serving(answer: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[int]:
    """A server on a free port that answers each connection with `answer`."""
    listener = socket.create_server((host, 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.settimeout(20)
                    answer(connection)
                except OSError:
                    continue

    threading.Thread(target=run, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def secured(ca: Path, *, trusts: Path | None = None) -> Callable[[socket.socket], None]:
    """The TLS side of a broker."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(trusts or ca / "ca.crt"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(str(ca / "issued/broker.crt"), str(ca / "issued/broker.key"))

    def answer(plain: socket.socket) -> None:
        with context.wrap_socket(plain, server_side=True) as connection:
            connection.recv(100)

    return answer


def test_the_brokers_name_and_authority_are_checked(tmp_path: Path, ca: Path) -> None:
    def asked(host: str, port: int, **more: Any) -> list[Finding]:
        return wrong(broker(look(tmp_path, broker=tls(ca, host=host, port=port, **more))))

    with serving(secured(ca), "127.0.0.2") as port:
        found = asked("127.0.0.2", port)[0]
        assert (found.level, "issue the broker a certificate with the name 127.0.0.2" in found.fix) == ("error", True)
    with serving(secured(ca)) as port:
        found = asked("127.0.0.1", port, ca=ca / "stranger" / "ca.crt")[0]
        assert "put the CA that signed the broker's certificate into broker.ca" in found.fix
    with serving(secured(ca, trusts=ca / "stranger" / "ca.crt")) as port:
        found = asked("127.0.0.1", port)[0]
        assert "is the broker's CA the one that issued this device's certificate?" in found.fix
    with serving(lambda connection: connection.sendall(b"no TLS here")) as port:
        assert "is this the TLS port" in asked("127.0.0.1", port)[0].fix


def test_a_broker_that_is_not_there_is_said(tmp_path: Path) -> None:
    with serving(lambda connection: None) as port:
        pass
    found = wrong(broker(look(tmp_path, broker={"port": port})))
    assert (found[0].name, "start the broker" in found[0].fix) == ("broker", True)


def mqtt(connack: int, suback: list[int]) -> Callable[[socket.socket], None]:
    """A broker of MQTT 5 that answers CONNECT and SUBSCRIBE with these reason codes."""

    def packet(connection: socket.socket) -> bytes:
        kind, size = connection.recv(1)[0], 0
        for shift in (0, 7, 14, 21):
            byte = connection.recv(1)[0]
            size |= (byte & 127) << shift
            if byte < 128:
                break
        body = b""
        while len(body) < size:
            body += connection.recv(size - len(body))
        return bytes([kind]) + body

    def answer(connection: socket.socket) -> None:
        try:
            packet(connection)
            connection.sendall(bytes([0x20, 3, 0, connack, 0]))
            subscribe = packet(connection)
            codes = bytes(suback)
            connection.sendall(bytes([0x90, 3 + len(codes)]) + subscribe[1:3] + b"\0" + codes)
            packet(connection)
        except IndexError:  # it went away
            return

    return answer


@pytest.mark.parametrize(
    ("connack", "suback", "name", "said", "fix"),
    [
        (0x87, [], "broker", "Not authorized", "let the broker take dev1~check"),
        (0x85, [], "broker", "Client identifier not valid", "use a device.id that the broker takes"),
        (0x84, [], "broker", "Unsupported protocol version", "use a broker that speaks MQTT 5"),
        (
            0,
            [0x87, 0, 0, 0, 0, 0],
            "broker rights",
            "edged/v1/default/dev1/down/desired",
            "allow dev1~check to read them",
        ),
        (0, [1, 1, 1, 1, 1, 1], "broker rights", "every subscription of this device is granted", ""),
    ],
)
def test_what_the_broker_refuses_is_named(
    tmp_path: Path, connack: int, suback: list[int], name: str, said: str, fix: str
) -> None:
    with serving(mqtt(connack, suback)) as port:
        found = {finding.name: finding for finding in broker(look(tmp_path, broker={"port": port}))}
    assert said in found[name].text
    assert fix in found[name].fix


def test_a_broker_that_says_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_broker, "CONNECT_S", 0.3)
    with serving(lambda connection: threading.Event().wait(2)) as port:
        found = wrong(broker(look(tmp_path, broker={"port": port})))
    assert "no answer to CONNECT" in found[0].text


@pytest.mark.parametrize(("state", "level"), [("connected", "ok"), ("not authorised", "error")])
def test_a_running_daemon_is_asked_instead_of_the_broker(tmp_path: Path, state: str, level: str) -> None:
    visited = []
    with serving(lambda connection: visited.append(connection.recv(1))) as port:
        found = list(broker(look(tmp_path, broker={"port": port}, status={"broker": state})))
    assert [(finding.level, "the running edged" in finding.text) for finding in found] == [(level, True)]
    assert visited in ([], [b""]), "no MQTT was spoken: a second connection would end the daemon's"


# The command.


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "edged.toml"
    path.write_text(f'[device]\nid = "dev1"\nstate_dir = "{tmp_path / "state"}"\n[broker]\nport = 1\n')
    return path


def edged(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments, "--config", str(config)])


def test_the_command_prints_findings_and_counts_them(config: Path) -> None:
    done = edged(config)
    lines = done.stdout.splitlines()
    assert done.exit_code == 1
    failed = next(number for number, line in enumerate(lines) if line.startswith("FAIL broker: 127.0.0.1:1: "))
    assert lines[failed + 1] == "       fix: start the broker, and open the port on the way to it"
    assert " 1 errors, " in lines[-1]


def test_warnings_alone_are_no_failure(config: Path) -> None:
    with serving(mqtt(0, [1, 1, 1, 1, 1])) as port:
        config.write_text(config.read_text().replace("port = 1", f"port = {port}"))
        done = edged(config, "--json")
    rows = json.loads(done.stdout)
    assert (done.exit_code, {row["level"] for row in rows}) == (0, {"ok", "warning"})
    assert all(set(row) == {"name", "level", "ok", "text", "fix"} for row in rows)


def test_a_configuration_that_cannot_be_read_is_a_finding(config: Path) -> None:
    config.write_text("[device]\nid = 'a b'\nx = 1")
    rows = json.loads(edged(config, "--json").stdout)
    assert [(row["name"], row["level"]) for row in rows] == [("configuration", "error")] * 2
    done = edged(config)
    assert (done.exit_code, "FAIL configuration: " in done.stdout) == (1, True)


def test_a_part_that_breaks_is_a_finding_and_the_others_are_still_looked_at(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(_look: Look) -> Iterator[Finding]:
        yield Finding("odd", "ok", "so far")
        raise ZeroDivisionError("three of zero")

    monkeypatch.setattr(check, "PARTS", (odd, check.running))
    found = check.inspect(load(config), config)
    assert [finding.level for finding in found] == ["ok", "error", "ok"]
    assert "ZeroDivisionError: three of zero" in found[1].text


def test_looking_changes_nothing(config: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    edged(config)
    assert sorted(os.listdir(tmp_path)) == before
