"""What an operator sees of a real device: metrics, status, log, check and diag, with a real broker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from edged.clock import SystemClock
from edged.link import Inbound, Link, LinkOptions
from edged.stamp import Stamp
from edged.wire import messages, topics
from tests.support.device import EDGED, SITE, Bus, Device, clean_env, tables, until
from tests.support.models import picture
from tests.support.ports import free_port
from tests.system.broker import Broker


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "broker", tls=True) as running:
        yield running


def scrape(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, label values in the order of their names) -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    found = {}
    for family in parse(text):
        for sample in family.samples:
            found[(sample.name, tuple(value for _, value in sorted(sample.labels.items())))] = sample.value
    return found


def test_metrics_status_and_diag_tell_of_what_a_device_did(tmp_path: Path, broker: Broker, toy: Path) -> None:
    port = free_port()
    config = tables(
        tmp_path, "dev1", broker, toy, metrics={"listen": f"127.0.0.1:{port}"}, log={"format": "json"},
    )  # fmt: skip
    with Device(tmp_path, config) as device:
        device.wait("it is connected", lambda status: status["broker"] == "connected")
        for number in range(3):
            (device.inbox / f"{number}.png").write_bytes(picture(mark=number))
        (device.inbox / "broken.png").write_bytes(b"no picture")
        device.wait(
            "all are answered",
            lambda status: (t := status["pipelines"]["line"]["totals"])["items"] == 3 and t["errors"] == 1,
        )

        def found() -> dict[tuple[str, tuple[str, ...]], float] | None:
            page = scrape(port)
            return page if page.get(("edged_item_errors_total", ("line",))) == 1 else None

        page = until("the page shows it", found)
        answered = {labels[2]: value for (name, labels), value in page.items() if name == "edged_items_total"}
        assert sum(answered.values()) == 3
        assert page[("edged_answer_latency_seconds_count", ("line",))] == 3
        assert page[("edged_model_info", ("", "toy@1.0", "eye"))] == 1
        assert page[("edged_broker_connected", ())] == 1
        assert page[("edged_events_total", ("items_bad_image",))] == 1
        assert page[("edged_memory_pss_bytes", ("daemon",))] > 10 << 20
        assert page[("edged_open_files", ())] > 5

        status = device.cli("status")
        assert status.returncode == 0, status.stdout + status.stderr
        assert status.stdout.splitlines()[1].startswith("healthy")
        assert "line: directory -> eye" in status.stdout
        assert "3 answered" in status.stdout

        archive = tmp_path / "out.tar.gz"
        done = device.cli("diag", "-o", str(archive))
        assert done.returncode == 0, done.stderr
        with tarfile.open(archive) as file:
            contents = {Path(e.name).name: file.extractfile(e).read() for e in file.getmembers()}  # type: ignore[union-attr]
        assert json.loads(contents["status.json"])["pipelines"]["line"]["totals"]["items"] == 3
        assert b"the running edged is connected" in contents["check.txt"]
        assert b"\x89PNG" not in b"".join(contents.values())

        broker.stop()
        device.wait("it knows", lambda status: status["broker"] != "connected")
        status = device.cli("status")
        assert status.returncode == 1
        assert "! broker: not connected: " in status.stdout
        assert until("the page knows", lambda: scrape(port)[("edged_broker_connected", ())] == 0)
        broker.start()
    rows = [json.loads(line) for line in device.log().splitlines()]
    assert any(row["logger"] == "edged.refusals" and "broken.png" in row["message"] for row in rows)
    assert {row["level"] for row in rows} <= {"info", "warning", "error"}


def test_a_port_that_is_taken_costs_only_the_metrics(tmp_path: Path, broker: Broker, toy: Path) -> None:
    config = tables(tmp_path, "dev1", broker, toy, metrics={"listen": f"127.0.0.1:{broker.port}"})
    with Device(tmp_path, config) as device:
        device.wait("it is connected", lambda status: status["broker"] == "connected")
        assert "choose another port in metrics.listen" in device.log()


def session(broker: Broker, name: str, expiry_s: int) -> Link:
    """A connection as the device `name`, with its session."""
    certificate, key = broker.certificate(name)
    options = LinkOptions(broker.host, broker.port, name, broker.ca, certificate, key, session_expiry_s=expiry_s)
    return Link(options, [topics.VERDICT.filter(site=SITE, dev=name)])


def test_check_takes_nothing_from_the_session_of_the_device(tmp_path: Path, secure: Broker, toy: Path) -> None:
    """The broker takes the certificate's name for the client id: check comes as the device itself."""
    before = session(secure, "dev1", 3600)
    before.start()
    until("it is subscribed", lambda: before.connected)
    bus = Bus(secure)
    stamp = Stamp(SystemClock())
    address = topics.VERDICT(site=SITE, dev="dev1")

    def verdict(sample: str) -> messages.Verdict:
        by = messages.Provenance(kind="model", who="big1")
        return messages.Verdict(**stamp(), sample=sample, status="unresolved", provenance=by)

    bus.say(address, verdict("s0"))
    until("the subscription is in force", lambda: any(isinstance(e, Inbound) for e in list(before.inbox.queue)))
    before.stop()
    bus.say(address, verdict("s1"))
    device = Device(tmp_path, tables(tmp_path, "dev1", secure, toy))
    done = device.cli("check", "--no-prove")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{secure.host}:{secure.port} takes dev1" in done.stdout
    assert "every subscription of this device is granted" in done.stdout

    after = session(secure, "dev1", 3600)
    after.start()
    heard: list[str] = []

    def waiting() -> bool:
        event = after.inbox.get(timeout=20)
        if isinstance(event, Inbound):
            heard.append(json.loads(event.payload)["sample"])
        return "s1" in heard

    until("what waited for the device still waits", waiting)
    after.stop()
    bus.close()


def test_check_leaves_no_session_where_there_was_none(tmp_path: Path, secure: Broker, toy: Path) -> None:
    device = Device(tmp_path, tables(tmp_path, "dev1", secure, toy))
    assert device.cli("check", "--no-prove").returncode == 0
    fresh = session(secure, "dev1", 3600)
    fresh.start()
    event = fresh.inbox.get(timeout=20)
    assert getattr(event, "session", None) is False
    fresh.stop()


def test_check_names_what_the_broker_holds_against_the_device(tmp_path: Path, secure: Broker, toy: Path) -> None:
    config = tables(tmp_path, "dev1", secure, toy)
    stranger = Broker(tmp_path / "stranger", tls=True)  # another authority; it never runs
    certificate, key = stranger.certificate("dev1")
    config["broker"] |= {"certificate": certificate, "key": key}
    done = Device(tmp_path, config).cli("check", "--no-prove", "--json")
    failed = {row["name"]: row for row in json.loads(done.stdout) if not row["ok"]}
    assert done.returncode == 1
    assert list(failed) == ["broker"]
    assert "is the broker's CA the one that issued this device's certificate?" in failed["broker"]["fix"]


def test_check_beside_a_running_device_does_not_disturb_it(tmp_path: Path, secure: Broker, toy: Path) -> None:
    with Device(tmp_path, tables(tmp_path, "dev1", secure, toy)) as device:
        device.wait("it is connected", lambda status: status["broker"] == "connected")
        done = device.cli("check")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the running edged is connected" in done.stdout
        status = device.status()
        assert status is not None
        assert (status["broker"], status["counters"]["broker_connects"]) == ("connected", 1)


def test_a_camera_password_is_in_no_log_and_no_status(tmp_path: Path, broker: Broker, toy: Path) -> None:
    """The address leads nowhere, and is complained about."""
    url = f"rtsp://admin:planted-9d1c@127.0.0.1:{free_port()}/stream"
    config = tables(tmp_path, "dev1", broker, toy)
    del config["pipelines"]["line"]
    config["pipelines"]["eye"] = {"slot": "eye", "source": {"type": "rtsp", "url": url}}
    with Device(tmp_path, config) as device:
        device.wait("it is complained about", lambda status: status["health"]["problems"])
        shown = device.cli("status").stdout + device.cli("status", "--json").stdout + device.cli("check").stdout
        assert device.cli("diag", "-o", str(tmp_path / "out.tar.gz")).returncode == 0
    with tarfile.open(tmp_path / "out.tar.gz") as file:
        for entry in file.getmembers():
            shown += file.extractfile(entry).read().decode()  # type: ignore[union-attr]
    assert "planted-9d1c" not in shown + device.log()
    assert os.path.getsize(tmp_path / "out.tar.gz") < 1 << 20


JOURNALD = Path("/lib/systemd/systemd-journald")
# A journald of its own in a mount namespace of its own: this machine's is not touched.
IN_A_JOURNAL = """
set -eu
mount -t tmpfs none /run
mkdir -p /run/systemd/journal /run/log/journal
$1 & journald=$!
for _ in $(seq 200); do [ -S /run/systemd/journal/stdout ] && break; sleep 0.05; done
# As systemd itself does for a service: it tells which file the journal is.
systemd-cat -t other bash -c 'JOURNAL_STREAM=$(stat -Lc %d:%i /dev/stderr) exec "$0" run -c "$1"' "$2" "$3" & daemon=$!
for _ in $(seq 400); do
    journalctl -D /run/log/journal -q --no-pager -o cat 2>/dev/null | grep -q "edged dev1 runs" && break
    sleep 0.05
done
kill $daemon; wait $daemon || true
for _ in $(seq 200); do
    journalctl -D /run/log/journal -q --no-pager -o cat 2>/dev/null | grep -q "edged dev1 stopped" && break
    sleep 0.05
done
journalctl -D /run/log/journal -q --no-pager -o json --all
kill $journald
"""


def why_no_journal() -> str:
    """Why this machine cannot run a journald for the test, in its own words; empty when it can."""
    missing = [name for name in (str(JOURNALD), "journalctl", "systemd-cat", "unshare") if not shutil.which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: systemd, util-linux)"
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/run"], capture_output=True, text=True, check=False
    )
    return tried.stderr.strip()


@pytest.mark.skipif(bool(why_no_journal()), reason=why_no_journal())
def test_a_real_journal_gets_every_field(tmp_path: Path, toy: Path) -> None:
    config = tmp_path / "edged.toml"
    config.write_text(
        f'[device]\nid = "dev1"\nstate_dir = "{tmp_path / "state"}"\n[broker]\nport = {free_port()}\n'
        f'[log]\nlevel = "debug"\n[slots.eye]\nseed = "{toy}"\n'
    )
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", IN_A_JOURNAL, "-", str(JOURNALD), str(EDGED), str(config)],
        capture_output=True, text=True, timeout=90, check=False, env=clean_env(),
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    ours = {str(row["MESSAGE"]): row for row in rows if row.get("SYSLOG_IDENTIFIER") == "edged"}
    started = ours["edged dev1 runs: 1 slots, 0 pipelines"]
    expected = {"PRIORITY": "6", "LOGGER": "edged.daemon", "THREAD_NAME": "MainThread", "CODE_FUNC": "run"}
    assert {name: started.get(name) for name in expected} == expected, done.stderr
    assert "edged dev1 stopped" in ours
    assert any(row["PRIORITY"] == "4" and "no connection to" in text for text, row in ours.items())
