"""`trainer mcp` as a process, driven by the protocol's own client, beside a real `trainer serve` that decides (L3, L15)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from sqlalchemy import select

from edged.wire.messages import State
from tests.support.lived import lived
from tests.system.broker import free_port
from tests.unit.test_notices import SECRET, Hook
from trainer import fleet
from trainer.database import Database, events, requests
from trainer.host import new_id

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.close()


@pytest.fixture
def config(tmp_path: Path, hook: Hook) -> Iterator[Path]:
    """A trainer that serves; its broker is away, which decisions do not need."""
    path = tmp_path / "trainer.toml"
    path.write_text(
        f'name = "host"\ndata_dir = "data"\n[broker]\nport = {free_port()}\n[http]\nport = 0\n'
        f'[notify]\nurls = ["{hook.url}"]\n'
        '[models.digits]\ncheckpoint = "missing.pt"\nlabels = ["1"]\nholdout = "h"\nholdout_clean = "c"\ncalibration = "k"\n'
    )
    with (tmp_path / "serve.log").open("wb") as log:
        command = [sys.executable, "-m", "trainer", "serve", "--verbose", "--config", str(path)]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        yield path
        assert process.poll() is None, (tmp_path / "serve.log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


async def drive(config: Path, *calls: tuple[str, dict[str, Any]]) -> tuple[list[Any], list[tuple[bool, str]]]:
    """(the tools as the client sees them, is_error and text of each call)."""
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "trainer", "mcp", "--config", str(config)], env=dict(os.environ), cwd=ROOT
    )
    async with stdio_client(server) as (incoming, outgoing), ClientSession(incoming, outgoing) as session:
        await session.initialize()
        listed = (await session.list_tools()).tools
        answers = []
        for name, arguments in calls:
            result = await session.call_tool(name, arguments)
            (content,) = result.content
            answers.append((bool(result.isError), content.text))
        return listed, answers


def test_l3_an_agent_uses_the_tools_over_mcp_and_l15_gets_no_further_than_others(config: Path, hook: Hook) -> None:
    listed, answers = anyio.run(
        drive,
        config,
        ("query_metrics", {"model": "digits"}),
        ("collect_samples", {"model": "digits"}),
        ("notify", {"text": "look at line 3", "level": "warning"}),
        ("request_training", {"model": "digits"}),
        ("deploy_model", {"release": "digits@1.0"}),
        ("request_training", {"model": "digits", "force": True}),
        ("delete_samples", {}),
    )
    assert [tool.name for tool in listed] == [
        "collect_samples", "request_training", "deploy_model", "query_metrics", "notify",
    ]  # fmt: skip
    assert listed[1].inputSchema["required"] == ["model"]
    assert "minimum interval" in listed[1].description
    failed, texts = [error for error, _ in answers], [text for _, text in answers]
    assert failed == [False, False, False, True, True, True, True]
    assert json.loads(texts[0])["jobs"] == []
    assert json.loads(texts[1])["samples_new"] == 0
    assert json.loads(texts[2]) == {"notified": True}
    assert texts[3] == "digits is not trained: no labelled sample"
    assert "digits@1.0" in texts[4]
    assert "force" in texts[5]
    assert "delete_samples" in texts[6]
    database = Database(config.parent / "data" / "trainer.sqlite")
    with database.read() as connection:
        said = connection.execute(select(events).where(events.c.kind == "notice")).one()
        orders = connection.execute(select(requests.c.kind, requests.c.body).order_by(requests.c.created)).all()
    database.close()
    assert (said.text, said.detail["level"]) == ("look at line 3", "warning")
    assert [row.kind for row in orders] == ["notify", "train", "rollout_start"]
    assert all(row.body["by"] == "agent" for row in orders)
    until = time.monotonic() + 20
    while not hook.said and time.monotonic() < until:
        time.sleep(0.05)
    assert [body["message"] for body in hook.said] == ["look at line 3"]
    assert hook.said[0]["type"] == "warning"
    assert SECRET not in (config.parent / "serve.log").read_text()  # not even in a log of everything


def test_l3_an_agent_sees_how_right_the_fleet_is_also_before_the_windows_that_are_kept(config: Path) -> None:
    database, now = Database(config.parent / "data" / "trainer.sqlite"), time.time()
    with database.write() as connection:
        for device, days, right in (("d1", 20, 57), ("d2", 20, 45), ("d1", 1, 60)):
            birth = State(id=new_id(), ts=now, boot="b", seq=1, state="online", device=device, profile=f"pi-{device}")
            fleet.take_state(connection, device, birth, now)
            lived(connection, device, now - days * 86400, items=1000, audits=60, right=right)
        fleet.prune(connection, now)
    database.close()
    listed, answers = anyio.run(
        drive, config, ("query_metrics", {"hours": 720, "group_by": ["profile"]}), ("query_metrics", {"hours": 5000})
    )
    asked = listed[3].inputSchema["properties"]
    assert (asked["hours"]["maximum"], asked["group_by"]["type"]) == (4320, "array")
    assert "95 % interval" in listed[3].description
    (row,) = json.loads(answers[0][1])["releases"]
    assert row["items"] == 3000
    assert row["accuracy"]["value"] == pytest.approx(162 / 180)
    assert row["accuracy"]["low"] < row["accuracy"]["value"] < row["accuracy"]["high"]
    assert row["groups"]["profile=pi-d2"]["accuracy"]["value"] == pytest.approx(45 / 60)
    assert answers[1][0] and "4320" in answers[1][1]


def test_a_second_trainer_on_the_same_database_says_so_and_ends(config: Path) -> None:
    while "serving releases" not in (config.parent / "serve.log").read_text():
        time.sleep(0.05)
    command = [sys.executable, "-m", "trainer", "serve", "--config", str(config)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert second.returncode == 1
    assert "another `trainer serve` works on this database (host): stop it first" in second.stderr
