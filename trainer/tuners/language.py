"""What tuners of language models share: the model with its adapter, and examples as tokens."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from trainer.tuners.base import Work
from trainer.tuners.lora.data import Turn
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.settings import LoraSettings, SettingsError

log = logging.getLogger(__name__)

Row = dict[str, list[int]]  # an example as tokens, by what they are
IGNORED = -100  # torch's cross-entropy leaves this label out


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint, loaded: the model, its tokenizer, the tokens that end an answer, and what a person should know."""

    model: Any
    words: Any
    ends: frozenset[int]
    context: int  # tokens
    facts: dict[str, Any] = field(default_factory=dict)


def load(folder: Path, settings: LanguageSettings) -> Base:
    """Load a Hugging Face checkpoint for training; raises SettingsError for what this host cannot do, or for one that
    is not whole."""
    gpu = torch.cuda.is_available()
    four_bit, why = four_bits(settings.load_4bit, gpu=gpu, installed=find_spec("bitsandbytes") is not None)
    options: dict[str, Any] = {"dtype": torch.float32}
    if bf16(settings):
        options["dtype"] = torch.bfloat16  # of the frozen base alone: PEFT keeps the adapter in 32 bits
    if four_bit:
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0")) if gpu else "cpu"}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    words, model = _whole(folder, AutoTokenizer.from_pretrained), causal_lm(folder, **options)
    if four_bit:
        _keep_gradients(model)
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    ends = ends_of(folder, words, model.generation_config)
    context = int(model.config.max_position_embeddings)
    facts = {
        "load_4bit": why,
        "dtype": str(options["dtype"]).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }
    return Base(model, words, ends, min(context, settings.context or context), facts)


def fitting(
    folder: Path, settings: LanguageSettings, asked: Iterable[tuple[str, Sequence[Turn], Sequence[str]]]
) -> list[bool]:
    """Which examples fit the context that a training of the checkpoint in `folder` would have: each a prompt, the same as a
    conversation, and its answers, of which the longest counts. Loads no weights; raises SettingsError."""
    try:
        config, words = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        generation = GenerationConfig.from_model_config(config)
        if (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{folder}: no checkpoint of a language model: {error}") from None
    context = int(config.max_position_embeddings)
    base = Base(None, words, ends_of(folder, words, generation), min(context, settings.context or context))
    return [
        len(prompt_tokens(base, prompt, turns)) + max(len(answer_tokens(base, each, turns)) for each in answers)
        <= base.context
        for prompt, turns, answers in asked
    ]


def ends_of(folder: Path, words: Any, generation: Any) -> frozenset[int]:
    """The tokens that end an answer; raises SettingsError without one."""
    end = generation.eos_token_id
    ends = {words.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    if not ends:
        raise SettingsError(f"{folder}: neither its tokenizer nor its generation_config.json names an end of text")
    return frozenset(ends)


def causal_lm(folder: Path, **options: Any) -> Any:
    """The weights of a Hugging Face checkpoint, `options` as transformers has them; raises SettingsError naming the folder
    of one that is absent or broken."""
    if not (folder / "config.json").is_file():
        raise SettingsError(
            f"base = {str(folder)!r}: no Hugging Face checkpoint is there (config.json); name the folder of one"
        )
    return _whole(folder, AutoModelForCausalLM.from_pretrained, **options)


def _whole(folder: Path, read: Callable[..., Any], **options: Any) -> Any:
    try:
        return read(folder, **options)
    except Exception as error:  # transformers, safetensors and tokenizers each have their own
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):
            raise  # nothing is wrong with the checkpoint
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"base = {str(folder)!r}: not a whole checkpoint of a language model ({said}); save it with save_pretrained()"
        ) from error


def _keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from packing weights for inference on CPUs with AVX512-BF16, at the first look at held-out examples:
    it does not unpack them for training (0.50), and then no gradient goes through them any more."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def bf16(settings: LanguageSettings) -> bool:
    """Whether to compute in bfloat16: where it is asked for, else on GPUs that have it."""
    if settings.bf16 == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return settings.bf16


def four_bits(asked: bool | str, *, gpu: bool, installed: bool) -> tuple[bool, str]:
    """Whether the base is loaded in four bits, and why or why not; raises SettingsError when it must be and cannot.

    Without a GPU only when it is asked for: bitsandbytes computes on CPUs too, to save memory, not time.
    """
    lacking = [what for what, there in (("a GPU", gpu), ("the package bitsandbytes", installed)) if not there]
    if asked is True and not installed:
        raise SettingsError(
            'load_4bit = true: this host lacks the package bitsandbytes; install it, or use "auto" or false'
        )
    if asked is False or (lacking and asked is not True):
        return False, f"no: {'not asked for' if asked is False else 'without ' + ' and '.join(lacking)}"
    return True, "yes: NF4" if gpu else "yes: NF4, on the CPU"


def adapted(base: Base, settings: LanguageSettings) -> Any:
    """The model with a fresh adapter, or with the one to train further; only the adapter's parameters learn.

    Raises SettingsError for LoRA settings that the model or that adapter cannot honour.
    """
    if settings.adapter is None:
        return get_peft_model(base.model, lora_config(base.model, settings.lora))
    _check_same(settings.adapter, settings.lora)
    return PeftModel.from_pretrained(base.model, settings.adapter, is_trainable=True)


def check_shape(folder: Path, settings: LanguageSettings) -> None:
    """Whether a checkpoint can have the adapter that is asked for, by its configuration alone: no weights are loaded.

    Raises SettingsError.
    """
    if settings.adapter is not None:
        _check_same(settings.adapter, settings.lora)
        return
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{folder}: no checkpoint of a language model: {error}") from None
    lora_config(model, settings.lora)


def adapter_config(adapter: Path) -> dict[str, Any]:
    """The configuration of a PEFT adapter; raises SettingsError when the folder holds none."""
    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"adapter = {str(adapter)!r}: no PEFT adapter is there ({error})") from None
    return config


def _check_same(adapter: Path, lora: LoraSettings) -> None:
    """An adapter that is trained further keeps its shape: what is set must be what it has."""
    has = adapter_config(adapter)
    has["target_modules"] = sorted(has["target_modules"] or [])
    for key in lora.model_fields_set:
        asked = getattr(lora, key)
        if key == "target_modules" and asked != "all":
            asked = sorted(asked)
        if asked != has[key]:
            raise SettingsError(f"lora.{key} = {asked!r}: the adapter {adapter} has {has[key]!r}; leave the key out")


def lora_config(model: Any, settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration for a causal language model.

    PEFT leaves out names it does not find as long as one matches; here each must match a module, else SettingsError.
    """
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if settings.target_modules != "all":
        for target in settings.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
                raise SettingsError(f"lora.target_modules = {target!r}: no such module in this model; it has: {known}")
    alpha = settings.lora_alpha
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules="all-linear" if settings.target_modules == "all" else list(settings.target_modules),
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
    )


def as_tokens(
    base: Base, work: Work, encode: Callable[[Base, Sequence[Any]], tuple[list[Row], int]], what: str
) -> tuple[list[Row], list[Row], dict[str, int]]:
    """The data and the held-out data of `work` as tokens, and how many there are of each and were left out. `what`: the
    name of the data. Raises ValueError when nothing is left of either."""
    rows, left_out = encode(base, work.data)
    if not rows:
        raise ValueError(
            f"nothing to train on: none of {len(work.data)} {what} fits the context of {base.context} tokens"
        )
    held_out, held_left_out = encode(base, work.held_out)
    if work.held_out and not held_out:
        raise ValueError(f"none of {len(work.held_out)} held-out {what} fits the context of {base.context} tokens")
    counts = {"left_out": left_out, "held_out": len(held_out), "held_left_out": held_left_out}
    return rows, held_out, {what: len(rows), **counts}


def prompt_tokens(base: Base, prompt: str, messages: Sequence[Turn] | None) -> list[int]:
    """The tokens in front of an answer, as a device makes them: a conversation goes through the model's chat template,
    where it has one."""
    if messages and base.words.chat_template:
        return list(base.words.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True))
    return list(base.words(prompt)["input_ids"])


def answer_tokens(base: Base, answer: str, messages: Sequence[Turn] | None) -> list[int]:
    """The tokens of an answer and of the end behind it: that of a turn in a conversation, else that of a text.

    An answer is tokenized apart from its prompt, because that is how a device meets them: the prompt ends where it ends.
    """
    tokens = list(base.words(_completion(base, answer, messages), add_special_tokens=False)["input_ids"])
    ended = next((place for place, token in enumerate(tokens) if token in base.ends), None)
    if ended is not None:
        return tokens[: ended + 1]
    end = base.words.eos_token_id
    return [*tokens, end if end is not None else min(base.ends)]


def _completion(base: Base, answer: str, messages: Sequence[Turn] | None) -> str:
    """What the chat template makes of an answer, with its mark of the turn's end."""
    if not messages or not base.words.chat_template:
        return answer
    asked = base.words.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    turn = Turn(role="assistant", content=answer)
    said = base.words.apply_chat_template([*messages, turn], tokenize=False)
    # Some templates write an answer differently from where they ask for one; those know no more than the text itself.
    return said[len(asked) :] if said.startswith(asked) and len(said) > len(asked) else answer
