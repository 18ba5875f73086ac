"""The learning agent with the five tools: what it does on a real trainer's database, and that no words of its model get
around what it must not do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from edged.agents.learning import FIVE, learning_agent, trainer_tools
from edged.agents.schemas import for_grammar
from edged.engines.base import GenerateRequest
from edged.engines.constrain import grammar
from tests.support.scripted import Scripted, call, final
from tests.unit.test_jobs import World
from tests.unit.test_tools import FAILED, judged, served
from trainer.database import events, jobs, rollouts, samples
from trainer.tools import TOOLS, Tools

pytestmark = pytest.mark.usefixtures("each_database")


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[tuple[World, Tools]]:
    """A trainer at work, which trains at most once an hour."""
    world = World(tmp_path)
    own = world.host.config.model("digits").model_copy(update={"minimum_interval_s": 3600.0})
    world.host.config = world.host.config.model_copy(update={"models": {"digits": own}})
    with served(world) as tools:
        yield world, tools


def run(tools: Tools, *lines: Any) -> tuple[Any, list[str]]:
    """The agent's answer, and what its model was told after each step."""
    model = Scripted(*lines)
    agent = learning_agent(model, trainer_tools(TOOLS, tools.call))
    answer = asyncio.run(agent.auto_run("Look after the model digits."))
    return answer, [request.messages[-1].content for request in model.asked[1:]]


def count(world: World, table: Any) -> int:
    with world.host.database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def test_it_has_the_five_tools_and_no_other() -> None:
    tools = trainer_tools(TOOLS, lambda name, arguments: {})
    assert tuple(tools) == FIVE == tuple(TOOLS)
    for name, tool in tools.items():
        assert tool.parameters == json.loads(json.dumps(TOOLS[name].schema))
        grammar(for_grammar(tool.parameters))  # a small model can be held to it
    with pytest.raises(ValueError, match="has no tool notify"):
        trainer_tools({name: tool for name, tool in TOOLS.items() if name != "notify"}, lambda name, arguments: {})
    with pytest.raises(ValueError, match="has the tools collect_samples"):
        learning_agent(Scripted(), {})


def test_it_collects_trains_and_answers_with_the_documented_fields(trainer: tuple[World, Tools]) -> None:
    world, tools = trainer

    def triggered(request: GenerateRequest) -> str:
        said = json.loads(request.messages[-1].content.removeprefix("result of request_training: "))
        return json.dumps(final(said))

    answer, told = run(
        tools, call("query_metrics", model="digits"), call("collect_samples", model="digits"),
        call("request_training", model="digits"), triggered,
    )  # fmt: skip
    assert answer.role == "assistant", answer.text
    assert sorted(answer.content) == [
        "action", "estimated_completion", "reason", "samples_collected", "target_model", "training_job_id",
    ]  # fmt: skip
    assert (answer.content["action"], answer.content["samples_collected"]) == ("training_triggered", 6)
    assert answer.content["estimated_completion"].endswith("Z")
    assert '"samples_new": 6' in told[1]
    assert count(world, jobs) == 1


def test_it_cannot_say_that_it_trains_without_the_fields_of_the_job(trainer: tuple[World, Tools]) -> None:
    world, tools = trainer
    bare = final({"action": "training_triggered", "reason": "more than 100 new samples"})
    answer, _ = run(tools, bare, bare)
    assert answer.role == "error" and "Response validation failed" in answer.text
    assert count(world, jobs) == 0


def test_it_does_not_train_constantly(trainer: tuple[World, Tools]) -> None:
    world, tools = trainer
    train = call("request_training", model="digits")
    answer, told = run(tools, train, train, train, final({"action": "nothing", "reason": "one is running"}))
    assert count(world, jobs) == 1
    assert all("error of request_training: request_training failed: ToolRefused" in said for said in told[1:3])
    assert answer.content == {"action": "nothing", "reason": "one is running"}


def test_it_does_not_deploy_what_was_not_validated(trainer: tuple[World, Tools]) -> None:
    world, tools = trainer
    judged(world, "digits@1.5", FAILED)
    judged(world, "digits@1.6", None)
    deploys = [call("deploy_model", release=release) for release in ("digits@1.5", "digits@1.6", "digits@9.9")]
    _, told = run(tools, *deploys, final({"action": "nothing", "reason": "refused"}))
    assert count(world, rollouts) == 0
    assert all(said.startswith("error of deploy_model: ") for said in told)


@pytest.mark.parametrize(
    "step",
    [
        call("request_training", model="digits", force=True),
        call("request_training", model="digits", by="operator"),
        call("collect_samples", model="digits", state="deleted"),
        call("collect_samples", model="digits", label_confidence_min=0.0),
        call("delete_samples", model="digits"),
        call("deploy_model", release="digits@1.5", skip_gate=True),
        call("notify", text=""),
    ],
)
def test_what_no_tool_offers_is_refused_before_the_trainer_hears_of_it(trainer: tuple[World, Tools], step: Any) -> None:
    world, tools = trainer
    before = count(world, samples)
    _, (told, *_) = run(tools, step, final({"action": "nothing", "reason": "refused"}))
    assert told.startswith("error of ") and ("its arguments are wrong" in told or "there is no tool" in told)
    assert (count(world, jobs), count(world, rollouts), count(world, samples)) == (0, 0, before)


def test_it_tells_people(trainer: tuple[World, Tools]) -> None:
    world, tools = trainer
    _, told = run(tools, call("notify", text="digits is fine"), final({"action": "notified", "reason": "weekly"}))
    assert told[0].startswith("result of notify: ")
    with world.host.database.read() as connection:
        assert "digits is fine" in str(connection.execute(select(events)).all())
