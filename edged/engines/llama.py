"""Language models in GGUF files, run by llama.cpp. The only file of the device that imports llama_cpp.

The C API is used rather than llama_cpp's `Llama` class, for three reasons: LoRA adapters come and go on a loaded model,
the context is sized by what the model was trained with and what the device allows, and the log-probability of a token
comes from the last row of logits without keeping a row for every token.
"""

from __future__ import annotations

import codecs
import ctypes
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edged.engines.base import EngineError, EngineOptions, Finished, GenerateRequest, PromptTooLong, Token
from edged.wire.manifest import ReleaseManifest

BATCH_TOKENS = 512  # prompt tokens in one call to llama_decode
ADAPTERS_MAX = 2  # the one in use and the one before it, so that going back needs no disk
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
    `gpu_layers` is how many layers llama.cpp may put on a GPU it was built for."""

    context_max: int = 0
    gpu_layers: int = 0

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> _LlamaKeys:
        known = ("context_max", "gpu_layers")
        for key, value in extra.items():
            if key not in known:
                raise EngineError(f"engine key {key} = {value!r} is unknown to llama; known: {', '.join(known)}")
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
        are the model's own, before temperature; their mean covers the end-of-text token too, so that an empty answer
        has a probability as well. Control tokens are never part of the text. Another `generate`, `attach` or `close`
        ends an answer that is still being made with the reason `cancelled`.
        Raises PromptTooLong (prompt and at least one token must fit `context`) or EngineError at the call.
        """
        if self._context is None:
            raise EngineError(f"{self._release}: the engine is closed")
        if not request.temperature >= 0:
            raise EngineError(f"temperature {request.temperature}: use 0 (greedy) or more")
        prompt = self._tokenize(request.prompt)
        if not prompt:
            raise EngineError("the prompt is empty; send at least one character")
        if len(prompt) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context of {self._release} is {self.context} tokens for "
                f"prompt and answer together; send at most {self.context - 1}"
            )
        self._turn += 1
        _log_errors.clear()
        return self._answer(request, prompt, self._turn)

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
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
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

    def _answer(self, request: GenerateRequest, prompt: list[int], turn: int) -> Iterator[Token | Finished]:
        room = self.context - len(prompt)
        limit = min(request.tokens_max, room) if request.tokens_max > 0 else room
        chance = np.random.default_rng(request.seed)
        pieces = _Pieces(request.stop)
        logprobs: list[float] = []
        reason, made, pending = "length", 0, prompt
        if turn == self._turn:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        while made < limit:
            if turn != self._turn:
                reason = "cancelled"
                break
            logits = self._decode(pending)
            token, logprob = _sample(logits, request.temperature, chance)
            logprobs.append(logprob)
            if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                reason = "stop"
                break
            made += 1
            yield from pieces.add(self._piece(token), logprob)
            if pieces.stopped:
                reason = "stop"
                break
            pending = [token]
        yield from pieces.rest()
        mean = float(np.mean(logprobs)) if logprobs else 0.0
        yield Finished(reason, prompt_tokens=len(prompt), answer_tokens=made, mean_logprob=mean)

    def _decode(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits (vocabulary,) after `tokens`, which go behind what the cache holds; raises EngineError."""
        for start in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[start : start + BATCH_TOKENS]
            array = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(part)))
            if code != 0:
                raise EngineError(f"{self._release}: llama.cpp failed with code {code} while decoding{log_reason()}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), shape=(self._vocab_size,))
        if not np.isfinite(logits).all():
            raise EngineError(f"{self._release}: the model computes numbers that are not finite; its file is damaged")
        return logits

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 2  # a token is at least one byte; one more at each end for what the model adds
        tokens = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, size, True, True)
        if count < 0:
            raise EngineError(f"the prompt of {len(data)} bytes cannot be tokenized (code {count})")
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


def _load_model(path: Path, gpu_layers: int) -> Any:
    capture_log()
    _check_gguf(path)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise EngineError(f"{path}: llama.cpp cannot load it{log_reason()}; fetch the release again or export it anew")
    return model


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


def _sample(logits: NDArray[np.float32], temperature: float, chance: np.random.Generator) -> tuple[int, float]:
    """One token and its natural log-probability under softmax(`logits`); greedy at temperature 0."""
    shifted = logits - logits.max()
    total = np.log(np.exp(shifted).sum(dtype=np.float64))
    if temperature == 0:
        token = int(shifted.argmax())
    else:
        weights = np.exp(shifted.astype(np.float64) / temperature)
        token = int(np.searchsorted(np.cumsum(weights), chance.random() * weights.sum(), side="right"))
        token = min(token, len(logits) - 1)  # rounding may put the last bound a hair below the sum
    return token, float(shifted[token] - total)


@dataclass(slots=True)
class _Pieces:
    """Turns bytes of tokens into text: characters split between tokens, stop sequences held back until ruled out."""

    stop: tuple[str, ...]
    stopped: bool = False
    _held: list[Token] = field(default_factory=list)
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def __post_init__(self) -> None:
        self.stop = tuple(text for text in self.stop if text)

    def add(self, piece: bytes, logprob: float) -> list[Token]:
        """Tokens whose text is now certain to be part of the answer."""
        self._held.append(Token(self._utf8.decode(piece), logprob))
        text = "".join(token.text for token in self._held)
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._cut(min(ends))
            return self.rest()
        if any(text.endswith(stop[:length]) for stop in self.stop for length in range(1, len(stop))):
            return []
        return self.rest()

    def rest(self) -> list[Token]:
        """What is still held back. Bytes that never became a character are left out."""
        tokens, self._held = self._held, []
        return tokens

    def _cut(self, length: int) -> None:
        kept: list[Token] = []
        for token in self._held:
            if length <= 0:
                break
            kept.append(Token(token.text[:length], token.logprob))
            length -= len(token.text)
        self._held = kept
