"""`trainer samples pull` with real processes: pixels come into the pool, devices keep their samples, whoever is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.support.device import Device, responder_tables, tables
from tests.support.models import STRANGE, make_release, put_pictures
from tests.system.broker import Broker
from tests.system.test_trainer_serve import SITE, Trainer, until
from trainer.core.access import Identity
from trainer.database import Database, commands, samples
from trainer.fleet import ENDED
from trainer.pool import Pool, Wanted

SAMPLES = 6
SIDE_PX = 250  # as plain pixels: three blocks a picture
SLOW_KIB_S = 512


def pull(trainer: Trainer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "trainer",
        "samples",
        "pull",
        *arguments,
        "--config",
        str(trainer.config),
        "--json",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def rows(trainer: Trainer) -> list[Any]:
    """What the trainer knows of the samples."""
    with Database(trainer.folder / "data" / "trainer.sqlite").read() as connection:
        return list(connection.execute(select(samples)).all())


def open_commands(trainer: Trainer) -> list[str]:
    """What devices have not confirmed yet."""
    with Database(trainer.folder / "data" / "trainer.sqlite").read() as connection:
        return list(connection.execute(select(commands.c.id).where(commands.c.state.notin_(ENDED))).scalars())


def free(trainer: Trainer) -> bool:
    """Whether every sample may train, as if nobody had asked for it."""
    return {(row.state, row.job, row.tried) for row in rows(trainer)} == {("labelled", None, 0)}


@contextmanager
def plant(
    folder: Path, broker: Broker, toy: Path, *, by_blocks: bool = False
) -> Iterator[tuple[Trainer, Device, dict[str, bytes]]]:
    """A trainer that serves, and a device with SAMPLES samples that a responder has labelled; `by_blocks`: nobody reaches
    the trainer but through the broker."""
    make_release(folder / "teacher", "teacher@3.0", 2)
    trainer = Trainer(folder / "trainer", broker)
    plan = tables(folder, "dev1", broker, toy)
    if by_blocks:
        only_by_broker(trainer, plan, broker)
    trainer.start()
    device = Device(folder, plan)
    try:
        with Device(folder, responder_tables(folder, "big1", broker, folder / "teacher")), device:
            names = [f"strange{number}.png" for number in range(SAMPLES)]
            put_pictures(device.inbox, names, STRANGE, SIDE_PX if by_blocks else 0)
            device.wait(f"{SAMPLES} labels", lambda s: s["samples"].get("labelled", 0) == SAMPLES)
            until("the trainer knows", lambda: len(rows(trainer)) == SAMPLES and free(trainer))
            taken = [path.read_bytes() for path in (device.inbox / "done").iterdir()]
            yield trainer, device, {sha256(data).hexdigest(): data for data in taken}
    except BaseException:
        print(trainer.log()[-8000:])
        raise
    finally:
        trainer.stop()


def only_by_broker(trainer: Trainer, plan: dict[str, Any], broker: Broker) -> None:
    """Both have the second connection, with a certificate of its own; the trainer's HTTPS leads nowhere."""
    certificate, key = broker.certificate("host~blk")
    text = trainer.config.read_text()
    text = text.replace("[broker]\n", f'[broker]\nbulk_certificate = "{certificate}"\nbulk_key = "{key}"\n')
    text = text.replace("[http]\nport = 0\n", '[http]\nport = 0\nurl = "https://127.0.0.1:1"\n')
    trainer.config.write_text(text + "[blocks]\nsamples = true\n")
    certificate, key = broker.certificate("dev1~blk")
    plan["broker"] |= {"bulk_certificate": certificate, "bulk_key": key}
    plan["host"] |= {"carrier": "mqtt", "bandwidth_kib_s": SLOW_KIB_S}


@pytest.mark.timeout(180)
def test_a_device_that_reaches_only_the_broker_hands_its_pixels_over_as_blocks(tmp_path: Path, toy: Path) -> None:
    """With certificates and rights, over a slow link, through the death of each end and of the broker."""
    clients = [
        Identity("host", SITE, roles=("trainer",)), Identity("dev1", SITE), Identity("big1", SITE, roles=("responder",)),
    ]  # fmt: skip
    with (
        Broker(tmp_path / "broker", tls=True, clients=clients) as broker,
        plant(tmp_path, broker, toy, by_blocks=True) as (trainer, device, pictures),
    ):
        pool = Pool(Database(trainer.folder / "data" / "trainer.sqlite"), trainer.folder / "data" / "pool")
        ids = [row["id"] for row in trainer.call("samples", "list", "--device", "dev1")]
        done = pull(trainer, *ids[:2])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["here"] == 2

        # The rest, while everybody dies once.
        started = json.loads(pull(trainer, "--device", "dev1", "--no-wait").stdout)
        assert started["samples"] == SAMPLES
        device.kill9()
        device.start()
        broker.kill9()
        broker.start()
        trainer.end(signal.SIGKILL)
        trainer.start()
        until("all are in the pool", lambda: len(pool.records()) == SAMPLES, 90)
        assert {record.sha256: pool.read(record.sha256) for record in pool.records()} == pictures
        until("all may train", lambda: free(trainer) and not open_commands(trainer))
        status = device.wait("they are labelled there", lambda s: s["samples"] == {"labelled": SAMPLES})
        assert status["counters"]["blocks_sent"] > 0
        assert "commands_failed" not in status["counters"]
        assert trainer.log().count("PUT /samples") == 0


@pytest.mark.timeout(180)
def test_pixels_come_into_the_pool_and_the_device_keeps_its_samples(tmp_path: Path, broker: Broker, toy: Path) -> None:
    """L1, L9: labelled samples come from the devices themselves, exactly those that were named."""
    with plant(tmp_path, broker, toy) as (trainer, device, pictures):
        pool = Pool(Database(trainer.folder / "data" / "trainer.sqlite"), trainer.folder / "data" / "pool")
        ids = [row["id"] for row in trainer.call("samples", "list", "--class", "owl", "--device", "dev1")]
        assert len(ids) == SAMPLES

        done = pull(trainer, *ids[:2], "unheard-of")
        assert done.returncode == 1
        assert "unheard-of: no device has told of it" in done.stderr
        told = json.loads(done.stdout)
        assert (told["state"], told["here"], set(told["missing"])) == ("done", 2, {"unheard-of"})
        assert len(pool.records()) == 2

        # A device that stays away: nothing is kept for nobody when it is back.
        device.kill9()
        done = pull(trainer, *ids[2:4], "--seconds", "1")
        assert done.returncode == 1
        assert json.loads(done.stdout)["missing"] == dict.fromkeys(ids[2:4], "it did not come in time")
        assert free(trainer)

        # The rest through power cuts of both: the device is gone when it is asked, the trainer while it waits.
        started = json.loads(pull(trainer, "--device", "dev1", "--no-wait").stdout)
        assert started["samples"] == SAMPLES
        assert {row.job for row in rows(trainer) if row.id not in ids[:2]} == {started["pull"]}
        trainer.end(signal.SIGKILL)
        trainer.start()
        device.start()
        until("all are in the pool", lambda: len(pool.records()) == SAMPLES)
        for record in pool.records(Wanted(device="dev1", label="owl")):
            assert pool.read(record.sha256) == pictures.pop(record.sha256)
            assert (record.kind, record.who, record.release) == ("model", "big1", "teacher@3.0")
        assert pictures == {}
        until("all may train", lambda: free(trainer) and not open_commands(trainer))
        device.wait("they are labelled there", lambda s: s["samples"] == {"labelled": SAMPLES})
        assert list((trainer.folder / "data" / "samples").iterdir()) == []

        # A person's word reaches the device: a rejected label is none there any more, an accepted one is that person's.
        wrong, right = pool.records()[:2]
        trainer.call("samples", "review", "--reject", wrong.id, "--accept", right.id, "--who", "ann")
        device.wait("the rejection", lambda s: s["samples"] == {"labelled": SAMPLES - 1, "rejected": 1})
        until("the catalogue has it", lambda: {row.sha256 for row in rows(trainer) if row.state == "rejected"})
        known = {row.sha256: row for row in rows(trainer)}
        assert known[wrong.sha256].state == "rejected"
        who = until("the acceptance", lambda: [r.provenance for r in rows(trainer) if r.provenance["kind"] == "person"])
        assert {each["who"] for each in who} == {"ann"}
