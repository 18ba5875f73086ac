"""What jobs, rollouts and orders share: the configuration, the database, the registry, and how they say things.

Nothing here sends: what is to be sent becomes a row in the caller's transaction, and the coordinator sends rows.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, insert

from edged.wire.ids import uuid7
from trainer.clock import Clock, SystemClock
from trainer.config import TrainerConfig
from trainer.core.presence import Lately, lately
from trainer.database import Database, commands, events
from trainer.notices import note
from trainer.releases import Registry

log = logging.getLogger(__name__)

SAMPLES_A_COMMAND_MAX = 2000  # 37 bytes each: a command stays far below the broker's packet limit


def new_id() -> str:
    """An identifier that sorts by time."""
    return uuid7(int(time.time() * 1000), os.urandom(10))


@dataclass(slots=True)
class Host:
    """One trainer. `config_path` is the file that training children read again. `entropy`: so many random bytes."""

    config: TrainerConfig
    config_path: Path
    database: Database
    registry: Registry
    boot: str = field(default_factory=new_id)
    clock: Clock = field(default_factory=SystemClock)
    entropy: Callable[[int], bytes] = os.urandom
    _seq: int = 0

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.clock.now()

    def new_id(self) -> str:
        """An identifier that sorts by time, by this trainer's clock and chance."""
        return uuid7(int(self.now() * 1000), self.entropy(10))

    def lately(self) -> Lately:
        """Whose sign of life still counts now (`core.presence`)."""
        return lately(self.now(), self.config.silent_s_max)

    def envelope(self) -> dict[str, Any]:
        """The fields that every message begins with."""
        self._seq += 1
        return {"id": self.new_id(), "ts": self.now(), "boot": self.boot, "seq": self._seq}

    def announce(self, connection: Connection, kind: str, text: str, **detail: Any) -> None:
        """Tell people: in the log, in the database, and over MQTT as soon as there is a connection."""
        log.info("%s: %s", kind, text)
        row = {
            "id": self.new_id(),
            "ts": self.now(),
            "source": self.config.name,
            "kind": kind,
            "text": text,
            "detail": detail,
        }
        connection.execute(insert(events).values(**row, published=False))
        note(connection, self.config.notify, row)

    def command_slot(self, connection: Connection, device: str, kind: str, body: dict[str, Any]) -> str:
        """Have a device carry out a person's order (`fleet.ORDERS`); it is told again until it says that it did or will not.
        Returns the command's id."""
        row = {"id": self.new_id(), "device": device, "type": kind, "body": body, "state": "open", "job": ""}
        connection.execute(insert(commands).values(**row, created=self.now()))
        return str(row["id"])

    def command_samples(
        self,
        connection: Connection,
        device: str,
        action: Literal["claim", "used", "release", "archive", "list"],
        samples: Iterable[str] = (),
        *,
        job: str = "",
        release: str = "",
    ) -> None:
        """Have a device move these samples; it is told again until it says that it did."""
        ids = list(samples)
        for start in range(0, max(len(ids), 1), SAMPLES_A_COMMAND_MAX):
            body = {
                "action": action,
                "job": job,
                "samples": ids[start : start + SAMPLES_A_COMMAND_MAX],
                "release": release,
            }
            row = {"id": self.new_id(), "device": device, "type": "samples", "body": body, "state": "open", "job": job}
            connection.execute(insert(commands).values(**row, created=self.now()))

    def ask_for_lists(self, connection: Connection, devices: Iterable[str]) -> None:
        """Have each of these devices say its whole catalogue again."""
        body = {"action": "list", "job": "", "samples": [], "release": ""}
        told = {"type": "samples", "body": body, "state": "open", "job": "", "created": self.now()}
        rows = [{"id": self.new_id(), "device": device, **told} for device in devices]
        if rows:
            connection.execute(insert(commands), rows)
