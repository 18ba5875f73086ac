"""Each of the five tools as a command, with what it should do done (L3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import select
from typer.testing import CliRunner

from tests.unit.test_jobs import World
from tests.unit.test_tools import PASSED, judged, served
from trainer.cli import app
from trainer.database import events, rollouts


def said(world: World, *words: str) -> Any:
    config = str(world.host.config.data_dir.parent / "trainer.toml")
    done = CliRunner().invoke(app, ["tool", *words, "--config", config])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_l3_the_five_tools_are_commands(tmp_path: Path) -> None:
    world = World(tmp_path)
    judged(world, "digits@1.1", PASSED)
    with served(world):
        counted = said(world, "collect_samples", "--model", "digits", "--state", "labelled")
        assert [row["count"] for row in counted["samples"]] == [3, 3]
        pulled = said(
            world, "collect_samples", "--model", "digits", "--selector", "device=d2", "--pull", "--limit", "2"
        )
        assert (pulled["pulled"], world.commands("claim")) == (2, {"d2": ["d2-1", "d2-2"]})
        trained = said(world, "request_training", "--model", "digits")
        assert (trained["action"], trained["target_model"]) == ("training_triggered", "digits@1.2")
        begun = said(world, "deploy_model", "digits@1.1")
        assert (begun["release"], len(begun["canary"]), sorted(begun["devices"])) == ("digits@1.1", 1, ["d1", "d2"])
        figures = said(world, "query_metrics", "--model", "digits", "--hours", "2", "--group-by", "profile")
        assert [row["rollout_id"] for row in figures["rollouts"]] == [begun["rollout"]]
        assert figures["devices"] == ["d1", "d2"]
        assert said(world, "notify", "look at line 3", "--title", "line 3") == {"notified": True}
    with world.host.database.read() as connection:
        assert connection.execute(select(rollouts.c.release)).scalars().all() == ["digits@1.1"]
        texts = connection.execute(select(events.c.text).where(events.c.kind == "notice")).scalars().all()
    assert texts == ["look at line 3"]
