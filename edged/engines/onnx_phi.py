"""Phi language models as ONNX files, decoded token by token on ONNX Runtime.

A release of this engine has the files `model` (and `model_data`, where its weights lie outside of it), `tokenizer`
(tokenizer.json) and `config`: a JSON object with `max_position_embeddings` (tokens, prompt and answer together),
`eos_token_id` (one or a list) and, for conversations, `chat_template`, `bos_token` and `eos_token`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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
from edged.engines.causal import STEP_TOKENS_MAX, CausalModel
from edged.engines.chat import ChatTemplate
from edged.engines.constrain import grammar
from edged.engines.ort import Session
from edged.engines.token_mask import TokenMask, TokenTrie
from edged.engines.vocabulary import Vocabulary
from edged.wire.manifest import ReleaseManifest

_ROLES = ("model", "tokenizer", "config")


@dataclass(frozen=True, slots=True)
class _Config:
    """What a release's config says."""

    context: int
    ends: frozenset[int]  # tokens that end an answer
    template: str
    bos: str
    eos: str

    @classmethod
    def read(cls, path: Path) -> _Config:
        """Raises EngineError naming the file and the key."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"it holds {type(value).__name__} instead of an object")
            ends = value.get("eos_token_id")
            return cls(
                _whole(value.get("max_position_embeddings"), "max_position_embeddings", 2),
                frozenset(_whole(end, "eos_token_id", 0) for end in (ends if isinstance(ends, list) else [ends])),
                *(_text(value.get(key) or "", key) for key in ("chat_template", "bos_token", "eos_token")),
            )
        except OSError as error:
            raise EngineError(f"{path}: cannot be read ({error.strerror}); fetch the release again") from None
        except ValueError as error:
            raise EngineError(f"{path}: {error}; fetch the release again or export it anew") from None


def _whole(value: object, key: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} = {value!r}: expected a whole number, {least} or more")
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} = {value!r}: expected a text")
    return value


class OnnxPhiGenerator:
    """An ONNX language model of a release, as a `Generator`. One worker thread at a time.

    `options.extra` knows `context_max`, which caps the context (the cache grows with it; 0 means the model's own), and
    the keys of every ONNX engine. ONNX Runtime's arena is off unless asked for: for arrays that grow with every token it
    only takes more memory.
    """

    def __init__(self, folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> None:
        """Load the release in `folder`; raises EngineError naming the file and the reason."""
        self._release = manifest.release
        self._turn = 0
        self._model: CausalModel | None = None
        self._trie: TokenTrie | None = None  # made for the first answer under a schema
        context_max, options = _split(options)
        paths = _paths(folder, manifest)
        self._config = _Config.read(paths["config"])
        self.context = min(self._config.context, context_max or self._config.context)
        self._vocabulary = Vocabulary(paths["tokenizer"])
        self._template = self._chat_template()
        self._model = CausalModel(Session(folder, manifest, options, shapes_vary=True), self._release)
        if (size := self._model.vocabulary) is not None and self._vocabulary.size > size:
            self.close()
            raise EngineError(
                f"release {self._release}: {paths['tokenizer'].name} has {self._vocabulary.size} tokens, the model only "
                f"{size}: they do not belong together"
            )

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """Yield the answer's tokens, then one Finished.

        Greedy when `temperature` is 0, else sampled from the whole tempered distribution with `seed`. Log-probabilities
        are the model's own, before temperature and before a schema rules tokens out; their mean covers the end-of-text
        token too, so that an empty answer has a probability as well. Control tokens are never part of the text. Another
        `generate`, `attach` or `close` ends an answer that is still being made with the reason `cancelled`.
        Raises PromptTooLong (prompt and at least one token must fit `context`) or EngineError at the call.
        """
        if self._model is None:
            raise EngineError(f"{self._release}: the engine is closed")
        if not request.temperature >= 0:
            raise Unsuitable(f"temperature {request.temperature}: use 0 (greedy) or more")
        prompt = self._tokens(request)
        if not prompt:
            raise Unsuitable("the prompt is empty; send at least one character")
        if len(prompt) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context of {self._release} is {self.context} tokens for "
                f"prompt and answer together; send at most {self.context - 1}"
            )
        mask = None if request.schema is None else TokenMask(self._known(), grammar(request.schema))
        self._turn += 1
        return self._answer(self._model, request, prompt, mask, self._turn)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """Only None, the bare base, is possible here; an adapter is an EngineError that says what to do instead."""
        if self._model is None:
            raise EngineError(f"{self._release}: the engine is closed")
        if adapter is not None:
            raise EngineError(
                f"{adapter}: the weights of an ONNX file are fixed, {self._release} takes no adapter; merge the adapter "
                "before the export, or release the base as GGUF for the llama engine"
            )
        self._turn += 1

    def close(self) -> None:
        """Free the model and its cache; an answer in progress ends as `cancelled`. May be repeated."""
        self._turn += 1
        if self._model is not None:
            self._model.close()
            self._model = None

    def _chat_template(self) -> ChatTemplate | None:
        config = self._config
        if not config.template:
            return None
        return ChatTemplate(config.template, self._release, config.bos, config.eos, self._vocabulary.control)

    def _tokens(self, request: GenerateRequest) -> list[int]:
        if not request.messages:
            return self._vocabulary.encode(request.prompt)
        if self._template is None:
            raise NoTemplate(f"{self._release}: the model has no chat template; send a prompt instead of messages")
        parts = self._template.render(request.messages)
        return [token for part in parts for token in self._vocabulary.encode(part, whole=False)]

    def _known(self) -> TokenTrie:
        if self._trie is None:
            vocabulary = self._vocabulary
            self._trie = TokenTrie([vocabulary.piece(token) for token in range(vocabulary.size)], self._config.ends)
        return self._trie

    def _answer(
        self, model: CausalModel, request: GenerateRequest, prompt: list[int], mask: TokenMask | None, turn: int
    ) -> Iterator[Token | Finished]:
        """The answer to `prompt`, within `mask` if there is one, as long as `turn` is the engine's."""
        room = self.context - len(prompt)
        limit = min(request.tokens_max, room) if request.tokens_max > 0 else room
        chance = np.random.default_rng(request.seed)
        pieces = Pieces(request.stop)
        logprobs: list[float] = []
        made = 0
        reused = model.rewind(prompt) if turn == self._turn else 0
        steps = deque(prompt[at : at + STEP_TOKENS_MAX] for at in range(reused, len(prompt), STEP_TOKENS_MAX))
        while True:
            # Somebody else's turn comes first: the cache is theirs.
            reason = "cancelled" if turn != self._turn else request.halt()
            if reason:
                break
            logits = model.step(steps.popleft())
            if steps:
                continue
            token = draw(mask.masked(logits) if mask else logits, request.temperature, chance)
            logprobs.append(log_probability(logits, token))
            if token in self._config.ends:
                reason = "stop"
                break
            made += 1
            if mask:
                mask.accept(token)
            said = pieces.add(self._vocabulary.piece(token), logprobs[-1])
            reason = _ended(pieces, mask, made == limit)
            yield from said
            if reason:
                break
            steps.append([token])
        yield from pieces.rest()
        mean = float(np.mean(logprobs)) if logprobs else 0.0
        yield Finished(reason, len(prompt), made, mean, reused_tokens=reused)


def _ended(pieces: Pieces, mask: TokenMask | None, full: bool) -> str:
    """Why an answer ends behind its newest token, "": it goes on. `full`: there is no room for another token."""
    if mask and (pieces.stopped or (full and not mask.may_end)):
        return "truncated"
    if pieces.stopped or (mask and mask.complete):
        return "stop"
    return "length" if full else ""


def _split(options: EngineOptions) -> tuple[int, EngineOptions]:
    """This engine's own key, and the options for ONNX Runtime; raises EngineError."""
    extra = {"arena": False} | options.extra
    context_max = extra.pop("context_max", 0)
    try:
        _whole(context_max, "context_max", 0)
    except ValueError as error:
        raise EngineError(f"engine key {error}") from None
    return context_max, replace(options, extra=extra)


def _paths(folder: Path, manifest: ReleaseManifest) -> dict[str, Path]:
    """The files by role, all of them there; raises EngineError."""
    if lost := [role for role in _ROLES if role not in manifest.files]:
        raise EngineError(
            f"release {manifest.release} names no file {', '.join(lost)}, it has: {', '.join(manifest.files)}"
        )
    paths = {role: folder / manifest.files[role].path for role in (*_ROLES, "model_data") if role in manifest.files}
    for path in paths.values():
        if not path.is_file():
            raise EngineError(f"release {manifest.release}: {path} is missing; fetch the release again")
    return paths
