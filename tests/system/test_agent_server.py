"""Agents on a server of their own kind: llama-cpp-python's, a process that speaks OpenAI's protocol around a tiny Phi.

The model's weights are random: whatever it says, only the grammar makes it a step.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import pytest

from edged.agents import Agent, Message, ModelConfig, RunLimits
from edged.agents.steps import read_step
from tests.support.chatty import make_chatty
from tests.support.device import until
from tests.support.ports import free_port

KEY = "sk-l0cal"
CONTEXT = 1024  # tokens
VERDICT = {"verdict": Literal["accept", "reject"], "sure": bool}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the running server; its model is called `tiny`."""
    folder = tmp_path_factory.mktemp("server")
    gguf = make_chatty(folder, max_position_embeddings=CONTEXT, original_max_position_embeddings=CONTEXT)
    port = free_port()
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", gguf, "--model_alias", "tiny", "--n_ctx", str(CONTEXT),
        "--host", "127.0.0.1", "--port", str(port), "--api_key", KEY, "--n_threads", "1", "--verbose", "false",
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})

    def answers() -> bool:
        assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
        try:
            found = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        except httpx.HTTPError:
            return False
        return found.status_code == 200

    try:
        until("the server answers", answers, 60)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def config(server: str, **more: Any) -> ModelConfig:
    given: dict[str, Any] = {"api_key": KEY, "temperature": 4.0, "max_tokens": 300} | more
    return ModelConfig(type="api", provider="llama-cpp-python", name="tiny", base_url=server, **given)


def test_every_step_is_a_step_and_tools_are_called_and_answers_fit(server: str) -> None:
    """A2."""
    called: list[str] = []

    def look(camera: Literal["left", "right"]) -> str:
        """Look through a camera."""
        called.append(camera)
        return f"the {camera} camera sees a scratch"

    answers: list[Message] = []
    after_a_call = 0
    for seed in range(40):  # until chance has it that a run calls the tool and then answers
        agent = Agent(config(server, seed=seed), "You inspect parts.", tools=[look], output_schema=VERDICT)
        before = len(called)
        answers.append(asyncio.run(agent.auto_run("Is the part fine?", max_steps=4)))
        after_a_call += len(called) > before and answers[-1].role == "assistant"
        said = [message for message in agent.memory.history if message.role == "assistant"]
        for message in said:
            read_step(message.text)  # every one of them is a step
        seen = [message.text for message in agent.memory.history if message.role == "tool"]
        assert seen == [f"result of look: the {camera} camera sees a scratch" for camera in called[before:]]
        if after_a_call:
            break
    assert set(called) <= {"left", "right"} and called
    assert after_a_call, "a run that called the tool has answered"
    for answer in answers:
        if answer.role == "assistant":
            jsonschema.validate(
                answer.content,
                {"properties": {"verdict": {"enum": ["accept", "reject"]}, "sure": {"type": "boolean"}},
                 "required": ["verdict", "sure"]},
            )  # fmt: skip
        else:
            honest = "gave no final response within 4 steps", "was cut off"
            assert any(why in answer.text for why in honest), answer.text


def test_a_conversation_longer_than_the_servers_context_goes_on(server: str) -> None:
    agent = Agent(config(server, temperature=0.0), "x", output_schema={"ok": bool})
    for number in range(5):
        answer = asyncio.run(agent.auto_run(f"part {number}: " + "a scratch here, " * 12))
        assert answer.role == "assistant", answer.text
    assert len(agent.memory.shown) < len(agent.memory.history), "some of it had to be left out"
    alone = asyncio.run(agent.auto_run("a scratch " * 1000))
    assert alone.role == "error" and f"maximum context length is {CONTEXT}" in alone.text


def test_limits_and_wrong_keys_are_errors_that_say_so(server: str) -> None:
    agent = Agent(config(server), "x", limits=RunLimits(tokens_max=5))
    answer = asyncio.run(agent.auto_run("?"))
    assert answer.role == "error" and "was cut off" in answer.text
    stranger = Agent(config(server, api_key="sk-guessed", timeout_s=5), "x")
    answer = asyncio.run(stranger.auto_run("?"))
    assert answer.role == "error" and "it answered 401" in answer.text
    assert "sk-guessed" not in answer.text and KEY not in answer.text


def test_its_json_is_the_schemas(server: str) -> None:
    """The server that is told a schema in OpenAI's own form refuses it: this is why the provider is named."""
    other = ModelConfig(type="api", name="tiny", base_url=server, api_key=KEY, timeout_s=1)
    answer = asyncio.run(Agent(other, "x", limits=RunLimits(seconds_max=20)).auto_run("?"))
    assert answer.role == "error" and "json_object" in json.dumps(answer.text)
