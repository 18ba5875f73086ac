"""Agents on the device's own llama.cpp engine, with real Phis: one of random weights, which only the grammar makes say
steps, and the demo's, which knows its trade."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged.agents import (
    Agent,
    GenerationPromptRequest,
    GenerationPromptResponse,
    LearnableAgent,
    Message,
    ModelConfig,
    Orchestra,
    PhiAgent,
    PhiAgentProps,
    RequestContext,
    RunLimits,
)
from edged.agents.models import LentModel, OwnEngine, open_model
from edged.agents.phi import NotGenerated
from edged.agents.schemas import compile_schema, faults
from edged.agents.steps import read_step
from edged.engines.base import EngineError, PromptTooLong
from tests.support.chatty import load, make_chatty
from tests.support.models import write_manifest
from tests.support.scripted import Scripted
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

CONTEXT = 2048  # tokens, of the random model
PROMPT, ANSWER = "line 1 read a 7 with score 0.9. What to do?\n", "accept the seven"
PHI_CONTEXT = 256  # of the demo's


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF of random weights."""
    size = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": CONTEXT}
    return make_chatty(tmp_path_factory.mktemp("chatty"), **size)


@pytest.fixture(scope="module")
def model(chatty: Path) -> Iterator[LentModel]:
    engine = load(chatty)
    yield LentModel(OwnEngine(engine, "chatty@1.0"))
    engine.close()


@pytest.fixture(scope="module")
def clerk(tmp_path_factory: pytest.TempPathFactory, phi: dict[str, Path]) -> Path:
    """A release with the demo's Phi."""
    folder = tmp_path_factory.mktemp("releases") / "clerk"
    folder.mkdir()
    shutil.copy(phi["model_gguf"], folder / "model.gguf")
    roles = {"model": "model.gguf", **write_prompt_golden(folder, [(PROMPT, ANSWER)])}
    write_manifest(folder, build_manifest(folder, "clerk@1.0", kind="llm", engine="llama", roles=roles))
    return folder


def measure(part: int, unit: Literal["mm", "in"] = "mm") -> float:
    """Measure a part."""
    return 12.5 if unit == "mm" else 0.49


LEAVES = st.sampled_from(
    [
        {"type": "boolean"}, {"enum": ["accept", "reject", 7]}, {"type": "integer", "minimum": 0, "maximum": 9},
        {"type": "string", "maxLength": 5}, {"type": "null"},
    ]
)  # fmt: skip
FIELDS = st.dictionaries(st.sampled_from(["verdict", "sure", "größe", 'a "b"']), LEAVES, min_size=1, max_size=3)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(fields=FIELDS, goal=st.text(max_size=40), seed=st.integers(0, 1000), warm=st.sampled_from([0.0, 1.0, 4.0]))
def test_a_model_of_random_weights_takes_steps_and_its_answers_fit(
    model: LentModel, fields: dict[str, Any], goal: str, seed: int, warm: float
) -> None:
    """A2."""
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    agent = Agent(model, "You inspect.", tools=[measure], output_schema=schema, max_tokens=400)
    agent.model_config = ModelConfig(type="local", name="chatty", temperature=warm, seed=seed)
    answer = asyncio.run(agent.auto_run(goal, max_steps=2))
    said = [message for message in agent.memory.history if message.role == "assistant"]
    assert said or "was cut off" in answer.text
    steps = [read_step(message.text) for message in said]  # raises for one that is none
    for step in steps:
        if step.action == "call_tool":
            assert faults(step.value, agent.tools["measure"].parameters) == ""
    if answer.role == "assistant":
        assert faults(answer.content, compile_schema(schema, "schema")) == ""
    else:
        assert "was cut off" in answer.text or "gave no final response within 2 steps" in answer.text


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(1, 120), steps=st.integers(1, 4), a_step=st.integers(1, 80))
def test_no_run_uses_more_tokens_than_it_may(model: LentModel, tokens: int, steps: int, a_step: int) -> None:
    used: list[int] = []

    class Counted:
        def say(self, request: Any, hear: Any = None) -> Any:
            said = model.say(request)
            used.append(said.end.answer_tokens)
            assert said.end.answer_tokens <= request.tokens_max <= a_step
            return said

    agent = Agent(Counted(), "x", tools=[measure], limits=RunLimits(tokens_max=tokens), max_tokens=a_step)  # type: ignore[arg-type]
    asyncio.run(agent.auto_run("?", max_steps=steps))
    assert sum(used) <= tokens and len(used) <= steps


def test_a_run_ends_at_the_next_token_when_it_is_cancelled_and_the_next_one_is_whole(model: LentModel) -> None:
    speaking = threading.Event()

    class Heard:
        def say(self, request: Any, hear: Any = None) -> Any:
            return model.say(request, lambda _piece: speaking.set())

    agent = Agent(Heard(), "x", output_schema={"ok": bool}, max_tokens=400)  # type: ignore[arg-type]

    async def both() -> Message:
        task = asyncio.create_task(agent.auto_run("tell me all"))
        assert await asyncio.to_thread(speaking.wait, 60)
        agent.cancel()
        return await task

    answer = asyncio.run(both())
    assert answer.role == "error" and "was cancelled" in answer.text
    assert isinstance(asyncio.run(agent.auto_run("again")).content, dict)


def test_a_run_of_no_time_says_so(model: LentModel) -> None:
    answer = asyncio.run(Agent(model, "x", limits=RunLimits(seconds_max=0.001)).auto_run("tell me all"))
    assert answer.role == "error" and ("took too long" in answer.text or "its time is over" in answer.text)


def test_the_documented_topology_on_a_local_folder(
    tmp_path: Path, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`from_pretrained` finds a release in a folder of the name, and its model runs in a process of its own."""
    folder = tmp_path / "mistralai" / "Mistral-7B-v0.1"
    folder.mkdir(parents=True)
    shutil.copy(chatty, folder / "model.gguf")
    manifest = build_manifest(folder, "mistral@0.1", kind="llm", engine="llama", roles={"model": "model.gguf"})
    write_manifest(folder, manifest)
    monkeypatch.chdir(tmp_path)
    local_model = open_model(ModelConfig(type="local", name="mistralai/Mistral-7B-v0.1"))
    agent = LearnableAgent(
        model=local_model, description="You are an expert code reviewer", learning_head="peft", agent_name="CodeReviewer",
        learning_head_config={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        output_schema={"bugs": bool},
    )  # fmt: skip
    assert agent.running() == ("mistral@0.1", "")
    topology = {"nodes": ["CodeReviewer"], "edges": []}
    result = asyncio.run(Orchestra.run(task="Review this Python code for bugs", topology=topology))
    assert isinstance(result.content["bugs"], bool), result.trace_text


def test_the_phi_agent_answers_with_a_confidence_piece_by_piece(clerk: Path) -> None:
    """P7."""
    agent = PhiAgent(props=PhiAgentProps(model_id=str(clerk), torch_device="cpu"), agent_name="phi")
    pieces: list[str] = []
    response = asyncio.run(agent.generate(GenerationPromptRequest(generation_prompt=PROMPT), hear=pieces.append))
    assert response.generation_prompt == PROMPT
    assert response.generated_response.strip() == ANSWER, "no special tokens in it"
    assert "".join(pieces) == response.generated_response and len(pieces) > 1
    assert (response.finish_reason, response.release) == ("stop", "clerk@1.0")
    assert response.confidence is not None and 0.9 < response.confidence <= 1
    # The same through an agent's door, with checked fields.
    asker = Agent(Scripted(), "x", allowed_peers=["phi"])
    said = asyncio.run(asker.invoke_agent("phi", {"generation_prompt": PROMPT}))
    again = GenerationPromptResponse.model_validate(said.content)
    assert again.confidence == pytest.approx(response.confidence, abs=0.01)
    assert again.model_copy(update={"confidence": response.confidence}) == response
    unfit = asyncio.run(agent.invoke({"prompt": PROMPT}, RequestContext()))
    assert unfit.role == "error" and unfit.text.startswith("Request validation failed")


def test_the_phi_agent_uses_the_whole_context_and_says_when_a_prompt_does_not_fit(clerk: Path) -> None:
    """P5."""
    agent = PhiAgent(props=PhiAgentProps(model_id=str(clerk)), limits=RunLimits(seconds_max=60))
    with pytest.raises(PromptTooLong, match=rf"{PHI_CONTEXT}"):
        asyncio.run(agent.generate("word " * 400))
    answer = asyncio.run(agent.invoke({"generation_prompt": "word " * 400}, RequestContext()))
    assert answer.role == "error" and str(PHI_CONTEXT) in answer.text
    with pytest.raises(NotGenerated, match="was cancelled"):
        asyncio.run(agent.generate(PROMPT, cancelled=lambda: True))


def test_a_gpu_that_is_not_there_is_said_before_anything_is_answered(clerk: Path) -> None:
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp has a GPU")
    with pytest.raises(EngineError, match=r'gpu_layers = "all", and this llama\.cpp finds no GPU; use "auto"'):
        PhiAgent(props=PhiAgentProps(model_id=str(clerk), torch_device="cuda:0"))
