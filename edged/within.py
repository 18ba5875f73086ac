"""Something that may hang, done within a time: nobody waits longer for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


def within(seconds: float, name: str, act: Callable[[], object]) -> bool:
    """Do `act` on a thread called `name`; false when it has not ended after `seconds`, and then it is left to itself."""

    def run() -> None:
        try:
            act()
        except Exception:  # nobody else could hear of it
            log.exception("%s", name)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
