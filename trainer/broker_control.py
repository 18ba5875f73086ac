"""Talks to the dynamic security plugin of a running broker, over the topic that only the admin may use, and empties what
the broker retains of who was revoked."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Sequence
from typing import Any

from edged.link import Connected, Disconnected, Inbound, Link, LinkOptions, Published
from edged.wire.topics import Address
from trainer.core.access import CONTROL

BATCH_MAX = 200  # commands in one message: far below the broker's largest packet


class ControlError(RuntimeError):
    """The broker could not be told; the message says why."""


def command(options: LinkOptions, commands: list[dict[str, Any]], wait_s: float) -> list[dict[str, Any]]:
    """The plugin's answers to these commands, in their order; an answer with `error` was refused. Raises ControlError."""
    link = Link(options, [f"{CONTROL}/response"])
    deadline = time.monotonic() + wait_s
    where, why = f"{options.host}:{options.port}", "no answer"
    answers: list[dict[str, Any]] = []
    link.start()
    try:
        while len(answers) < len(commands):
            event = link.inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(event, Disconnected):
                why = event.reason
                continue
            if isinstance(event, Inbound):
                link.acknowledge(event)
                answers += json.loads(event.payload)["responses"]
            # Our subscription was sent before: the broker takes it first, and we hear every answer.
            if isinstance(event, Connected | Inbound) and (rest := commands[len(answers) :][:BATCH_MAX]):
                link.publish(Address(CONTROL, 1, False, None), json.dumps({"commands": rest}).encode())
    except queue.Empty:
        pass
    finally:
        link.stop()
    if len(answers) < len(commands):
        refused = "; the broker lets this client say nothing there" if link.refused else ""
        raise ControlError(f"broker {where}: {why} within {wait_s:.0f} s{refused}")
    return answers


def empty(options: LinkOptions, addresses: Sequence[Address], wait_s: float) -> list[str]:
    """Have the broker keep nothing on these topics; what it has against it, a line each. Raises ControlError."""
    link = Link(options, [])
    deadline = time.monotonic() + wait_s
    answers: dict[str, str] = {}
    why = "no answer"
    link.start()
    try:
        while len(answers) < len(addresses):
            event = link.inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(event, Connected):
                for address in addresses:
                    link.publish(address, b"", address.topic)
            elif isinstance(event, Published):
                answers[event.ref] = event.error
            elif isinstance(event, Disconnected):
                why = event.reason
    except queue.Empty:
        raise ControlError(f"broker {options.host}:{options.port}: {why} within {wait_s:.0f} s") from None
    finally:
        link.stop()
    return [f"{topic}: {error}" for topic, error in answers.items() if error]
