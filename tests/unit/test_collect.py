"""Pulls on a real database: what arrives is checked and kept, what does not is said, and samples are free afterwards."""

from __future__ import annotations

import errno
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sqlalchemy import select, update

from edged.wire.messages import Box, CommandState, Provenance, SampleEntry, Text
from trainer import fleet
from trainer.collect import Collect
from trainer.config import load_config
from trainer.coordinator import Coordinator
from trainer.database import Database, commands, pulls, samples
from trainer.files import write_whole
from trainer.host import Host
from trainer.pool import Pool, Wanted
from trainer.releases import Registry


def png(value: int) -> bytes:
    return cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))[1].tobytes()


class World:
    """A trainer without a broker; the test does what devices would."""

    def __init__(self, folder: Path) -> None:
        (folder / "trainer.toml").write_text('name = "host"\ndata_dir = "data"\n')
        config = load_config(folder / "trainer.toml")
        self.host = Host(config, folder / "trainer.toml", Database(config.database_at), Registry(config.releases))
        self.pool = Pool(self.host.database, config.pool)
        self.collect = Collect(self.host)

    def sample(self, number: int, data: bytes | None = None, **more: Any) -> str:
        content = data or png(number)
        fields: dict[str, Any] = {
            "sample": f"s{number}", "pipeline": "p", "task": "detect", "model": "eye", "release": "eye@1.0",
            "state": "labelled", "sha256": sha256(content).hexdigest(), "bytes": len(content),
            "label": [Box(label="cat", box=(1, 2, 5, 6), score=0.75)], "label_confidence": 0.75,
            "provenance": Provenance(kind="model", who="big1", release="teacher@3.0"), "captured": float(number),
        }  # fmt: skip
        with self.host.database.write() as connection:
            entry = SampleEntry(**self.host.envelope(), **(fields | more))
            fleet.take_sample(connection, f"d{number % 2}", entry)
        return f"s{number}"

    def upload(self, *given: bytes) -> None:
        for data in given:
            write_whole(self.host.config.samples / sha256(data).hexdigest(), data)

    def pull(self) -> dict[str, Any]:
        with self.host.database.read() as connection:
            return dict(connection.execute(select(pulls).order_by(pulls.c.created.desc())).first()._mapping)  # type: ignore[union-attr]

    def commands(self) -> list[tuple[str, str, list[str], str]]:
        with self.host.database.read() as connection:
            rows = connection.execute(select(commands).order_by(commands.c.created)).all()
        return [(row.device, row.body["action"], sorted(row.body["samples"]), row.state) for row in rows]

    def jobs(self) -> dict[str, tuple[str | None, int]]:
        with self.host.database.read() as connection:
            return {row.id: (row.job, row.tried) for row in connection.execute(select(samples))}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_arrives_is_kept_with_its_label_and_the_samples_are_free_again(world: World) -> None:
    ids = [world.sample(number) for number in range(3)]
    answer = world.collect.start(ids, 60)
    assert answer["refused"] == {}
    claimed = [("d0", "claim", ["s0", "s2"], "open"), ("d1", "claim", ["s1"], "open")]
    assert world.commands() == claimed
    world.collect.tick()
    assert world.pull()["here"] == []
    world.upload(png(0), png(1))
    world.collect.tick()
    world.upload(png(2))
    Collect(world.host).tick()  # another process, after a kill
    assert (world.pull()["state"], sorted(world.pull()["here"])) == ("done", ids)
    assert world.commands()[2:] == [("d0", "release", ["s0", "s2"], "open"), ("d1", "release", ["s1"], "open")]
    assert {state for *_, state in world.commands()[:2]} == {"expired"}
    assert world.jobs() == dict.fromkeys(ids, (None, 0))
    assert list(world.host.config.samples.iterdir()) == []
    record = world.pool.records(Wanted(device="d1"))[0]
    assert (record.model, record.task, record.who, record.release) == ("eye", "detect", "big1", "teacher@3.0")
    assert (record.confidence, record.captured, record.origin) == (0.75, 1.0, "device d1, sample s1")
    assert record.label == ({"label": "cat", "box": [1, 2, 5, 6], "score": 0.75},)
    assert world.pool.read(record.sha256) == png(1)


def test_old_pulls_are_forgotten_open_ones_are_not(world: World) -> None:
    world.collect.start([world.sample(0)], 60)
    world.collect.start([world.sample(1)], 60)
    world.upload(png(0))
    world.collect.tick()
    with world.host.database.write() as connection:
        fleet.prune(connection, world.host.now() + 30 * 86400)
        assert [row.state for row in connection.execute(select(pulls))] == ["open"]


def test_what_cannot_come_is_said_at_once_or_in_time(world: World) -> None:
    with_job, other = world.sample(0), world.sample(1, state="unresolved")
    with world.host.database.write() as connection:
        connection.execute(update(samples).where(samples.c.id == with_job).values(job="eye-1"))
    asked = world.sample(3)
    answer = world.collect.start([with_job, other, "nobody", asked], 0.0001)
    assert answer["refused"] == {
        "s0": "it is labelled, in eye-1", "s1": "it is unresolved", "nobody": "no device has told of it",
    }  # fmt: skip
    world.collect.tick()
    assert world.pull()["missing"]["s3"] == "it did not come in time"
    assert world.pull()["state"] == "done"
    assert world.jobs()["s0"] == ("eye-1", 0), "another's claim stays his"
    assert world.collect.start([], 60) == {"error": "0 samples: name between 1 and 5000 in one pull"}
    assert "error" in world.collect.start([asked], 0)


def test_what_a_device_refuses_is_not_waited_for(world: World) -> None:
    world.collect.start([world.sample(1), world.sample(3)], 60)
    with world.host.database.write() as connection:
        key = connection.execute(select(commands.c.id)).scalar_one()
        detail = {"unknown": ["s1"], "refused": {"s3": "its image is gone or damaged"}}
        state = CommandState(**world.host.envelope(), command=key, state="done", detail=detail)
        fleet.take_command_state(connection, "d1", key, state)
    world.collect.tick()
    said = {"s1": "the device does not have it", "s3": "its image is gone or damaged"}
    assert (world.pull()["state"], world.pull()["missing"]) == ("done", said)


def test_pixels_that_are_here_are_not_fetched_again(world: World) -> None:
    world.collect.start([world.sample(0)], 60)
    world.upload(png(0))
    world.collect.tick()
    world.sample(0, state="used", label=[Box(label="dog", box=(1, 2, 5, 6))], label_confidence=1.0)
    before = len(world.commands())
    assert world.collect.start(["s0"], 60)["refused"] == {}
    world.collect.tick()
    assert world.pull()["here"] == ["s0"]
    assert len(world.commands()) == before
    assert [record.label[0]["label"] for record in world.pool.records()] == ["cat", "dog"]


def test_damaged_pixels_are_asked_for_again(world: World) -> None:
    world.collect.start([world.sample(0)], 60)
    path = world.host.config.samples / sha256(png(0)).hexdigest()
    write_whole(path, png(7))  # as a disk might have it
    world.collect.tick()
    assert (world.pull()["state"], path.exists(), world.pool.records()) == ("open", False, [])
    assert world.commands() == [("d0", "claim", ["s0"], "open")] * 2, "who has handed it over is asked again"
    world.upload(png(0))
    world.collect.tick()
    assert world.pull()["state"] == "done"


def test_texts_and_empty_labels_come_and_what_is_no_picture_is_said(world: World) -> None:
    prompt = b'{"generation_prompt": "A seven?"}'
    ids = [world.sample(0, prompt, task="generate", label=[Text(text="Yes.")]), world.sample(1, label=[])]
    ids.append(world.sample(2, b"no picture"))
    world.collect.start(ids, 60)
    world.upload(prompt, png(1), b"no picture")
    world.collect.tick()
    assert {(record.task, len(record.label)) for record in world.pool.records()} == {("text", 1), ("detect", 0)}
    assert world.pull()["missing"] == {"s2": "10 bytes that do not decode as a picture"}


def test_a_full_disk_is_said_and_the_pull_goes_on_when_there_is_room(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.collect.start([world.sample(0)], 60)
    world.upload(png(0))

    def full(path: Path, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("trainer.pool.write_whole", full)
        world.collect.tick()
        world.collect.tick()
    assert [record.message.partition(": ")[2] for record in caplog.records if "No space" in record.message]
    assert sum("No space" in record.message for record in caplog.records) == 1
    world.collect.tick()
    assert (world.pull()["state"], len(world.pool.records())) == ("done", 1)


def test_an_upload_is_taken_while_a_pull_waits_for_it_and_not_after(world: World, tmp_path: Path) -> None:
    coordinator = Coordinator(world.host.config, tmp_path / "trainer.toml")
    digest = sha256(png(0)).hexdigest()
    world.sample(0)
    assert not coordinator._is_claimed(digest)
    world.collect.start(["s0"], 60)
    assert coordinator._is_claimed(digest)
    world.upload(png(0))
    world.collect.tick()
    assert not coordinator._is_claimed(digest)
    coordinator.host.database.close()
