"""`trainer mcp` as a process, driven by the protocol's own client, beside a real `trainer serve` that decides (L3, L15)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from sqlalchemy import func, select

from edged.agents.learning import FIVE, learning_agent, trainer_tools
from edged.agents.tools import Tool
from edged.wire.messages import State
from tests.support.lived import lived
from tests.support.scripted import Scripted, call, final
from tests.system.broker import free_port
from tests.unit.test_jobs import World
from tests.unit.test_notices import SECRET, Hook
from tests.unit.test_tools import FAILED, PASSED, judged
from trainer import fleet
from trainer.database import Database, events, jobs, requests, rollouts, samples
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
    with serving(path):
        yield path


@contextmanager
def serving(path: Path) -> Iterator[None]:
    """`trainer serve`."""
    with (path.parent / "serve.log").open("wb") as log:
        command = [sys.executable, "-m", "trainer", "serve", "--verbose", "--config", str(path)]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        yield
        assert process.poll() is None, (path.parent / "serve.log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def mcp(config: Path) -> StdioServerParameters:
    """`trainer mcp`."""
    return StdioServerParameters(
        command=sys.executable, args=["-m", "trainer", "mcp", "--config", str(config)], env=dict(os.environ), cwd=ROOT
    )


@contextmanager
def tools_over_mcp(config: Path) -> Iterator[dict[str, Tool]]:
    """The tools of an agent that uses them through the protocol's own client, which lives in a thread of its own."""
    with start_blocking_portal() as portal, ExitStack() as stack:
        streams = stack.enter_context(portal.wrap_async_context_manager(stdio_client(mcp(config))))
        session = stack.enter_context(portal.wrap_async_context_manager(ClientSession(*streams)))
        portal.call(session.initialize)

        def use(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
            result = portal.call(session.call_tool, name, arguments)
            (content,) = result.content
            if result.isError:
                raise RuntimeError(content.text)
            answer: dict[str, Any] = json.loads(content.text)
            return answer

        listed = portal.call(session.list_tools).tools
        described = {
            t.name: SimpleNamespace(name=t.name, description=t.description, schema=t.inputSchema) for t in listed
        }
        yield trainer_tools(described, use)


async def drive(config: Path, *calls: tuple[str, dict[str, Any]]) -> tuple[list[Any], list[tuple[bool, str]]]:
    """(the tools as the client sees them, is_error and text of each call)."""
    async with stdio_client(mcp(config)) as (incoming, outgoing), ClientSession(incoming, outgoing) as session:
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


def test_l3_the_learning_agent_works_over_mcp_and_its_donts_are_refused_under_the_tools(tmp_path: Path) -> None:
    """Twelve labelled samples, a release that its gate has passed, one that it has not, one that nobody has judged."""
    world = World(tmp_path)
    for release, verdict in (("digits@1.5", FAILED), ("digits@1.6", None), ("digits@1.7", PASSED)):
        judged(world, release, verdict)
    for number in range(3, 6):
        world.sample("d1", number)
        world.sample("d2", number)
    world.host.database.close()
    config = tmp_path / "trainer.toml"
    seldom = config.read_text().replace(
        "threshold = 3\nminimum_interval_s = 0", "threshold = 1000\nminimum_interval_s = 3600"
    )
    config.write_text(f"{seldom}[broker]\nport = {free_port()}\n[http]\nport = 0\n")
    train = call("request_training", model="digits")
    steps = [
        call("query_metrics", model="digits"), call("collect_samples", model="digits"), train,
        call("deploy_model", release="digits@1.7"), call("notify", text="training and rollout have begun"),
        train, call("request_training", model="digits", force=True),
        call("collect_samples", model="digits", state="deleted"), call("deploy_model", release="digits@1.5"),
        call("deploy_model", release="digits@1.6"), call("delete_samples"),
    ]  # fmt: skip
    model = Scripted(*steps, final({"action": "deployment_started", "reason": "1.7 has passed its gate"}))
    with serving(config), tools_over_mcp(config) as tools:
        assert tuple(tools) == FIVE
        agent = learning_agent(model, tools)
        answer = asyncio.run(agent.auto_run("Look after the model digits.", max_steps=len(steps) + 1))
    assert answer.content == {"action": "deployment_started", "reason": "1.7 has passed its gate"}, answer.text
    told = [request.messages[-1].content for request in model.asked[1:]]
    for number, tool in enumerate(["query_metrics", "collect_samples", "request_training", "deploy_model", "notify"]):
        assert told[number].startswith(f"result of {tool}: "), told[number]
    assert '"samples_new": 12' in told[1] and '"action": "training_triggered"' in told[2]
    assert [said.split(":")[0] for said in told[5:]] == [
        "error of request_training", "error of request_training", "error of collect_samples", "error of deploy_model",
        "error of deploy_model", "error of delete_samples",
    ]  # fmt: skip
    assert "digits is not trained: " in told[5], "a second training at once"
    assert "the gate refused it" in told[8] and "no gate has judged it" in told[9]
    assert (
        "its arguments are wrong" in told[6] and "its arguments are wrong" in told[7] and "there is no tool" in told[10]
    )
    database = Database(tmp_path / "data" / "trainer.sqlite")
    with database.read() as connection:
        counts = [
            connection.execute(select(func.count()).select_from(t)).scalar_one() for t in (jobs, rollouts, samples)
        ]
        assert counts == [1, 1, 12]
        assert connection.execute(select(rollouts.c.release)).scalar_one() == "digits@1.7"
        assert {row.body["by"] for row in connection.execute(select(requests.c.body))} == {"agent"}
    database.close()


def test_a_second_trainer_on_the_same_database_says_so_and_ends(config: Path) -> None:
    while "serving releases" not in (config.parent / "serve.log").read_text():
        time.sleep(0.05)
    command = [sys.executable, "-m", "trainer", "serve", "--config", str(config)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert second.returncode == 1
    assert "another `trainer serve` works on this database (host): stop it first" in second.stderr
