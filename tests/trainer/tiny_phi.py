"""Phi checkpoints of random weights, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2TokenizerFast, Phi3Config, Phi3ForCausalLM, PhiConfig, PhiForCausalLM

END = "<|endoftext|>"
VOCAB = 400
# Grouped heads, and three queries for one key, so that a wrong order of rows cannot go unnoticed.
PHI3: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that logits differ clearly from token to token
}
_PHI2 = {key: PHI3[key] for key in PHI3 if key != "original_max_position_embeddings"}
_TEXT = ["the line reads a seven, ask the teacher", "größer als ½? don't!  12345 + 678", "日本語 naïve \n\n  x=1\t;"]


def tokenizer(split: str | None = None) -> GPT2TokenizerFast:
    """A byte-level BPE; `split` is the expression that splits words, None GPT-2's own."""
    bpe = Tokenizer(models.BPE())
    if split is None:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        steps = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_TEXT * 3, trainer)
    return GPT2TokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, pad_token=END)


def save_phi3(folder: Path, seed: int = 0, words: GPT2TokenizerFast | None = None, **changes: Any) -> Phi3ForCausalLM:
    """Save a random Phi-3 with its tokenizer in `folder` and return it."""
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(Phi3Config(**(PHI3 | changes), bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()
    return _save(model, folder, words)


def save_phi2(folder: Path, seed: int = 0, **changes: Any) -> PhiForCausalLM:
    """Save a random Phi-2 with its tokenizer in `folder` and return it."""
    torch.manual_seed(seed)
    model = PhiForCausalLM(PhiConfig(**(_PHI2 | changes), bos_token_id=0, eos_token_id=0)).eval()
    return _save(model, folder, None)


def _save(model: Any, folder: Path, words: GPT2TokenizerFast | None) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # ones and zeros otherwise, which would hide a swap
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return model
