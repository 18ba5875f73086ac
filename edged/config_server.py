"""A slot's model that is not here: an HTTP server that speaks OpenAI's protocol (`[slots.NAME.server]`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from edged.config_sources import Section
from edged.core.address import BadEndpoint, check_url

# What a slot with a server starts with: a release without files, which says that its engine asks a server.
SEED = Path(__file__).parent / "engines" / "server_release"
NAME_CHARS_MAX = 128
SERVED_TASK = "generate"  # the only one that such a slot can do


class Server(Section):
    """Which server answers, and what it may take. `url` ends where `/chat/completions` follows, often in /v1.

    `name`: who is said to have answered; by default the server's host. `api_key_file` is read at every question, so that a
    new key needs no restart. `confidence`: the probability that is noted of an answer whose tokens' log-probabilities the
    server does not give. `prompts`: how a prompt that is no conversation is asked: as a user's turn, or as a text to go on.
    """

    url: Annotated[str, Field(max_length=2048)]
    model: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
    name: Annotated[str, Field(max_length=NAME_CHARS_MAX, pattern=r"^[A-Za-z0-9_.:-]*$")] = ""
    api_key_file: Path | None = None
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    ca: Path | None = None  # who signed the server's certificate; none: those that this machine trusts
    certificate: Path | None = None  # ours, where the server asks for one
    key: Path | None = None
    allow_plain: bool = False  # plain HTTP to another machine
    prompts: Literal["chat", "completion"] = "chat"
    instructions: Annotated[str, Field(max_length=8192)] = ""  # before every conversation, as its system's turn
    tokens_max: Annotated[int, Field(ge=1, le=65536)] = 1024  # of an answer for which nobody set a limit
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    schema_form: Literal["json_schema", "json_object"] = "json_schema"  # of OpenAI; of llama-cpp-python's own server
    logprobs: bool = True  # ask for log-probabilities; some servers refuse such a question
    confidence: Annotated[float, Field(gt=0, le=1)] = 0.5
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0  # of one try, to the answer's last byte
    patience_s: Annotated[float, Field(gt=0, le=3600)] = 90.0  # of all tries and the pauses between them
    tries_max: Annotated[int, Field(ge=1, le=100)] = 4

    @model_validator(mode="after")
    def _usable(self) -> Server:
        try:
            check_url(self.url, plain=self.allow_plain)
        except BadEndpoint as error:
            raise ValueError(f"url: {error}") from None
        if urlsplit(self.url).query or urlsplit(self.url).fragment:
            raise ValueError("url: expected no ? and no #: /chat/completions is put behind it")
        if self.api_key_file is not None and self.api_key_env is not None:
            raise ValueError("api_key_file and api_key_env: set one of them")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both or none")
        return self

    @property
    def who(self) -> str:
        """Whose answers they are."""
        return self.name or urlsplit(self.url).netloc
