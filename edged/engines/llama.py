"""Language models in GGUF files, run by llama.cpp. With `llama_grammar` the only file that imports llama_cpp.

The C API is used rather than llama_cpp's `Llama` class, for four reasons: LoRA adapters come and go on a loaded model,
the context is sized by what the model was trained with and what the device allows, the log-probability of a token
comes from the last row of logits without keeping a row for every token, and the work can be halted between its steps.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edged.engines.answer import Pieces, draw, log_probability
from edged.engines.base import (
    EngineError,
    EngineOptions,
    Finished,
    GenerateRequest,
    NoTemplate,
    PromptTooLong,
    Token,
    Unsuitable,
)
from edged.engines.chat import ChatTemplate, Markers
from edged.engines.constrain import grammar
from edged.engines.llama_grammar import Constraint, TokenTable
from edged.wire.manifest import ReleaseManifest

# Prompt tokens in one call to llama_decode. `halt` is asked between calls, so fewer means sooner: a model of 4 B parameters
# computes 64 tokens in 2 to 3 s on two cores. Measured with 0.3 B parameters, 64 cost 6 % of the speed of 256, 32 cost 18 %.
BATCH_TOKENS = 64
ADAPTERS_MAX = 2  # the one in use and the one before it, so that going back needs no disk
ALL_LAYERS = -1
_MAGIC = b"GGUF"
_HEADER_BYTES = 24  # magic, version, number of tensors, number of keys
_LOG_ERROR = 4  # ggml_log_level

# llama.cpp reports why a file was refused only through its log, which belongs to the process as a whole.
_log_errors: deque[str] = deque(maxlen=16)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _user: object) -> None:
    if level == _LOG_ERROR:
        _log_errors.append(text.decode("utf-8", "replace").strip())


def log_reason() -> str:
    """Why llama.cpp refused what it was last asked for, in brackets; empty when it did not say."""
    # The first line names the cause, later ones only say who gave up because of it.
    return f" ({_log_errors[0].partition(': ')[2]})" if _log_errors else ""


def capture_log() -> None:
    """Take llama.cpp's log, which would go to standard error, and forget what it said so far."""
    _log_errors.clear()
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def _check_gguf(path: Path) -> None:
    """Refuse what is not even the start of a GGUF file before llama.cpp reads it; raises EngineError."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); fetch the release again") from None
    if head[:4] != _MAGIC:
        raise EngineError(f"{path}: not a GGUF file, it starts with {head[:4]!r} instead of {_MAGIC!r}")
    if len(head) < _HEADER_BYTES:
        raise EngineError(f"{path}: truncated, {len(head)} bytes are less than a GGUF header; fetch the release again")


@dataclass(frozen=True, slots=True)
class _LlamaKeys:
    """Engine keys of this engine: `context_max` caps the context (its memory grows with it), 0 means the model's own;
    `gpu_layers` is how many layers llama.cpp may put on a GPU: a number, "all", or "auto", which is all of them where it
    finds one that it was built for, and none elsewhere."""

    context_max: int = 0
    gpu_layers: int | Literal["auto", "all"] = "auto"

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> _LlamaKeys:
        known = ("context_max", "gpu_layers")
        for key, value in extra.items():
            if key not in known:
                raise EngineError(f"engine key {key} = {value!r} is unknown to llama; known: {', '.join(known)}")
            if key == "gpu_layers" and value in ("auto", "all"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise EngineError(f"engine key {key} = {value!r}: use a whole number, 0 or more")
        return cls(**extra)


class LlamaGenerator:
    """A GGUF model of a release, as a `Generator`. One worker thread at a time."""

    def __init__(self, folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> None:
        """Load `files["model"]` of the release in `folder`; raises EngineError naming the file and the reason."""
        keys = _LlamaKeys.parse(options.extra)
        if "model" not in manifest.files:
            raise EngineError(f"release {manifest.release} names no file `model`, it has: {', '.join(manifest.files)}")
        self._release = manifest.release
        self._adapters: OrderedDict[tuple[str, int, int], Any] = OrderedDict()
        self._turn = 0
        self._cached: list[int] = []  # the tokens that llama.cpp's cache holds, in order
        self._chat: ChatTemplate | None = None
        self._markers: Markers | None = None  # for prompts whose control tokens stay text
        self._table: TokenTable | None = None
        self._context: Any = None
        self._model = _load_model(folder / manifest.files["model"].path, keys.gpu_layers)
        try:
            trained = int(llama_cpp.llama_model_n_ctx_train(self._model))
            # llama.cpp rounds the size of its cache up; the model is still only good for what it was trained with.
            self.context = min(trained, keys.context_max) if keys.context_max else trained
            self._context = _open_context(self._model, self.context, max(1, options.threads))
            self._vocab = llama_cpp.llama_model_get_vocab(self._model)
            self._vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        except BaseException:
            self.close()
            raise

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """Yield the answer's tokens, then one Finished.

        Greedy when `temperature` is 0, else sampled from the whole tempered distribution with `seed`. Log-probabilities
        are the model's own, before temperature and before a schema rules tokens out; their mean covers the end-of-text
        token too, so that an empty answer has a probability as well. Control tokens are never part of the text.
        A `prompt` belongs to whoever sends it, control tokens that it spells out included; in `messages`, and in a prompt
        that is `literal`, they stay text.
        The tokens with which this prompt begins like the last one are not computed again. That changes how the work is
        cut into batches, and thereby the last bits of the numbers, not more.
        Another `generate`, `attach` or `close` ends an answer that is still being made with the reason `cancelled`.
        Raises PromptTooLong (prompt and at least one token must fit `context`) or EngineError at the call.
        """
        if self._context is None:
            raise EngineError(f"{self._release}: the engine is closed")
        if not 0 <= request.temperature < float("inf"):
            raise Unsuitable(f"temperature {request.temperature}: use 0 (greedy) or more")
        prompt = self._prompt(request)
        if len(prompt) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context of {self._release} is {self.context} tokens for "
                f"prompt and answer together; send at most {self.context - 1}"
            )
        _log_errors.clear()
        rules = "" if request.schema is None else grammar(request.schema)
        self._turn += 1
        return self._answer(request, prompt, rules, self._turn)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """Use this LoRA adapter (GGUF) at `scale` from the next request on, None: the bare base.

        Takes no reload of the base; an adapter that cannot be loaded leaves the one in use where it is.
        Raises EngineError naming the file and the reason.
        """
        if self._context is None:
            raise EngineError(f"{self._release}: the engine is closed")
        self._turn += 1
        _log_errors.clear()
        if adapter is None:
            code = llama_cpp.llama_set_adapters_lora(self._context, None, 0, None)
        else:
            if not np.isfinite(scale):
                raise EngineError(f"adapter scale {scale}: use a finite number, 1.0 is the adapter as it was trained")
            handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._load_adapter(adapter))
            code = llama_cpp.llama_set_adapters_lora(self._context, handles, 1, (ctypes.c_float * 1)(scale))
        if code != 0:
            raise EngineError(f"{self._release}: adapter {adapter} was refused with code {code}{log_reason()}")
        # What the cache holds was computed under the other weights.
        self._forget()
        while len(self._adapters) > ADAPTERS_MAX:
            llama_cpp.llama_adapter_lora_free(self._adapters.popitem(last=False)[1])

    def close(self) -> None:
        """Free the context, the adapters and the model; an answer in progress ends as `cancelled`. May be repeated."""
        self._turn += 1
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context = None
        while self._adapters:
            llama_cpp.llama_adapter_lora_free(self._adapters.popitem()[1])
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def _answer(self, request: GenerateRequest, prompt: list[int], rules: str, turn: int) -> Iterator[Token | Finished]:
        """The answer to `prompt`, within the grammar `rules` if there are any, as long as `turn` is the engine's."""
        if turn != self._turn:
            yield Finished("cancelled", len(prompt), 0, 0.0)
            return
        room = self.context - len(prompt)
        limit = min(request.tokens_max, room) if request.tokens_max > 0 else room
        chance = np.random.default_rng(request.seed)
        pieces = Pieces(request.stop)
        logprobs: list[float] = []
        reused = self._keep(prompt)
        reason, made, pending = "", 0, prompt[reused:]
        with Constraint(self._tokens(), rules) if rules else nullcontext() as constraint:
            choose = constraint.choose if constraint else draw
            while not reason:
                reason = self._decode(pending, request, turn)
                if reason:
                    break
                logits = self._logits()
                token = choose(logits, request.temperature, chance)
                logprobs.append(log_probability(logits, token))
                if constraint:
                    constraint.accept(token)
                if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                    reason = "stop"
                    break
                made, pending = made + 1, [token]
                said = pieces.add(self._piece(token), logprobs[-1])
                if pieces.stopped or (constraint and constraint.complete):
                    reason = "stop"
                elif made == limit:
                    reason = "length"
                if constraint and reason and (pieces.stopped or not constraint.may_end()):
                    reason = "truncated"
                yield from said
        yield from pieces.rest()
        mean = float(np.mean(logprobs)) if logprobs else 0.0
        yield Finished(reason, len(prompt), made, mean, reused)

    def _keep(self, prompt: Sequence[int]) -> int:
        """Shorten the cache to what `prompt` begins with too; answers how many tokens that is.

        The last token of a prompt is always decoded again, for its logits.
        """
        same = 0
        for cached, wanted in zip(self._cached, prompt[:-1], strict=False):
            if cached != wanted:
                break
            same += 1
        memory = llama_cpp.llama_get_memory(self._context)
        if same < len(self._cached):
            # Memories of sliding windows or of states cannot go back to every place; some say so, others are just gone.
            shortened = llama_cpp.llama_memory_seq_rm(memory, 0, same, -1)
            if not shortened or llama_cpp.llama_memory_seq_pos_max(memory, 0) != same - 1:
                same = 0
        if same == 0 or llama_cpp.llama_memory_seq_pos_min(memory, 0) != 0:
            self._forget()
            return 0
        self._cached = self._cached[:same]
        return same

    def _forget(self) -> None:
        """Empty the cache."""
        self._cached = []
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], request: GenerateRequest, turn: int) -> str:
        """Compute `tokens`, which go behind what the cache holds; answers why it was halted, "" when it was not.

        Raises EngineError.
        """
        for start in range(0, len(tokens), BATCH_TOKENS):
            reason = "cancelled" if turn != self._turn else request.halt()
            if reason:
                return reason
            part = tokens[start : start + BATCH_TOKENS]
            array = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(part)))
            if code != 0:
                self._forget()  # a part of the batch may be in it
                raise EngineError(f"{self._release}: llama.cpp failed with code {code} while decoding{log_reason()}")
            self._cached += part
        return ""

    def _logits(self) -> NDArray[np.float32]:
        """Logits (vocabulary,) behind the last decoded token; raises EngineError when they are no numbers."""
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), shape=(self._vocab_size,))
        if not np.isfinite(logits).all():
            self._forget()
            raise EngineError(f"{self._release}: the model computes numbers that are not finite; its file is damaged")
        return logits

    def _prompt(self, request: GenerateRequest) -> list[int]:
        """The tokens of the request's prompt or conversation, one at least; raises EngineError."""
        if request.prompt and request.messages:
            raise Unsuitable("the request has a prompt and messages; send one of them")
        if not request.messages:
            if request.literal:
                self._markers = self._markers or Markers(self._control(""))
                tokens = self._markers.literal(request.prompt, self._tokenize)
            else:
                tokens = self._tokenize(request.prompt, whole=True)
            if not tokens:
                raise Unsuitable("the prompt is empty; send at least one character")
            return tokens
        if self._chat is None:
            self._chat = self._chat_template()
        tokens = []
        for part in self._chat.render(request.messages):
            tokens += self._tokenize(part, whole=False)
        if not tokens:
            raise Unsuitable(f"{self._release}: its chat template makes an empty prompt of this conversation")
        return tokens

    def _chat_template(self) -> ChatTemplate:
        source = llama_cpp.llama_model_chat_template(self._model, None)
        if source is None:
            raise NoTemplate(f"{self._release}: its GGUF file has no chat template; send a prompt instead of messages")
        text = source.decode("utf-8", "replace")
        bos, eos = llama_cpp.llama_vocab_bos(self._vocab), llama_cpp.llama_vocab_eos(self._vocab)
        return ChatTemplate(text, self._release, self._text(bos), self._text(eos), self._control(text))

    def _control(self, template: str) -> list[str]:
        """The spellings that no message may contain."""
        return [spelling for token in range(self._vocab_size) if (spelling := self._spelling(token, template))]

    def _spelling(self, token: int, template: str) -> str:
        """How a token is spelled that no message may contain, "" for other tokens."""
        attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
        if attributes & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN):
            return self._text(token)
        # Some vocabularies list the marks of turns among the words that users added, beside runs of spaces and HTML; and
        # some templates put such a mark together from the name of a role.
        text = self._text(token) if attributes & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED else ""
        mark = text.startswith("<|") and text.endswith("|>")
        return text if mark or (text.strip() and text in template) else ""

    def _text(self, token: int) -> str:
        """A token as the vocabulary spells it; "" for none."""
        return llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace") if token >= 0 else ""

    def _tokens(self) -> TokenTable:
        if self._table is None:
            self._table = TokenTable(self._vocab, self._vocab_size, self._piece)
        return self._table

    def _tokenize(self, text: str, *, whole: bool) -> list[int]:
        """The tokens of `text`, control tokens included; `whole`: with what the model wants at both ends of a text."""
        data = text.encode("utf-8", "replace")
        size = len(data) + 2  # a token is at least one byte; one more at each end for what the model adds
        tokens = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, size, whole, True)
        if count < 0:
            raise Unsuitable(f"the prompt of {len(data)} bytes cannot be tokenized (code {count})")
        return list(tokens[:count])

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _load_adapter(self, path: Path) -> Any:
        _check_gguf(path)
        stat = path.stat()
        key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
        if key not in self._adapters:
            handle = llama_cpp.llama_adapter_lora_init(self._model, str(path).encode())
            if not handle:
                raise EngineError(f"{path}: not a LoRA adapter for {self._release}{log_reason()}")
            self._adapters[key] = handle
        self._adapters.move_to_end(key)
        return self._adapters[key]


def _load_model(path: Path, gpu_layers: int | Literal["auto", "all"]) -> Any:
    capture_log()
    _check_gguf(path)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = _on_gpu() if isinstance(gpu_layers, str) else gpu_layers
    if gpu_layers == "all" and not params.n_gpu_layers:
        raise EngineError(
            f'{path}: gpu_layers = "all", and this llama.cpp finds no GPU; use "auto", or install one that is built for it'
        )
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise EngineError(f"{path}: llama.cpp cannot load it{log_reason()}; fetch the release again or export it anew")
    return model


def _on_gpu() -> int:
    """How many layers belong on a GPU: all (as llama.cpp writes it) where it can use one, else none."""
    return ALL_LAYERS if llama_cpp.llama_supports_gpu_offload() else 0


def _open_context(model: Any, tokens: int, threads: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = tokens
    params.n_batch = params.n_ubatch = min(tokens, BATCH_TOKENS)
    params.n_threads = params.n_threads_batch = threads
    params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise EngineError(
            f"a context of {tokens} tokens cannot be opened{log_reason()}; lower the engine key context_max"
        )
    return context
