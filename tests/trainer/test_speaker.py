"""Agents on transformers models with the weights at hand: as on a device, before anything is exported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from peft import PeftModel
from phi_answers import one_thread
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo.phi import EXAMPLES
from edged.agents import Agent, ModelConfig
from edged.agents.schemas import compile_schema, faults
from edged.agents.steps import read_step
from edged.engines.base import EngineError, GenerateRequest, Generator, PromptTooLong
from tests.support.chatty import ask, make_chatty
from tests.support.json_schemas import SCHEMAS
from trainer.checkpoints import CheckpointError
from trainer.tuners.lora.data import Example
from trainer.tuners.peft_head import PeftHead
from trainer.tuners.speaker import CheckpointGenerator

CONTEXT = 2048  # tokens of the random model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def clerk(phi: dict[str, Path]) -> Iterator[CheckpointGenerator]:
    """The demo's Phi, which knows its trade."""
    engine = CheckpointGenerator(phi["base"])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model of random weights."""
    folder = tmp_path_factory.mktemp("chatty")
    make_chatty(folder, max_position_embeddings=CONTEXT, original_max_position_embeddings=CONTEXT)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def engine(chatty: Path) -> Iterator[CheckpointGenerator]:
    engine = CheckpointGenerator(chatty)
    yield engine
    engine.close()


def test_it_says_what_transformers_says(phi: dict[str, Path], clerk: CheckpointGenerator) -> None:
    assert isinstance(clerk, Generator)
    words, net = AutoTokenizer.from_pretrained(phi["base"]), AutoModelForCausalLM.from_pretrained(phi["base"])
    for item in EXAMPLES[:4]:
        ids = words(item.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            made = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        said, end = ask(clerk, prompt=item.prompt, tokens_max=32)
        assert said == words.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == item.base
        assert end.reason == "stop" and end.prompt_tokens == ids.shape[1]


def test_what_the_last_prompt_began_with_is_not_computed_again(engine: CheckpointGenerator) -> None:
    long = "the line reads a seven, ask the teacher. " * 8
    first = ask(engine, prompt=long, tokens_max=8)
    assert first[1].reused_tokens == 0
    again, end = ask(engine, prompt=long + first[0] + " x", tokens_max=8)
    assert end.reused_tokens > 0.8 * end.prompt_tokens
    ask(engine, prompt="something else", tokens_max=1)
    fresh, end = ask(engine, prompt=long + first[0] + " x", tokens_max=8)
    assert end.reused_tokens == 0 and fresh == again


@pytest.mark.parametrize("name", ["keys", "enum", "refs", "number range"])
def test_answers_keep_to_a_schema(engine: CheckpointGenerator, name: str) -> None:
    for seed in range(4):
        said, end = ask(engine, prompt="the line", schema=SCHEMAS[name], seed=seed, temperature=2.0, tokens_max=300)
        assert end.reason in ("stop", "length")
        jsonschema.validate(json.loads(said), SCHEMAS[name])
    assert ask(engine, prompt="the", schema=SCHEMAS["refs"], tokens_max=3)[1].reason == "truncated"


def scratches(part: int) -> int:
    """Count the scratches of a part."""
    return part - 4


def test_an_agent_takes_steps_on_a_checkpoint(engine: CheckpointGenerator) -> None:
    schema = {"type": "object", "properties": {"verdict": {"enum": ["accept", "reject"]}}, "required": ["verdict"]}
    whole = 0
    for seed in range(4):
        agent = Agent(engine, "You inspect.", tools=[scratches], output_schema=schema, max_tokens=400)
        agent.model_config = ModelConfig(type="local", name="chatty", temperature=1.0, seed=seed)
        answer = asyncio.run(agent.auto_run("part 7", max_steps=3))
        for said in [message for message in agent.memory.history if message.role == "assistant"]:
            read_step(said.text)  # raises for a text that is none
        if answer.role == "assistant":
            whole += 1
            assert faults(answer.content, compile_schema(schema, "schema")) == ""
        else:
            assert "was cut off" in answer.text or "gave no final response" in answer.text
    assert whole > 0


def test_agents_that_share_a_generator_take_turns(engine: CheckpointGenerator) -> None:
    one, other = Agent(engine, "x", output_schema={"ok": bool}), Agent(engine, "x", output_schema={"ok": bool})
    assert one.model is other.model

    async def both() -> list[Any]:
        return await asyncio.gather(one.auto_run("a"), other.auto_run("b"))

    for answer in asyncio.run(both()):
        assert isinstance(answer.content, dict), answer.text


def test_the_head_that_was_tuned_speaks(phi: dict[str, Path], tmp_path: Path) -> None:
    prompt = EXAMPLES[0].prompt
    head = PeftHead(phi["base"], {"r": 8, "lora_alpha": 32, "target_modules": ["qkv_proj", "o_proj"]})
    data = [Example(prompt=prompt, answer=" ask the teacher")] * 8
    head.tune(data, tmp_path / "out", tmp_path / "scratch", epochs=6, batch=8, learning_rate=5e-3)
    assert head.adapter is not None
    words, net = AutoTokenizer.from_pretrained(phi["base"]), AutoModelForCausalLM.from_pretrained(phi["base"])
    before = _first(net, words, prompt)
    after = _first(PeftModel.from_pretrained(net, head.adapter), words, prompt)
    engine, sure = CheckpointGenerator(phi["base"]), []
    for adapter, scale in ((None, 1.0), (head.adapter, 1.0), (head.adapter, 0.0), (head.adapter, 1.0), (None, 1.0)):
        engine.attach(adapter, scale)
        sure.append(ask(engine, prompt=prompt, tokens_max=1)[1].mean_logprob)
    assert abs(after - before) > 0.001
    assert sure == pytest.approx([before, after, before, after, before], abs=1e-4)
    with pytest.raises(EngineError, match="not a LoRA adapter for"):
        engine.attach(tmp_path)
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.generate(GenerateRequest("x"))


@torch.no_grad()
def _first(net: Any, words: Any, prompt: str) -> float:
    """The log-probability of the likeliest first token of an answer."""
    logits = net(input_ids=words(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
    return float(logits.log_softmax(0).max())


def test_what_cannot_be_spoken_with_is_named(phi: dict[str, Path], clerk: CheckpointGenerator, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no Hugging Face checkpoint is there"):
        CheckpointGenerator(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder here"):
        CheckpointGenerator("no/such/model/at/all")
    with pytest.raises(PromptTooLong):
        clerk.generate(GenerateRequest("word " * 2000))
    with pytest.raises(EngineError, match="the prompt is empty"):
        clerk.generate(GenerateRequest(messages=()))
