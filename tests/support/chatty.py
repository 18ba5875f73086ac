"""A Phi-3 of random weights that knows the control tokens of conversations: it says nothing sensible, of every byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edged.engines.base import EngineOptions, Finished, GenerateRequest, Generator, Token
from edged.engines.llama import LlamaGenerator
from edged.wire.manifest import FileEntry, ReleaseManifest
from tests.trainer.tiny_phi import save_phi3, tokenizer
from trainer.export.gguf import export_gguf

CONTEXT = 640  # tokens
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def make_chatty(folder: Path, template: str | None = TEMPLATE, *, special: bool = True, **changes: Any) -> Path:
    """Write the model below `folder` and answer with its GGUF file.

    `special` False: the marks of turns are listed as words that users added. `changes`: of its Phi3Config.
    """
    words = tokenizer()
    words.add_tokens([*TURN_TOKENS], special_tokens=special)
    words.chat_template = template
    context = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": CONTEXT}
    save_phi3(folder / "checkpoint", words=words, **(context | changes))
    return export_gguf(folder / "checkpoint", folder / "model.gguf")


def load(path: Path, **extra: Any) -> LlamaGenerator:
    """The engine of a release `chatty@1.0` with this file; `extra`: engine keys."""
    entry = FileEntry.of(path.name, 1, [b"x"])
    manifest = ReleaseManifest(
        release="chatty@1.0", kind="llm", engine="llama", files={"model": entry}, created="2026-01-01T00:00:00Z"
    )
    return LlamaGenerator(path.parent, manifest, EngineOptions(threads=1, extra=extra))


def ask(engine: Generator, **request: Any) -> tuple[str, Finished]:
    """The answer's text and how it ended."""
    *tokens, finished = engine.generate(GenerateRequest(**request))
    assert isinstance(finished, Finished)
    return "".join(token.text for token in tokens if isinstance(token, Token)), finished
