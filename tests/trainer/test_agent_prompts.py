"""What an agent's model is asked on a device, token for token, is what the trainer trains and the gate scores: with a chat
template and without one. Otherwise an adapter learns to answer what nobody ever asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from edged.agents import Agent, Feedback
from edged.agents.models import LentModel, OwnEngine
from edged.agents.recorded import StoreRecorder
from edged.clock import SystemClock
from edged.engines.base import EngineOptions, Finished, GenerateRequest, Token
from edged.engines.llama import LlamaGenerator
from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import Store
from edged.wire.manifest import TrainingManifest, TrainingSample
from tests.support.hosted import manifest
from tests.trainer.tiny_phi import save_phi3, tokenizer
from trainer import likelihood
from trainer.export.gguf import export_gguf
from trainer.kinds import texts
from trainer.kinds.catalogue import write_dataset
from trainer.tuners import language
from trainer.tuners.lora.settings import LanguageSettings

# As Phi-3's own; the roles of a conversation between an agent, its model and its tools. Like Phi-3 the model knows several
# tokens that end something, and llama.cpp takes any one of them for the end of a turn.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ENDS = ("<|end|>", "<|im_end|>")
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", *ENDS]


class Overheard:
    """A generator, and what it was asked at last."""

    def __init__(self, engine: LlamaGenerator) -> None:
        self.engine, self.context = engine, engine.context
        self.asked: list[int] = []

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        self.asked = self.engine._prompt(request)
        return self.engine.generate(request)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None: ...

    def close(self) -> None: ...


def checkpoint(folder: Path, end: str | None) -> Path:
    """A Phi-3 of random weights, with a chat template whose turns end so; None: without one."""
    words = tokenizer()
    if end:
        words.add_special_tokens({"additional_special_tokens": MARKS})
        words.chat_template = TEMPLATE.replace("END", end)
    size = {"vocab_size": 420, "max_position_embeddings": 8192, "original_max_position_embeddings": 8192}
    model = save_phi3(folder, 1, words, **size)
    with torch.no_grad():
        model.lm_head.weight[len(words) :] = 0  # rows of no token are never the likeliest
    if end:
        model.generation_config.eos_token_id = [0, words.convert_tokens_to_ids(end)]
    model.save_pretrained(folder)
    return folder


def scratches(part: int) -> int:
    """How many scratches a part has."""
    return part - 4


def trained_line(store: Store, sample: str, folder: Path) -> texts.Text:
    """A labelled sample as the trainer reads it after its device has handed its bytes over."""
    kept = store.sample(sample)
    assert kept is not None
    blob = store.blob(kept.sha256)
    assert blob is not None
    folder.mkdir()
    (folder / sha256(blob.read_bytes()).hexdigest()).write_bytes(blob.read_bytes())
    label = {"text": kept.label[0]["text"], "other": kept.prediction[0]["text"], "confidence": 1.0}
    told = TrainingSample(
        id=sample, device="dev1", sha256=kept.sha256, label=label, provenance={"kind": "person", "who": "ann"}
    )
    job = TrainingManifest(
        job="job-1", model="tongue", source="phi@1.0", target="tongue-lora@1.0", created="2026", config={}, samples=[told]
    )  # fmt: skip
    assert write_dataset(job, folder, folder / "dataset.jsonl") == {}
    (row,), bad, _ = texts.read(folder / "dataset.jsonl", "lora")
    assert bad == []
    return row


@pytest.mark.parametrize("end", [*ENDS, None])
@pytest.mark.parametrize("requests", [1, 2])
def test_what_is_trained_is_what_was_asked(tmp_path: Path, end: str | None, requests: int) -> None:
    folder = checkpoint(tmp_path / "phi", end)
    export_gguf(folder, tmp_path / "model.gguf")
    engine = LlamaGenerator(tmp_path, manifest(tmp_path / "model.gguf"), EngineOptions())
    store, clock = Store(tmp_path / "state"), SystemClock()
    heard = Overheard(engine)
    try:
        recorder = StoreRecorder(store, clock, Outgoing("plant", "dev1", Stamp(clock)))
        agent = Agent(
            LentModel(OwnEngine(heard, "phi@1.0"), "tongue"), "You inspect größer parts.", {"scratches": scratches},
            output_schema={"type": "object", "properties": {"verdict": {"enum": ["accept", "reject"]}}},
            recorder=recorder, max_tokens=1500,
        )  # fmt: skip
        for number in range(requests):
            asyncio.run(agent.auto_run({"part": 7 + number}, max_steps=2))
        run = agent.last_execution
        assert run is not None
        record: Any = store.runs.get(run)
        request = store.request(record.record["requests"][-1])
        assert request is not None and record.record["answer"] == request.id, "the newest question is the corrected one"
        recorder.feedback(run, Feedback(correction={"verdict": "reject"}, who="ann"))
        row = trained_line(store, request.id, tmp_path / "pulled")

        base = language.load(folder, LanguageSettings())
        asked = language.prompt_tokens(base, row.prompt, row.given.get("messages"))
        assert asked == heard.asked
        assert len(asked) > 100
        answer = language.answer_tokens(base, row.wanted, row.given.get("messages"))
        assert likelihood._llama_tokens(engine, row.said) == (heard.asked, answer), "as the gate scores it"
        assert likelihood._tokens(base.words, row.said, set(base.ends)) == (heard.asked, answer)
        assert json.loads(base.words.decode(answer, skip_special_tokens=True)) == json.loads(row.wanted)
    finally:
        engine.close()
        store.close()
