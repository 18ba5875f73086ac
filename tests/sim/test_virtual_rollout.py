"""A whole rollout to a fleet on a virtual clock (trainer/simulate/virtual.py): the real coordinator, no broker."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from trainer.simulate.virtual import BAD, GOOD, OLD, Scenario, run_virtual
from trainer.simulate.virtual_fleet import Habits

# Tables with rows for each device or message, and how often is more than at each step of a rollout or each hour.
GROWING = {"devices", "desired", "identities", "samples", "windows", "judged", "seen", "commands", "events"}
OFTEN = 100
# More of everything that goes wrong than a real fleet has, so that few devices show it.
ROUGH = Habits(away_share=0.05, reverts=0.004)


def check(result: dict[str, Any], devices: int) -> None:
    """What must be right whatever the seed: the good release is everywhere, the bad one was seen by its canaries alone."""
    good, bad = result["rollouts"]
    canaries, limit = -(-devices // 10), round(devices * 0.1)
    assert good["release"] == GOOD
    assert good["phase"] == "done", good["reason"]
    assert [step["phase"] for step in good["steps"]][-2:] == ["done", "settled"]
    assert {"canary", "watching", "rolling"} <= {step["phase"] for step in good["steps"]}
    assert good["canaries"] == canaries
    watching = next(step for step in good["steps"] if step["phase"] == "watching")
    assert watching["told"] == canaries
    assert good["steps"][-2]["audited"] >= 400
    assert good["ran_it"] == good["run_it_at_the_end"] >= 0.97 * devices  # the others reverted, or are away still
    assert 0 < good["busy_max"] <= limit
    assert good["away_at_the_end"] > 0
    assert good["steps"][-1]["running"] >= good["steps"][-2]["running"]  # who was away gets it when he comes back
    assert bad["release"] == BAD
    assert bad["phase"] == "aborted", bad["reason"]
    assert "audited agreement" in bad["reason"]
    assert bad["ran_it"] > 0.9 * canaries
    assert bad["ran_it_beside_the_canaries"] == 0
    assert bad["run_it_at_the_end"] <= bad["away_at_the_end"]
    # Who was away over both rollouts is where the others are, though the last one was aborted.
    assert result["absent"] == [{"device": f"sim-{devices:06d}", "away": OLD, "back": GOOD}]
    assert result["rows"]["devices"] == devices
    assert result["counters"].get("faults", 0) == 0


@pytest.mark.timeout(600)
def test_l11_a_good_release_reaches_a_simulated_fleet_and_a_bad_one_only_its_canaries() -> None:
    habits = Habits(away_share=0.05, reverts=0.0)
    check(run_virtual(Scenario(300, seed=1, habits=habits))["result"], 300)


SMALL = Scenario(40, seed=2, bad=False, habits=ROUGH)


@dataclass(slots=True)
class Played:
    """A rollout, how often each statement was executed in it, and the tables that it read from end to end."""

    result: dict[str, Any]
    executed: Counter[str] = field(default_factory=Counter)
    scanned: dict[str, set[str]] = field(default_factory=dict)

    def look(self, connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        """Ask SQLite how it goes about a statement, before its first execution."""
        self.executed[statement] += 1
        if statement in self.scanned:
            return
        self.scanned[statement] = set()
        if not statement.startswith(("SELECT", "UPDATE", "DELETE", "INSERT")):
            return
        plan = connection.connection.cursor().execute(
            f"EXPLAIN QUERY PLAN {statement}", parameters[0] if many else parameters
        )
        told = [re.match(r"SCAN (\w+)$", row[3]) for row in plan.fetchall()]
        self.scanned[statement] = {each[1] for each in told if each}


@pytest.fixture(scope="module")
def played() -> Played:
    played = Played({})
    event.listen(Engine, "before_cursor_execute", played.look)
    try:
        played.result = run_virtual(SMALL)["result"]
    finally:
        event.remove(Engine, "before_cursor_execute", played.look)
    return played


@pytest.mark.timeout(600)
def test_the_same_seed_gives_the_same_result_byte_for_byte(played: Played) -> None:
    assert json.dumps(played.result) == json.dumps(run_virtual(SMALL)["result"])


@pytest.mark.timeout(600)
def test_no_turn_reads_a_table_that_grows_with_the_fleet_from_end_to_end(played: Played) -> None:
    often = {statement: played.scanned[statement] & GROWING for statement, n in played.executed.items() if n > OFTEN}
    assert len(often) > 20
    assert {statement: tables for statement, tables in often.items() if tables} == {}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_l11_a_rollout_to_4_000_devices() -> None:
    """100 000 take half an hour of a processor: `trainer simulate-virtual --devices 100000` (docs/scale.md)."""
    result = run_virtual(Scenario(4_000, seed=1))["result"]
    check(result, 4_000)
    good = result["rollouts"][0]
    assert good["steps"][-1]["running"] > good["steps"][-2]["running"]
