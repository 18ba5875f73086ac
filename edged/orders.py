"""The way of people's orders to the updater: from the command line through files in `state_dir/orders`, from the fleet
through `down/cmd/{rollback,pin,unpin,forget}/{id}`.

Law: a file goes only after its order is saved with what it changes, and an order that comes again is known by its id. So an
order given while no daemon runs is carried out at the next start, and none twice.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from edged.files import sync
from edged.holds import Answer, Order
from edged.store import Store
from edged.updater import Updater
from edged.wire.messages import COMMANDS, ForgetCommand, PinCommand, RollbackCommand, UnpinCommand
from edged.wire.topics import LEVEL

log = logging.getLogger(__name__)

FOLDER = "orders"  # in the state folder
KINDS = ("forget", "pin", "rollback", "unpin")
LOCAL = "local-"  # how the ids of the command line's orders begin
FILES_MAX = 16  # looked at in one tick
FILE_BYTES_MAX = 64 << 10
ANSWERS_MAX = 16  # that the status document shows, the newest

Tell = Callable[[str, str, Literal["accepted", "done", "failed"], str], None]


class Orders:
    """Passes orders on and keeps their answers, on the control loop. `tell(kind, id, state, reason)`: on `up/cmd`."""

    def __init__(self, state: Path, store: Store, updater: Updater, tell: Tell) -> None:
        self._folder, self._store, self._updater, self._tell = state / FOLDER, store, updater, tell
        self._answers: dict[str, Answer] = {}
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700)
            sync(state)
        updater.answered = lambda order_id, answer: self._answer("rollback", order_id, answer)

    def take(self, kind: str, order_id: str, order: Order) -> None:
        """Carry an order out and answer it; raises StoreError when it cannot be kept, and then nothing has happened."""
        self._answer(kind, order_id, self._updater.order(order_id, order))

    def tick(self) -> None:
        """Take what the command line has left here."""
        for path in sorted(self._folder.glob(f"{LOCAL}*.json"))[:FILES_MAX]:
            try:
                kind, order = read(path)
            except ValueError as error:
                self._store.count("orders_invalid")
                log.error("%s: %s", path, error)
                self._note(path.stem, Answer("failed", str(error)))
            else:
                self.take(kind, path.stem, order)
            path.unlink()

    def status(self) -> dict[str, dict[str, str]]:
        """Order -> how far it is."""
        return {key: {"state": answer.state, "reason": answer.reason} for key, answer in list(self._answers.items())}

    def _answer(self, kind: str, order_id: str, answer: Answer) -> None:
        log.info("order %s %s: %s %s", kind, order_id, answer.state, answer.reason)
        if order_id.startswith(LOCAL):
            self._note(order_id, answer)
        else:
            self._tell(kind, order_id, answer.state, answer.reason)

    def _note(self, order_id: str, answer: Answer) -> None:
        known = self._answers.get(order_id)
        if known is not None and known.state == "done":
            return  # a rollback may be over before `order` has returned
        answers = {key: value for key, value in self._answers.items() if key != order_id} | {order_id: answer}
        self._answers = dict(list(answers.items())[-ANSWERS_MAX:])


def read(path: Path) -> tuple[str, Order]:
    """The order in a file; raises ValueError."""
    if not re.fullmatch(LEVEL, path.stem):
        raise ValueError(f"the name of an order is made of letters, digits and _.@:-, not {path.stem!r}")
    try:
        with path.open("rb") as file:
            body = json.loads(file.read(FILE_BYTES_MAX))
        kind = body.pop("kind")
        if kind not in KINDS:
            raise ValueError(f"order {kind!r} is unknown; known: {', '.join(KINDS)}")
        order = COMMANDS[kind].model_validate({"id": path.stem, "ts": 0.0, "boot": "", "seq": 0, **body})
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no order: {type(error).__name__}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    assert isinstance(order, RollbackCommand | PinCommand | UnpinCommand | ForgetCommand)
    return kind, order


def place(state: Path, order_id: str, kind: str, body: dict[str, Any]) -> None:
    """Leave an order for the daemon that works in `state`, whole and on the disk; raises OSError."""
    folder = state / FOLDER
    beside, path = folder / f".{order_id}", folder / f"{order_id}.json"
    beside.write_text(json.dumps({"kind": kind, **body}))
    os.chmod(beside, 0o644)  # root may order, the daemon reads
    sync(beside)
    beside.replace(path)
    sync(folder)


def waits(state: Path, order_id: str) -> bool:
    """Whether no daemon has taken the order yet."""
    return (state / FOLDER / f"{order_id}.json").exists()
