"""Checkpoints of random weights of the Llama, Mistral and Qwen families, and a SentencePiece-like tokenizer, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_phi import PHI3, VOCAB, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.export.parity import PROBE

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_SHAPE: dict[str, Any] = {key: value for key, value in PHI3.items() if key != "original_max_position_embeddings"}
SENTENCEPIECE_VOCAB = 600  # of which 256 are bytes


def save_tiny(family: str, folder: Path, *, words: Any = None, **changes: Any) -> Any:
    """Save a random model of the family with its tokenizer in `folder` and return it."""
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**(_SHAPE | {"max_position_embeddings": 256} | changes), bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # ones and zeros otherwise, which would hide a swap
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return model


def sentencepiece(**changes: Any) -> LlamaTokenizerFast:
    """A tokenizer as transformers makes it of SentencePiece's BPE: every way to put a piece together is a merge."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = spaces
    octets = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=SENTENCEPIECE_VOCAB - 10, special_tokens=["<unk>", "<s>", "</s>", *octets], show_progress=False
    )
    trained.train_from_iterator(["the line reads a seven, ask the teacher", *PROBE.split("."), PROBE] * 2, trainer)
    vocab = trained.get_vocab()
    pieces = sorted((index, piece) for piece, index in vocab.items() if len(piece) > 1 and index >= 259)
    merges = [
        (piece[:cut], piece[cut:])
        for _, piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    whole = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.normalizer = spaces
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return LlamaTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", legacy=True, **changes
    )


assert VOCAB < SENTENCEPIECE_VOCAB
