"""What the delivery of files says: where they are, which blocks are wanted, how far a transfer is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edged.wire.blocks import BLOCKS_MAX, WINDOW
from edged.wire.manifest import SHA256
from edged.wire.parts import Message, Part

MIRRORS_MAX = 16  # addresses that a trainer announces beside its own
METADATA_FILES_MAX = 256


class Progress(Part):
    """How much of a release is here: bytes of `total`."""

    bytes: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(ge=0)]


class HostState(Message):
    """A trainer is here, with the address that devices fetch from and upload to; retained, Will `offline`.

    `mirrors`: further addresses that serve releases, each as `url` does. `blocks`: it answers `up/want`.
    """

    state: Literal["online", "offline"]
    url: str = ""
    mirrors: Annotated[list[str], Field(max_length=MIRRORS_MAX)] = []
    blocks: bool = False


class MetadataFile(Part):
    """One file of signed metadata, by its content: fetched like any blob."""

    sha256: SHA256
    bytes: Annotated[int, Field(ge=0)]


class Metadata(Message):
    """The signed metadata files that there are now, by name; retained. It only points: the device's own root decides what
    is believed."""

    files: Annotated[dict[str, MetadataFile], Field(max_length=METADATA_FILES_MAX)] = {}


BlockNumber = Annotated[int, Field(ge=0, lt=BLOCKS_MAX)]


class Want(Message):
    """`up/want/{sha256}`: blocks of this blob that a device misses; each comes on `_blocks/{sha256}/{n}`."""

    blocks: Annotated[list[BlockNumber], Field(min_length=1, max_length=WINDOW)]


class AskBlocks(Message):
    """`down/blocks/{sha256}`: blocks of a claimed sample that the trainer misses; each comes on `up/blob/{sha256}/{n}`. With
    none named, it has the whole sample."""

    blocks: Annotated[list[BlockNumber], Field(max_length=WINDOW)] = []
