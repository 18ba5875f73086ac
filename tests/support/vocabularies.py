"""Small tokenizers that spell bytes in the two ways of Phi models."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["the line reads a seven, ask the teacher", "größer als ½? don't!  12345", "日本語 naïve \n\n  x=1\t;"]
CONTROL = ["<|endoftext|>", "<|user|>"]


def byte_level() -> Tokenizer:
    """As GPT-2, Phi-2 and Phi-4 spell: every byte a letter."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    made.add_tokens([AddedToken("    ", normalized=False)])  # Phi-2 has such tokens, for the indents of programs
    return made


def sentence_piece() -> Tokenizer:
    """As Phi-3 spells: a mark for spaces, and single bytes for what the vocabulary lacks."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilnorstv", "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    made = Tokenizer(
        models.BPE(
            {name: n for n, name in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made
