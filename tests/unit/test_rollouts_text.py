"""Adapters reach the fleet as whole models do, on a real database and registry: the canaries' checked texts decide, and who
goes back gets the adapter that he had, or none (L11-L14)."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert, select

from edged.wire.manifest import ReleaseRef, TrainingManifest
from edged.wire.messages import Event, Metrics, ModelReport, Provenance, Reported, SampleEntry, State, Text
from trainer import fleet
from trainer.config import load_config
from trainer.core.checked import Part, pooled
from trainer.database import Database, desired, jobs, judged, rollouts
from trainer.files import write_whole
from trainer.host import Host
from trainer.jobs import Jobs
from trainer.kinds.language import current_adapter
from trainer.observed import Period, tallies
from trainer.orders import Orders
from trainer.presence import touch
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes
from trainer.rollouts import Rollouts, progress

CONFIG = """
name = "host"
data_dir = "data"
[rollout]
steps = [0.4, 1.0]
watch_s = 3600
baseline_s = 43200
audits_planned = 100
{rollout}
[models.clerk]
kind = "llm"
checkpoint = "checkpoint"
threshold = 1000000
"""
BASE, FIRST, SECOND = "clerk@1.0", "clerk-lora@1.0", "clerk-lora@1.1"
WINDOW_S, ITEMS = 900.0, 40
HOUR = 3600.0


class World:
    """A trainer whose clock stands still until `live` lets time pass, and devices with a language model.

    `right`: how often each release is right; `unsure`: the share of its answers that it escalates.
    """

    def __init__(self, folder: Path, devices: int = 5, rollout: str = "", heard: bool = True) -> None:
        (folder / "trainer.toml").write_text(CONFIG.format(rollout=rollout))
        settings = load_config(folder / "trainer.toml")
        self.clock, self.dice, self.heard = 1e6, np.random.default_rng(3), heard

        class Clocked(Host):
            def now(_self) -> float:  # noqa: N805
                return self.clock

        registry = Registry(settings.releases)
        database = Database(settings.database_at)
        # The id of a rollout decides who its canaries are: the same every time.
        self.host = Clocked(settings, folder / "trainer.toml", database, registry, entropy=Random(3).randbytes)
        self.names = [f"d{number:02}" for number in range(devices)]
        self.active: dict[str, str | None] = dict.fromkeys(self.names)
        self.update = dict.fromkeys(self.names, "idle")
        self.right = {BASE: 0.9, FIRST: 0.9, SECOND: 0.9}
        self.unsure = {BASE: 1.0, FIRST: 1.0, SECOND: 1.0}
        self.number = 0
        base = self.release(folder, BASE, None)
        for adapter in (FIRST, SECOND):
            self.release(folder, adapter, base)
        self.rollouts, self.jobs = Rollouts(self.host), Jobs(self.host)
        self.orders = Orders(self.host, self.jobs, self.rollouts)
        for name in self.names:
            with self.host.database.write() as connection:
                said = State(**self.host.envelope(), state="online", device=name)
                fleet.take_state(connection, name, said.model_copy(update={"boot": name}), self.clock)
            self.report(name)

    def release(self, folder: Path, release: str, base: ReleaseRef | None) -> ReleaseRef:
        source, role = folder / release, "model" if base is None else "adapter"
        source.mkdir()
        (source / "it.gguf").write_bytes(release.encode())
        kind: Any = "llm" if base is None else "lora"
        manifest = build_manifest(source, release, kind=kind, engine="llama", roles={role: "it.gguf"}, base=base)
        write_whole(source / MANIFEST, canonical_bytes(manifest))
        return self.host.registry.register(source)

    def report(self, name: str, base: str = BASE) -> None:
        with self.host.database.write() as connection:
            told = fleet.desired_of(connection, name) or {"rev": 0}
            model = ModelReport(active=base, adapter=self.active[name], update=self.update[name])
            said = Reported(**self.host.envelope(), desired_rev=told["rev"], models={"clerk": model})
            fleet.take_reported(connection, name, said, self.clock)

    def told(self) -> dict[str, tuple[str | None, str | None]]:
        """Device -> (model, adapter) that it shall run, of those who were ever told anything."""
        with self.host.database.read() as connection:
            rows = connection.execute(select(desired)).all()
        return {row.device: tuple(part.get("clerk", {}).get("release") for part in (row.models, row.adapters))
                for row in rows}  # type: ignore[misc]  # fmt: skip

    def live(self, seconds: float) -> None:
        """Time passes: windows close, questions are answered, devices do as they are told, the trainer ticks."""
        end = self.clock + seconds
        while self.clock < end:
            self.clock += WINDOW_S
            with self.host.database.write() as connection:
                for name in self.names:
                    self._window(connection, name)
                touch(connection, self.names, self.clock, self.host.config.silent_s_max)
            told = self.told()
            for name in self.names:
                if name in told and told[name][1] != self.active[name]:
                    self.active[name] = told[name][1]
                    self.update[name] = "committed" if self.active[name] else "idle"
                    self.report(name)
            self.rollouts.tick()

    def _window(self, connection: Any, name: str) -> None:
        release = self.active[name] or BASE
        escalated = int(self.dice.binomial(ITEMS, self.unsure[release]))
        audited = int(self.dice.binomial(ITEMS - escalated, 0.5))
        counts = {"items": ITEMS, "escalated": escalated, "audited": audited, "accepted": ITEMS - escalated - audited}
        window = Metrics(**self.host.envelope(), start=self.clock - WINDOW_S, end=self.clock, pipeline="chat",
                         release=release, latency_ms_p95=50.0, **counts)  # fmt: skip
        fleet.take_metrics(connection, name, window)
        self._checked(connection, name, self.clock, release, {"escalate": escalated, "audit": audited})

    def _checked(self, connection: Any, name: str, at: float, release: str, counts: dict[str, int]) -> None:
        """Answers with a verdict, as the catalogue's entries leave them."""
        rows = []
        for decision in (each for each, count in counts.items() for _ in range(count if self.heard else 0)):
            self.number += 1
            inclusion, right = 1.0 if decision == "escalate" else 0.5, bool(self.dice.random() < self.right[release])
            rows.append(
                {
                    "id": f"s{self.number}",
                    "device": name,
                    "pipeline": "chat",
                    "release": release,
                    "captured": at,
                    "decision": decision,
                    "inclusion": inclusion,
                    "right": right,
                    "confidence": 0.9,
                    "said_by": None,
                }
            )
        if rows:
            connection.execute(insert(judged), rows)

    def past(self) -> None:
        """Half a day with what runs now, as its messages would have left it; 200 answers of each device were checked."""
        start = self.clock - 12 * HOUR
        with self.host.database.write() as connection:
            for name in self.names:
                release = self.active[name] or BASE
                window = Metrics(**self.host.envelope(), start=start, end=self.clock, pipeline="chat", release=release,
                                 items=200, escalated=200, latency_ms_p95=50.0)  # fmt: skip
                fleet.take_metrics(connection, name, window)
                self._checked(connection, name, start, release, {"escalate": 200})

    def order(self, kind: str, **body: str) -> dict[str, Any]:
        return self.orders._carry_out(kind, body)

    def begin(self, release: str) -> list[str]:
        answer = self.order("rollout_start", release=release, unjudged="a test")
        assert "error" not in answer, answer
        self.rollouts.tick()
        canary: list[str] = answer["canary"]
        return canary

    def shown(self) -> dict[str, Any]:
        with self.host.database.read() as connection:
            row = connection.execute(select(rollouts).order_by(rollouts.c.created.desc())).first()
            assert row is not None
            return progress(connection, row)


def test_l11_a_good_adapter_goes_to_the_canaries_and_then_to_all(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.past()
    assert world.told() == {}
    canary = world.begin(FIRST)
    assert len(canary) == 2
    # The base is named with it: else a device would not take the adapter off again.
    assert world.told() == dict.fromkeys(canary, (BASE, FIRST))
    world.live(2 * HOUR)
    assert (world.shown()["status"], world.shown()["canary_result"]) == ("done", "passed"), world.shown()
    assert world.shown()["progress"] == "5/5 nodes"
    assert world.shown()["part"] == "adapters"
    assert world.told() == dict.fromkeys(world.names, (BASE, FIRST))


@pytest.mark.parametrize("before", [None, FIRST])
def test_l13_a_worse_adapter_goes_back_to_the_one_before_or_to_none(tmp_path: Path, before: str | None) -> None:
    world = World(tmp_path)
    for name in world.names:
        world.active[name] = before
        world.report(name)
    world.past()
    world.right[SECOND] = 0.6
    canary = world.begin(SECOND)
    ever: set[str] = set()
    for _ in range(8):
        world.live(WINDOW_S)
        ever |= {name for name, (_, adapter) in world.told().items() if adapter == SECOND}
    shown = world.shown()
    assert (shown["status"], shown["progress"]) == ("aborted", "0/5 nodes"), shown
    assert "audited agreement 0." in shown["reason"]
    assert ever == set(canary), "nobody but the canaries was ever told to run it"
    assert {name: adapter for name, (_, adapter) in world.told().items()} == dict.fromkeys(world.told(), before)
    assert set(world.active.values()) == {before}


def test_l12_without_checked_answers_an_adapter_is_held_and_never_passes(tmp_path: Path) -> None:
    world = World(tmp_path, heard=False, rollout="extend_max = 1")
    world.past()
    canary = world.begin(FIRST)
    world.live(4 * HOUR)
    assert world.shown()["status"] == "held"
    assert "0 audited answers of canaries, 100 are needed" in world.shown()["reason"]
    assert {name for name, (_, adapter) in world.told().items() if adapter} == set(canary)
    assert world.order("rollout_abort", rollout="clerk")["going_back"] == canary
    world.rollouts.tick()
    assert world.shown()["status"] == "aborting", "nobody has taken it off yet"
    world.live(WINDOW_S)
    assert world.shown()["status"] == "aborted"
    assert set(world.active.values()) == {None}


def test_l12_answers_that_are_hardly_ever_the_teachers_words_show_no_loss_and_pass_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, rollout="extend_max = 0")
    world.right = dict.fromkeys(world.right, 0.03)
    world.past()
    world.begin(FIRST)
    world.live(3 * HOUR)
    assert world.shown()["status"] == "held"


def test_a_pause_keeps_an_adapter_on_the_canaries_and_a_promotion_brings_it_to_all(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.past()
    canary = world.begin(FIRST)
    world.live(2 * WINDOW_S)
    assert world.order("rollout_pause", rollout="clerk")["phase"] == "paused"
    world.live(3 * HOUR)
    assert {name for name, (_, adapter) in world.told().items() if adapter} == set(canary)
    assert world.order("rollout_resume", rollout="clerk")["phase"] == "watching"
    assert world.order("rollout_promote", rollout=FIRST)["phase"] == "rolling"
    world.live(WINDOW_S)
    assert set(world.active.values()) == {FIRST}


def test_l13_a_canary_that_cannot_install_an_adapter_ends_the_rollout(tmp_path: Path) -> None:
    world = World(tmp_path)
    (canary, *_) = world.begin(FIRST)
    world.update[canary] = "reverted"
    world.report(canary)
    world.rollouts.tick()
    assert world.shown()["status"] == "aborting"
    assert world.told()[canary] == (BASE, None)
    world.update[canary] = "idle"
    for name in world.shown()["canary"]:
        world.report(name)
    world.rollouts.tick()
    assert world.shown()["status"] == "aborted"


def test_only_devices_that_run_its_base_are_an_adapters_fleet(tmp_path: Path) -> None:
    world = World(tmp_path, devices=3)
    world.report("d00", base="clerk@0.9")
    answer = world.order("rollout_start", release=FIRST, unjudged="a test")
    assert sorted(answer["devices"]) == ["d01", "d02"]
    assert "is pending" in world.order("rollout_start", release=SECOND, unjudged="a test")["error"]
    world.order("rollout_abort", rollout="clerk")
    for name in world.names:
        world.report(name, base="clerk@0.9")
    refused = world.order("rollout_start", release=SECOND, unjudged="a test")
    assert refused["error"] == (
        f"{SECOND} is an adapter for clerk@1.0, and no device runs that in its slot 'clerk', but clerk@0.9"
    )


def test_a_device_that_was_told_of_no_model_is_told_its_base_with_the_adapter(tmp_path: Path) -> None:
    world = World(tmp_path, devices=1)
    with world.host.database.write() as connection:
        fleet.desire(connection, "d00", policy={"chat": {"audit_share": 0.5}})
    assert world.told() == {"d00": (None, None)}
    world.begin(FIRST)
    assert world.told() == {"d00": (BASE, FIRST)}, "else it would not take the adapter off again"


def test_a_device_whose_adapter_is_not_registered_has_no_way_back(tmp_path: Path) -> None:
    world = World(tmp_path, devices=2)
    world.active["d01"] = "clerk-own@3.0"
    world.report("d01")
    refused = world.order("rollout_start", release=FIRST, unjudged="a test")
    assert "d01 runs clerk-own@3.0, which is not registered" in refused["error"]


def test_a_text_is_right_when_it_is_the_teachers_word_for_word_and_its_own_model_is_no_teacher(tmp_path: Path) -> None:
    world = World(tmp_path, devices=1)
    said = {"so": "large@1.0", "not so": "large@1.0", "so it is": "clerk-lora@0.9"}
    with world.host.database.write() as connection:
        for number, (text, by) in enumerate(said.items()):
            entry = SampleEntry(
                **world.host.envelope(), sample=f"s{number}", pipeline="chat", task="generate", model="clerk", release=FIRST,
                state="labelled", sha256="0" * 64, bytes=1, decision="escalate", prediction=[Text(text="So ")],
                label=[Text(text=text)], label_confidence=0.9, captured=5.0,
                provenance=Provenance(kind="model", who="big", release=by),
            )  # fmt: skip
            fleet.take_sample(connection, "d00", entry)
        rows = connection.execute(select(judged).order_by(judged.c.id)).all()
    assert [row.right for row in rows] == [True, False, None]


@pytest.mark.usefixtures("each_database")
def test_the_past_of_a_slot_counts_whatever_adapter_answered_in_it(tmp_path: Path) -> None:
    world = World(tmp_path, devices=1)
    for release, items in ((BASE, 10), (FIRST, 20), ("other@1.0", 40)):
        window = Metrics(**world.host.envelope(), start=5, end=3605, pipeline="chat", release=release, items=items)
        ended = {"kind": "engine_ended", "text": "", "detail": {"release": BASE}}
        with world.host.database.write() as connection:
            fleet.take_metrics(connection, "d00", window)
            fleet.take_event(connection, "d00", Event(**world.host.envelope() | {"ts": 7.0}, **ended))
    with world.host.database.read() as connection:
        both = tallies(connection, ["d00"], Period("clerk", 0, others=("clerk", "clerk-lora")))["d00"]
        adapted = tallies(connection, ["d00"], Period("clerk", 0, release=FIRST, others=("clerk", "clerk-lora")))["d00"]
    assert both.items == 30
    # The engine that ended ran the base's process, and the adapter in it.
    assert (adapted.items, adapted.crashes) == (20, 3)


@pytest.mark.parametrize(
    ("accepted", "escalated", "found"),
    [
        # 90 accepted of which 10 were checked, all right; 10 escalated, all checked, none right: nine of ten are right.
        (Part(90, 10, 20.0, 20.0, 40.0), Part(10, 10, 0.0, 10.0, 10.0), (20, 18.0, 1 / (0.81 / 10 + 0.01 / 10))),
        # Everything is asked about: as in a count.
        (Part(0), Part(50, 50, 45.0, 50.0, 50.0), (50, 45.0, 50.0)),
        # Few enough escalations that nobody answered are left out.
        (Part(97, 10, 9.0, 10.0, 10.0), Part(3), (10, 9.0, 10.0)),
        # Of the accepted ones nobody knows anything.
        (Part(90), Part(10, 10, 10.0, 10.0, 10.0), None),
        (Part(0), Part(0), None),
    ],
)
def test_accepted_and_escalated_texts_weigh_as_many_as_there_were(
    accepted: Part, escalated: Part, found: tuple[int, float, float] | None
) -> None:
    assert pooled([accepted, escalated]) == (None if found is None else pytest.approx(found))


@pytest.mark.parametrize(("adapted", "found"), [(3, FIRST), (2, ""), (0, "")])
def test_a_job_is_judged_against_the_adapter_that_most_devices_run(tmp_path: Path, adapted: int, found: str) -> None:
    world = World(tmp_path)
    for name in world.names[:adapted]:
        world.active[name] = FIRST
        world.report(name)
    with world.host.database.write() as connection:
        entry = SampleEntry(
            **world.host.envelope(), sample="s1", pipeline="chat", task="generate", model="clerk", release=BASE,
            state="labelled", sha256="0" * 64, bytes=1, prediction=[Text(text="so")], label=[Text(text="so")],
            label_confidence=0.9, captured=5.0, provenance=Provenance(kind="model", who="big", release="large@1.0"),
        )  # fmt: skip
        fleet.take_sample(connection, "d00", entry)
    answer = world.jobs.train_now("clerk")
    # 1.1 is the newest that is registered, but nobody runs it: a canary may have been taken back from it.
    assert answer["target_model"] == "clerk-lora@1.2", answer
    with world.host.database.read() as connection:
        manifest = TrainingManifest.model_validate(connection.execute(select(jobs.c.manifest)).scalar_one())
    assert (manifest.source, manifest.adapter) == (BASE, found)
    base = world.host.registry.get(BASE)
    current = current_adapter(world.host.config.releases, manifest.target, base, manifest.adapter)
    assert (current.ref.release if current else "") == found
    newest = current_adapter(world.host.config.releases, manifest.target, base)
    assert newest is not None and newest.ref.release == SECOND, "where nobody says what runs"
