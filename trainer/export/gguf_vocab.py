"""Writes a tokenizer (tokenizer.json of Hugging Face) into a GGUF file: byte-level BPE, or the SentencePiece kind.

SentencePiece (Llama 1 and 2, Mistral, Phi-3): tokenizer.json keeps it as a BPE with byte fallback. llama.cpp merges the pair
whose piece has the highest score, so a piece's score is minus the rank of the merge that makes it.
"""

from __future__ import annotations

import json
import re
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
_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_SPACE = "▁"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, vocab_size: int) -> None:
    """Write tokens, merges or scores, the special tokens and the chat template of the tokenizer in `checkpoint`.

    `vocab_size` is the number of rows of the model's embedding; rows beyond the tokenizer's become unused tokens.
    Raises ValueError for a tokenizer of another kind, OSError when its files are missing.
    """
    path, content = _read(checkpoint)
    model = content["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"{path}: a tokenizer of the kind {model.get('type')} is not supported; supported are byte-level BPE and "
            "SentencePiece's BPE with byte fallback"
        )
    tokens, types = _tokens(content, vocab_size)
    if model.get("byte_fallback"):
        _write_sentencepiece(writer, path, content, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(path, content))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special(writer, checkpoint, {token: index for index, token in enumerate(tokens)})


def _read(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    path = checkpoint / "tokenizer.json"
    if not path.is_file() and (checkpoint / "tokenizer.model").is_file():
        raise ValueError(
            f"{path} is missing, there is only a tokenizer.model; write it with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return path, json.loads(path.read_text(encoding="utf-8"))


def model_name(checkpoint: Path) -> str:
    """The name for the file. llama.cpp goes by it: special tokens take the spaces behind them where it has "phi-3" in it,
    and such a file does not load without the tokens that Phi-3 has."""
    _, content = _read(checkpoint)
    added = content.get("added_tokens", [])
    known = {*content["model"].get("vocab", {}), *(token["content"] for token in added)}
    plain = re.sub(r"phi-?3", "phi", checkpoint.name, flags=re.IGNORECASE)
    trims = any(token["special"] and token.get("rstrip") for token in added)
    return f"phi-3 {plain}" if trims and known >= _PHI3 else plain


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs that are merged, first the first; older files write a pair as one text."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]


def _write_sentencepiece(
    writer: gguf.GGUFWriter, path: Path, content: dict[str, Any], tokens: list[str], types: list[gguf.TokenType]
) -> None:
    model = content["model"]
    _check_spaces(path, content)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(model)):
        ranks.setdefault("".join(pair), rank)
    scores = [float(-ranks.get(token, len(ranks))) for token in tokens]
    for index, token in enumerate(tokens):
        if types[index] != gguf.TokenType.NORMAL:
            continue
        if _BYTE.fullmatch(token):
            types[index], scores[index] = gguf.TokenType.BYTE, 0.0
        elif token == model.get("unk_token"):
            types[index], scores[index] = gguf.TokenType.UNKNOWN, 0.0
    if sum(kind == gguf.TokenType.BYTE for kind in types) != 256:
        raise ValueError(f"{path}: byte_fallback is set, but not all of <0x00> to <0xFF> are in the vocabulary")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_add_space_prefix(_prefixes(path))


def _check_spaces(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError for a treatment of spaces that llama.cpp does not have."""
    normal, step = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normal.get("normalizers", [normal] if normal else [])
    kinds = [item.get("type") for item in steps]
    if kinds and (set(kinds) - {"Prepend", "Replace"} or kinds.count("Replace") != 1):
        raise ValueError(f"{path}: its normalizer does {kinds}; llama.cpp does Prepend and Replace of spaces alone")
    if not kinds and step.get("type") != "Metaspace":
        raise ValueError(f"{path}: spaces do not become {_SPACE}: neither its normalizer nor its pre_tokenizer says so")
    if kinds and step:
        raise ValueError(f"{path}: its pre_tokenizer {step.get('type')} is not applied by llama.cpp; save it without")
    if not kinds and step.get("prepend_scheme") == "first":
        raise ValueError(
            f'{path}: prepend_scheme "first" puts a space before the first word of a text only, llama.cpp before the first '
            'after each special token; set it to "always" and check your prompts, or "never"'
        )
    if not kinds and step.get("split", True):
        raise ValueError(f"{path}: its pre_tokenizer splits at spaces, which llama.cpp does not; save it without")


def _prefixes(path: Path) -> bool:
    """Whether a space is put before a text."""
    pieces = Tokenizer.from_file(str(path)).encode("a", add_special_tokens=False).tokens
    return bool(pieces) and pieces[0].startswith(_SPACE)


def _pre_tokenizer(path: Path, content: dict[str, Any]) -> str:
    step = content.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    byte_level = next((item for item in steps if item.get("type") == "ByteLevel"), None)
    if byte_level is None:
        raise ValueError(
            f"{path}: it splits by {[item.get('type') for item in steps]}; supported are byte-level BPE and "
            "SentencePiece's BPE with byte fallback"
        )
    normal = content.get("normalizer")
    # Qwen's. llama.cpp does not apply it: text that is not in NFC already becomes other tokens.
    if normal and normal.get("type") != "NFC":
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
