"""Simulated devices with a real mosquitto and a real `trainer serve`: what the trainer sees is what real ones show."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from edged.link import Inbound, Link, LinkOptions
from edged.wire import topics
from tests.support.ports import free_port
from tests.system.broker import Broker
from tests.system.test_trainer_serve import SITE, Device, Trainer, rollout_of, until
from trainer.database import Database, devices, events, judged, seen, windows
from trainer.simulate.plan import Plan
from trainer.simulate.run import Seen, Simulation

DEVICES, ITEMS = 50, 20
WEIGHTS = bytes(range(256)) * 1200  # five blocks
# Chance decides nothing here: right answers, and margins that noise does not reach.
ROLLOUT = (
    "steps = [0.1, 1.0]\nwatch_s = 8\nitems_min = 20\naudits_planned = 20\naccuracy_loss_max = 0.5\ninstall_s_max = 150\n"
    "failed_grace_s = 1\nbaseline_s = 30\nescalation_margin = 0.5\nlatency_factor = 5.0"
)


def plan(broker: Broker, **changes: Any) -> Plan:
    """Fifty devices that close a window every four seconds."""
    fields: dict[str, Any] = {
        "host": broker.host, "port": broker.port, "site": SITE, "devices": DEVICES, "model": "digits",
        "classes": ["0", "1"], "release": "digits@1.0", "window_s": 4.0, "items": ITEMS, "escalate_share": 0.03,
        "accuracy": 1.0, "connects_s": 50.0, "prove_s": 0.1, "probation_s": 0.5, "seed": 3,
    }  # fmt: skip
    return Plan(**fields | changes)


def serving(folder: Path, broker: Broker, *releases: str) -> Trainer:
    trainer = Trainer(folder / "trainer", broker, ROLLOUT)
    text = trainer.config.read_text().replace("[models.digits]\n", "[models.digits]\nthreshold = 100000\n")
    trainer.config.write_text(text)
    for release in releases:
        trainer.register(release, release.encode() + WEIGHTS)
    trainer.start()
    until("its database", (folder / "trainer" / "data" / "trainer.sqlite").is_file)
    return trainer


def kept(trainer: Trainer, query: Any) -> list[Any]:
    """Rows of the trainer's database."""
    database = Database(trainer.folder / "data" / "trainer.sqlite")
    try:
        with database.read() as connection:
            return list(connection.execute(query))
    finally:
        database.close()


def seen_to(fleet: Simulation, what: str, holds: Callable[[Seen], bool]) -> Seen:
    def look() -> Seen | None:
        now = fleet.seen()
        return now if holds(now) else None

    return until(what, look, 90.0)


def lost(trainer: Trainer, trail: Path) -> set[str]:
    """Reports that the broker answered for and the trainer has not."""
    told = {line for file in trail.glob("*.ids") for line in file.read_text().split()}
    assert len(told) > DEVICES * 4
    return told - {row.id for row in kept(trainer, select(seen.c.id))}


@pytest.mark.alone  # fifty devices and their trainer take both cores of a small machine, and a rollout has its limits
@pytest.mark.timeout(300)
def test_fifty_devices_are_a_fleet_that_releases_go_through(tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        trainer = serving(tmp_path, broker, "digits@1.0", "digits@1.1", "digits@1.2")
        try:
            _a_good_release_reaches_all(broker, trainer, tmp_path / "trail")
            _one_that_devices_revert_stops_at_the_canaries(broker, trainer)
        except BaseException:
            print(trainer.log()[-6000:])
            raise
        finally:
            trainer.stop()


def _a_good_release_reaches_all(broker: Broker, trainer: Trainer, trail: Path) -> None:
    with Simulation(plan(broker, trail=trail)) as fleet:
        seen_to(
            fleet, "all of them, and some answers", lambda now: now.online == DEVICES and now.counts["verdicts"] > 20
        )
        known = until("the inventory", lambda: (f := trainer.call("fleet", "status")) and len(f) == DEVICES and f)
        assert [row["device"] for row in known] == [f"sim-{number:05d}" for number in range(1, DEVICES + 1)]
        assert all(row["online"] and row["models"]["digits"]["active"] == "digits@1.0" for row in known)
        started = trainer.call("rollout", "start", "digits@1.1", "--unjudged", "simulated")
        assert len(started["canary"]) == DEVICES // 10
        done = until("the rollout is over", lambda: (r := rollout_of(trainer))["status"] == "done" and r, 150.0)
        assert done["progress"] == "50/50 nodes", done
        now = fleet.seen()
        assert now.updates == {"committed": DEVICES}
        # Every device asked for, received and verified every block of it.
        assert (now.counts["fetched"], now.counts["installed"]) == (DEVICES, DEVICES)
        assert now.counts["block_bytes"] >= DEVICES * (len(WEIGHTS) + len("digits@1.1"))
        assert not now.counts["blocks_wrong"]
    until("all said that they go", lambda: not kept(trainer, select(devices).where(devices.c.online.is_(True))))
    until("nothing is lost", lambda: not lost(trainer, trail))
    of = (windows.c.device, windows.c.pipeline, func.count().label("n"), func.sum(windows.c["items"]).label("answers"))
    rows = kept(trainer, select(*of).group_by(windows.c.device, windows.c.pipeline))
    assert len(rows) == DEVICES
    assert {row.answers / row.n for row in rows} == {ITEMS}
    audits = kept(trainer, select(judged).where(judged.c.decision == "audit", judged.c.right.is_not(None)))
    assert len(audits) > 20
    assert all(row.right for row in audits)  # as this plan's devices are, and whoever answers them


def _one_that_devices_revert_stops_at_the_canaries(broker: Broker, trainer: Trainer) -> None:
    with Simulation(plan(broker, release="digits@1.1", revert_share=0.9)) as fleet:
        seen_to(fleet, "all are back", lambda now: now.online == DEVICES)
        until("the inventory", lambda: sum(row["online"] for row in trainer.call("fleet", "status")) == DEVICES)
        trainer.call("rollout", "start", "digits@1.2", "--unjudged", "simulated")
        ended = until("the rollout is stopped", lambda: (r := rollout_of(trainer))["status"] == "aborted" and r, 90.0)
        assert "unhealthy on this device" in ended["reason"] or "revert" in ended["reason"], ended
        now = fleet.seen()
        assert now.counts["fetched"] == DEVICES // 10  # nobody but the canaries saw it
        assert now.counts["reverted"] >= 1
    assert {row["models"]["digits"]["active"] for row in trainer.call("fleet", "status")} == {"digits@1.1"}
    told = kept(trainer, select(events).where(events.c.kind == "reverted"))
    assert len(told) == now.counts["reverted"]


@pytest.mark.timeout(120)
def test_each_lost_connection_of_a_boot_is_seen_by_the_trainer(tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        trainer = serving(tmp_path, broker)
        try:
            # A Will is written once for a boot: the trainer must believe the same one again.
            with Simulation(
                plan(broker, devices=2, lost_per_hour=900.0, lost_s=2.0, will_delay_s=0, end="will")
            ) as fleet:
                states: list[bool] = []

                def twice() -> bool:
                    for row in kept(trainer, select(devices.c.online).where(devices.c.device == "sim-00001")):
                        if not states or states[-1] != row.online:
                            states.append(row.online)
                    return states[:5] == [True, False, True, False, True]

                until("it was away twice, and is back", twice, 90.0)
                assert fleet.seen().counts["lost_connections"] >= 2
            until("the last will of both", lambda: not kept(trainer, select(devices).where(devices.c.online.is_(True))))
        finally:
            trainer.stop()


def command(folder: Path, broker: Broker, *arguments: str) -> list[str]:
    config = folder / "own.toml"
    config.write_text(f'site = "{SITE}"\ndata_dir = "own"\n[broker]\nport = {broker.port}\n')
    base = ["--model", "digits", "--classes", "0,1", "--json", "--config", str(config)]
    return [sys.executable, "-m", "trainer", "simulate", *base, *arguments]


def retained(broker: Broker, topic: str) -> set[str]:
    """The topics of what the broker keeps."""
    link = Link(LinkOptions(broker.host, broker.port, "look"), [topic])
    link.start()
    found, deadline = set(), time.monotonic() + 1.5
    while time.monotonic() < deadline:
        try:
            event = link.inbox.get(timeout=0.1)
        except queue.Empty:
            continue
        if isinstance(event, Inbound):
            link.acknowledge(event)
            found.add(event.topic)
    link.stop()
    return found


@pytest.mark.timeout(120)
def test_it_does_not_mix_with_real_devices_and_leaves_in_order(tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        real = Device(broker, "cam1")
        done = subprocess.run(command(tmp_path, broker), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "cam1" in done.stderr
        assert "--site sim" in done.stderr

        options = ("--site", "sim", "--devices", "8", "--processes", "2", "--rate", "8", "--end", "clear")
        process = subprocess.Popen(
            command(tmp_path, broker, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        until("they are there", lambda: len(retained(broker, topics.STATE.filter(site="sim"))) == 8)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        told = json.loads(out)
        assert told["counts"]["births"] == 16, told  # each came, and said that it goes
        assert told["counts"]["windows"] >= 8
        assert told["online"] == 0
        assert retained(broker, "edged/v1/sim/#") == set()
        assert len(retained(broker, topics.STATE.filter(site=SITE))) == 1  # the real one's is not touched
        real.stop()


def test_too_few_open_files_are_named_with_the_fix(tmp_path: Path) -> None:
    text = f'ulimit -n 256; exec "$0" -m trainer simulate --broker 127.0.0.1:{free_port()} --devices 500 --processes 1'
    text += f" --model digits --classes 0,1 --among-real-devices --config {tmp_path}/own.toml"
    (tmp_path / "own.toml").write_text('data_dir = "own"\n')
    done = subprocess.run(["bash", "-c", text, sys.executable], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ulimit -n" in done.stderr
    assert "--processes 6" in done.stderr
