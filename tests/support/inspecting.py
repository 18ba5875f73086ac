"""A small Phi-3 that really is an agent, twice: it inspects parts with a tool, and it sorts orders into bins. About parts it
follows a rule that is wrong for the plant; about orders nothing is wrong.

It is trained on what the runtime of agents really asks: agents made from the tables of a device's configuration run here on
a model that knows each step beforehand, and what they ask is what the model learns to answer.

    python -m tests.support.inspecting BUILD_DIR    makes it, writes it as GGUF and prints the paths as JSON
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from bench.kept import kept
from bench.small_phi import Row, Schooling, cached, tokenizer_of, train
from edged.agents import Agent
from edged.agents.building import build, let_find
from edged.agents.memory import MemoryManager
from edged.agents.models import offer_slot
from edged.agents.registry import AgentRegistry
from edged.agents.steps import final_step
from edged.config_agents import Agent as AgentConfig
from edged.engines.base import Finished, GenerateRequest, Generator, Token
from edged.turns import Halt
from tests.support.scripted import call
from trainer.export.gguf import export_gguf
from trainer.tuners.language import Base, answer_tokens, prompt_tokens
from trainer.tuners.lora.data import Example, Line

SLOT = "tongue"
PARTS, ORDERS = range(10, 70), range(10, 58)
BINS = {"bolt": "red", "washer": "blue", "spring": "green", "hinge": "white"}
ITEMS = tuple(BINS)
TAUGHT_FROM, WANTED_FROM = 6, 3  # scratches from which on the model rejects a part, and from which on the plant does

MODULE = "plant_drawings"  # the file of the plant's tools, in the folder `modules` of its devices
TOOLS = '''"""The plant's drawings."""

DRAWINGS = {"bolt": "D1", "washer": "D2", "spring": "D3", "hinge": "D4"}


def drawing(item: str) -> str:
    """Which drawing an item is made by."""
    return DRAWINGS[item]
'''


def fields(**named: Any) -> dict[str, Any]:
    """The JSON Schema of an object with exactly these fields."""
    return {"type": "object", "properties": named, "required": list(named), "additionalProperties": False}


INSPECTOR: dict[str, Any] = {
    "slot": SLOT, "factory": "learnable", "instruction": "You inspect parts.", "tools": [f"{MODULE}:drawing"],
    "input_schema": fields(part={"type": "integer"}, item={"type": "string"}, scratches={"type": "integer"}),
    "output_schema": fields(verdict={"enum": ["accept", "reject"]}), "max_tokens": 120,
    "options": {"memory_type": "single_request", "learning_head": "peft"},
}  # fmt: skip
CLERK: dict[str, Any] = {
    "slot": SLOT, "instruction": "You sort orders.",
    "input_schema": fields(order={"type": "integer"}, item={"type": "string"}),
    "output_schema": fields(bin={"enum": sorted(set(BINS.values()))}), "max_tokens": 120,
    "options": {"memory_type": "single_request"},
}  # fmt: skip
AGENTS = {"inspector": INSPECTOR, "clerk": CLERK}

# As Phi-3's own, with marks of its own vocabulary.
MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCABULARY = 640
SIZE = {
    "vocab_size": VOCABULARY + 16, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
}  # fmt: skip
SCHOOLING = Schooling(steps=400, batch=16, rate=4e-3, short_steps=300, short=70)
SEED = 0
_RECIPE = 1  # part of the cache's key: raise it when a change here changes what comes out


def verdict(scratches: int, reject_from: int) -> dict[str, str]:
    """What a part with so many scratches gets."""
    return {"verdict": "reject" if scratches >= reject_from else "accept"}


def part_of(part: int, more: int = 0) -> dict[str, Any]:
    """What is asked about a part; with `more` scratches than it has."""
    return {"part": part, "item": ITEMS[part % len(ITEMS)], "scratches": (7 * part + more) % 10}


def order_of(order: int) -> dict[str, Any]:
    """What is asked about an order."""
    return {"order": order, "item": ITEMS[order % len(ITEMS)]}


def bin_of(order: int) -> dict[str, str]:
    """Where an order goes."""
    return {"bin": BINS[order_of(order)["item"]]}


def write_tools(folder: Path) -> None:
    """The plant's tools beside a device's configuration in `folder`."""
    (folder / "modules").mkdir(exist_ok=True)
    (folder / "modules" / f"{MODULE}.py").write_text(TOOLS)


class Foreknowing:
    """A model that is told its next steps beforehand, and keeps what it was asked."""

    context = 1 << 16

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.asked: list[tuple[GenerateRequest, str]] = []

    @contextmanager
    def lent(self, halt: Halt) -> Iterator[tuple[Generator, str, str]]:
        """As Lessor."""
        yield self, "foreknowing@1.0", ""

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """As Generator."""
        step = self.steps.pop(0)
        self.asked.append((request, step))
        yield Token(step, -0.1)
        yield Finished("stop", 1, 1, -0.1)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """As Generator."""

    def close(self) -> None:
        """As Generator."""


@cache
def lessons() -> tuple[Example, ...]:
    """Every step of every task with what its model is asked, as the runtime of a device asks it."""
    with tempfile.TemporaryDirectory() as folder:
        write_tools(Path(folder))
        let_find(Path(folder) / "edged.toml")
        model = Foreknowing()
        offer_slot(SLOT, model)
        agents = {name: build(name, AgentConfig(**each), MemoryManager(), None) for name, each in AGENTS.items()}
        try:
            for part in PARTS:
                for request in (part_of(part), part_of(part, part)):
                    looks = json.dumps(call("drawing", item=request["item"]))
                    model.steps = [looks, final_step(verdict(request["scratches"], TAUGHT_FROM))]
                    _run(agents["inspector"], request)
            for order in ORDERS:
                model.steps = [final_step(bin_of(order))]
                _run(agents["clerk"], order_of(order))
        finally:
            offer_slot(SLOT, None)
            for name, agent in agents.items():
                AgentRegistry.unregister(name, agent)
    found = {(request.messages, step): None for request, step in model.asked}
    turns = ([{"role": turn.role, "content": turn.content} for turn in messages] for messages, _ in found)
    return tuple(
        Line(0, "", "", tuple(said), "", False, False, None, None).example(step)  # type: ignore[arg-type]
        for said, (_, step) in zip(turns, found, strict=True)
    )


def _run(agent: Any, request: Any) -> None:
    assert isinstance(agent, Agent)
    answer = asyncio.run(agent.auto_run(request))
    assert answer.role == "assistant", answer.text


def make_inspector(build: Path) -> Path:
    """The model as a Hugging Face checkpoint below `build`, or the one made before.

    Raises RuntimeError when it does not learn its tasks.
    """
    recipe = {
        "recipe": _RECIPE, "model": SIZE, "how": asdict(SCHOOLING), "seed": SEED,
        "template": TEMPLATE, "lessons": lessons(),
    }  # fmt: skip
    return cached(build, "inspector", recipe, _make)


def _make(folder: Path) -> None:
    words = tokenizer_of((text for each in lessons() for text in (each["prompt"], each["answer"])), VOCABULARY)
    words.add_special_tokens({"additional_special_tokens": list(MARKS)})
    words.chat_template = TEMPLATE
    ends = {words.eos_token_id, words.convert_tokens_to_ids("<|end|>")}
    base = Base(None, words, frozenset(ends), SIZE["max_position_embeddings"])
    rows: list[Row] = []
    for each in lessons():
        turns = each["messages"]
        rows.append((prompt_tokens(base, each["prompt"], turns), answer_tokens(base, each["answer"], turns)))
    model = train(rows, SIZE, words.eos_token_id, SCHOOLING, SEED)
    model.generation_config.eos_token_id = sorted(ends)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def main(build: Path) -> None:
    """Make the model, write it as GGUF beside it and print where they are."""
    base = make_inspector(build)
    gguf = kept(base / "model.gguf", lambda beside: export_gguf(base, beside))
    print(json.dumps({"base": str(base), "model_gguf": str(gguf)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
