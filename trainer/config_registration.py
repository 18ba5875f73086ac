"""The tables `[[registration]]` of the trainer's configuration: servers that are told of releases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edged.core.address import BadEndpoint, check_url
from edged.wire.manifest import Kind
from trainer.core.registration import PLACEHOLDERS, REASON, Pace, unknown_placeholders

TARGETS_MAX = 16
_OURS = {"content-type", "content-length", "idempotency-key", "host", "transfer-encoding"}
# What LlamaFarm and other servers need to serve a file that they can reach; other words: `body`.
BODY: dict[str, Any] = {
    "model": "{release}", "file": "{file}", "sha256": "{sha256}", "bytes": "{bytes}", "url": "{url}", "base": "{base}",
}  # fmt: skip


class Revocation(BaseModel):
    """How a server is told that a release which it knows was revoked. `url` has no default: a DELETE of the address that
    releases are told to could mean all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    method: Literal["DELETE", "POST", "PUT", "PATCH"] = "DELETE"
    body: dict[str, Any] = {}  # {}: none


class Registration(BaseModel):
    """One server that is told of new releases. `token_file`: a key that goes as `Authorization: Bearer KEY`, or bare in
    `token_header` where that is another. `when`: as soon as a release is registered and may be installed, or when a
    rollout has brought it to the whole fleet (an adapter: when every slot with its base runs it). `models`: only these;
    none: all of `kinds`. `revocation`: without it the server hears of no revocation, and an event says so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    url: str
    method: Literal["POST", "PUT", "PATCH"] = "POST"
    headers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")], str] = {}
    token_file: Path | None = None
    token_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] = "Authorization"
    body: dict[str, Any] = BODY
    when: Literal["released", "promoted"] = "released"
    kinds: Annotated[list[Kind], Field(min_length=1)] = ["llm", "lora"]
    models: list[str] = []
    revocation: Revocation | None = None
    ca: Path | None = None  # who signed the server's certificate; none: those that this machine trusts
    certificate: Path | None = None  # ours, where the server asks for one
    key: Path | None = None
    allow_plain: bool = False  # plain HTTP to another machine
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    retry_s: Annotated[float, Field(gt=0, le=3600)] = 5.0  # the first pause; each one is twice as long
    retry_s_max: Annotated[float, Field(gt=0, le=86400)] = 3600.0
    tries_max: Annotated[int, Field(ge=1, le=1000)] = 40

    @model_validator(mode="after")
    def _usable(self) -> Registration:
        self._check("", self.url, self.body, PLACEHOLDERS)
        if self.revocation is not None:
            known = (*PLACEHOLDERS, REASON)
            self._check("revocation.", self.revocation.url, self.revocation.body, known)
            if urlsplit(self.revocation.url)[:2] != urlsplit(self.url)[:2]:
                raise ValueError("revocation.url: another server than url's: the key is for that one alone")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both or none")
        return self

    def _check(self, where: str, url: str, body: dict[str, Any], known: tuple[str, ...]) -> None:
        # Placeholders stand in the path at most: where a release is sent must not depend on its name.
        if "{" in urlsplit(url).netloc:
            raise ValueError(f"{where}url: a placeholder cannot stand in the server's name; write that out")
        try:
            check_url(url, plain=self.allow_plain)
        except BadEndpoint as error:
            raise ValueError(f"{where}url: {error}") from None
        if unknown := unknown_placeholders([url, body], known):
            raise ValueError(f"{where}unknown placeholder {{{unknown[0]}}}; known: {', '.join(known)}")

    @field_validator("headers")
    @classmethod
    def _headers(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if name.lower() in _OURS:
                raise ValueError(f"header {name} is set by the trainer: remove it")
            if name.lower() == "authorization":
                raise ValueError(f"header {name}: a key belongs into a file, not into this one: use token_file")
            if not (text.isascii() and text.isprintable()):
                raise ValueError(f"header {name}: expected printable ASCII")
        return value

    def pace(self) -> Pace:
        """What `core.registration` needs."""
        return Pace(self.retry_s, max(self.retry_s, self.retry_s_max), self.tries_max)
