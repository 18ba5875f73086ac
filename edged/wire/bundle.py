"""What a device is enrolled with: one JSON document, made by the trainer's host and carried to the device by a person.

It holds private keys: whoever has it can be the device. Text and not an archive: it has no paths, links or sizes to be
misled by, and everything in it can be looked at.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

BUNDLE_BYTES_MAX = 1 << 20
BULK = "~blk"  # `{device}~blk` is the common name of a device's second connection, which carries blocks of files
# Of devices, sites and groups. They become topic levels, where `_host`, `_resp`, `_blocks` and `_g` mean something else;
# with BULK behind it a name still fits a certificate's 64.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,59}$"
Name = Annotated[str, Field(pattern=NAME)]
Pem = Annotated[str, Field(min_length=1, max_length=64 << 10, pattern=r"^[ -~\r\n\t]*$")]  # ASCII: ssl takes no more


class BadBundle(ValueError):
    """The bytes are no bundle; the message says where and why."""


class Pair(BaseModel):
    """A certificate and its key, in PEM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Pem
    key: Pem


class Bundle(BaseModel):
    """An identity: `own` is the device's certificate, `bulk` that of its second connection, `ca` who signed both.

    `root`: the TUF root, whose signers the device will trust; None: it takes unsigned releases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Literal[1] = 1
    device: Name
    site: Name
    group: Name | None = None
    # A host name or an address; also no quotes or line ends in the configuration file.
    broker_host: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:-]{1,253}$")]
    broker_port: Annotated[int, Field(ge=1, le=65535)]
    ca: Pem
    own: Pair
    bulk: Pair
    root: Annotated[str, Field(min_length=1, max_length=512 << 10)] | None = None


def encode(bundle: Bundle) -> bytes:
    """The document; the same bytes for the same bundle."""
    return (bundle.model_dump_json(indent=1) + "\n").encode()


def decode(data: bytes) -> Bundle:
    """The bundle in `data`; raises BadBundle, with no word of what the keys are."""
    if len(data) > BUNDLE_BYTES_MAX:
        raise BadBundle(f"{len(data)} bytes: a bundle has at most {BUNDLE_BYTES_MAX}")
    try:
        return Bundle.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadBundle(f"{where + ': ' if where else ''}{first['msg']}; make it again with `trainer enroll`") from None
