"""The store of a real `edged run` when its database is damaged, its quota is reached and its disk is full."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.wire import messages, topics
from edged.wire.messages import Event
from tests.support import disk
from tests.support.device import SITE, Bus, Device, tables, until
from tests.support.models import STRANGE, picture, put_pictures
from tests.system.broker import Broker
from tests.unit import test_store_integrity as damages

COUNT = 60  # enough that their rows fill many pages


def large(mark: int, size: int) -> bytes:
    """A picture that the model is unsure of, with `size` more bytes that no decoder looks at."""
    body = b"tEXt" + mark.to_bytes(4, "big").hex().encode() + b"\0" + b"x" * size
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    plain = picture(STRANGE, mark)
    end = plain.rindex(b"IEND") - 4
    return plain[:end] + chunk + plain[end:]


def put(device: Device, name: str, content: bytes) -> None:
    beside = device.inbox / f".{name}"
    beside.write_bytes(content)
    beside.rename(device.inbox / name)


def events(bus: Bus, kind: str) -> list[Event]:
    return [event for event in bus.of(Event, "dev1") if event.kind == kind]


def delete_the_log(database: Path) -> None:
    database.with_name("edged.db-wal").unlink()


def offline(folder: Path, broker: Broker, seed: Path | None, **more: Any) -> dict[str, Any]:
    return tables(folder, "dev1", broker, seed, pipelines={"line": {"results": "off"}}, **more)


@pytest.mark.parametrize("damage", [*damages.DAMAGE, delete_the_log], ids=lambda damage: damage.__name__)
def test_a_device_with_a_damaged_database_serves_on_and_takes_over_what_can_be_read(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, damage: Callable[[Path], None]
) -> None:
    device = Device(tmp_path, tables(tmp_path, "dev1", broker, toy))
    with device:
        put_pictures(device.inbox, [f"a{n:02}.png" for n in range(COUNT)], STRANGE)
        device.wait("all are kept", lambda s: s["samples"].get("escalated", 0) == COUNT)
        kept = {row["id"]: row["sha256"] for row in json.loads(device.cli("samples", "list", "--json").stdout)}
        device.kill9()
    database = device.state_dir / "edged.db"
    pixels = {path.name: path.read_bytes() for path in (device.state_dir / "blobs").glob("*/*")}
    if damage is not delete_the_log:  # else SQLite would read the whole pages in the log instead
        checkpoint(database)
    damage(database)

    with device:  # its model is loaded, and what was lost is told
        until("the event", lambda: events(bus, "store_broken"))
        (event,) = events(bus, "store_broken")
        assert event.detail["blobs"] in event.text
        aside = Path(event.detail["database"])
        lost = set(kept) - {row["id"] for row in json.loads(device.cli("samples", "list", "--json").stdout)}
        assert lost
        for sample_id in lost:
            sha256 = kept[sample_id]
            assert (Path(event.detail["blobs"]) / sha256[:2] / sha256).read_bytes() == pixels[sha256]
        assert str(aside) in device.log() or damage is delete_the_log
        assert device.wait("told", lambda s: s["storage"]["set_aside"])["storage"]["set_aside"] == [aside.name]
        put(device, "new.png", picture(STRANGE, 900))
        device.wait("it serves on", lambda s: s["samples"].get("escalated", 0) == COUNT + 1 - len(lost))

        running = device.cli("samples", "recover", "--json")
        assert running.returncode == 1
        assert "stop it first" in running.stderr
        device.stop()
    if damage is delete_the_log:
        return
    done = device.cli("samples", "recover", "--json")
    (report,) = json.loads(done.stdout)
    assert done.returncode == (1 if report["lost"] or report["damaged"] else 0)
    assert report["samples"] > 0
    twice = json.loads(device.cli("samples", "recover", "--json").stdout)
    assert (twice[0]["samples"], twice[0]["already"]) == (0, report["samples"])
    listed = {row["id"]: row for row in json.loads(device.cli("samples", "list", "--json").stdout)}
    back = {sample_id for sample_id in kept if sample_id in listed}
    assert len(back) == report["samples"]
    verified = device.cli("samples", "verify", "--json")
    assert json.loads(verified.stdout) == {
        "damage": "", "samples": len(listed), "blobs": len({row["sha256"] for row in listed.values()}), "bad_blobs": [],
    }  # fmt: skip
    assert verified.returncode == 0

    # The questions of what came back are asked again: a verdict labels it.
    with device:
        asked = sorted(sample_id for sample_id in back if listed[sample_id]["state"] == "escalated")
        for sample_id in asked[:1]:
            provenance = messages.Provenance(kind="person", who="ada")
            verdict = messages.Verdict(**bus.stamp(), sample=sample_id, status="labelled", confidence=1.0,
                                       provenance=provenance)  # fmt: skip
            bus.say(topics.VERDICT(site=SITE, dev="dev1"), verdict)
            device.wait("a label", lambda s: s["samples"].get("labelled") == 1)


def checkpoint(database: Path, statement: str = "SELECT 1") -> None:
    """Bring the log into the file, as SQLite does from time to time. After a write of another process no connection relies
    on what it has in its cache."""
    import sqlite3

    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute(statement)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def test_a_full_store_is_said_while_answers_go_on_and_room_is_said_too(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    config = tables(tmp_path, "dev1", broker, toy, store={"blob_bytes_max": 1 << 20})
    with Device(tmp_path, config) as device:
        for n in range(9):
            put(device, f"a{n}.png", large(n, 150_000))
        full = device.wait("it is full", lambda s: s["storage"]["full"])
        until("9 results", lambda: len(bus.of(messages.Result, "dev1")) == 9)
        status = device.wait("all are counted", lambda s: s["counters"].get("samples_not_kept", 0) == 3)
        assert status["samples"] == {"escalated": 6}
        assert "blob_bytes_max=1048576" in full["storage"]["reason"]
        assert status["storage"]["bytes"] <= 1 << 20
        assert "no samples are captured" in device.cli("status").stdout
        until("the event", lambda: events(bus, "storage_full"))
        assert "nothing is left that may be given up" in events(bus, "storage_full")[0].text
        for n in range(9, 12):  # said once, not for every frame
            put(device, f"a{n}.png", large(n, 150_000))
        until("12 results", lambda: len(bus.of(messages.Result, "dev1")) == 12)
        assert len(events(bus, "storage_full")) == 1
        assert device.counted("storage_full")["counters"]["storage_full"] == 1

        # Labelled by somebody, trained with: then they may go.
        ids = [row["id"] for row in json.loads(device.cli("samples", "list", "--json").stdout)]
        for sample_id in ids[:4]:
            verdict = messages.Verdict(
                **bus.stamp(), sample=sample_id, status="rejected", confidence=1.0,
                provenance=messages.Provenance(kind="person", who="ada"),
            )  # fmt: skip
            bus.say(topics.VERDICT(site=SITE, dev="dev1"), verdict)
        until("the event", lambda: events(bus, "storage_free"))
        put(device, "b.png", large(100, 150_000))
        status = device.wait("kept again", lambda s: s["samples"].get("escalated", 0) == 3)
        assert not status["storage"]["full"]
        assert status["counters"]["samples_evicted"] >= 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk.small_disk(tmp_path / "disk", "24m") as folder:
        yield folder


def test_a_disk_that_somebody_fills_stops_nothing_but_the_keeping(
    tmp_path: Path, small_disk: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    more = {"device": {"state_dir": small_disk / "dev1"}, "store": {"free_bytes_min": 0}}
    config = offline(tmp_path, broker, toy, **more)
    with Device(tmp_path, config) as device:
        put(device, "before.png", large(0, 100_000))
        device.wait("kept", lambda s: s["samples"].get("escalated") == 1)
        filler = disk.fill(small_disk)
        for n in range(1, 6):
            put(device, f"a{n}.png", large(n, 200_000))
        device.wait("answered all the same", lambda s: s["counters"].get("samples_not_kept", 0) == 5)
        device.wait("it says so", lambda s: s["storage"]["full"])
        assert device.wait("alive", lambda s: s["pipelines"]["line"]["alive"])
        assert not list(device.inbox.glob("a*.png"))
        filler.unlink()
        device.wait("there is room", lambda s: not s["storage"]["full"])
        put(device, "after.png", large(50, 200_000))
        device.wait("kept again", lambda s: s["samples"].get("escalated") == 2)
        until("both are said", lambda: events(bus, "storage_free"))
        assert len(events(bus, "storage_full")) == 1
        assert device.stop() == 0
        verified = device.cli("samples", "verify")
        assert verified.returncode == 0, verified.stdout


def test_the_operating_system_keeps_its_share_of_the_disk(
    tmp_path: Path, small_disk: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    more = {"device": {"state_dir": small_disk / "dev1"}, "store": {"free_bytes_min": 16 << 20}}
    config = offline(tmp_path, broker, toy, **more)
    with Device(tmp_path, config) as device:
        for n in range(40):
            put(device, f"a{n}.png", large(n, 230_000))
        device.wait("full", lambda s: s["storage"]["full"] and s["counters"].get("samples_not_kept", 0))
        device.wait("all answered", lambda s: not list(device.inbox.glob("a*.png")))
        storage = device.wait("said", lambda s: s["storage"]["full"])["storage"]
        assert storage["free"] > 13 << 20  # what was under way, and the log of the database
        assert "free_bytes_min=16777216" in storage["reason"]


def test_damage_that_comes_while_it_runs_is_told_and_healed_by_the_next_start(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    device = Device(tmp_path, tables(tmp_path, "dev1", broker, toy))
    with device:
        put_pictures(device.inbox, [f"a{n:02}.png" for n in range(COUNT)], STRANGE)
        device.wait("all are kept", lambda s: s["samples"].get("escalated", 0) == COUNT)
        checkpoint(device.state_dir / "edged.db", "INSERT INTO value VALUES ('somebody else', '1')")
        damages.garbage_pages(device.state_dir / "edged.db")
        put_pictures(device.inbox, [f"b{n:02}.png" for n in range(9)], STRANGE)
        status = until("a status that says so", lambda: told_damaged(device))
        assert "samples recover" in json.dumps(status["health"]["problems"])
        until("an entry in the log", lambda: "the store is damaged" in device.log())
        device.kill9()  # as the watchdog does

    with device:
        until("the event", lambda: events(bus, "store_broken"))
        device.wait("what waited is answered", lambda s: not list(device.inbox.glob("*.png")))
        assert device.stop() == 0
    report = json.loads(device.cli("samples", "recover", "--json").stdout)[0]
    assert report["samples"] > 0


def told_damaged(device: Device) -> dict[str, Any] | None:
    status = device.status()
    return status if status and status["storage"]["broken"] else None
