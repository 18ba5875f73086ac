"""A batch of messages comes to the same rows as its messages one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, select

from edged.wire.messages import CommandState, Machine, Metrics, ModelReport, Reported, State
from trainer import archive, fleet, intake
from trainer.database import Database, commands, devices, labels, measured, seen, windows

NOW = 1e6
STATES = [
    ("d1", "online", "a", {"site": "hall"}), ("d2", "online", "b", {}), ("d1", "offline", "a", {}),
    ("d1", "online", "c", {}), ("d2", "offline", "of an older boot", {}), ("d3", "offline", "never born", {}),
    ("d2", "offline", "b", {}),
]  # fmt: skip
REPORTS = [("d1", "phi@1.0", 1), ("d2", "phi@1.0", 0), ("d1", "phi@1.1", 2), ("never born", "phi@1.0", 0)]
WINDOWS = [
    ("d1", "phi@1.0", 100.0, 5), ("d1", "phi@1.0", 160.0, 7), ("d2", "phi@1.0", 100.0, 1), ("d1", "phi@1.1", 3700.0, 2),
    ("d1", "no release", 200.0, 3),
]  # fmt: skip


def stamp(number: int) -> dict[str, Any]:
    return {"id": f"m{number}", "ts": float(number), "boot": "x", "seq": number}


def states(first: int = 0) -> list[tuple[str, State]]:
    return [
        (name, State(**(stamp(first + number) | {"boot": boot}), state=state, device=name, labels=born))  # type: ignore[arg-type]
        for number, (name, state, boot, born) in enumerate(STATES)
    ]


def reports() -> list[tuple[str, Reported]]:
    return [
        (name, Reported(**stamp(100 + number), desired_rev=rev, models={"phi": ModelReport(active=active)}))
        for number, (name, active, rev) in enumerate(REPORTS)
    ]


def closed() -> list[tuple[str, Metrics]]:
    found = []
    for number, (name, release, start, items) in enumerate(WINDOWS):
        body = {
            "items": items,
            "accepted": items - 1,
            "escalated": 1,
            "reasons": {"unsure": 1},
            "suppressed": {"rate": 2},
        }
        machine = Machine(temperature_c_max=40.0 + number)
        window = Metrics(
            **stamp(200 + number), start=start, end=start + 60, pipeline="line", release=release, **body, machine=machine,
            confidence_histogram=[0, items], latency_histogram=[0, 0, number],
        )  # fmt: skip
        found.append((name, window))
    return found


def rows(database: Database, table: Table) -> list[dict[str, Any]]:
    with database.read() as connection:
        found = [dict(row._mapping) for row in connection.execute(select(table))]
    return sorted(found, key=str)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Database, Database]:
    return Database(tmp_path / "one.db"), Database(tmp_path / "many.db")


def test_a_batch_of_births_reports_and_windows_comes_to_the_same_rows(both: tuple[Database, Database]) -> None:
    one, many = both
    with one.write() as connection:
        # Births before reports before windows, as a batch takes them.
        started = [name for name, state in states() if fleet.take_state(connection, name, state, NOW)]
        for name, report in reports():
            fleet.take_reported(connection, name, report, NOW)
        for name, window in closed():
            fleet.take_metrics(connection, name, window)
    with many.write() as connection:
        assert intake.take_states(connection, states(), NOW) == started
        intake.take_reports(connection, reports(), NOW)
        intake.take_windows(connection, closed())
    assert len(rows(one, devices)) == 3
    for table in (devices, labels, windows, measured):
        assert rows(many, table) == rows(one, table), table.name


def test_a_second_batch_adds_to_the_first(both: tuple[Database, Database]) -> None:
    one, many = both
    with one.write() as connection:
        for name, window in closed():
            fleet.take_metrics(connection, name, window)
    for part in (closed()[:1], closed()[:3], closed()[3:], closed()):  # some of them twice
        with many.write() as connection:
            intake.take_windows(connection, part)
    assert rows(many, measured) == rows(one, measured)
    assert len(rows(many, windows)) == len(WINDOWS)


def test_what_came_before_is_not_new_also_within_a_batch(both: tuple[Database, Database]) -> None:
    said = [state for _, state in states()]
    with both[1].write() as connection:
        assert intake.news(connection, [said[0], said[1], said[0]], NOW) == [True, True, False]
        assert intake.news(connection, [said[1], said[2]], NOW) == [False, True]
    assert {row["id"] for row in rows(both[1], seen)} == {"m0", "m1", "m2"}


def test_answers_to_commands_come_to_the_same_states(both: tuple[Database, Database]) -> None:
    bodies = [("samples", {"action": "list"}, "open"), ("pin", {}, "open"), ("samples", {"action": "list"}, "done"),
              ("samples", {"action": "release"}, "open")]  # fmt: skip
    said = [(f"c{number}", CommandState(**stamp(number), command=f"c{number}", state=state))  # type: ignore[arg-type]
            for number, state in enumerate(("done", "failed", "failed", "done", "done"))]  # fmt: skip
    nobody: Any = None  # no answer among these has anything archived
    for database in both:
        with database.write() as connection:
            for number, (kind, body, state) in enumerate(bodies):
                row = {"id": f"c{number}", "device": "d1", "type": kind, "body": body, "state": state, "created": 1.0}
                connection.execute(commands.insert().values(**row))
            if database is both[1]:
                archive.take_command_states(nobody, connection, [("d1", *each) for each in said])
            else:
                for command, state in said:
                    fleet.take_command_state(connection, "d1", command, state)
    assert [row["state"] for row in sorted(rows(both[1], commands), key=lambda row: row["id"])] == [
        "done", "refused", "done", "done",
    ]  # fmt: skip
    assert rows(both[1], commands) == rows(both[0], commands)


def test_who_asked_is_told_which_rows_were_written(tmp_path: Path) -> None:
    database = Database(tmp_path / "trainer.db")
    changed = database.changed(devices)
    with database.write() as connection:
        intake.take_states(connection, states(), NOW)
    assert changed.take() == ["d1", "d2"]
    assert changed.take() == []
