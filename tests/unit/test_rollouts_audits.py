"""How many answers are checked for the sake of a watch, where somebody was told to check more anyway (L12)."""

from __future__ import annotations

from pathlib import Path

from tests.unit.test_rollouts import HOUR, NEW, QUICK, WINDOW_S, World
from trainer import fleet


def test_l12_who_was_told_to_check_more_than_the_watch_needs_goes_on_checking_as_much(tmp_path: Path) -> None:
    """Each of the two shares for itself."""
    world = World(tmp_path, rollout=QUICK)
    world.past()
    policies = {name: {"line": {"audit_share": 0.5, "empty_share": 0.01}} for name in world.names}
    with world.host.database.write() as connection:
        for name, policy in policies.items():
            fleet.desire(connection, name, policy=policy, start_from={"models": {}})
    world.begin()
    for _ in range(2):  # not before: half of all answers are more than the watch plans
        world.clock += WINDOW_S
        for name in world.shown()["canary"]:
            world.active[name], world.update[name] = NEW, "committed"
            world.report(name)
        world.rollouts.tick()
    assert world.shown()["status"] == "watching"
    told = world.told("policy")
    assert {each["line"]["audit_share"] for each in told.values()} == {0.5}
    assert [told[name]["line"]["empty_share"] > 0.01 for name in world.names] == [True] * 10
    world.live(2 * HOUR)
    assert world.shown()["status"] == "done"
    assert world.told("policy") == policies
