"""A language model that an HTTP server runs, as a `Generator`: any server that speaks OpenAI's protocol.

The server may be away, slow, wrong or hostile. What may pass is tried again within the slot's patience; then the question
stays unanswered, which says nothing about a release here, and whoever asked asks again. The key stands in no message.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from edged.config_server import Server
from edged.core.address import BadEndpoint
from edged.core.backoff import reconnect_s
from edged.engines import openai_wire
from edged.engines.base import (
    EngineError,
    EngineOptions,
    Finished,
    GenerateRequest,
    PromptTooLong,
    Token,
    Unanswered,
    Unsuitable,
)
from edged.engines.conform import fault
from edged.engines.constrain import grammar
from edged.engines.endpoint import (
    POLL_S,
    SECRET_BYTES_MAX,
    EndpointError,
    Halted,
    Limits,
    Reply,
    read_secret,
    send,
    tls,
)
from edged.engines.openai_wire import BadAnswer, Declined, Said
from edged.wire.manifest import ReleaseManifest

log = logging.getLogger(__name__)

ANSWER_BYTES_MAX = 8 << 20  # log-probabilities of thousands of tokens, and nothing beyond
LOOK_S_MAX = 10.0
LOOK_BYTES_MAX = 1 << 20


class _Passing(Exception):
    """It may work later; `after_s`: not before this, as the server says."""

    def __init__(self, text: str, after_s: float = 0.0) -> None:
        super().__init__(text)
        self.after_s = after_s


class KeyRefused(BadAnswer):
    """The server does not take the key."""


class OpenAiGenerator:
    """The server of a slot, as a `Generator`. Any number of threads may ask at once: nothing is shared between questions."""

    context = 1 << 20  # tokens; the server knows its own, and says when a question does not fit

    def __init__(
        self, folder: Path, manifest: ReleaseManifest, options: EngineOptions, secret: str | None = None
    ) -> None:
        """The server is not asked yet: it may be away when this device starts. `secret`: the key, where it is not the
        server's configuration that says where it is. Raises EngineError for a wrong configuration."""
        server = options.extra.get("server")
        if server is None or len(options.extra) > 1:
            raise EngineError(
                f"release {manifest.release} is a server's: its slot needs a table `server` with url and model, and no "
                f"`extra` (engine keys: {', '.join(options.extra) or 'none'})"
            )
        try:
            self._server = Server.model_validate(server)
            self._context = tls(self._server.ca, self._server.certificate, self._server.key)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise EngineError(f"server.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except BadEndpoint as error:
            raise EngineError(str(error)) from None
        self._given = secret
        self._closed = False

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """Yield the answer as one piece, then a Finished that names the server and its model.

        Its mean log-probability is that of the tokens where the server gives it, else that of `confidence`. An answer that
        the slot's own limit of tokens cut off ends as `truncated`; under a schema an answer that does not keep to it ends as
        `truncated` where a limit cut it off, else as `invalid`. Raises Unsuitable (PromptTooLong) for what the server will
        not answer, Unanswered when it does not answer in time, at the first step.
        """
        if self._closed:
            raise EngineError(f"{self._server.who}: the engine is closed")
        if request.schema is not None:
            grammar(request.schema)  # raises for a schema that the answer cannot be held against
        if not 0 <= request.temperature < math.inf:
            raise Unsuitable(f"temperature {request.temperature}: use 0 (greedy) or more")
        if bool(request.prompt) == bool(request.messages):
            raise Unsuitable("send a prompt or messages, one of them")
        return self._answer(request)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """Only None is possible: what a server runs is not changed from here."""
        if adapter is not None:
            raise EngineError(f"{adapter}: {self._server.who} is a server, it takes no adapter from here")

    def close(self) -> None:
        """No further question; may be repeated."""
        self._closed = True

    def _answer(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        server = self._server
        try:
            said = self._ask(request)
        except Halted as halted:
            yield Finished(str(halted), 0, 0, 0.0)
            return
        if request.schema is not None:
            said = replace(said, text=openai_wire.mended(said.text))
        mean = said.mean_logprob if said.mean_logprob is not None else math.log(server.confidence)
        reason = self._reason(said, request)
        if said.text:
            yield Token(said.text, mean)
        yield Finished(reason, said.prompt_tokens, said.answer_tokens, mean, who=server.who, model=said.model)

    def _reason(self, said: Said, request: GenerateRequest) -> str:
        """Why the answer ended. Whether a server keeps to a schema is its own affair, so what it said is looked at."""
        if request.schema is None:
            return "truncated" if said.reason == "length" and not request.tokens_max else said.reason
        why = fault(said.text, request.schema)
        if not why:
            return "stop"
        log.warning("%s: its answer is not what the schema asks for: %s", self._server.who, why)
        return "truncated" if said.reason == "length" else "invalid"

    def _ask(self, request: GenerateRequest) -> Said:
        """Ask until there is an answer, or patience ends. Raises Unsuitable, Unanswered, Halted."""
        server, until, tries = self._server, time.monotonic() + self._server.patience_s, 0
        while True:
            tries += 1
            try:
                return self._try(request, min(server.timeout_s, max(until - time.monotonic(), POLL_S)))
            except _Passing as error:
                pause_s = max(reconnect_s(tries, random.random()), error.after_s)
                if tries >= server.tries_max or time.monotonic() + pause_s >= until:
                    raise Unanswered(f"{error} (after {tries} {'try' if tries == 1 else 'tries'})") from None
                log.info("%s; again in %.1f s", error, pause_s)
            self._wait(pause_s, request)

    def _wait(self, seconds: float, request: GenerateRequest) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if reason := request.halt():
                raise Halted(reason)
            time.sleep(min(POLL_S, left))

    def _try(self, request: GenerateRequest, within_s: float) -> Said:
        """One question; raises _Passing too."""
        server = self._server
        chat = server.prompts == "chat" or bool(request.messages)
        body = openai_wire.question(
            request, server.model, chat=chat, instructions=server.instructions, tokens_max=server.tokens_max,
            tokens_field=server.tokens_field, logprobs=server.logprobs, schema_form=server.schema_form,
        )  # fmt: skip
        url = f"{server.url.rstrip('/')}/{'chat/completions' if chat else 'completions'}"
        try:
            data = json.dumps(body).encode("ascii")
            secret = secret_of(server) if self._given is None else self._given
            reply = send(
                "POST", url, _headers(secret), data, self._context, Limits(within_s, ANSWER_BYTES_MAX, request.halt)
            )
        except BadEndpoint as error:
            raise Unanswered(f"{server.who}: {error}") from None
        except Halted:
            raise
        except EndpointError as error:
            raise _Passing(str(error)) from None
        return self._said(reply, url, secret, chat=chat)

    def _said(self, reply: Reply, url: str, secret: str, *, chat: bool) -> Said:
        text = f"{url}: it answered {reply.status}: {reply.said(secret) or 'nothing'}"
        meaning = openai_wire.meaning(reply.status)
        if meaning == "passing":
            asked = reply.headers.get("retry-after", "").strip()
            raise _Passing(text, float(asked) if asked.isascii() and asked.isdigit() else 0.0)
        if meaning == "unsuitable":
            raise PromptTooLong(text) if openai_wire.too_long(reply.body) else Unsuitable(text)
        if meaning == "refused":
            raise Unanswered(f"{text}; see url, model and the key of the slot's server")
        try:
            return openai_wire.answer(reply.body, self._server.model, chat=chat)
        except Declined as error:
            raise Unsuitable(f"{url}: {error}") from None
        except BadAnswer as error:
            shown = str(error).replace(secret, "***") if secret else str(error)
            raise _Passing(f"{url}: what it answered is no answer: {shown}") from None


def secret_of(server: Server) -> str:
    """The key for a server, "" for none; raises BadEndpoint."""
    if server.api_key_file is not None:
        return read_secret(server.api_key_file)
    if server.api_key_env is None:
        return ""
    found = os.environ.get(server.api_key_env, "").strip()
    if not found or not found.isascii() or not found.isprintable() or len(found) > SECRET_BYTES_MAX:
        raise BadEndpoint(f"environment variable {server.api_key_env}: not set, or not one line of printable ASCII")
    return found


def served(server: Server) -> list[str]:
    """The models that a server says it has; raises BadEndpoint, EndpointError, KeyRefused, BadAnswer."""
    url, secret = f"{server.url.rstrip('/')}/models", secret_of(server)
    context = tls(server.ca, server.certificate, server.key)
    reply = send("GET", url, _headers(secret), b"", context, Limits(LOOK_S_MAX, LOOK_BYTES_MAX))
    if reply.status != 200:
        kind = KeyRefused if reply.status in (401, 403) else BadAnswer
        raise kind(f"{url}: it answered {reply.status}: {reply.said(secret)}")
    return openai_wire.models(reply.body)


def _headers(secret: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    return headers | ({"Authorization": f"Bearer {secret}"} if secret else {})
