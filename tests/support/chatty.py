"""A Phi-3 of random weights that knows the control tokens of conversations: it says nothing sensible, of every byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edged.engines.base import EngineOptions, Finished, GenerateRequest, Generator, Token, open_engine
from edged.engines.llama import LlamaGenerator
from edged.wire.manifest import FileEntry, ReleaseManifest
from tests.support.models import write_manifest
from tests.trainer.tiny_phi import save_phi3, tokenizer
from trainer.export.gguf import export_gguf
from trainer.export.onnx_phi import export_phi
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

CONTEXT = 640  # tokens
PROMPT = "the line reads a seven, "
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def make_chatty(folder: Path, template: str | None = TEMPLATE, *, special: bool = True, **changes: Any) -> Path:
    """Write the model below `folder` and answer with its GGUF file.

    `special` False: the marks of turns are listed as words that users added. `changes`: of its Phi3Config.
    """
    return export_gguf(_checkpoint(folder, template, special, changes), folder / "model.gguf")


def make_chatty_onnx(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """The same as a whole ONNX release `chatty@1.0`, in fp32; answers with its folder."""
    release = folder / "release"
    roles = export_phi(_checkpoint(folder, template, True, changes), release, int8=False)
    facts: dict[str, Any] = {"kind": "llm", "engine": "onnx_phi"}
    engine = open_engine(release, build_manifest(release, "chatty@1.0", roles=roles, **facts), EngineOptions())
    assert isinstance(engine, Generator)
    roles |= write_prompt_golden(release, [(PROMPT, ask(engine, prompt=PROMPT, tokens_max=32)[0])])
    engine.close()
    write_manifest(release, build_manifest(release, "chatty@1.0", roles=roles, **facts))
    return release


def _checkpoint(folder: Path, template: str | None, special: bool, changes: dict[str, Any]) -> Path:
    words = tokenizer()
    words.add_tokens([*TURN_TOKENS], special_tokens=special)
    words.chat_template = template
    context = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": CONTEXT}
    save_phi3(folder / "checkpoint", words=words, **(context | changes))
    return folder / "checkpoint"


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
