"""The tables [broker] and [http]: where traffic goes, and what it is encrypted with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from edged.wire.messages import MIRRORS_MAX
from trainer.config_parts import Section

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Tls(Section):
    """Our certificate and key, and the authority that the other side's certificate must come from."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _whole(self) -> Tls:
        given = {"ca": self.ca, "certificate": self.certificate, "key": self.key}
        missing = [name for name, path in given.items() if path is None]
        if missing and len(missing) < len(given):
            raise ValueError(f"{', '.join(missing)} missing: set all of ca, certificate and key, or none of them")
        return self


class Broker(Tls):
    """Where the MQTT broker is. Without `ca` the connection is plain TCP, which is refused off loopback."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8883
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 30
    session_expiry_s: Annotated[int, Field(ge=0, le=30 * 86400)] = 86400
    bulk_certificate: Path | None = None  # of `{name}~blk`, the second connection, which carries blocks of files
    bulk_key: Path | None = None

    @model_validator(mode="after")
    def _encrypted(self) -> Broker:
        if self.ca is None and self.host not in _LOOPBACK:
            raise ValueError(
                f"host {self.host!r} without `ca`: traffic off this machine is encrypted; set ca, certificate, key"
            )
        return self


class Http(Tls):
    """The address that devices fetch releases from and upload samples to. `url` is what they are told: by default
    https (http without certificates) with `host` and the port that was bound."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8443  # 0: any free port
    url: str = ""
    crl: Path | None = None  # certificates that are revoked; by default crl.pem beside `ca`, where there is one
    mirrors: Annotated[list[str], Field(max_length=MIRRORS_MAX)] = []  # further addresses that serve the releases
    sample_bytes_max: Annotated[int, Field(gt=0)] = 64 << 20

    @model_validator(mode="after")
    def _reachable(self) -> Http:
        if self.host in {"0.0.0.0", "::"} and not self.url:
            raise ValueError(
                f"host {self.host!r} without `url`: set url to the address that devices reach this host at"
            )
        return self

    @model_validator(mode="after")
    def _encrypted(self) -> Http:
        if self.ca is None and self.host not in _LOOPBACK:
            raise ValueError(
                f"host {self.host!r} without `ca`: only this machine may connect unencrypted; set ca, certificate, key"
            )
        return self
