"""What devices may send without ending, stopping or misleading the trainer: real payloads through the real intake."""

from __future__ import annotations

import itertools
import json
import sqlite3
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import func, insert, select

from edged.link import Connected, Inbound, Published, TooLarge
from edged.wire.ids import uuid7
from tests.support.models import make_release
from trainer import dialects, drift, fleet, incoming, intake, live, retention
from trainer.claims import refused
from trainer.clock import SystemClock
from trainer.config import TrainerConfig
from trainer.config_fleet import Notify
from trainer.coordinator import Coordinator, Outside
from trainer.core.believed import ITEMS_A_SECOND_MAX
from trainer.core.drift import Look
from trainer.database import (
    commands,
    devices,
    events,
    judged,
    measured,
    notices,
    put,
    requests,
    rollouts,
    samples,
    seen,
    windows,
)
from trainer.incoming import SentEvent
from trainer.observed import Period, tallies
from trainer.orders import place
from trainer.status import status

NOW = 1_790_000_000.0
HUGE = 1 << 64
_numbers = itertools.count()
BASE: dict[str, dict[str, Any]] = {
    "state": {"state": "online", "device": "evil", "tier": "device", "profile": "pi5"},
    "reported": {"desired_rev": 0, "models": {"toy": {"active": "toy@1.0", "update": "idle"}}},
    "metrics": {
        "start": NOW - 60, "end": NOW, "pipeline": "cam", "release": "toy@1.0", "items": 100, "accepted": 80,
        "audited": 10, "escalated": 10, "reasons": {"confident": 80}, "machine": {"memory_mib_max": 90.0},
    },
    "sample": {
        "sample": "evil-1", "pipeline": "cam", "task": "detect", "model": "toy", "release": "toy@1.0",
        "state": "labelled", "sha256": "0" * 64, "bytes": 10, "label": [], "label_confidence": 0.9, "captured": NOW,
        "provenance": {"kind": "person", "who": "ann"}, "decision": "audit", "inclusion_probability": 0.1,
    },
    "event": {"kind": "storage_full", "text": "full", "detail": {"release": "toy@1.0"}},
    "cmd/samples/c1": {"command": "c1", "state": "done", "detail": {"moved": [], "unknown": [], "refused": {}}},
}  # fmt: skip


class Hand(SystemClock):
    at = NOW

    def now(self) -> float:
        return self.at


class Desk:
    """A coordinator without a broker: what devices say is put where its connection puts it."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.clock = Hand()
        known = TrainerConfig(name="host", data_dir=folder / "data", **config)
        self.coordinator = Coordinator(known, folder / "trainer.toml", Outside(clock=self.clock))
        self.host, self.counters = self.coordinator.host, self.coordinator.counters
        self.acknowledged: list[Inbound] = []
        self.coordinator.link.acknowledge = self.acknowledged.append  # type: ignore[method-assign]

    def put(self, device: str, topic: str, body: dict[str, Any] | bytes) -> None:
        if isinstance(body, dict):
            number = next(_numbers)
            envelope = {"v": 1, "id": uuid7(number, bytes(10)), "ts": self.clock.at, "boot": "b1", "seq": 0}
            body = json.dumps({**envelope, **body}).encode()
        message = Inbound(f"edged/v1/default/{device}/up/{topic}", body, False, (1, 0, 0))
        self.coordinator.link.inbox.put(message)

    def say(self, topic: str, device: str = "evil", **changes: Any) -> None:
        """One message, taken in."""
        self.put(device, topic, {**BASE[topic], **changes})
        self.coordinator.incoming.take_in()

    def rows(self, query: Any) -> list[Any]:
        with self.host.database.read() as connection:
            return list(connection.execute(query).all())

    def count(self, table: Any, *where: Any) -> int:
        return int(self.rows(select(func.count()).select_from(table).where(*where))[0][0])

    def goes_on(self) -> None:
        """A message of another device is kept, and everything that looks at the rows once has looked."""
        before, faults = self.count(events, events.c.source == "d1"), dict(self.counters)
        self.say("event", "d1")
        assert self.count(events, events.c.source == "d1") == before + 1
        self.coordinator.rollouts.tick()
        self.coordinator.jobs.tick()
        self.coordinator.drift.check()
        drift.report(self.host)
        json.dumps(status(self.host, self.counters, connected=True))
        assert self.coordinator.drift.counters["drift_failed"] == 0
        assert self.counters.get("faults", 0) == faults.get("faults", 0)
        assert self.coordinator.link.inbox.empty()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize(
    ("topic", "field"),
    [("metrics", name) for name in ("items", "accepted", "audited", "escalated", "errors", "unheard")]
    + [("reported", "desired_rev"), ("sample", "bytes")],
)
@pytest.mark.parametrize("value", [HUGE, 1 << 63, -5])
def test_a_number_that_no_database_takes_ends_nothing(desk: Desk, topic: str, field: str, value: int) -> None:
    desk.say(topic, **{field: value})
    assert desk.counters["payloads_invalid"] == 1
    assert len(desk.acknowledged) == 1, "else the broker sends it again for ever"
    desk.goes_on()


def test_a_fault_that_nobody_thought_of_costs_one_message(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take, windows_of = fleet.take_event, intake.take_windows

    def planted(connection: Any, device: str, event: Any) -> None:
        if device == "evil":
            raise RecursionError("planted")
        take(connection, device, event)

    def together(connection: Any, said: Any) -> int:
        if any(device == "evil" for device, _ in said):
            raise OverflowError("planted")
        return windows_of(connection, said)

    monkeypatch.setattr(fleet, "take_event", planted)
    monkeypatch.setattr(intake, "take_windows", together)
    for device in ("evil", "d1", "evil"):
        desk.put(device, "event", BASE["event"])
        desk.put(device, "metrics", BASE["metrics"])
    desk.coordinator.incoming.take_in()
    assert (desk.counters["faults"], len(desk.acknowledged)) == (4, 6)
    assert [row.source for row in desk.rows(select(events.c.source))] == ["d1"]
    assert [row.device for row in desk.rows(select(windows.c.device))] == ["d1"]
    assert caplog.text.count("is left out") == 2, "one a device and topic, however many there are"


def test_messages_and_what_the_broker_confirmed_wait_for_a_locked_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialects, "BUSY_MS_MAX", 50)
    monkeypatch.setattr(incoming, "WAIT_S", 0.02)
    desk = Desk(tmp_path)
    with desk.host.database.write() as connection:
        desk.host.announce(connection, "notice", "one")
        put(connection, devices, {"device": "d1"}, {"listed_at": 5.0})
    (row,) = desk.rows(select(events))
    lock = sqlite3.connect(tmp_path / "data" / "trainer.sqlite", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN IMMEDIATE")
    for said in (Connected(False), Published(SentEvent(row.id), "")):
        desk.coordinator.link.inbox.put(said)
    desk.put("d1", "event", BASE["event"])
    work = threading.Thread(target=desk.coordinator.incoming.take_in)
    work.start()
    for _ in range(1000):
        if desk.counters.get("database_errors", 0) >= 2:
            break
        work.join(0.02)
    assert work.is_alive()
    assert desk.acknowledged == []
    assert desk.coordinator.incoming.confirmed(row.id)
    lock.execute("ROLLBACK")
    work.join(20)
    assert (len(desk.acknowledged), desk.count(events, events.c.published.is_(True))) == (1, 2)
    assert [row.listed_at for row in desk.rows(select(devices.c.listed_at))] == [0.0]


def test_an_answer_that_was_hardly_ever_to_be_checked_says_nothing(desk: Desk) -> None:
    for value in (1e-200, 5e-324, 1e-7):
        desk.say("sample", sample=f"s{value}", inclusion_probability=value)
    assert desk.count(judged) == 0
    desk.say("metrics")
    row = {
        "device": "evil", "pipeline": "cam", "release": "toy@1.0", "decision": "audit", "inclusion": 1e-200,
        "right": True, "confidence": 1.0, "captured": NOW - 1,
    }  # fmt: skip
    with desk.host.database.write() as connection:
        connection.execute(insert(judged).values(id="of an earlier version", **row))
        assert tallies(connection, ["evil"], Period("toy", 0.0))["evil"].audited == 0
        assert live.report(connection, "toy@1.0", 0.0)["fleet"]["accuracy"]["accepted"]["checked"] == 0
    desk.goes_on()


def test_a_release_that_cannot_be_looked_at_hides_no_other(desk: Desk) -> None:
    looked: list[float] = []

    def observe(counted: Any, *_more: Any) -> list[Look]:
        looked.append(1.0)
        if len(looked) == 1:
            raise OverflowError("planted")
        return []

    for release in ("toy@1.0", "toy@1.1"):
        desk.say("metrics", release=release)
    watch = drift.Drift(desk.host, observe)
    watch.check()
    assert (len(looked), watch.counters["drift_failed"]) == (2, 1)


def test_a_text_of_a_device_does_not_stop_the_events_of_the_trainer(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []

    def publish(address: Any, payload: bytes, _ref: Any = None) -> bool:
        if len(payload) > 4096:
            raise TooLarge(address.topic, len(payload), 4096)
        sent.append(payload)
        return True

    reason = "x" * 900_000
    desk.say("reported", models={"toy": {"active": "toy@1.0", "update": "reverted", "reason": reason}})
    (row,) = desk.rows(select(devices.c.models))
    assert len(row.models["toy"]["reason"]) == 500
    with desk.host.database.write() as connection:
        desk.host.announce(connection, "notice", reason, why=reason)
    (row,) = desk.rows(select(events))
    monkeypatch.setattr(desk.coordinator.link, "publish", publish)
    desk.coordinator._send_event(row)
    assert json.loads(sent[0])["detail"] == {"cut": True}
    assert desk.coordinator._all_counters()["messages_too_large"] == 1
    desk.coordinator.link.inbox.put(Published(SentEvent(row.id), ""))
    desk.coordinator.incoming.take_in()
    assert desk.count(events, events.c.published.is_(False)) == 0


@pytest.mark.parametrize(
    "detail", [{"unknown": 5}, {"unknown": [["x"]]}, {"moved": [[1]]}, {"refused": 5}, {"refused": {"s1": 5}}]
)
def test_an_answer_to_a_command_is_typed_and_its_device_s_own(desk: Desk, detail: dict[str, Any]) -> None:
    row = {"type": "samples", "body": {"action": "claim"}, "state": "open", "created": NOW, "job": "j1"}
    with desk.host.database.write() as connection:
        put(connection, commands, {"id": "c1"}, {**row, "device": "evil"})
        put(connection, commands, {"id": "c2"}, {**row, "device": "d1"})
    desk.say("cmd/samples/c1", detail=detail)
    assert desk.counters["payloads_invalid"] == 1
    for state in ("done", "failed"):
        desk.put("evil", "cmd/samples/c2", {"command": "c2", "state": state})
    desk.coordinator.incoming.take_in()
    assert {row.state for row in desk.rows(select(commands.c.state))} == {"open"}
    desk.say("cmd/samples/c1", detail={"unknown": ["s1"], "refused": {"s2": "gone"}})
    with desk.host.database.write() as connection:
        assert refused(connection, "j1") == {"s1": "the device does not have it", "s2": "gone"}
        put(connection, commands, {"id": "c1"}, {"detail": detail})  # of an earlier version
        refused(connection, "j1")


def test_a_revision_that_nobody_told_does_not_drive_ours(desk: Desk) -> None:
    desk.say("reported", desired_rev=(1 << 53) - 1)
    with desk.host.database.write() as connection:
        assert fleet.desire(connection, "evil", models={"toy": {"release": "toy@1.0", "sha256": "0" * 64}}) == 1


def test_a_clock_of_1970_lets_nothing_count_twice(tmp_path: Path) -> None:
    url = SecretStr("json://127.0.0.1:9/x")
    desk = Desk(tmp_path, notify=Notify(urls=[url], kinds=["device:*"]))
    payload = json.dumps({"v": 1, "id": "m1", "ts": 0.0, "boot": "b", "seq": 1, **BASE["event"]}).encode()
    for _ in range(2):
        desk.put("evil", "event", payload)
        desk.coordinator.incoming.take_in()
        desk.clock.at += 3600
        with desk.host.database.write() as connection:
            fleet.prune(connection, desk.clock.at)
    assert (desk.counters["duplicates"], desk.count(seen), desk.count(notices)) == (1, 1, 1)
    desk.clock.at += 30 * 86400  # forgotten at last: it is taken for new, and changes nothing
    with desk.host.database.write() as connection:
        fleet.prune(connection, desk.clock.at)
    desk.put("evil", "event", payload)
    desk.coordinator.incoming.take_in()
    assert (desk.counters.get("faults", 0), desk.count(notices)) == (0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"items": 10, "accepted": 10, "audited": 1, "escalated": 0, "reasons": {}},
        {"items": 10, "accepted": 0, "audited": 0, "escalated": 10**9, "reasons": {}},
        {"confidence_histogram": [101]},
        {"latency_histogram": [60, 41]},
        {"reasons": {"unsure": 101}},
        {"suppressed": {"budget": 101}},
        {"items": ITEMS_A_SECOND_MAX * 60 + 1},
        {"errors": ITEMS_A_SECOND_MAX * 60 + 1},
        {"reasons": {"x" * 65: 1}},
        {"pipeline": "p" * 129},
        {"counters": {f"c{number}": 1 for number in range(4000)}},
    ],
)
def test_counts_that_cannot_be_are_refused(desk: Desk, changes: dict[str, Any]) -> None:
    desk.say("metrics", **changes)
    assert (desk.counters["payloads_invalid"], desk.count(windows), desk.count(measured)) == (1, 0, 0)


@pytest.mark.parametrize(
    ("start", "end", "stored"),
    [
        (NOW - 60, NOW, (NOW - 60, NOW)),
        (NOW - 3 * 86400, NOW - 3 * 86400 + 60, (NOW - 3 * 86400, NOW - 3 * 86400 + 60)),  # waited in the outbox
        (NOW, NOW - 600, (NOW - 600, NOW - 600)),  # the clock was set back
        (0.0, NOW, (NOW, NOW)),  # a device without a clock of its own was told the time
        (4e9, 4e9 + 60, (NOW - 60, NOW)),
        (-1e308, 1e308, (NOW, NOW)),
    ],
)
def test_a_window_lies_where_it_can(desk: Desk, start: float, end: float, stored: tuple[float, float]) -> None:
    desk.say("metrics", start=start, end=end)
    assert [tuple(row) for row in desk.rows(select(windows.c.start, windows.c.end))] == [stored]


def test_one_device_makes_so_many_rows_an_hour_and_no_more(desk: Desk) -> None:
    for number in range(intake.STREAMS_MAX + 3):
        desk.put("evil", "metrics", {**BASE["metrics"], "pipeline": f"p{number}"})
    desk.put("d1", "metrics", BASE["metrics"])
    desk.coordinator.incoming.take_in()
    assert desk.counters["windows_refused"] == 3
    assert desk.count(measured, measured.c.device == "evil") == intake.STREAMS_MAX
    assert desk.count(measured, measured.c.device == "d1") == 1
    for number in range(70):
        counts = {"items": 600_000, "accepted": 600_000, "audited": 0, "escalated": 0}
        desk.put("d1", "metrics", {**BASE["metrics"], **counts, "reasons": {f"r{number}": 1}})
    desk.coordinator.incoming.take_in()
    (row,) = desk.rows(select(measured).where(measured.c.device == "d1"))
    assert (row._mapping["items"], len(row.reasons)) == (intake.HOUR_COUNT_MAX, 65)


def test_a_batch_comes_to_the_same_as_its_messages_one_by_one(tmp_path: Path) -> None:
    said = [
        ("d1", "state", {**BASE["state"], "labels": {"line": "a"}}), ("d1", "reported", BASE["reported"]),
        ("d1", "metrics", BASE["metrics"]), ("d1", "metrics", {**BASE["metrics"], "latency_histogram": [1, 2]}),
        ("d2", "metrics", {**BASE["metrics"], "machine": {"memory_mib_max": 95.0}}), ("d2", "state", BASE["state"]),
        ("d2", "state", {"state": "offline", "device": "d2"}), ("d1", "state", {**BASE["state"], "boot": "b2"}),
        ("d1", "state", {"state": "offline", "device": "d1"}),
    ]  # fmt: skip
    found = []
    for at_once in (True, False):
        desk = Desk(tmp_path / str(at_once))
        for device, topic, body in said:
            desk.put(device, topic, body)
            if not at_once:
                desk.coordinator.incoming.take_in()
        desk.coordinator.incoming.take_in()
        columns = [column for column in windows.c if column.name not in ("id", "body")]
        tables: list[Any] = [select(devices), select(measured), select(*columns)]
        found.append([sorted(map(repr, desk.rows(query))) for query in tables])
    assert found[0] == found[1]


def test_labels_below_the_floor_judge_no_canary(desk: Desk) -> None:
    desk.say("metrics")
    for number, sure in enumerate((0.01, 0.49, 0.5, 0.9)):
        desk.say("sample", sample=f"s{number}", label_confidence=sure)
    with desk.host.database.read() as connection:
        assert tallies(connection, ["evil"], Period("toy", 0.0))["evil"].audited == 4
        assert tallies(connection, ["evil"], Period("toy", 0.0, confidence_min=0.5))["evil"].audited == 2


def test_devices_push_no_event_of_the_trainer_out(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "EVENTS_MAX", 20)
    monkeypatch.setattr(retention, "EVENTS_A_DEVICE_MAX", 8)
    with desk.host.database.write() as connection:
        for number in range(30):
            desk.host.announce(connection, "notice", f"{number}")
    desk.say("event", "d1")
    desk.clock.at += 1
    for number in range(30):
        desk.put("evil", "event", {**BASE["event"], "ts": desk.clock.at + (3600 if number % 2 else 4e9)})
    desk.coordinator.incoming.take_in()
    assert max(row.ts for row in desk.rows(select(events.c.ts))) <= desk.clock.at
    with desk.host.database.write() as connection:
        fleet.prune(connection, desk.clock.at, "host")
    assert desk.count(events, events.c.source == "evil") == 8
    assert desk.count(events, events.c.source == "host") == 30, "not sent yet"
    assert desk.count(events, events.c.source == "d1") == 1


def test_what_is_over_is_forgotten_and_what_may_train_stays(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "SAMPLES_A_DEVICE_MAX", 4)
    for number, state in enumerate(("labelled", "used", "rejected", "archived", "escalated")):
        desk.say("sample", "d1", sample=f"old-{number}", state=state)
    desk.clock.at += retention.SAMPLES_S_MAX + 1
    for number in range(6):
        desk.say("sample", sample=f"new-{number}")
        desk.clock.at += 1
    row = {"model": "toy", "release": "toy@1.0", "sha256": "0" * 64, "state": {}, "previous": {}, "updated": 0.0}
    with desk.host.database.write() as connection:
        for number, phase in enumerate(("done", "done", "watching")):
            put(connection, rollouts, {"id": f"r{number}"}, {**row, "phase": phase, "created": float(number)})
        put(connection, rollouts, {"id": "last"}, {**row, "phase": "aborted", "created": 3.0})
        fleet.prune(connection, desk.clock.at)
    kept = {row.id for row in desk.rows(select(samples.c.id))}
    assert kept == {"old-0", "old-4", "new-2", "new-3", "new-4", "new-5"}
    # The last one that is done stays: after an abort it says what devices that were away should run.
    assert {row.id for row in desk.rows(select(rollouts.c.id))} == {"r1", "r2", "last"}


def test_text_of_a_device_stays_on_its_line_and_answers_keep_theirs(desk: Desk) -> None:
    desk.say("state", profile="pi5\nd9  online  toy@9.9", tier="a\u202eb\x1b[2J")
    desk.say("event", text="one\r\ntwo\x00", kind="a\nb", detail={"k\n": ["x\x07", float("nan")]})
    desk.say("sample", task="generate", label=[{"text": "two\nlines"}], provenance={"kind": "person", "who": "a\nb"})
    (device,), (event,) = desk.rows(select(devices)), desk.rows(select(events))
    (sample,) = desk.rows(select(samples))
    assert (device.profile, device.tier) == ("pi5 d9  online  toy@9.9", "a b [2J")
    assert (event.text, event.kind, event.detail) == ("one  two ", "a b", {"k ": ["x ", None]})
    assert (sample.label, sample.provenance["who"]) == ([{"text": "two\nlines"}], "a b")


def test_a_device_does_not_speak_as_the_trainer_to_people(tmp_path: Path) -> None:
    url = SecretStr("json://127.0.0.1:9/x")
    desk = Desk(tmp_path, notify=Notify(urls=[url], kinds=["rollout_*", "*_done", "*", "device:storage_*"]))
    desk.say("event", kind="rollout_done")
    desk.say("event", kind="storage_full", detail={"title": 5, "level": "error"})
    with desk.host.database.write() as connection:
        desk.host.announce(connection, "rollout_done", "ours")
    told = {row.title: (row.level, row.target.endswith("-devices")) for row in desk.rows(select(notices))}
    assert told == {"evil: storage full": ("info", True), "host: rollout done": ("success", False)}


def test_what_a_retained_or_foreign_message_says_is_counted_or_left(desk: Desk) -> None:
    for payload in (b"[" * 100_000, b"\xff\xfe", b'{"v":1', b"null", b'"x"'):
        desk.put("evil", "event", payload)
    desk.coordinator.incoming.take_in()
    assert (desk.counters["payloads_invalid"], len(desk.acknowledged)) == (5, 5)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, -1, HUGE, -HUGE, (1 << 53) - 1, (1 << 31) - 1, 10**400]),
    st.sampled_from([0.0, 1e-320, 1e-200, 1e308, -1e308, float("nan"), float("inf"), 4e9]),
    st.sampled_from(["", "\x00", "\ud800", "a\nb", "../../x", "x" * 70_000, "toy@1.0", "toy@1.1", "reverted", "failed"]),
    st.integers(), st.floats(), st.text(max_size=20),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _paths(body: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [before] if before else []
    if isinstance(body, dict):
        for key, value in body.items():
            found += _paths(value, (*before, key))
    return found


def _changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**body, path[0]: value}
    return {**body, path[0]: _changed(body[path[0]], path[1:], value)}


MORE = {
    "metrics": ["confidence_histogram", "latency_histogram", "suppressed", "latency_ms_p95", "counters", "ts"],
    "reported": ["health", "bad", "ts"], "event": ["ts", "id"], "sample": ["opinions", "prediction", "ts", "reason"],
    "state": ["capabilities", "labels", "ts", "boot"], "cmd/samples/c1": ["reason", "ts", "moved"],
}  # fmt: skip
CHANGES = st.sampled_from(sorted(BASE)).flatmap(
    lambda topic: st.tuples(
        st.just(topic), st.sampled_from([*_paths(BASE[topic]), *((name,) for name in MORE[topic])]), VALUES
    )
)


@pytest.fixture(scope="module")
def rolling() -> Desk:
    """A fleet of four in the watch of a rollout, `evil` among the canaries, and a job that has claimed a sample."""
    folder = Path(tempfile.mkdtemp())
    desk = Desk(folder)
    for release in ("toy@1.0", "toy@1.1"):
        make_release(folder / release, release)
        desk.host.registry.register(folder / release)
    for device in ("d1", "d2", "d3", "evil"):
        for topic in ("state", "reported", "metrics"):
            desk.put(device, topic, BASE[topic])
    desk.coordinator.incoming.take_in()
    place(desk.host.database, "rollout_start", {"release": "toy@1.1", "unjudged": "made by a test", "by": "operator"})
    desk.coordinator.orders.tick()
    assert desk.count(rollouts) == 1, desk.rows(select(requests.c.answer))
    for device in ("d1", "d2", "d3", "evil"):
        report = {"desired_rev": 1, "models": {"toy": {"active": "toy@1.1", "update": "committed"}}}
        desk.put(device, "reported", report)
        desk.put(device, "metrics", {**BASE["metrics"], "release": "toy@1.1"})
    desk.coordinator.incoming.take_in()
    row = {"type": "samples", "body": {"action": "claim"}, "state": "open", "created": NOW, "job": "j1"}
    with desk.host.database.write() as connection:
        put(connection, commands, {"id": "c1"}, {**row, "device": "evil"})
    for _ in range(3):
        desk.coordinator.rollouts.tick()
    return desk


@settings(max_examples=150)
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_whatever_a_device_sends_the_trainer_goes_on(
    rolling: Desk, said: list[tuple[str, tuple[Any, ...], Any]]
) -> None:
    desk, before = rolling, len(rolling.acknowledged)
    sent = 0
    for topic, path, value in said:
        try:
            desk.put("evil", topic, _changed(BASE[topic], path, value))
            sent += 1
        except UnicodeEncodeError:
            continue
    desk.coordinator.incoming.take_in()
    assert len(desk.acknowledged) == before + sent
    assert desk.counters.get("faults", 0) == 0, "what is refused is known beforehand, in one way: an invalid payload"
    desk.clock.at += 1
    with desk.host.database.read() as connection:
        refused(connection, "j1")
    desk.goes_on()
