"""`trainer worker`: trains what `trainer serve` has collected."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import asdict
from typing import Annotated

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, show


def worker(
    config: Config = CONFIG,
    name: Annotated[str | None, typer.Option(help="Its name. Default: the host's, with this process's number.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End after one job, or at once when none waits.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this host has (GPU, memory, disk), then lease training jobs and run each in a child process.

    It shares the database and the folders of `trainer serve`. A job whose worker dies is leased again by another.
    """
    from trainer.database import DatabaseError
    from trainer.hostfacts import host_facts

    settings = load(config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    chosen = name or f"{socket.gethostname()}-{os.getpid()}"
    show(asdict(host_facts(chosen, settings.data_dir)), as_json)
    sys.stdout.flush()
    from trainer.database import Database
    from trainer.host import Host
    from trainer.releases import Registry
    from trainer.worker import Worker, serve

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        host = Host(settings, config.resolve(), Database(settings.database_at), Registry(settings.releases))
        serve(Worker(host, chosen), stopping, once=once)
    except (DatabaseError, OSError) as error:
        fail(str(error))
