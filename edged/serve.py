"""`edged run` as a process: signals in, exit status out."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from edged.acts import THREAD as UPDATER
from edged.config import Settings
from edged.daemon import Daemon
from edged.notify import Notifier

log = logging.getLogger(__name__)

ENDING = (signal.SIGTERM, signal.SIGINT)
EXIT_HUNG = 70  # EX_SOFTWARE: something did not end when it was asked to


def build(settings: Settings, config: Path) -> Daemon:
    """The daemon of this process, not running yet; raises what `Daemon` raises."""
    return Daemon(settings, config=config.absolute(), notifier=Notifier.from_environment(os.environ))


def serve(daemon: Daemon) -> None:
    """Run the daemon until SIGTERM or SIGINT; SIGHUP loads its configuration again.

    Returns when everything has ended; else the process ends here, with EXIT_HUNG when a worker hangs.
    """
    daemon.overdue = _hung
    _listen(daemon)
    daemon.run()
    if [name for name in daemon.left_running if name != UPDATER]:
        _hung()
    if daemon.left_running:
        _exit(0)  # a load cannot be interrupted, and is done again: nothing is wrong, but nobody waits for it


def _listen(daemon: Daemon) -> None:
    """Act on signals on a thread of their own: the main thread may be the one that hangs."""
    heard, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    for number in (*ENDING, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the byte in the pipe is all that is wanted
    threading.Thread(target=_obey, args=(daemon, heard), name="signals", daemon=True).start()


def _obey(daemon: Daemon, heard: int) -> None:
    asked = False
    while True:
        for number in os.read(heard, 64):
            if number == signal.SIGHUP:
                daemon.reloader.ask()
            elif number in ENDING and asked:  # who asks twice does not want to wait: what is in hand comes again
                _exit(128 + number)
            elif number in ENDING:
                asked = True
                daemon.stop()


def _hung() -> NoReturn:
    faulthandler.dump_traceback(sys.stderr)  # where each thread stands: this is what a bug report needs
    _exit(EXIT_HUNG)


def _exit(status: int) -> NoReturn:
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
