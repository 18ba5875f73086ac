"""One broken rollout, job or model must not stop the others: what broke is counted, logged once a minute, told as an event.

The event is told once for as long as the same thing breaks in the same way, and again after it went well in between.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sqlalchemy.exc import OperationalError

from trainer.database import Served
from trainer.host import Host

log = logging.getLogger(__name__)

LOGGED_S = 60.0  # the traceback of one thing's fault is logged so often
TEXT_MAX = 300  # characters of an error in an event: what devices say may stand in it


class Faults:
    """`of(name)` around the work on one thing of this `kind`; belongs to one thread. `counters`: for /status."""

    def __init__(self, host: Host, kind: str) -> None:
        self._host, self._kind = host, kind
        self._logged: dict[str, float] = {}  # name -> when (monotonic)
        self._told: dict[str, str] = {}  # name -> what
        self.counters: dict[str, int] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Go on after whatever the block raises, but for what concerns all: the database is another's, or cannot be used."""
        try:
            yield
        except (Served, OperationalError):
            raise
        except Exception as error:
            self._happened(name, error)
        else:
            self._told.pop(name, None)

    def keep(self, names: Iterable[str]) -> None:
        """Forget all but these: the others are over."""
        kept = frozenset(names)
        for known in (self._logged, self._told):
            for name in known.keys() - kept:
                del known[name]

    def _happened(self, name: str, error: Exception) -> None:
        counter = f"{self._kind}_faults"
        self.counters[counter] = self.counters.get(counter, 0) + 1
        now = self._host.clock.monotonic()
        if now - self._logged.get(name, -LOGGED_S) >= LOGGED_S:
            self._logged[name] = now
            log.exception("%s %s cannot go on; the others do", self._kind, name)
        said = f"{type(error).__name__}: {error}"[:TEXT_MAX]
        if self._told.get(name) == said:
            return
        with self._host.database.write() as connection:
            text = f"{self._kind} {name} cannot go on, the others do: {said}"
            self._host.announce(connection, f"{self._kind}_fault", text, name=name, error=said)
        self._told[name] = said
