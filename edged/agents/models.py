"""The model of an agent: the device's own, or a server that speaks OpenAI's protocol. To an agent they are the same: a
conversation and a schema in, a text out."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from edged.core.transcript import STOP, transcript
from edged.engines.base import (
    ChatMessage,
    EngineError,
    EngineOptions,
    Finished,
    GenerateRequest,
    Generator,
    NoTemplate,
    generate_all,
)
from edged.turns import Halt, Halted, Turns, never

log = logging.getLogger(__name__)

# Where a provider's server is, "" where only its operator knows, and how it wants to be told a schema.
PROVIDERS: dict[str, tuple[str, Literal["json_schema", "json_object"]]] = {
    "openai": ("https://api.openai.com/v1", "json_schema"),
    "llama-cpp-python": ("", "json_object"),
}
TOKEN_CHARS = 4  # of a token, about, where a server does not count them
WAITING_MAX = 64  # that wait for one model
THREADS_MAX = WAITING_MAX + 2  # of one model: those that wait, the one that generates, and one to say that it is full


class ModelConfig(BaseModel):
    """Which model an agent uses.

    `type` local: `name` is a slot of this device's daemon, or the folder of a release. `type` api: `name` is the model's
    name at a server that speaks OpenAI's protocol; `base_url` or OPENAI_BASE_URL says where, `api_key` or OPENAI_API_KEY
    is its key; `provider` says how it wants to be asked. `device`: where a release's folder is loaded, "auto" is the GPU
    where the engine finds one (a slot's own configuration says where that runs). `model_class` is kept for readers: every
    model here is a language model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    type: Literal["local", "api"]
    name: str = Field(min_length=1, max_length=512)
    provider: str | None = None
    base_url: str | None = None
    api_key: SecretStr | None = None
    max_tokens: int = Field(default=1024, ge=1, le=65536)
    temperature: float = Field(default=0.0, ge=0, le=10)
    seed: int = 0
    allow_plain: bool = False  # plain HTTP to another machine
    model_class: Literal["llm", "vlm"] | None = None
    timeout_s: float = Field(default=60.0, gt=0, le=3600)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:0)?)$")


@dataclass(frozen=True, slots=True)
class Said:
    """A model's answer: `end.reason` says why it ended; `release`, `adapter` whose words they are."""

    text: str
    end: Finished
    release: str = ""
    adapter: str = ""
    took_ms: float = 0.0  # without the wait for the turn; 0: not measured


Hear = Callable[[str], None]  # gets each piece of an answer as it is made


class Model(Protocol):
    """What an agent needs of a model."""

    def say(self, request: GenerateRequest, hear: Hear | None = None) -> Said:
        """Answer; blocks. Raises EngineError (PromptTooLong, Unsuitable, Unanswered)."""
        ...


class Lessor(Protocol):
    """Where a generator comes from for one request: a slot lends the one that is live now."""

    def lent(self, halt: Halt) -> AbstractContextManager[tuple[Generator, str, str]]:
        """The generator, its release and its adapter, for one request. Raises Halted when `halt` ends the wait for it."""
        ...


class LentModel:
    """A model that is lent for one request at a time: what is swapped in between is simply the next one. One generation at
    a time, in the order in which agents asked."""

    def __init__(self, lessor: Lessor, name: str = "") -> None:
        """`name`: the slot's, or the release's folder."""
        self._lessor, self._turns, self.name = lessor, Turns(WAITING_MAX), name

    def say(self, request: GenerateRequest, hear: Hear | None = None) -> Said:
        try:
            with self._turns.turn(request.halt), self._lessor.lent(request.halt) as (generator, release, adapter):
                began = time.monotonic()
                try:
                    text, end = generate_all(generator, request, hear)
                except NoTemplate:
                    text, end = generate_all(generator, plain(request), hear)
                took_ms = (time.monotonic() - began) * 1000
        except Halted as late:
            return Said("", Finished(str(late), 0, 0, 0.0))
        return Said(text, end, release, adapter, took_ms)

    def running(self) -> tuple[str, str]:
        """The release and the adapter that would answer now. Raises EngineError when none would."""
        look = getattr(self._lessor, "running", None)  # a slot knows without being lent
        if look is not None:
            found: tuple[str, str] = look()
            return found
        with self._lessor.lent(never) as (_, release, adapter):
            return release, adapter


def plain(request: GenerateRequest) -> GenerateRequest:
    """A conversation as one text, for a model without a chat template; control tokens in it stay text."""
    said = transcript((turn.role, turn.content) for turn in request.messages)
    return replace(request, prompt=said, literal=True, messages=(), stop=(STOP, *request.stop))


class OwnEngine:
    """A release that this process has loaded for itself."""

    def __init__(self, generator: Generator, release: str) -> None:
        self._generator, self._release = generator, release

    @contextmanager
    def lent(self, halt: Halt) -> Iterator[tuple[Generator, str, str]]:
        yield self._generator, self._release, ""


_spoken: WeakValueDictionary[int, LentModel] = WeakValueDictionary()  # by the generator's identity: each holds its own


def spoken_by(model: Any) -> Model:
    """A model as it is; a generator that somebody has opened as a model: agents that share it take turns."""
    if not isinstance(model, Generator):
        return cast(Model, model)
    with _opening:
        known = _spoken.get(id(model))
        if known is None:
            name = getattr(model, "name", "")
            known = _spoken[id(model)] = LentModel(OwnEngine(model, name), name)
        return known


class ServerModel:
    """A server that speaks OpenAI's protocol. It has its own queue: nobody waits here."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def say(self, request: GenerateRequest, hear: Hear | None = None) -> Said:
        text, end = generate_all(self._generator, request, hear)
        if text and not end.answer_tokens:  # it does not say: a limit of tokens must act all the same
            end = replace(end, answer_tokens=math.ceil(len(text) / TOKEN_CHARS))
        return Said(text, end, end.model)


_opened: dict[tuple[str, str], Model] = {}  # by configuration, and folder or key
_opening = threading.Lock()
_slots: dict[str, Model] = {}  # of the daemon that hosts this process's agents, by their names
# Where each model's requests wait and run: those of a slow one keep nobody from another. They end with their models.
_pooling = threading.Lock()
_threads: WeakKeyDictionary[Model, ThreadPoolExecutor] = WeakKeyDictionary()


def _pool(model: Model) -> ThreadPoolExecutor | None:
    with _pooling:
        try:
            if model not in _threads:
                _threads[model] = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="agent")
        except TypeError:  # somebody's own, which cannot be a key: the event loop's threads do
            return None
        return _threads[model]


def offer_slot(name: str, lessor: Lessor | None) -> None:
    """The daemon offers its slot `name` to agents of this process; None takes it back."""
    if lessor is None:
        _slots.pop(name, None)
    else:
        _slots[name] = LentModel(lessor, name)


def open_model(config: ModelConfig) -> Model:
    """The model of a configuration; agents with the same one share it. Raises EngineError naming what is missing."""
    if config.type == "local" and config.name in _slots:
        return _slots[config.name]
    with _opening:
        config = _resolved(config) if config.type == "api" else config
        secret = config.api_key.get_secret_value() if config.api_key else ""
        where = str(Path(config.name).resolve()) if config.type == "local" else secret
        key = (config.model_dump_json(exclude={"temperature", "max_tokens", "seed", "api_key"}), where)
        if key not in _opened:
            _opened[key] = _server(config) if config.type == "api" else _release(config)
        return _opened[key]


class BaseLLM:
    """Loads a language model of this device, where other libraries' class of this name does."""

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> Model:
        """The model of a slot of the daemon, or of a release's folder; nothing is downloaded. `options`: of ModelConfig.
        Raises EngineError naming what is missing."""
        return open_model(ModelConfig(type="local", name=name, **options))


async def ask(
    model: Model, config: ModelConfig, messages: Sequence[ChatMessage], schema: dict[str, Any] | None, *,
    tokens_max: int, until: float, cancelled: Callable[[], bool],
) -> Said:  # fmt: skip
    """Let the model answer a conversation; the rest as `speak`."""
    request = GenerateRequest(
        messages=tuple(messages), tokens_max=tokens_max, temperature=config.temperature, seed=config.seed, schema=schema,
    )  # fmt: skip
    return await speak(model, request, until=until, cancelled=cancelled)


async def speak(
    model: Model, request: GenerateRequest, *, until: float, cancelled: Callable[[], bool], hear: Hear | None = None
) -> Said:
    """Let the model answer, in a thread of its own. `until`: on the monotonic clock; `hear` is called in that thread.

    When the caller is cancelled the generation ends at its next token.
    """
    gone = threading.Event()

    def halt() -> str:
        if gone.is_set() or cancelled():
            return "cancelled"
        return "deadline" if time.monotonic() >= until else ""

    asked, loop = replace(request, halt=halt), asyncio.get_running_loop()
    try:
        if hear is None:
            return await loop.run_in_executor(_pool(model), model.say, asked)
        return await loop.run_in_executor(_pool(model), model.say, asked, hear)
    except asyncio.CancelledError:
        gone.set()
        raise


def _release(config: ModelConfig) -> Model:
    from edged.engines.host import ProcessGenerator
    from edged.releases import BadRelease, reference, verify

    folder = Path(config.name)
    try:
        manifest = verify(folder, reference(folder))
    except BadRelease as error:
        offered = ", ".join(sorted(_slots)) or "none"
        raise EngineError(
            f"local model {config.name!r}: not one of the daemon's slots (offered here: {offered}), and {error}"
        ) from None
    if manifest.kind != "llm":
        raise EngineError(f"local model {config.name}: a release of kind {manifest.kind}; agents need a language model")
    options = replace(_where(config.device, manifest.engine), threads=max(1, (os.cpu_count() or 2) // 2))
    engine = OwnEngine(ProcessGenerator(folder, manifest, options, _ended), manifest.release)
    return LentModel(engine, config.name)


def _where(device: str, engine: str) -> EngineOptions:
    """The options that put an engine's model there."""
    if engine == "llama":
        layers = {"auto": "auto", "cpu": 0}.get(device, "all")
        return EngineOptions(extra={"gpu_layers": layers})
    return EngineOptions(providers=(device.removesuffix(":0"),))


def _ended(how: str, in_hand: bool) -> None:
    log.warning("the process of a local model has ended%s: %s", " with a request in hand" if in_hand else "", how)


def _resolved(config: ModelConfig) -> ModelConfig:
    """With the server's address and key as the environment and the provider say where the configuration does not."""
    known, _ = PROVIDERS.get(config.provider or "openai", ("", ""))
    url = config.base_url or os.environ.get("OPENAI_BASE_URL") or known
    if not url:
        raise EngineError(
            f"provider {config.provider!r} of model {config.name}: known are {', '.join(sorted(PROVIDERS))}; set base_url"
        )
    secret = config.api_key or SecretStr(os.environ.get("OPENAI_API_KEY", ""))
    return config.model_copy(update={"base_url": url, "api_key": secret})


def _server(config: ModelConfig) -> Model:
    from edged.config_server import SEED, Server
    from edged.engines.openai import OpenAiGenerator
    from edged.releases import read_manifest

    _, form = PROVIDERS.get(config.provider or "openai", ("", "json_schema"))
    try:
        server = Server(
            url=config.base_url or "", model=config.name, timeout_s=config.timeout_s, patience_s=2 * config.timeout_s,
            allow_plain=config.allow_plain, schema_form=form,
        )  # fmt: skip
    except ValidationError as error:
        raise EngineError(f"model {config.name}: {error.errors(include_url=False)[0]['msg']}") from None
    secret = config.api_key.get_secret_value() if config.api_key else ""
    options = EngineOptions(extra={"server": server.model_dump(mode="json")})
    return ServerModel(OpenAiGenerator(SEED, read_manifest(SEED), options, secret))
