"""A language model that never comes to an end by itself: random weights, an end token that is never the likeliest."""

from __future__ import annotations

from pathlib import Path

import torch

from edged.engines.base import EngineOptions, GenerateRequest, Generator, generate_all, open_engine
from edged.wire.manifest import ReleaseRef
from tests.support.models import write_manifest
from tests.trainer.tiny_phi import save_phi3, tokenizer
from trainer.export.gguf import export_gguf
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

CONTEXT = 32768  # tokens: half a minute of babbling
PROMPT = "the line reads a seven, "
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def make_babbler(folder: Path, release: str = "babbler@1.0", context: int = CONTEXT) -> ReleaseRef:
    """A whole release in `folder`, with a context of so many tokens."""
    folder.mkdir(parents=True)
    checkpoint = folder.with_name(folder.name + "-checkpoint")
    words = tokenizer()
    words.chat_template = TEMPLATE
    size = {"max_position_embeddings": context, "original_max_position_embeddings": context}
    model = save_phi3(checkpoint, 1, words, **size)
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # the end token's logit is 0, and among 400 random ones some are above it
    model.save_pretrained(checkpoint)
    export_gguf(checkpoint, folder / "model.gguf")
    roles = {"model": "model.gguf"}
    plain = build_manifest(folder, release, kind="llm", engine="llama", roles=roles)
    engine = open_engine(folder, plain, EngineOptions())
    assert isinstance(engine, Generator)
    answer, _ = generate_all(engine, GenerateRequest(PROMPT, tokens_max=32))
    engine.close()
    roles |= write_prompt_golden(folder, [(PROMPT, answer)])
    return write_manifest(folder, build_manifest(folder, release, kind="llm", engine="llama", roles=roles))
