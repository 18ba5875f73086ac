"""Phi language models as ONNX files, decoded token by token on ONNX Runtime.

A release of this engine has the files `model` (and `model_data`, where its weights lie outside of it), `tokenizer`
(tokenizer.json) and `config`: a JSON object with `max_position_embeddings` (tokens, prompt and answer together),
`eos_token_id` (one or a list) and, for conversations, `chat_template`, `bos_token` and `eos_token`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from edged.engines.base import EngineError, EngineOptions
from edged.engines.causal import CausalModel
from edged.engines.chat import ChatTemplate
from edged.engines.ort import Session
from edged.engines.token_loop import TokenGenerator
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


class OnnxPhiGenerator(TokenGenerator):
    """An ONNX language model of a release, as a `Generator`. One worker thread at a time.

    `options.extra` knows `context_max`, which caps the context (the cache grows with it; 0 means the model's own), and
    the keys of every ONNX engine. ONNX Runtime's arena is off unless asked for: for arrays that grow with every token it
    only takes more memory.
    """

    def __init__(self, folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> None:
        """Load the release in `folder`; raises EngineError naming the file and the reason."""
        release = manifest.release
        context_max, options = _split(options)
        paths = _paths(folder, manifest)
        config, vocabulary = _Config.read(paths["config"]), Vocabulary(paths["tokenizer"])
        template = None
        if config.template:
            template = ChatTemplate(config.template, release, config.bos, config.eos, vocabulary.control)
        model = CausalModel(Session(folder, manifest, options, shapes_vary=True), release)
        if (size := model.vocabulary) is not None and vocabulary.size > size:
            model.close()
            raise EngineError(
                f"release {release}: {paths['tokenizer'].name} has {vocabulary.size} tokens, the model only "
                f"{size}: they do not belong together"
            )
        context = min(config.context, context_max or config.context)
        super().__init__(release, model, vocabulary, template, context, config.ends)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """Only None, the bare base, is possible here; an adapter is an EngineError that says what to do instead."""
        if self._model is None:
            raise EngineError(f"{self._name}: the engine is closed")
        if adapter is not None:
            raise EngineError(
                f"{adapter}: the weights of an ONNX file are fixed, {self._name} takes no adapter; merge the adapter "
                "before the export, or release the base as GGUF for the llama engine"
            )
        self._turn += 1


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
