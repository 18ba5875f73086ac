"""What devices are told of people's words: a table of what the catalogue says and what was said here."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edged.link import TooLarge
from edged.wire import messages, topics
from edged.wire.messages import POINTS_MAX, Box, Provenance, SampleEntry, State, Text, Verdict
from trainer import fleet
from trainer.config import load_config
from trainer.corrections import TRIES_MAX, Corrections
from trainer.database import Database
from trainer.host import Host
from trainer.pool import Pool, Record, said_by
from trainer.releases import Registry

DATA = cv2.imencode(".png", np.full((8, 8, 3), 9, np.uint8))[1].tobytes()
CAT = {"label": "cat", "box": [0.0, 2.0, 5.0, 6.0]}
DOG = {"label": "dog", "box": [0.0, 2.0, 5.0, 6.0]}


class World:
    """A trainer whose messages the test reads; the clock is the test's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "trainer.toml").write_text(
            'name = "host"\nsite = "plant"\ndata_dir = "data"\ncommand_resend_s = 30\n'
        )
        config = load_config(folder / "trainer.toml")
        self.host = Host(config, folder / "trainer.toml", Database(config.database_at), Registry(config.releases))
        self.now, self.said, self.takes = 1000.0, list[tuple[str, Verdict]](), True
        monkeypatch.setattr(Host, "now", lambda _: self.now)
        self.pool = Pool(self.host.database, config.pool)
        self.corrections = Corrections(self.host, self.publish)
        with self.host.database.write() as connection:
            fleet.take_state(connection, "d1", State(**self.host.envelope(), state="online", device="d1"), 1.0)

    def publish(self, address: topics.Address, payload: bytes) -> bool:
        if self.takes:
            _, fields, message = messages.decode(address.topic, payload)
            assert isinstance(message, Verdict)
            self.said.append((fields["dev"], message))
        return self.takes

    def catalogue(self, **more: Any) -> None:
        self.now += 1
        fields: dict[str, Any] = {
            "sample": "s1", "pipeline": "p", "task": "detect", "model": "eye", "release": "eye@1.0", "state": "labelled",
            "sha256": sha256(DATA).hexdigest(), "bytes": len(DATA), "captured": 5.0, "label_confidence": 0.7,
            "label": [Box(label="cat", box=(-3, 2, 5, 6))], "provenance": Provenance(kind="model", who="big1"),
        }  # fmt: skip
        with self.host.database.write() as connection:
            fleet.take_sample(connection, "d1", SampleEntry(**self.host.envelope(), **(fields | more)))

    def record(self, **changes: Any) -> Record:
        made = Record(sha256(DATA).hexdigest(), "eye", "detect", (CAT,), "model", "big1", "teacher@1.0", 0.7, "d1", 5.0)
        return replace(made, **changes)

    def say(self, *records: Record) -> None:
        for record in records:
            self.now += 1
            self.pool.add([(record, DATA)], self.now, renew=True)

    def told(self) -> list[tuple[str, list[Any]]]:
        self.now += 60
        self.said.clear()
        self.corrections.tick()
        return [(each.status, [row.model_dump(exclude={"score"}) for row in each.label]) for _, each in self.said]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, monkeypatch)
    made.catalogue()
    made.say(made.record())
    return made


def test_nobody_is_told_what_a_model_said(world: World) -> None:
    assert world.told() == []


def test_a_correction_is_told_until_the_catalogue_has_it(world: World) -> None:
    world.say(said_by(world.record(), "ann", label=[DOG]))
    wanted = [("labelled", [{"label": "dog", "box": (0, 2, 5, 6)}])]
    assert world.told() == wanted
    (device, verdict) = world.said[0]
    assert (device, verdict.sample, verdict.provenance.kind, verdict.provenance.who) == ("d1", "s1", "person", "ann")
    world.now -= 40  # the next look, before it is due again
    assert world.told() == []
    assert world.told() == wanted
    world.catalogue(label=[Box(label="dog", box=(0, 2, 5, 6))], provenance=Provenance(kind="person", who="ann"))
    assert world.told() == []


def test_the_last_word_of_a_person_is_told(world: World) -> None:
    world.say(said_by(world.record(), "ann", label=[DOG]), said_by(world.record(), "bob", verdict="rejected"))
    assert world.told() == [("rejected", [])]
    world.say(said_by(world.record(), "ann", label=[DOG]))
    assert [status for status, _ in world.told()] == ["labelled"]


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ({}, 1),  # the device's box reaches over the border, the pool's ends there: it is the label that was rejected
        ({"state": "rejected"}, 0),
        ({"label": [Box(label="dog", box=(0, 2, 5, 6))]}, 0),  # by now it says something else
        ({"state": "claimed"}, 0),
        ({"state": "used"}, 0),
        ({"model": "ear"}, 0),
    ],
)
def test_a_rejection_is_told_while_the_label_is_the_samples(world: World, entry: dict[str, Any], count: int) -> None:
    world.say(said_by(world.record(), "ann", verdict="rejected"))
    world.catalogue(**entry)
    assert len(world.told()) == count


def test_an_accepted_label_becomes_that_persons(world: World) -> None:
    world.say(said_by(world.record(), "ann"))
    assert world.told() == [("labelled", [{"label": "cat", "box": (0, 2, 5, 6)}])]


def test_texts_and_classes_are_told_as_devices_have_them(world: World) -> None:
    world.catalogue(label=[Box(label="cat", box=(0, 0, 8, 8)), Box(label="dog", box=(0, 0, 8, 8), score=0.1)])
    world.say(said_by(world.record(task="classify", label=({"label": "cat"},)), "ann"))
    assert world.told() == [("labelled", [{"label": "cat", "box": (0, 0, 8, 8)}])]
    world.catalogue(label=[Text(text="No.")], task="generate")
    world.say(said_by(world.record(task="text", label=({"text": "Yes."},)), "ann"))
    assert world.told() == [("labelled", [{"text": "Yes."}])]


def test_outlines_are_told_to_those_who_have_them(world: World) -> None:
    part, fine = [0, 2, 5, 2, 5, 6, 0, 6], [value for n in range(300) for value in (n / 50, 2 + (n % 2) / 8)]
    cat = {"label": "cat", "box": [0, 2, 5, 6], "polygons": [part]}
    world.catalogue(label=[Box(label="cat", box=(0, 2, 5, 6), polygons=[[0, 2, 5, 2, 5, 5]])], task="segment")
    world.say(said_by(world.record(task="segment", label=(cat,)), "ann"))
    (told,) = world.told()
    assert told == ("labelled", [{"label": "cat", "box": (0, 2, 5, 6), "polygons": [part]}])
    ann = Provenance(kind="person", who="ann")
    world.catalogue(label=[Box(label="cat", box=(0, 2, 5, 6), polygons=[part])], task="segment", provenance=ann)
    assert world.told() == []
    drawn = {**cat, "polygons": [[*fine, 6, 6, 0, 6]]}
    world.say(said_by(world.record(task="segment", label=(drawn,)), "bob"))
    ((_, (row,)),) = world.told()
    assert 6 <= len(row["polygons"][0]) <= 2 * POINTS_MAX < len(drawn["polygons"][0])


def test_of_an_outline_that_is_nothing_when_it_is_simplified_the_box_is_told(world: World) -> None:
    there = [value for n in range(300) for value in (float(n % 6), 2.0)]
    thread = {"label": "cat", "box": [0, 2, 5, 6], "polygons": [there]}
    world.say(said_by(world.record(task="segment", label=(thread,)), "ann"))
    assert world.told() == [("labelled", [{"label": "cat", "box": (0, 2, 5, 6)}])]


def test_who_is_away_is_told_when_he_is_back_and_who_does_not_listen_not_for_ever(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.say(said_by(world.record(), "ann"))
    with world.host.database.write() as connection:
        birth = State(**world.host.envelope(), state="online", device="d1")
        fleet.take_state(connection, "d1", birth, 1.0)
        fleet.take_state(connection, "d1", birth.model_copy(update={"state": "offline"}), 1.0)
    assert world.told() == []
    with world.host.database.write() as connection:
        fleet.take_state(connection, "d1", birth, 1.0)
    world.takes = False  # there is no room for a message now
    assert world.told() == []
    world.takes = True
    assert sum(len(world.told()) for _ in range(TRIES_MAX + 3)) == TRIES_MAX
    assert "d1 does not take a person's word about its sample s1" in caplog.text


def test_one_that_is_too_large_holds_up_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.say(said_by(world.record(), "ann"))

    def refuse(*_: Any) -> bool:
        raise TooLarge("the verdict", 2_000_000, 1_000_000)

    monkeypatch.setattr(world.corrections, "_publish", refuse)
    assert world.told() == []
    monkeypatch.setattr(world.corrections, "_publish", world.publish)
    assert world.told() == [], "it is not tried again by this process"
