"""What the service manager is told (sd_notify(3)): that we are ready, what we do, that we live, that we go.

Law: READY is said once, when it is true; WATCHDOG only as long as every loop moves. Without NOTIFY_SOCKET nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, MutableMapping
from enum import StrEnum

from edged.core.health import Health

log = logging.getLogger(__name__)

THREAD = "notify"
LOOK_S = 1.0  # how often our health is looked at; three times within the watchdog's interval when that is shorter
START_LOOK_S = 0.2  # until we are ready: others wait for it
STATUS_BYTES_MAX = 512
# While we start or end, and everything moves: more time than what the unit gives, asked for again and again.
EXTEND_S = 30.0
EXTEND_EVERY_S = 5.0


class Notifier:
    """A datagram a message to the socket that the service manager listens on. Safe to use from any thread."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        """`address`: as NOTIFY_SOCKET has it, a path or `@` and an abstract name; empty: say nothing. `watchdog_s`: within
        how many seconds WATCHDOG=1 is expected again; 0: not at all."""
        self.watchdog_s = watchdog_s if address else 0.0
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        self._complained = False

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Notifier:
        """As systemd has told this process; the variables are taken out, so that no child believes they are meant for it."""
        address = environment.pop("NOTIFY_SOCKET", "")
        interval_us, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        if address and address[0] not in "/@":
            log.error(
                "NOTIFY_SOCKET=%r: neither a path nor an abstract name; the service manager is told nothing", address
            )
            address = ""
        meant = pid in ("", str(os.getpid()))
        watchdog_s = int(interval_us) / 1e6 if meant and interval_us.isascii() and interval_us.isdigit() else 0.0
        return cls(address, watchdog_s)

    def send(self, *assignments: str) -> bool:
        """Send `assignments` (`READY=1`) as one message; false when nobody was told."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto(
                "\n".join(assignments).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._address
            )
        except OSError as error:  # without a listener we serve as well; said once, because it comes again every second
            if not self._complained:
                log.error("the service manager at NOTIFY_SOCKET does not hear us: %s", error)
            self._complained = True
            return False
        self._complained = False
        return True


def status_line(text: str) -> str:
    """`STATUS=` of one line."""
    line = " ".join(text.split()).encode()[:STATUS_BYTES_MAX].decode(errors="ignore")
    return f"STATUS={line}"


def extend(seconds: float) -> str:
    """Give us `seconds` more from now on to start or to stop."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"


def reloading() -> str:
    """The configuration is being loaded again; READY=1 ends it."""
    # systemd compares this with its own CLOCK_MONOTONIC, which no clock of ours may stand in for.
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


class Phase(StrEnum):
    """Where the daemon's life is."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


class Herald:
    """Looks at the daemon's health again and again, from a thread of its own, and tells the service manager."""

    def __init__(self, notifier: Notifier, look: Callable[[], Health], changed: Callable[[], None]) -> None:
        """`look` may be called on any thread; `changed`: the health is another than at the last look."""
        self._notifier, self._look, self._changed = notifier, look, changed
        self.phase = Phase.STARTING
        self._said = ""  # the last STATUS
        self._before: tuple[object, ...] = ()
        self._fed = self._extended = float("-inf")
        self._withheld = False
        self._lock = threading.Lock()  # the messages of a reload and of a look keep their order
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; nothing is said any more."""
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join(LOOK_S)

    def reloading(self) -> None:
        """The configuration is being loaded; not said before READY, which it would take back."""
        with self._lock:
            if self.phase is Phase.SERVING:
                self._notifier.send(reloading())

    def reloaded(self) -> None:
        """It is loaded, or refused."""
        with self._lock:
            if self.phase is Phase.SERVING:
                self._notifier.send("READY=1")

    def stopping(self) -> None:
        """The daemon has begun to end."""
        with self._lock:
            self.phase = Phase.STOPPING
            self._notifier.send("STOPPING=1", self._status("stopping: what is in hand is finished"))

    def _status(self, text: str) -> str:
        self._said = text
        return status_line(text)

    def _run(self) -> None:
        steady_s = min(LOOK_S, self._notifier.watchdog_s / 3 or LOOK_S)
        while not self._done.is_set():
            try:
                self.look(time.monotonic())
            except Exception:  # whoever cannot tell how he is does not say that he is well
                log.exception("health")
            self._done.wait(min(START_LOOK_S, steady_s) if self.phase is Phase.STARTING else steady_s)

    def look(self, now: float) -> None:
        """Look once, at `now` of the monotonic clock, and say what is due."""
        health = self._look()
        # Not the texts: they hold figures that change with every look.
        before, self._before = self._before, (health.ready, *(problem.what for problem in health.problems))
        with self._lock:
            self._tell(health, now)
        if before != self._before:
            self._changed()

    def _tell(self, health: Health, now: float) -> None:
        say: list[str] = []
        if self.phase is Phase.STARTING and health.ready:
            self.phase = Phase.SERVING
            log.info("%s", health.summary)
            say.append("READY=1")
        if self.phase is not Phase.STOPPING and health.summary != self._said:
            say.append(self._status(health.summary))
        if self.phase is not Phase.SERVING and health.moves and now - self._extended >= EXTEND_EVERY_S:
            self._extended = now
            say.append(extend(EXTEND_S))
        if health.moves is self._withheld:
            self._withheld = not health.moves
            if self._withheld:
                log.error("the watchdog is not fed: %s", "; ".join(p.text for p in health.problems if p.fatal))
            else:
                log.warning("the watchdog is fed again: everything moves")
        if health.moves and self._notifier.watchdog_s and now - self._fed >= self._notifier.watchdog_s / 3 * 0.9:
            self._fed = now
            say.append("WATCHDOG=1")
        if say:
            self._notifier.send(*say)
