"""Writes a byte-level BPE tokenizer (tokenizer.json of Hugging Face) into a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

# How llama.cpp calls the expression that splits text into words before merging; the key is that expression.
_SPLITS: dict[str, str] = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",
}
_SPECIAL = ("bos", "eos", "unk", "pad")


def write_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, vocab_size: int) -> None:
    """Write tokens, merges, the special tokens and the chat template of the tokenizer in `checkpoint`.

    `vocab_size` is the number of rows of the model's embedding; rows beyond the tokenizer's become unused tokens.
    Raises ValueError for a tokenizer of another kind, OSError when its files are missing.
    """
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    pre = _pre_tokenizer(path, content)
    tokens, types = _tokens(content, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    _write_special(writer, checkpoint, {token: index for index, token in enumerate(tokens)})


def _pre_tokenizer(path: Path, content: dict[str, Any]) -> str:
    step = content.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    byte_level = next((item for item in steps if item.get("type") == "ByteLevel"), None)
    if content["model"].get("type") != "BPE" or byte_level is None:
        raise ValueError(f"{path}: it is not a byte-level BPE, the one kind that is supported")
    if content.get("normalizer"):
        raise ValueError(f"{path}: it has a normalizer, which llama.cpp does not apply; train the tokenizer without")
    if byte_level.get("add_prefix_space"):
        raise ValueError(f"{path}: add_prefix_space is set, which llama.cpp does not do; train the tokenizer without")
    if byte_level.get("use_regex", True):
        return "gpt-2"
    split = next((item["pattern"].get("Regex", "") for item in steps if item.get("type") == "Split"), "")
    if split not in _SPLITS:
        raise ValueError(f"{path}: llama.cpp's name for the split {split!r} is not known here; add it to _SPLITS")
    return _SPLITS[split]


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in content["model"]["vocab"].items():
        tokens[_within(index, token, vocab_size)] = token
        types[index] = gguf.TokenType.NORMAL
    for added in content.get("added_tokens", []):
        index = _within(added["id"], added["content"], vocab_size)
        tokens[index] = added["content"]
        types[index] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return tokens, types


def _within(index: int, token: str, vocab_size: int) -> int:
    if index >= vocab_size:
        raise ValueError(f"token {token!r} has id {index}, the model has {vocab_size} rows; resize its embedding")
    return index


def _write_special(writer: gguf.GGUFWriter, checkpoint: Path, ids: dict[str, int]) -> None:
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    named: dict[str, int] = {}
    for kind in _SPECIAL:
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and text not in ids:
            raise ValueError(f"tokenizer_config.json names {kind}_token {text!r}, which is not in the vocabulary")
        if text is not None:
            named[kind] = ids[text]
            getattr(writer, f"add_{kind}_token_id")(ids[text])
    # What the tokenizer really puts around a text, whichever of its settings or steps says so.
    around = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode("a").ids
    writer.add_add_bos_token("bos" in named and around[0] == named["bos"])
    writer.add_add_eos_token("eos" in named and len(around) > 1 and around[-1] == named["eos"])
    template = settings.get("chat_template")
    beside = checkpoint / "chat_template.jinja"
    if template is None and beside.is_file():
        template = beside.read_text(encoding="utf-8")
    if template is not None:
        writer.add_chat_template(template)
