from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select

from edged.wire.messages import (
    Box,
    CommandState,
    Event,
    Metrics,
    ModelReport,
    Provenance,
    Reported,
    SampleEntry,
    State,
    Text,
)
from trainer import fleet
from trainer.core.rollout import Outcome
from trainer.database import Database, commands, devices, put, samples
from trainer.observed import Period, tallies

pytestmark = pytest.mark.usefixtures("each_database")

_numbers = itertools.count()
REF = {"release": "digits@1.1", "sha256": "0" * 64}


def envelope(ts: float = 0.0, boot: str = "b1") -> dict[str, Any]:
    return {"id": f"m{next(_numbers)}", "ts": ts, "boot": boot, "seq": 1}


def state(kind: str, boot: str = "b1", tier: str = "device") -> State:
    return State(**envelope(boot=boot), state=kind, device="d1", tier=tier)  # type: ignore[arg-type]


def entry(sample: str, ts: float = 1.0, **changes: Any) -> SampleEntry:
    fields = {
        "pipeline": "line", "task": "detect", "model": "digits", "release": "digits@1.0", "state": "labelled",
        "sha256": "a" * 64, "bytes": 3, "label_confidence": 0.9, "captured": 1.0,
    }  # fmt: skip
    return SampleEntry(**envelope(ts), sample=sample, **{**fields, **changes})


def report(rev: int = 0, **model: Any) -> Reported:
    return Reported(**envelope(), desired_rev=rev, models={"digits": ModelReport(**model)})


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as opened:
        yield opened
    database.close()


def online(connection: Connection) -> bool:
    return bool(connection.execute(select(devices.c.online)).scalar_one())


def test_a_will_of_an_earlier_boot_does_not_hide_a_device_that_is_back(connection: Connection) -> None:
    assert fleet.take_state(connection, "d1", state("online", "b1"), 1.0)
    assert fleet.take_state(connection, "d1", state("online", "b2"), 2.0)
    assert not fleet.take_state(connection, "d1", state("online", "b2"), 2.0)  # the same boot is no new start
    fleet.take_state(connection, "d1", state("offline", "b1"), 3.0)
    assert online(connection)
    fleet.take_state(connection, "d1", state("offline", "b2"), 4.0)
    assert not online(connection)


def test_a_message_counts_once(connection: Connection) -> None:
    message = entry("s1")
    assert fleet.is_new(connection, message, 1.0)
    assert not fleet.is_new(connection, message, 1.0)


def test_an_older_entry_and_a_foreign_one_change_nothing(connection: Connection) -> None:
    fleet.take_sample(connection, "d1", entry("s1", ts=5.0, state="claimed"))
    fleet.take_sample(connection, "d1", entry("s1", ts=4.0, state="labelled"))
    fleet.take_sample(connection, "d2", entry("s1", ts=9.0, state="rejected"))
    row = connection.execute(select(samples)).one()
    assert (row.device, row.state) == ("d1", "claimed")


def test_what_trained_a_release_never_counts_again(connection: Connection) -> None:
    fleet.take_sample(connection, "d1", entry("s1"))
    put(connection, samples, {"id": "s1"}, {"state": "used"})
    fleet.take_sample(connection, "d1", entry("s1", ts=9.0, state="labelled"))  # sent before it heard of it
    assert fleet.training_counts(connection, "digits", 0.5) == (0, 0)
    fleet.take_sample(connection, "d1", entry("s1", ts=10.0, state="archived"))
    assert connection.execute(select(samples.c.state)).scalar_one() == "archived"


def test_counts_new_and_usable(connection: Connection) -> None:
    for number, changes in enumerate(
        [{}, {"label_confidence": 0.4}, {"state": "escalated"}, {"model": "cats"}, {}, {}]
    ):
        fleet.take_sample(connection, "d1", entry(f"s{number}", **changes))
    put(connection, samples, {"id": "s4"}, {"tried": 1})
    put(connection, samples, {"id": "s5"}, {"job": "j1"})
    assert fleet.training_counts(connection, "digits", 0.5) == (1, 2)


def test_the_fleet_of_a_model_is_who_runs_it(connection: Connection) -> None:
    for device, tier in (("d1", "device"), ("d2", "tier2")):
        fleet.take_state(connection, device, state("online", tier=tier), 1.0)
        fleet.take_reported(connection, device, report(active="digits@1.0"), 1.0)
    fleet.take_state(connection, "d3", state("online"), 1.0)
    assert [member.device for member in fleet.members(connection, "digits")] == ["d1", "d2"]
    assert [member.device for member in fleet.members(connection, "digits", "device")] == ["d1"]
    assert fleet.members(connection, "cats") == []


@pytest.mark.parametrize(
    ("active", "update", "seen", "there", "expected"),
    [
        ("digits@1.1", "committed", 3, True, Outcome.RUNNING),
        ("digits@1.1", "switched", 3, True, Outcome.ON_THE_WAY),  # probation
        ("digits@1.0", "proving", 3, True, Outcome.ON_THE_WAY),
        ("digits@1.0", "idle", 2, False, Outcome.OFFLINE),
        ("digits@1.0", "reverted", 3, True, Outcome.FAILED),
        ("digits@1.0", "failed", 3, False, Outcome.FAILED),
        ("digits@1.0", "failed", 2, True, Outcome.ON_THE_WAY),  # of an earlier order
    ],
)
def test_how_far_a_device_is(active: str, update: str, seen: int, there: bool, expected: Outcome) -> None:
    member = fleet.Member("d1", there, active, None, update, "", seen)
    assert fleet.outcome(member, "digits@1.1", rev=3) is expected


def test_a_device_that_reverted_is_back_where_it_was(connection: Connection) -> None:
    member = fleet.Member("d1", True, "digits@1.0", None, "reverted", "golden set", 4)
    assert fleet.outcome(member, "digits@1.0", rev=4) is Outcome.RUNNING


@pytest.mark.parametrize(
    ("active", "update", "pinned", "found"),
    [
        ("digits@1.0", "committed", "digits@1.0", Outcome.PINNED),
        ("digits@1.0", "failed", "digits@1.0", Outcome.PINNED),
        ("digits@1.1", "committed", "digits@1.1", Outcome.RUNNING),
        ("digits@1.0", "downloading", "digits@1.1", Outcome.ON_THE_WAY),  # a person wants the same as the fleet
        ("digits@1.0", "reverted", None, Outcome.FAILED),  # a person rolled it back
    ],
)
def test_a_device_that_a_person_holds(active: str, update: str, pinned: str | None, found: Outcome) -> None:
    member = fleet.Member("d1", True, active, None, update, "rolled back by a person", 4, pinned)
    assert fleet.outcome(member, "digits@1.1", rev=4) is found


def test_an_order_that_a_device_refuses_is_not_sent_again(connection: Connection) -> None:
    row = {"device": "d1", "type": "rollback", "body": {"slot": "digits"}, "state": "open", "created": 1.0}
    put(connection, commands, {"id": "c1"}, row)
    refused = CommandState(**envelope(), command="c1", state="failed", reason="no release before")
    fleet.take_command_state(connection, "d1", "c1", refused)
    state, reason = connection.execute(select(commands.c.state, commands.c.reason)).one()
    assert (state, reason) == ("refused", "no release before")
    assert state in fleet.ENDED
    fleet.prune(connection, now=1e9)
    assert connection.execute(select(commands.c.id)).first() is None


def test_desired_state_only_moves_forward(connection: Connection) -> None:
    fleet.take_reported(connection, "d1", report(rev=7, active="digits@1.0"), 1.0)
    assert (
        fleet.desire(connection, "d1", models={"digits": REF}, start_from={"models": {"phi": REF}, "adapters": {}}) == 8
    )
    assert fleet.desire(connection, "d1", models={"digits": REF}) == 8  # nothing new: nothing to say
    assert fleet.desire(connection, "d1", adapters={"phi": REF}) == 9
    assert fleet.desire(connection, "d1", models={"digits": None}) == 10
    told = fleet.desired_of(connection, "d1")
    assert told is not None
    assert (told["models"], told["adapters"]) == ({"phi": REF}, {"phi": REF})


def test_windows_are_summed_by_device_model_and_time(connection: Connection) -> None:
    def window(device: str, release: str, start: float, items: int) -> None:
        metrics = Metrics(
            **envelope(), start=start, end=start + 1, pipeline="p", release=release, items=items, escalated=1
        )
        fleet.take_metrics(connection, device, metrics)

    window("d1", "digits@1.0", 5, 10)
    window("d1", "digits@1.1", 10, 100)
    window("d1", "digits@1.1", 11, 100)
    window("d1", "phi@1.0", 11, 1000)  # another model on the same device
    window("d2", "digits@1.0", 11, 7)

    def counted(names: list[str], period: Period) -> dict[str, tuple[int, int]]:
        found = tallies(connection, names, period)
        return {device: (tally.items, tally.escalated) for device, tally in found.items()}

    assert counted(["d1"], Period("digits", 10)) == {"d1": (200, 2)}
    assert counted(["d1", "d2"], Period("digits", 10, release="digits@1.0")) == {"d2": (7, 1)}
    assert counted(["d1", "d2"], Period("digits", 0, without="digits@1.1")) == {"d1": (10, 1), "d2": (7, 1)}
    assert counted(["d1"], Period("digits", 0, until=6)) == {"d1": (10, 1)}
    assert counted(["d9"], Period("digits", 0)) == {}


def test_audits_count_as_many_answers_as_they_stand_for(connection: Connection) -> None:
    def audit(sample: str, right: bool, inclusion: float, **changes: Any) -> None:
        said = [Box(label="1", box=(0, 0, 5, 5))]
        fields = {
            "decision": "audit",
            "inclusion_probability": inclusion,
            "label": said,
            "prediction": said if right else [],
            "provenance": Provenance(kind="model", who="big", release="teacher@1.0"),
        }
        fleet.take_sample(connection, "d1", entry(sample, **{**fields, **changes}))

    for number in range(10):
        audit(f"a{number}", right=True, inclusion=0.5)
    for number in range(10):
        audit(f"b{number}", right=False, inclusion=0.1)
    audit("c1", right=True, inclusion=0.5, state="escalated")  # nobody has answered yet
    audit("c2", right=True, inclusion=1.0, decision="escalate")
    audit(
        "c3", right=True, inclusion=0.5, provenance=Provenance(kind="model", who="d1", release="digits@1.0")
    )  # itself
    tally = tallies(connection, ["d1"], Period("digits", 0))["d1"]
    assert (tally.audited, tally.agreed) == (20, pytest.approx(20 * 20 / 120))
    assert tally.effective == pytest.approx(120**2 / (10 * 4 + 10 * 100))
    audit("a0", right=False, inclusion=0.5, ts=9.0)  # a person has corrected the verdict
    assert tallies(connection, ["d1"], Period("digits", 0))["d1"].agreed == pytest.approx(20 * 18 / 120)


def test_engines_that_end_by_themselves_count_for_their_release(connection: Connection) -> None:
    window = Metrics(**envelope(), start=5, end=3605, pipeline="p", release="digits@1.1", items=9)
    fleet.take_metrics(connection, "d1", window)
    for kind, release, ts in [
        ("engine_ended", "digits@1.1", 7), ("engine_ended", "digits@1.1", 9), ("engine_ended", "digits@1.0", 9),
        ("engine_ended", "phi@1.1", 9), ("engine_ended", "digits@1.1", 1), ("storage_full", "digits@1.1", 9),
    ]:  # fmt: skip
        fleet.take_event(connection, "d1", Event(**envelope(ts), kind=kind, text="", detail={"release": release}))
    found = tallies(connection, ["d1", "d2"], Period("digits", 5, release="digits@1.1"))
    assert (found["d1"].crashes, found["d1"].hours, "d2" in found) == (2, 1.0, False)


def test_a_command_that_is_done_stays_done(connection: Connection) -> None:
    row = {"device": "d1", "type": "samples", "body": {"action": "list"}, "state": "open", "created": 1.0}
    put(connection, commands, {"id": "c1"}, row)
    for told in ("failed", "done", "failed"):
        state = CommandState(**envelope(), command="c1", state=told, reason=told)  # type: ignore[arg-type]
        fleet.take_command_state(connection, "d1", "c1", state)
    assert connection.execute(select(commands.c.state)).scalar_one() == "done"


def test_old_things_are_forgotten(connection: Connection) -> None:
    fleet.is_new(connection, entry("s1", ts=1.0), 1.0)
    fleet.prune(connection, now=1e9)
    assert fleet.is_new(connection, entry("s2", ts=1e9), 1.0)
    assert connection.exec_driver_sql("select count(*) from seen").scalar_one() == 1


@pytest.mark.parametrize(
    ("provenance", "trains"),
    [
        (None, True),
        ({"kind": "person", "who": "digits@fan"}, True),
        ({"kind": "model", "who": "srv", "release": "digits-teacher@1.0"}, True),
        ({"kind": "model", "who": "srv", "release": ""}, True),
        ({"kind": "model", "who": "srv", "release": "digits@1.7"}, False),
    ],
)
def test_a_models_own_predictions_call_for_no_training(
    connection: Connection, provenance: dict[str, str] | None, trains: bool
) -> None:
    fleet.take_sample(connection, "d1", entry("s1", provenance=provenance))
    assert fleet.training_counts(connection, "digits", 0.5) == ((1, 1) if trains else (0, 0))


def test_an_outline_is_kept_with_its_box_and_a_box_without_one_stays_a_box(connection: Connection) -> None:
    part = [0.0, 0.0, 5.0, 0.0, 5.0, 5.5]
    label = [Box(label="1", box=(0, 0, 5, 5), polygons=[part]), Box(label="1", box=(0, 0, 5, 5))]
    fleet.take_sample(connection, "d1", entry("s1", task="segment", label=label))
    kept = connection.execute(select(samples.c.label).where(samples.c.id == "s1")).scalar_one()
    assert [row.get("polygons", "none") for row in kept] == [[part], "none"]


def test_who_else_said_something_is_kept(connection: Connection) -> None:
    said = [
        {"who": "mid", "status": "labelled", "confidence": 0.4, "label": []},
        {"who": "top", "status": "labelled", "confidence": 0.9, "label": [{"label": "7", "box": [1, 2, 3, 4]}]},
    ]
    fleet.take_sample(connection, "d1", entry("s1", opinions=said))
    fleet.take_sample(connection, "d1", entry("s2", opinions=said[:1]))
    found = fleet.opinions_of(connection, ["s1", "s2", "s3"])
    assert [(each["who"], each["confidence"]) for each in found["s1"]] == [("mid", 0.4), ("top", 0.9)]
    assert list(found) == ["s1"]


def test_the_answers_of_a_models_adapters_are_its_own_predictions(connection: Connection) -> None:
    for number, release in enumerate(("clerk@1.0", "clerk-lora@1.0", "clerk-loran@1.0", "large@1.0")):
        who = Provenance(kind="model", who="site-1", release=release)
        fleet.take_sample(connection, "d1", entry(f"s{number}", model="clerk", provenance=who))
    assert fleet.training_counts(connection, "clerk", 0.5) == (3, 3)
    assert fleet.training_counts(connection, "clerk", 0.5, ("clerk", "clerk-lora")) == (2, 2)


def test_what_the_devices_model_had_answered_to_a_text_is_kept(connection: Connection) -> None:
    fleet.take_sample(connection, "d1", entry("s1", prediction=[Text(text="accept")]))
    fleet.take_sample(connection, "d1", entry("s2", prediction=[Box(label="1", box=(0, 0, 5, 5))]))
    fleet.take_sample(connection, "d2", entry("s1", ts=9.0, prediction=[Text(text="another device's")]))
    assert fleet.answers_of(connection, ["s1", "s2"]) == {"s1": "accept"}


@pytest.mark.parametrize("late", [False, True], ids=["before the answer", "after it"])
def test_an_entry_from_before_a_release_does_not_hold_a_sample_for_nobody(connection: Connection, late: bool) -> None:
    """The listing was made while the sample was claimed, and is heard when the trainer has ended the claim."""
    row = {
        "device": "d1",
        "type": "samples",
        "body": {"action": "release"},
        "state": "open",
        "job": "j1",
        "created": 0.0,
    }
    put(connection, commands, {"id": "c1"}, row)
    for sample, job in (("s1", None), ("s2", "j2"), ("s3", None)):
        fleet.take_sample(connection, "d1", entry(sample, ts=1.0))
        put(connection, samples, {"id": sample}, {"job": job})
    stale = [entry(sample, ts=2.0, state="claimed") for sample in ("s1", "s2", "s3")]
    done = CommandState(**envelope(3.0), command="c1", state="done", detail={"moved": ["s1", "s2", 7]})
    if late:
        fleet.take_command_state(connection, "d1", "c1", done)
    for each in stale:
        fleet.take_sample(connection, "d1", each)
    if not late:
        fleet.take_command_state(connection, "d1", "c1", done)
    states = {row.id: row.state for row in connection.execute(select(samples.c.id, samples.c.state))}
    assert states == {"s1": "labelled", "s2": "claimed", "s3": "claimed"}, "s2 is another job's, s3 was not given back"
    fleet.take_sample(connection, "d1", entry("s1", ts=4.0, state="rejected"))  # what is newer counts
    assert connection.execute(select(samples.c.state).where(samples.c.id == "s1")).scalar_one() == "rejected"
