"""An agent on a server whose model does not keep to the form that it was asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from edged.agents import Agent, Message, ModelConfig, RunLimits
from edged.engines.openai_wire import mended
from tests.support.bad_server import BadServer, chat, reply
from tests.support.scripted import final

RIGHT = json.dumps(final({"verdict": "reject"}))
USAGE = {"prompt_tokens": 0, "completion_tokens": 0}


def asked(*texts: str, limits: RunLimits | None = None, **fields: Any) -> tuple[Message, list[dict[str, Any]]]:
    """What an agent answers whose server says these texts, and what it was asked."""
    acts = [reply(200, chat(text, **fields)) for text in texts]
    with BadServer(*acts, reply(500, b"the script is over")) as server:
        config = ModelConfig(type="api", name="large", base_url=server.url, api_key="k")  # type: ignore[arg-type]
        agent = Agent(config, agent_name="cloudy", output_schema={"verdict": str}, limits=limits)
        answer = asyncio.run(agent.auto_run("Is part 7 fine?", max_steps=4))
        bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for _, request in server.requests]
    return answer, bodies


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("The part is to be rejected.", "the step is no JSON"),
        ('{"verdict": "reject"}', "next_action is none of"),
        (
            '{"thought": "", "next_action": "final_response", "action_input": {}}',
            "action_input of final_response needs",
        ),
    ],
)
def test_what_is_no_step_is_asked_for_again_with_what_is_wrong(wrong: str, said: str) -> None:
    answer, bodies = asked(wrong, RIGHT)
    assert (answer.role, answer.content) == ("assistant", {"verdict": "reject"})
    assert len(bodies) == 2
    assert wrong == bodies[1]["messages"][-2]["content"]
    assert said in bodies[1]["messages"][-1]["content"]


def test_prose_for_ever_ends_with_the_steps() -> None:
    answer, bodies = asked(*["No."] * 4)
    assert (answer.role, len(bodies)) == ("error", 4)
    assert "no final response within 4 steps" in answer.text


@pytest.mark.parametrize("fence", ["```json\n{}\n```", "```\n{}\n```\n", "  ```JSON\n  {}  \n```  "])
def test_a_step_in_a_fence_is_the_step(fence: str) -> None:
    answer, bodies = asked(fence.replace("{}", RIGHT))
    assert (answer.content, len(bodies)) == ({"verdict": "reject"}, 1)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('"```\\nno fence\\n```"', '"```\\nno fence\\n```"'),
        ("```json\n[1]\n```", "[1]"),
        ('```json\n"a\tb"\n```', '"a\\tb"'),
        ("```json\nnot it\n```", "```json\nnot it\n```"),
        ("``` [1] ```", "``` [1] ```"),
    ],
)
def test_mended(text: str, means: str) -> None:
    assert mended(text) == means


def test_the_limit_of_tokens_acts_for_a_server_that_does_not_count_them() -> None:
    long = json.dumps({"thought": "x" * 190, "next_action": "call_tool", "action_input": {}})
    answer, bodies = asked(*[long] * 4, limits=RunLimits(tokens_max=100), usage=USAGE)
    assert len(bodies) == 2, "60 tokens each, about"
    assert "it has used its 100 tokens" in answer.text
