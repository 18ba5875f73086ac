"""What a device is told to do (`down/cmd/{type}/{id}`), and how far it is with that."""

from __future__ import annotations

from typing import Any, Literal

from edged.wire.manifest import SHA256, ReleaseRef
from edged.wire.parts import Id, Message


class SamplesCommand(Message):
    """`down/cmd/samples`: move samples between states; `claim` also hands their pixels over by
    PUT `upload_url`/{sha256}, or, without one, as blocks that the trainer asks for on `down/blocks`."""

    action: Literal["claim", "used", "release", "archive", "list"]
    job: str = ""
    samples: list[str] = []
    upload_url: str = ""
    release: str = ""  # `used`: the release that they trained


class CancelCommand(Message):
    """`down/cmd/cancel`: end a language request that waits or runs; it is answered with the error `cancelled`. Of any
    other request it changes nothing, and says so."""

    request: Id


class SlotCommand(Message):
    """What a person orders for one slot, or for the adapter in it."""

    slot: Id
    adapter: bool = False


class RollbackCommand(SlotCommand):
    """`down/cmd/rollback`: the release before serves again, at once. What desired state names now is not installed again
    until it names another one, or `unpin` allows it."""


class PinCommand(SlotCommand):
    """`down/cmd/pin`: this release (none: the one that serves), whatever desired state says, until `unpin`."""

    release: ReleaseRef | None = None


class UnpinCommand(SlotCommand):
    """`down/cmd/unpin`: desired state counts again, also after `rollback`."""


class ForgetCommand(Message):
    """`down/cmd/forget`: what is known against a release is forgotten; it may be tried again."""

    release: str
    sha256: SHA256 | None = None  # None: whatever has this name


class CommandState(Message):
    """`up/cmd/{type}/{id}`: how far a command is. `failed` says why; repeated commands end in the same state."""

    command: str
    state: Literal["accepted", "done", "failed"]
    reason: str = ""
    detail: dict[str, Any] = {}


# `down/cmd/{type}`: one payload a type.
COMMANDS: dict[str, type[Message]] = {
    "cancel": CancelCommand, "forget": ForgetCommand, "pin": PinCommand, "rollback": RollbackCommand,
    "samples": SamplesCommand, "unpin": UnpinCommand,
}  # fmt: skip
