"""Agents on ONNX Phis, of random weights: only the mask over the vocabulary makes them say steps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged.agents import Agent, ModelConfig
from edged.agents.models import LentModel, open_model
from edged.agents.schemas import compile_schema, faults
from edged.agents.steps import read_step
from edged.turns import never
from tests.support.chatty import make_chatty_onnx
from tests.support.device import Device, tables
from tests.system.broker import Broker

CONTEXT = 2048  # tokens
VERDICT = {"type": "object", "properties": {"verdict": {"enum": ["accept", "reject"]}}, "required": ["verdict"]}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": CONTEXT}
    return make_chatty_onnx(tmp_path_factory.mktemp("chatty"), **size)


@pytest.fixture(scope="module")
def model(release: Path) -> Iterator[LentModel]:
    """The release's model in a process of its own, as an agent outside of a daemon loads it."""
    opened = open_model(ModelConfig(type="local", name=str(release)))
    assert isinstance(opened, LentModel)
    yield opened
    with opened._lessor.lent(never) as (generator, _, _):
        generator.close()


def scratches(part: int) -> int:
    """Count the scratches of a part."""
    return part - 4


FIELDS = st.dictionaries(
    st.sampled_from(["sure", "größe", 'a "b"']),
    st.sampled_from([{"type": "boolean"}, {"enum": ["ja", 7]}, {"type": "integer", "minimum": 0, "maximum": 9}]),
    min_size=1,
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=FIELDS, goal=st.text(max_size=30), seed=st.integers(0, 1000), warm=st.sampled_from([0.0, 1.0, 4.0]))
def test_a_model_of_random_weights_takes_steps_and_its_answers_fit(
    model: LentModel, fields: dict[str, Any], goal: str, seed: int, warm: float
) -> None:
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    agent = Agent(model, "You inspect.", tools=[scratches], output_schema=schema, max_tokens=300)
    agent.model_config = ModelConfig(type="local", name="chatty", temperature=warm, seed=seed)
    answer = asyncio.run(agent.auto_run(goal, max_steps=2))
    said = [message for message in agent.memory.history if message.role == "assistant"]
    assert said or "was cut off" in answer.text
    for step in [read_step(message.text) for message in said]:  # raises for a text that is none
        if step.action == "call_tool":
            assert faults(step.value, agent.tools["scratches"].parameters) == ""
    if answer.role == "assistant":
        assert faults(answer.content, compile_schema(schema, "schema")) == ""
    else:
        assert "was cut off" in answer.text or "gave no final response within 2 steps" in answer.text


def test_a_step_that_is_cut_off_says_so(model: LentModel) -> None:
    answer = asyncio.run(Agent(model, "You inspect.", output_schema=VERDICT, max_tokens=5).auto_run("part 7"))
    assert answer.role == "error" and "was cut off" in answer.text


def test_a_device_answers_with_an_agent_on_an_onnx_slot(tmp_path: Path, broker: Broker, release: Path) -> None:
    inspector = {"slot": "tongue", "instruction": "You inspect parts.", "output_schema": VERDICT, "max_tokens": 500}
    plan = tables(tmp_path, "dev1", broker, None) | {"pipelines": {}, "agents": {"inspector": inspector}}
    plan |= {"slots": {"tongue": {"seed": release, "probation_s": 0.5}}}
    with Device(tmp_path, plan) as device:
        checked = device.cli("check", "--json")
        assert [f["level"] for f in json.loads(checked.stdout) if f["name"] == "agents.inspector"] == ["ok"]
        done = device.cli("agent", "run", "inspector", "--json", json.dumps({"part": 7}))
        assert done.returncode == 0, done.stderr + device.log()
        assert json.loads(done.stdout)["verdict"] in ("accept", "reject")
