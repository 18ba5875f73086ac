"""The life of `edged run` as the service manager and an operator see it: ready, watched, full, ended."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.serve import EXIT_HUNG
from edged.wire.messages import Result
from tests.support.device import Bus, Device, tables, until
from tests.support.models import HARD_WORK, make_release, put_pictures
from tests.support.notify import ServiceManager, program
from tests.system.broker import Broker

WATCHDOG_S = 1.5  # fed every half second


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(str(tmp_path / "notify")) as listening:
        yield listening


def quiet(tmp_path: Path, seed: Path | None, **more: Any) -> dict[str, Any]:
    """A device whose broker is not there."""
    nobody = Broker(tmp_path / "nobody")
    return tables(tmp_path, "dev1", nobody, seed, **more)


def test_ready_is_said_when_the_model_answers_and_the_end_is_announced(
    tmp_path: Path, manager: ServiceManager, broker: Broker, toy: Path
) -> None:
    environment = manager.environment(WATCHDOG_S)
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy), ready=False, env=environment) as device:
        until("READY", lambda: manager.ready)
        # At that moment, and not only later, the model answers.
        assert device.status()["models"]["eye"]["active"] == "toy@1.0"  # type: ignore[index]
        until("a status of what is served", lambda: manager.status == "serving 1 model; broker: connected")
        until("the watchdog is fed", lambda: len(manager.all("WATCHDOG")) > 3)
        status = device.wait("its health", lambda s: s["health"]["ready"])
        assert status["health"]["problems"] == []
        assert device.stop() == 0
    keys = manager.keys("STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC")
    assert keys == ["READY", "STOPPING"]
    assert manager.status.startswith("stopping")


def test_a_bad_seed_is_never_ready_and_says_why_while_the_device_serves_on(
    tmp_path: Path, manager: ServiceManager, toy: Path
) -> None:
    make_release(tmp_path / "bad", golden_label=1)  # it does not answer its golden set
    more = {"slots": {"ear": {"seed": tmp_path / "bad"}}}
    environment = manager.environment(WATCHDOG_S)
    with Device(tmp_path, quiet(tmp_path, toy, **more), ready=False, env=environment) as device:
        device.wait("the good one serves", lambda s: s["models"]["eye"]["active"])
        until("the status says which", lambda: "no model answers in ear" in manager.status)
        put_pictures(device.inbox, ["a.png"])
        until("the picture is answered", lambda: (device.inbox / "done" / "a.png").exists())
        until("the watchdog is fed", lambda: len(manager.all("WATCHDOG")) > 2)  # a restart would mend nothing
        until("more time is asked for", lambda: manager.all("EXTEND_TIMEOUT_USEC"))
        health = device.status()["health"]  # type: ignore[index]
        assert not health["ready"]
        assert "slot ear" in [problem["what"] for problem in health["problems"]]
        assert not manager.ready


def test_a_device_without_model_and_without_broker_is_ready(tmp_path: Path, manager: ServiceManager) -> None:
    with Device(tmp_path, quiet(tmp_path, None), ready=False, env=manager.environment()) as device:
        until("READY", lambda: manager.ready)
        until("the status says so", lambda: manager.status.startswith("ready; no model yet; broker: no connection"))
        device.wait("the broker is a problem", lambda s: [p["what"] for p in s["health"]["problems"]] == ["broker"])
        assert manager.all("WATCHDOG") == []  # no unit asked for it


# Limits of minutes are no test: the program is the same with shorter ones.
HASTY = """
import edged.pipeline
edged.pipeline.STILL_S_MAX = 2.0
"""


def test_a_hung_engine_is_no_longer_vouched_for_and_the_stop_names_it(
    tmp_path: Path, manager: ServiceManager, toy: Path
) -> None:
    # The very first picture is a matrix product without end, in native code: no exception, no signal ends it.
    make_release(tmp_path / "stuck", "toy@1.0", dark_hangs=True)
    hasty = program(tmp_path, HASTY)
    configured = quiet(tmp_path, tmp_path / "stuck")
    with Device(tmp_path, configured, program=hasty, env=manager.environment(WATCHDOG_S)) as device:
        put_pictures(device.inbox, ["a.png"])
        until("it answers what does not hang", lambda: (device.inbox / "done" / "a.png").exists())
        until("the watchdog is fed", lambda: len(manager.all("WATCHDOG")) > 2)
        put_pictures(device.inbox, ["dark.png"], value=0)
        until("the status says it", lambda: "1 model" in manager.status and "problem" in manager.status)
        until("the watchdog starves", lambda: manager.since("WATCHDOG") > 2 * WATCHDOG_S)
        problems = device.status()["health"]["problems"]  # type: ignore[index]
        assert "thread worker-line" in [problem["what"] for problem in problems]
        assert device.signal(signal.SIGTERM) != 0  # in time, but not as it should be
        assert "still at work: worker-line" in device.log()
        assert (device.inbox / "dark.png").exists()  # not lost


KILLS_NETWORK = """
import ctypes, signal, threading

def kill(*_):
    for thread in threading.enumerate():
        if "paho" in thread.name:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))

signal.signal(signal.SIGUSR1, kill)
"""
NOT_REVIVED = """
import edged.link
edged.link.Link.ensure_alive = lambda self: True
"""


def test_a_dead_network_thread_comes_back_and_is_counted(
    tmp_path: Path, manager: ServiceManager, broker: Broker, bus: Bus, toy: Path
) -> None:
    environment = manager.environment(WATCHDOG_S)
    configured = tables(tmp_path, "dev1", broker, toy)
    with Device(tmp_path, configured, program=program(tmp_path, KILLS_NETWORK), env=environment) as device:
        device.wait("connected", lambda s: s["broker"] == "connected")
        assert device.process is not None
        device.process.send_signal(signal.SIGUSR1)
        device.counted("network_thread_restarts")
        device.wait("connected again, and well", lambda s: s["broker"] == "connected" and not s["health"]["problems"])
        until("the watchdog is fed", lambda: manager.since("WATCHDOG") < WATCHDOG_S)
        bus.reply(bus.ask("dev1", "ask", image=_picture()))


def test_a_network_thread_that_stays_dead_is_no_longer_vouched_for(
    tmp_path: Path, manager: ServiceManager, broker: Broker, toy: Path
) -> None:
    environment = manager.environment(WATCHDOG_S)
    dead = program(tmp_path, KILLS_NETWORK + NOT_REVIVED)
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy), program=dead, env=environment) as device:
        device.wait("connected", lambda s: s["broker"] == "connected")
        assert device.process is not None
        device.process.send_signal(signal.SIGUSR1)
        until("the watchdog starves", lambda: manager.since("WATCHDOG") > 2 * WATCHDOG_S)
        assert "thread network" in [p["what"] for p in device.status()["health"]["problems"]]  # type: ignore[index]


# A disk that never answers: the directory source asks it for the next file for ever.
SOURCE_HANGS = """
import time
import edged.sources.directory as directory
directory.STILL_S_MAX = 2.0
look = directory.DirectorySource._hand_over
directory.DirectorySource._hand_over = lambda self, path, *more: (
    time.sleep(3600) if path.name == "dead.png" else look(self, path, *more)
)
"""


def test_a_hung_source_is_no_longer_vouched_for_and_does_not_hold_up_the_end(
    tmp_path: Path, manager: ServiceManager, toy: Path
) -> None:
    hanging = program(tmp_path, SOURCE_HANGS)
    with Device(tmp_path, quiet(tmp_path, toy), program=hanging, env=manager.environment(WATCHDOG_S)) as device:
        put_pictures(device.inbox, ["a.png"])
        until("it is answered", lambda: (device.inbox / "done" / "a.png").exists())
        put_pictures(device.inbox, ["dead.png"])
        until("the watchdog starves", lambda: manager.since("WATCHDOG") > 2 * WATCHDOG_S)
        assert "source-" in device.status()["health"]["problems"][0]["what"]  # type: ignore[index]
        assert device.signal(signal.SIGTERM) == EXIT_HUNG
        assert "still at work: source of line" in device.log()


CONTROL_HANGS = """
import signal, time
import edged.control
edged.control.STILL_S_MAX = 2.0
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))  # in the middle of the control loop, which is the main thread
"""


def test_a_hung_control_loop_is_no_longer_vouched_for(tmp_path: Path, manager: ServiceManager, toy: Path) -> None:
    hanging = program(tmp_path, CONTROL_HANGS)
    device = Device(tmp_path, quiet(tmp_path, toy), program=hanging, env=manager.environment(WATCHDOG_S))
    with device:
        until("the watchdog is fed", lambda: len(manager.all("WATCHDOG")) > 2)
        assert device.process is not None
        device.process.send_signal(signal.SIGUSR1)
        until("the watchdog starves", lambda: manager.since("WATCHDOG") > 2 * WATCHDOG_S)
        assert "control has stood still" in device.log()
        device.kill9()


def test_sigterm_with_full_queues_loses_nothing(
    tmp_path: Path, manager: ServiceManager, broker: Broker, bus: Bus
) -> None:
    make_release(tmp_path / "slow", "toy@1.0", products=HARD_WORK)
    configured = tables(tmp_path, "dev1", broker, tmp_path / "slow")
    names = [f"{number:02}.png" for number in range(20)]
    device = Device(tmp_path, configured, env=manager.environment(WATCHDOG_S))
    with device:
        until("READY", lambda: manager.ready)
        asked = [bus.ask("dev1", "ask", image=_picture()) for _ in range(10)]
        put_pictures(device.inbox, names)
        device.wait("they wait", lambda s: min(p["waiting"] for p in s["pipelines"].values()) > 2)
        assert device.stop() == 0
    assert manager.keys("STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC") == ["READY", "STOPPING"]
    left = {path.name for path in device.inbox.glob("*.png")}
    done = {path.name for path in (device.inbox / "done").iterdir()}
    assert left | done == set(names)
    assert left, "nothing was waiting: the test proves nothing"
    with device:  # the next start goes on with what the last one left
        for request in asked:
            assert bus.reply(request).error is None
        until("every file is done", lambda: len(list((device.inbox / "done").iterdir())) == len(names), 60)
    assert sorted(result.item for result in bus.of(Result)) == names


def test_a_second_sigterm_ends_at_once(tmp_path: Path, manager: ServiceManager) -> None:
    make_release(tmp_path / "stuck", "toy@1.0", dark_hangs=True)
    configured = quiet(tmp_path, tmp_path / "stuck")
    with Device(tmp_path, configured, program=program(tmp_path, HASTY), env=manager.environment()) as device:
        put_pictures(device.inbox, ["dark.png"], value=0)
        device.wait("it hangs", lambda s: "thread worker-line" in [p["what"] for p in s["health"]["problems"]])
        assert device.process is not None
        device.process.send_signal(signal.SIGTERM)
        until("the first is heard", lambda: bool(manager.all("STOPPING")))
        assert device.signal(signal.SIGTERM) == 128 + signal.SIGTERM
        assert "stopped" not in device.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_either_signal_ends_in_order(tmp_path: Path, toy: Path, number: int) -> None:
    with Device(tmp_path, quiet(tmp_path, toy)) as device:
        assert device.signal(number) == 0
        assert "edged dev1 stopped" in device.log()


def test_whatever_hangs_the_end_comes_in_time(tmp_path: Path, toy: Path) -> None:
    impatient = program(tmp_path, CONTROL_HANGS + "import edged.daemon\nedged.daemon.DRAIN_S_MAX = 1.0\n")
    with Device(tmp_path, quiet(tmp_path, toy), program=impatient) as device:
        assert device.process is not None
        device.process.send_signal(signal.SIGUSR1)
        assert device.signal(signal.SIGTERM) == EXIT_HUNG
        assert "these threads run: MainThread" in device.log()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this machine lets us mount nothing: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_shows_and_does_not_end_the_daemon(
    tmp_path: Path, manager: ServiceManager, small_disk: Path, toy: Path
) -> None:
    configured = quiet(tmp_path, toy, device={"state_dir": small_disk / "state"})
    with Device(tmp_path, configured, env=manager.environment(WATCHDOG_S)) as device:
        until("READY", lambda: manager.ready)
        filler = small_disk / "filler"
        with filler.open("wb") as file:  # every byte that is left
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass
        put_pictures(device.inbox, ["a.png", "b.png"])
        what = [p["what"] for p in device.wait("it shows", _disk_is_a_problem)["health"]["problems"]]
        assert "disk" in what
        until("the status says so", lambda: "problem" in manager.status)
        fed = len(manager.all("WATCHDOG"))
        until("the watchdog is fed on", lambda: len(manager.all("WATCHDOG")) > fed + 6)
        filler.unlink()
        until("both are answered once there is room", lambda: len(list((device.inbox / "done").iterdir())) == 2)
        device.wait("it is well", lambda s: "disk" not in [p["what"] for p in s["health"]["problems"]])
        assert device.stop() == 0


def _disk_is_a_problem(status: dict[str, Any]) -> bool:
    return "disk" in [problem["what"] for problem in status["health"]["problems"]]


def _picture() -> str:
    import base64

    from tests.support.models import picture

    return base64.b64encode(picture()).decode()
