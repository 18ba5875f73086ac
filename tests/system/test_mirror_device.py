"""A running trainer keeps a store filled, and a real device installs from there what it was told of, without the trainer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles

from tests.support.device import Bus, Device, tables
from tests.system.broker import Broker
from tests.system.test_trainer_serve import running, until
from trainer.releases import Registry


@contextmanager
def public(folder: Path) -> Iterator[str]:
    """The address that a store's files are read at."""
    application = Starlette()
    application.mount("/", StaticFiles(directory=folder))
    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until("it listens", lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_a_trainer_fills_the_store_and_a_device_installs_from_there(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, toy2: Path
) -> None:
    store = tmp_path / "store"
    with running(tmp_path, rollout=f'[storage]\nmirror = "file://{store}"') as (_, trainer, _devices):
        ref = Registry(trainer.folder / "data" / "releases").register(toy2)
        manifest = store / "releases" / "toy@1.1" / "release.json"
        until("the new release is in the store", manifest.is_file)
        assert (store / "releases" / "digits@1.0" / "release.json").is_file()
    # The trainer has ended.
    with public(store) as url, Device(tmp_path, tables(tmp_path, "dev1", broker, toy, host={"url": url})) as device:
        bus.desire("dev1", 7, {"eye": ref})
        status = device.wait("committed", lambda s: s["models"]["eye"]["update"] == "committed")
        assert status["models"]["eye"]["active"] == "toy@1.1"
