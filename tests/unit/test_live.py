"""What devices report becomes live accuracy and, when it changes, a detection: on a real database, from real messages."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert, select
from typer.testing import CliRunner

from edged.wire.manifest import Calibration
from edged.wire.messages import Box, Metrics, Provenance, SampleEntry, Text
from trainer import dialects, drift, fleet, live
from trainer.cli import app
from trainer.config import load_config
from trainer.core.drift import Look
from trainer.database import Database, detections, devices, events, identities, judged, looks, measured, put
from trainer.drift import Drift
from trainer.files import write_whole
from trainer.host import Host
from trainer.inventory import give_labels
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes

pytestmark = pytest.mark.usefixtures("each_database")

HOUR = 3600.0
T0 = 500_000 * HOUR
CONFIG = """
name = "host"
data_dir = "data"
[drift]
check_s = 36000
window_s = 36000
baseline_s = 36000
cycle_s = 36000
[models.digits]
checkpoint = "missing.pt"
labels = ["1", "2"]
holdout = "h"
holdout_clean = "hc"
calibration = "c"
"""
TEACHER = Provenance(kind="model", who="srv", release="digits-teacher@1.0")
ONE, TWO = Box(label="1", box=(1, 1, 9, 9)), Box(label="2", box=(1, 1, 9, 9))


@dataclass(slots=True)
class HandHost(Host):
    """A host whose clock is turned by hand."""

    at: float = T0

    def now(self) -> float:
        return self.at


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "trainer.toml").write_text(CONFIG)
        config = load_config(folder / "trainer.toml")
        self.host = HandHost(config, folder / "trainer.toml", Database(config.database_at), Registry(config.releases))
        self.rng, self.samples = np.random.default_rng(0), 0

    def window(self, device: str = "d1", at: float = 0.0, **fields: Any) -> Metrics:
        """A window that began `at` seconds after T0."""
        known = {"start": T0 + at, "end": T0 + at + 60, "pipeline": "eye", "release": "digits@1.0"}
        return Metrics(**self.host.envelope(), **(known | fields))

    def take(self, message: Metrics | SampleEntry, device: str = "d1") -> None:
        with self.host.database.write() as connection:
            if isinstance(message, Metrics):
                fleet.take_metrics(connection, device, message)
            else:
                fleet.take_sample(connection, device, message)

    def entry(self, sample: str = "", at: float = 0.0, **fields: Any) -> SampleEntry:
        self.samples += 1
        known = {
            "sample": sample or f"s{self.samples}", "pipeline": "eye", "task": "detect", "model": "digits",
            "release": "digits@1.0", "state": "labelled", "sha256": "a" * 64, "bytes": 3, "prediction": [ONE],
            "label": [ONE], "label_confidence": 0.9, "provenance": TEACHER, "decision": "audit",
            "inclusion_probability": 0.1, "captured": T0 + at,
        }  # fmt: skip
        return SampleEntry(**self.host.envelope(), **(known | fields))

    def regroup(self, keys: list[str]) -> None:
        drift = self.host.config.drift.model_copy(update={"group_by": keys})
        self.host.config = self.host.config.model_copy(update={"drift": drift})

    def enrol(self, name: str, group: str = "", profile: str = "", **given: str) -> None:
        with self.host.database.write() as connection:
            put(connection, devices, {"device": name}, {"profile": profile})
            put(connection, identities, {"name": name}, {"site": "s", "group": group, "roles": [], "enrolled": 0.0})
            assert isinstance(give_labels(connection, name, given), dict)

    def hours(self, count: int, start: int, rate: float, device: str = "d1", right: float = 0.9) -> None:
        """A stream: 400 items an hour, all escalations and a tenth of the rest answered."""
        rows: list[dict[str, Any]] = []
        with self.host.database.write() as connection:
            for hour in range(start, start + count):
                asked = int(self.rng.binomial(400, rate))
                audits = int(self.rng.binomial(400 - asked, 0.1))
                fields = {
                    "items": 400, "escalated": asked, "audited": audits, "accepted": 400 - asked - audits,
                    "confidence_histogram": [0, 0, asked, 0, 0, 0, 0, 0, 0, 400 - asked], "latency_histogram": [0, 0, 400],
                }  # fmt: skip
                fleet.take_metrics(connection, device, self.window(device, hour * HOUR, **fields))
                for decision, number, share, inclusion in (
                    ("audit", audits, right, 0.1),
                    ("escalate", asked, 0.5, 1.0),
                ):
                    rows += [
                        {"id": f"{device}-{hour}-{decision}-{index}", "device": device, "pipeline": "eye",
                         "release": "digits@1.0", "decision": decision, "inclusion": inclusion, "confidence": 0.9,
                         "right": bool(self.rng.random() < share), "captured": T0 + hour * HOUR + 1}
                        for index in range(number)
                    ]  # fmt: skip
            connection.execute(insert(judged), rows)
        self.host.at = T0 + (start + count) * HOUR

    def rows(self, table: Any) -> list[dict[str, Any]]:
        with self.host.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(select(table))]

    def found(self) -> list[tuple[str, str, str]]:
        return [(row["release"], row["scope"], row["rule"]) for row in self.rows(detections)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.host.database.close()


def test_windows_of_an_hour_are_added_up_and_each_counts_once(world: World) -> None:
    first = world.window(
        at=60, items=10, escalated=3, audited=1, suppressed={"messages": 2}, confidence_histogram=[0, 3, 7],
        latency_histogram=[0, 10], reasons={"unsure": 3, "confident": 6, "audit": 1},
        machine={"memory_mib_max": 90.0, "temperature_c_max": 55.0},
    )  # fmt: skip
    second = world.window(
        at=3540,
        items=5,
        reasons={"novel": 1, "confident": 4},
        errors=2,
        confidence_histogram=[5],
        latency_histogram=[1, 0, 4],
        machine={"memory_mib_max": 120.0},
    )
    for message in (first, second, first, world.window(at=3600, items=1), world.window(release="", errors=4)):
        world.take(message)
    rows = world.rows(measured)
    assert [(row["start"], row["items"]) for row in rows] == [(T0, 15), (T0 + HOUR, 1)]
    row = rows[0]
    assert (row["escalated"], row["audited"], row["errors"], row["suppressed"]) == (3, 1, 2, 2)
    assert (row["confidence"], row["latency"]) == ([5, 3, 7], [1, 10, 4])
    assert (row["memory_mib_max"], row["temperature_c_max"]) == (120.0, 55.0)
    assert row["model"] == "digits"
    assert row["reasons"] == {"unsure": 3, "novel": 1, "confident": 10, "audit": 1}


@pytest.mark.parametrize("version", [2, 3])
def test_a_database_of_a_schema_before_gets_the_new_tables(tmp_path: Path, version: int) -> None:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as connection:
        for table in ("measured", "judged", "looks", "detections"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        dialects.set_schema_version(connection, version)
    database.close()
    with Database(tmp_path / "t.sqlite").read() as connection:
        assert connection.execute(select(measured)).all() == []
        assert connection.execute(select(detections)).all() == []


CLASSIFIED = [Box(label="1", box=(0, 0, 9, 9), score=0.3), Box(label="2", box=(0, 0, 9, 9), score=0.7)]


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({}, True),
        ({"label": [TWO]}, False),
        ({"label": [ONE, TWO]}, False),
        ({"label": [Box(label="1", box=(1.5, 1, 9, 9.5))]}, True),
        ({"label": [], "prediction": []}, True),
        ({"label": []}, False),
        ({"state": "escalated", "provenance": None, "label": []}, None),
        ({"state": "unresolved"}, None),
        ({"state": "rejected"}, None),
        ({"state": "used"}, True),
        ({"provenance": Provenance(kind="model", who="d9", release="digits@1.1")}, None),  # itself, on another device
        ({"provenance": Provenance(kind="person", who="anna")}, True),
        ({"task": "classify", "prediction": CLASSIFIED, "label": [Box(label="2", box=(0, 0, 7, 7))]}, True),
        ({"task": "classify", "prediction": CLASSIFIED, "label": [Box(label="1", box=(0, 0, 9, 9))]}, False),
        ({"task": "generate", "prediction": [Text(text="A b")], "label": [Text(text=" a  B ")]}, True),
        ({"task": "generate", "prediction": [Text(text="A b")], "label": [Text(text="c")]}, False),
    ],
)
def test_whether_an_answer_was_right_is_what_its_label_says(
    world: World, fields: dict[str, Any], right: bool | None
) -> None:
    world.take(world.entry(**fields))
    (row,) = world.rows(judged)
    assert (row["right"], row["inclusion"], row["decision"]) == (right, 0.1, "audit")


@pytest.mark.parametrize("fields", [{"decision": "accept"}, {"decision": ""}, {"inclusion_probability": 0.0}])
def test_what_was_not_drawn_says_nothing_about_accuracy(world: World, fields: dict[str, Any]) -> None:
    world.take(world.entry(**fields))
    assert world.rows(judged) == []


def test_a_person_has_the_last_word(world: World) -> None:
    world.take(world.entry("s1", state="escalated", label=[], provenance=None))
    world.take(world.entry("s1"))
    world.take(world.entry("s1", label=[TWO], provenance=Provenance(kind="person", who="anna")))
    (row,) = world.rows(judged)
    assert (row["right"], row["said_by"]["who"]) == (False, "anna")


def test_live_accuracy_of_the_fleet_its_groups_and_its_devices(world: World) -> None:
    world.hours(5, 0, 0.1, "d1", right=0.95)
    world.hours(5, 0, 0.1, "d2", right=0.6)
    world.take(world.window(pipeline="responder-big", items=10_000), "d1")  # other devices' questions
    for name, group in (("d1", "north"), ("d2", "south"), ("d3", "south")):
        world.enrol(name, group)
    with world.host.database.read() as connection:
        grouped = live.groups(connection, "default", ["group"])
        told = live.report(connection, "digits@1.0", T0, grouped=grouped)
    parts = {name: part["accuracy"] for name, part in told["groups"].items()}
    assert parts == {"group=north": told["devices"]["d1"]["accuracy"], "group=south": told["devices"]["d2"]["accuracy"]}
    assert told["fleet"]["items"] == 4000
    for part, truth in (
        (parts["group=north"], 0.905),
        (parts["group=south"], 0.59),
        (told["fleet"]["accuracy"], 0.7475),
    ):
        assert part["low"] - 0.01 < truth < part["high"] + 0.01
        assert part["high"] - part["low"] < 0.15
    assert told["fleet"]["latency_ms_p95"] == pytest.approx(1.4, abs=0.1)
    json.dumps(told)


def test_unsure_labels_do_not_judge(world: World) -> None:
    world.take(world.window(items=100, escalated=0))
    world.take(world.entry(label_confidence=0.3, label=[TWO]))
    world.take(world.entry(label_confidence=0.9))
    with world.host.database.read() as connection:
        assert live.accuracy(connection, "digits@1.0", confidence_min=0.5).value == 1.0
        assert live.accuracy(connection, "digits@1.0").value == 0.5


def test_a_rise_of_escalations_is_found_announced_once_and_shown(world: World) -> None:
    """L5: checked, marked with its figures, and people are notified."""
    world.hours(10, 0, 0.1)
    watch = Drift(world.host)
    assert watch.check() == []  # the baseline
    world.hours(10, 10, 0.1)
    assert watch.check() == []
    world.hours(10, 20, 0.2)
    assert [row["rule"] for row in watch.check()] == ["escalation_rate"]
    assert watch.check() == []  # looked at again: the same
    assert world.found() == [("digits@1.0", "", "escalation_rate")]
    (event,) = world.rows(events)
    assert (event["kind"], event["published"]) == ("drift", False)
    assert event["text"].startswith("digits@1.0: escalation rate 0.195 against 0.095 in the baseline")
    assert event["detail"]["evidence"]["ratio"] > 1.5
    with world.host.database.read() as connection:
        told = drift.newest(connection, "digits", since=T0)
        assert told is not None and told["found_at"] == world.host.at
        assert drift.newest(connection, "digits", since=world.host.at) is None
        assert drift.newest(connection, "cats") is None
    world.hours(10, 30, 0.2)  # it lasts: said again, once a window
    assert [row["rule"] for row in watch.check()] == ["escalation_rate"]


def test_a_fall_of_accuracy_that_only_audits_see(world: World) -> None:
    """L5: by live accuracy."""
    world.hours(10, 0, 0.05, right=0.95)
    world.hours(10, 10, 0.05, right=0.8)
    found = {row["rule"]: row for row in Drift(world.host).check()}
    assert found.keys() <= {"accuracy", "accuracy_change"}
    row = found["accuracy"]
    assert row["evidence"]["drop"] > row["evidence"]["drop_max"] == 0.05
    assert row["evidence"]["window"]["audits"] > 200


def test_the_stream_is_compared_with_the_histogram_that_the_release_carries(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights")
    manifest = build_manifest(folder, "digits@1.0", kind="detect", engine="onnx_detect", roles={"model": "model.onnx"})
    carried = Calibration(confidence_histogram=[0, 0, 20, 0, 0, 0, 0, 0, 0, 180])
    write_whole(folder / MANIFEST, canonical_bytes(manifest.model_copy(update={"calibration": carried})))
    world.host.registry.register(folder)
    world.hours(20, 0, 0.1)
    assert Drift(world.host).check() == []
    world.hours(20, 20, 0.4)
    world.host.at += 1  # all of the last window lies after the baseline
    assert "confidence" in {row["rule"] for row in Drift(world.host).check()}


def test_a_look_is_taken_when_it_is_due_and_not_before(world: World) -> None:
    taken: list[float] = []

    def observe(*_arguments: Any) -> list[Look]:
        taken.append(world.host.at)
        return []

    def turn(watch: Drift) -> int:
        watch.tick()
        watch.stop()
        return len(taken)

    early = Drift(world.host, observe)
    assert turn(early) == 0  # nothing was ever measured
    world.hours(9, 0, 0.1)
    assert turn(early) == 0
    assert turn(Drift(world.host, observe)) == 0
    world.host.at = T0 + 10 * HOUR
    watch = Drift(world.host, observe)
    assert turn(watch) == 1
    assert turn(watch) == 1
    assert turn(Drift(world.host, observe)) == 1, "a restart remembers the last look"
    world.hours(10, 10, 0.1)
    assert turn(watch) == 2


def test_a_look_that_fails_is_tried_again_and_ends_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def observe(*_arguments: Any) -> list[Look]:
        tries.append(1)
        raise RuntimeError("planted")

    world.hours(10, 0, 0.1)
    watch = Drift(world.host, observe)
    for _ in range(3):
        watch.tick()
        watch.stop()
    assert (len(tries), "planted" in caplog.text) == (1, True)
    world.host.at += drift.RETRY_S
    watch.tick()
    watch.stop()
    assert len(tries) == 2
    assert world.rows(looks) == []


def test_what_is_old_is_forgotten(world: World) -> None:
    world.hours(1, 0, 0.1)
    Drift(world.host).check()
    with world.host.database.write() as connection:
        fleet.prune(connection, T0 + live.KEEP_S)
    assert len(world.rows(measured)) == 1
    with world.host.database.write() as connection:
        fleet.prune(connection, T0 + live.KEEP_S + 2 * HOUR)
    assert (world.rows(measured), world.rows(judged), world.rows(looks)) == ([], [], [])


def test_the_command_shows_figures_looks_and_what_was_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.hours(10, 0, 0.1)
    world.hours(10, 10, 0.2)
    Drift(world.host).check()
    monkeypatch.setattr(time, "time", lambda: world.host.at)
    config = ["--config", str(world.folder / "trainer.toml")]
    run = CliRunner().invoke(app, ["fleet", "drift", "--json", *config])
    assert run.exit_code == 0, run.output
    told = json.loads(run.output)
    assert [row["release"] for row in told["releases"]] == ["digits@1.0"]
    assert 0.5 < told["releases"][0]["fleet"]["accuracy"]["value"] < 0.95
    assert [row["rule"] for row in told["detections"]] == ["escalation_rate"]
    assert [each["rule"] for each in told["looks"][0]["found"]][:3] == ["escalation_rate", "accuracy", "confidence"]
    assert told["next_look"] == world.host.at + 36000
    world.enrol("d1", line="a")
    world.enrol("d2", line="b")
    by_line = CliRunner().invoke(app, ["fleet", "drift", "--json", "--group-by", "line", "-l", "line=a", *config])
    (row,) = json.loads(by_line.output)["releases"]
    assert (row["groups"].keys(), row["fleet"]["items"]) == ({"line=a"}, row["groups"]["line=a"]["items"])
    assert "line=a" in CliRunner().invoke(app, ["fleet", "drift", "--group-by", "line", *config]).output
    for asked in (["--group-by", "lime"], ["-l", "lime=a"]):
        wrong = CliRunner().invoke(app, ["fleet", "drift", *asked, *config])
        assert wrong.exit_code == 1 and "no device has a label 'lime'" in wrong.output
    plain = CliRunner().invoke(app, ["fleet", "drift", "--model", "digits", *config]).output
    assert "95 % interval" in plain and "digits@1.0: escalation rate" in plain
    assert "no such model" in CliRunner().invoke(app, ["fleet", "drift", "--model", "cats", *config]).output
