"""Language models: edged's engine against bare llama.cpp, what reused prefixes are worth, validity under a schema.

The model is a Phi-3 of random weights, 0.3 B parameters, Q8_0, made once below build/bench: how fast a network computes does
not depend on what it learned. It says nonsense, which is the hard case for a schema: hardly a token of it is allowed.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import llama_cpp
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2TokenizerFast, Phi3Config, Phi3ForCausalLM

from bench.measure import Benchmark, Result, Say, Target, alternate, ratio
from edged.agents import Agent
from edged.engines.base import ChatMessage, EngineOptions, Finished, GenerateRequest, Token
from edged.engines.llama import BATCH_TOKENS, LlamaGenerator
from edged.wire.manifest import ReleaseManifest
from trainer.export.gguf import export_gguf, quantize_gguf
from trainer.releases import file_entry

ROOT = Path(__file__).parents[1]
THREADS = 2
CONTEXT = 2048
SYSTEM_TOKENS = 1000
TURNS = 6
_RECIPE = 1  # part of the cache's name: raise it when a change here changes what comes out
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 16}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_VOCABULARY = 8192
_END = "<|endoftext|>"
_TURN_ENDS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_PLACES = ["pump", "gate", "belt", "oven", "north hall", "Überlauf", "棚"]
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"decision": {"enum": ["accept", "hold", "ask"]}, "reason": {"type": "string", "maxLength": 16}},
        "required": ["decision", "reason"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "line": {"type": "integer", "minimum": 1, "maximum": 12},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "faults": {"type": "array", "items": {"enum": _PLACES}, "maxItems": 4},
            "note": {"type": ["string", "null"], "maxLength": 12},
        },
        "required": ["line", "score", "faults"],
    },
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}, "minItems": 1},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {},
]  # fmt: skip


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Phi-3 of random weights and this shape as Q8_0 in `folder`, or the one made before."""
    out = folder / "model.gguf"
    if out.is_file():
        return out
    checkpoint = folder / "checkpoint"
    words = _tokenizer()
    torch.manual_seed(0)
    config = Phi3Config(
        **shape, vocab_size=_VOCABULARY, num_key_value_heads=shape["num_attention_heads"], bos_token_id=0, eos_token_id=0,
        pad_token_id=0, max_position_embeddings=CONTEXT, original_max_position_embeddings=CONTEXT,
    )  # fmt: skip
    Phi3ForCausalLM(config).to(torch.float16).save_pretrained(checkpoint)
    words.save_pretrained(checkpoint)
    export_gguf(checkpoint, folder / "f16.gguf")
    shutil.rmtree(checkpoint)
    quantize_gguf(folder / "f16.gguf", out, "Q8_0")
    (folder / "f16.gguf").unlink()
    return out


def _tokenizer() -> GPT2TokenizerFast:
    """A byte-level BPE learned from the project's own documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_END, *_TURN_ENDS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([path.read_text(encoding="utf-8") for path in _texts()], trainer)
    words = GPT2TokenizerFast(tokenizer_object=bpe, bos_token=_END, eos_token=_END, unk_token=_END, pad_token=_END)
    words.add_special_tokens({"additional_special_tokens": [*_TURN_ENDS]})
    words.chat_template = _TEMPLATE
    return words


def _texts() -> list[Path]:
    return sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "edged").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")])


@contextmanager
def _engine(model: Path) -> Iterator[LlamaGenerator]:
    entry = file_entry(model)
    manifest = ReleaseManifest(
        release="bench@1.0", kind="llm", engine="llama", files={"model": entry}, created="2026-01-01T00:00:00Z"
    )
    engine = LlamaGenerator(model.parent, manifest, EngineOptions(threads=THREADS))
    try:
        yield engine
    finally:
        engine.close()


def tokens_vs_raw(model: Path, rounds: int, tokens: int, say: Say) -> tuple[float, dict[str, Any]]:
    """Tokens a second of edged's engine over those of llama_cpp's own class, greedy, the same prompts and settings."""
    raw: Any = llama_cpp.Llama(
        str(model), n_ctx=CONTEXT, n_batch=BATCH_TOKENS, n_ubatch=BATCH_TOKENS, n_threads=THREADS,
        n_threads_batch=THREADS, flash_attn=True, verbose=False,
    )  # fmt: skip  # flash attention is what llama.cpp chooses by itself here; this class would go without it
    prompts = [f"line {n} read a {n % 10} with score 0.{n}. " * 3 for n in range(1, rounds + 2)]

    def of_raw(prompt: str) -> float:
        raw.reset()
        started = time.perf_counter()
        done = raw.create_completion(prompt, max_tokens=tokens, temperature=0.0, top_k=1, repeat_penalty=1.0)
        return int(done["usage"]["completion_tokens"]) / (time.perf_counter() - started)

    with _engine(model) as engine:

        def of_edged(prompt: str) -> float:
            engine.attach(None)  # forget what was computed before
            started = time.perf_counter()
            *_, end = engine.generate(GenerateRequest(prompt, tokens_max=tokens))
            assert isinstance(end, Finished)
            return end.answer_tokens / (time.perf_counter() - started)

        of_raw(prompts[-1]), of_edged(prompts[-1])
        ours, theirs = iter(prompts), iter(prompts)
        edged, bare = alternate(
            rounds, lambda: of_edged(next(ours)), lambda: of_raw(next(theirs)), say=say, names=("edged", "llama_cpp")
        )
    raw.close()
    facts = {"tokens_per_s": round(statistics.median(edged), 2), "tokens_per_s_raw": round(statistics.median(bare), 2)}
    return ratio(edged, bare), facts


def prefix_speedup(model: Path, rounds: int, turns: int, say: Say) -> tuple[float, dict[str, Any]]:
    """Time to the first token, summed over a conversation's turns: with nothing reused over with prefixes reused."""
    first_cold: list[float] = []
    first_warm: list[float] = []
    with _engine(model) as engine:

        def conversation(times: list[float], before: Callable[[], None]) -> float:
            engine.attach(None)
            times.clear()
            messages = [ChatMessage("system", _system_prompt(engine))]
            for turn in range(turns):
                messages.append(ChatMessage("user", f"Turn {turn}: what about line {turn + 3}?"))
                before()
                started = time.perf_counter()
                events = engine.generate(GenerateRequest(messages=tuple(messages), tokens_max=16))
                said = [next(events)]
                times.append(time.perf_counter() - started)
                said += events
                messages.append(ChatMessage("assistant", "".join(e.text for e in said if isinstance(e, Token))))
            return sum(times)

        cold, warm = alternate(
            rounds, lambda: conversation(first_cold, lambda: engine.attach(None)),
            lambda: conversation(first_warm, lambda: None), say=say, names=("nothing reused, s", "prefix reused, s"),
        )  # fmt: skip
    facts = {
        "first_token_s": [round(value, 3) for value in first_warm],
        "first_token_s_nothing_reused": [round(value, 3) for value in first_cold],
    }
    return ratio(cold, warm), facts


class Timed:
    """A generator for an agent, that notes of each request how long its first token took and what it read again; `cold`:
    nothing is reused."""

    def __init__(self, engine: LlamaGenerator, cold: bool) -> None:
        self._engine, self._cold, self.context = engine, cold, engine.context
        self.first_s: list[float] = []
        self.ends: list[Finished] = []

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """As the engine's."""
        if self._cold:
            self._engine.attach(None)
        started = time.perf_counter()
        for number, event in enumerate(self._engine.generate(request)):
            if number == 0:
                self.first_s.append(time.perf_counter() - started)
            if isinstance(event, Finished):
                self.ends.append(event)
            yield event

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """As the engine's."""
        self._engine.attach(adapter, scale)

    def close(self) -> None:
        """The engine outlives it."""


def agent_conversation(engine: LlamaGenerator, turns: int, cold: bool) -> Timed:
    """A conversation of an agent, remembered as agents do, on the engine. Raises RuntimeError for a turn that fails."""
    timed = Timed(engine, cold)
    engine.attach(None)
    agent = Agent(timed, _system_prompt(engine), output_schema={"done": bool}, max_tokens=400)
    for turn in range(turns):
        answer = asyncio.run(agent.auto_run(f"Turn {turn}: is line {turn + 3} done?", max_steps=1))
        if answer.role == "error":
            raise RuntimeError(f"turn {turn}: {answer.text}")
    return timed


def agent_prefix_speedup(model: Path, rounds: int, turns: int, say: Say) -> tuple[float, dict[str, Any]]:
    """The same for an agent with its memory: steps under their grammar, old messages left out where the context ends."""
    done: dict[bool, Timed] = {}
    with _engine(model) as engine:

        def side(cold: bool) -> float:
            done[cold] = agent_conversation(engine, turns, cold)
            return sum(done[cold].first_s)

        cold, warm = alternate(
            rounds, lambda: side(True), lambda: side(False), say=say, names=("agent, nothing reused, s", "agent, s")
        )
    read = sum(end.prompt_tokens for end in done[False].ends)
    reused = sum(end.reused_tokens for end in done[False].ends)
    return ratio(cold, warm), {"agent_tokens_reused": f"{reused} of {read}"}


def _system_prompt(engine: LlamaGenerator) -> str:
    """A text of SYSTEM_TOKENS tokens, to one sentence's length."""
    words = random.Random(0).choices([*_PLACES, "checks", "the", "every", "hour", "reports"], k=SYSTEM_TOKENS)
    text = ""
    for count in range(20, SYSTEM_TOKENS, 20):
        text = " ".join(words[:count])
        end = list(engine.generate(GenerateRequest(text, tokens_max=1, halt=lambda: "cancelled")))[-1]
        assert isinstance(end, Finished)
        if end.prompt_tokens >= SYSTEM_TOKENS:
            break
    return text


def valid_json(model: Path, answers: int, tokens: int, say: Say) -> tuple[float, Counter[str]]:
    """Share of constrained answers that are valid or end as `truncated`, and how many ended how."""
    ends: Counter[str] = Counter()
    with _engine(model) as engine:
        for number in range(answers):
            schema = SCHEMAS[number % len(SCHEMAS)]
            request = GenerateRequest(
                f"Report {number}: ", tokens_max=tokens, temperature=(0.0, 0.7, 1.0, 1.5)[number % 4], seed=number,
                schema=schema,
            )  # fmt: skip
            *pieces, end = engine.generate(request)
            assert isinstance(end, Finished)
            text = "".join(piece.text for piece in pieces if isinstance(piece, Token))
            ends[end.reason if end.reason == "truncated" else _verdict(text, schema)] += 1
    say(f"{answers} constrained answers of {model.parent.name}: {dict(ends)}")
    return (ends["valid"] + ends["truncated"]) / answers, ends


def _verdict(text: str, schema: dict[str, Any]) -> str:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return "invalid"
    return "valid"


def run(quick: bool, say: Say) -> Result:
    """Measure; `quick` on a model of a few weights."""
    folder = ROOT / "build" / "bench" / f"phi3-{_RECIPE}"
    say("making the models, if they are not there")
    small = make_model(folder / "small", SMALL)
    large = small if quick else make_model(folder / "large", _LARGE)
    speed, speed_facts = tokens_vs_raw(large, 2 if quick else 7, 32 if quick else 96, say)
    speedup, speedup_facts = prefix_speedup(large, 1 if quick else 3, TURNS, say)
    agents, agents_facts = agent_prefix_speedup(large, 1 if quick else 2, TURNS, say)
    share, ends = valid_json(small, 40 if quick else 400, 200, say)
    if not quick:
        share_large, more = valid_json(large, 20, 64, say)
        share, ends = min(share, share_large), ends + more
    facts = {
        "model": f"{large.stat().st_size / 2**20:.0f} MiB",
        "threads": THREADS,
        **speed_facts,
        **speedup_facts,
        **agents_facts,
    }
    keys = {
        "tokens_vs_raw": speed, "prefix_speedup": speedup, "agent_prefix_speedup": agents, "valid_json": share,
    }  # fmt: skip
    return Result(keys, facts | {"constrained_answers": dict(ends)})


BENCHMARK = Benchmark(
    "llm",
    "edged's generation against bare llama.cpp, reuse of prompt prefixes, answers constrained to a JSON Schema",
    {
        "tokens_vs_raw": Target(">=", 0.98),
        "prefix_speedup": Target(">=", 3.0),
        "agent_prefix_speedup": Target(">=", 3.0),
        "valid_json": Target(">=", 1.0),
    },
    run,
)
