"""What the service manager is told, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.core.health import Facts, Health, Problem, SlotFacts, assess
from edged.notify import EXTEND_EVERY_S, Herald, Notifier, Phase, status_line
from tests.support.device import until
from tests.support.notify import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@edged-test-{os.urandom(6).hex()}"
    with ServiceManager(address) as listening:
        yield listening


def test_messages_reach_a_path_and_an_abstract_socket(manager: ServiceManager) -> None:
    notifier = Notifier(manager.address)
    assert notifier.send("READY=1", status_line("serving\n 2 models"))
    until("it is heard", lambda: manager.ready)
    assert manager.heard[0][1] == {"READY": "1", "STATUS": "serving 2 models"}


def test_the_environment_is_for_this_process_alone(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    own = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "PATH": "/bin"}
    assert Notifier.from_environment(own).watchdog_s == 30.0
    assert own == {"PATH": "/bin"}  # a child would feed our watchdog with it
    another = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(another).watchdog_s == 0.0
    assert Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "soon"}).watchdog_s == 0.0
    assert Notifier.from_environment({"WATCHDOG_USEC": "30000000"}).watchdog_s == 0.0  # nobody to tell


@pytest.mark.parametrize("address", ["", "nonsense", "/nowhere/at/all"])
def test_without_a_listener_nothing_is_sent_and_nothing_fails(address: str) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    assert not notifier.send("READY=1")
    assert not notifier.send("READY=1")


def test_a_long_status_is_cut_between_characters() -> None:
    line = status_line("ü" * 1000)
    assert len(line.encode()) <= 520
    assert line.removeprefix("STATUS=").strip("ü") == ""


class Told(Notifier):
    """Keeps what is sent."""

    def __init__(self, watchdog_s: float = 0.0) -> None:
        super().__init__()
        self.watchdog_s = watchdog_s
        self.sent: list[str] = []

    def send(self, *assignments: str) -> bool:
        self.sent += [line.split("\n")[0] for line in assignments]
        return True

    def new(self) -> list[str]:
        sent, self.sent = self.sent, []
        return sent


class Patient:
    """A daemon whose health a test sets."""

    def __init__(self, watchdog_s: float = 0.0) -> None:
        self.facts = Facts(looped=False)
        self.told = Told(watchdog_s)
        self.changes = 0
        self.herald = Herald(self.told, self._look, self._changed)

    def _look(self) -> Health:
        return assess(self.facts)

    def _changed(self) -> None:
        self.changes += 1


SERVING = Facts(slots={"eye": SlotFacts("toy@1.0", "seed")}, broker="connected")
WAITING = Facts(slots={"eye": SlotFacts(None, "seed")}, broker="connected")
HUNG = Facts(slots={"eye": SlotFacts("toy@1.0", "seed")}, broker="connected", stalled={"worker-line": 130.0})


def test_ready_is_said_once_and_the_status_when_it_changes() -> None:
    patient = Patient()
    patient.herald.look(0.0)
    assert patient.told.new() == ["STATUS=starting; broker: not connected yet", "EXTEND_TIMEOUT_USEC=30000000"]
    patient.facts = WAITING
    patient.herald.look(1.0)
    assert patient.told.new() == ["STATUS=not ready: no model answers in eye; broker: connected; 1 problem"]
    patient.herald.look(EXTEND_EVERY_S + 1)
    assert patient.told.new() == ["EXTEND_TIMEOUT_USEC=30000000"]  # it still loads: more time
    patient.facts = SERVING
    patient.herald.look(20.0)
    assert patient.told.new() == ["READY=1", "STATUS=serving 1 model; broker: connected"]
    patient.facts = WAITING  # READY cannot be taken back; the status tells
    patient.herald.look(40.0)
    patient.facts = SERVING
    patient.herald.look(60.0)
    assert [line for line in patient.told.new() if not line.startswith("STATUS=")] == []


def test_who_hangs_while_it_starts_gets_no_more_time() -> None:
    patient = Patient(watchdog_s=30.0)
    patient.facts = Facts(looped=False, stalled={"updater": 2000.0})
    for second in range(0, 60, 5):
        patient.herald.look(float(second))
    assert {line.split("=")[0] for line in patient.told.new()} == {"STATUS"}


def test_the_watchdog_is_fed_at_a_third_and_only_while_everything_moves() -> None:
    patient = Patient(watchdog_s=30.0)
    patient.facts = SERVING
    patient.herald.look(0.0)
    assert "WATCHDOG=1" in patient.told.new()
    for second in range(1, 9):
        patient.herald.look(float(second))
    assert patient.told.new() == []
    patient.herald.look(10.0)
    assert patient.told.new() == ["WATCHDOG=1"]
    patient.facts = HUNG
    for second in range(11, 60):
        patient.herald.look(float(second))
    assert patient.told.new() == ["STATUS=serving 1 model; broker: connected; 1 problem"]
    patient.facts = SERVING
    patient.herald.look(60.0)
    assert "WATCHDOG=1" in patient.told.new()


def test_a_reload_is_framed_and_never_the_first_ready() -> None:
    patient = Patient()
    patient.herald.reloading()
    patient.herald.reloaded()
    assert patient.told.new() == []
    patient.facts = SERVING
    patient.herald.look(0.0)
    patient.told.new()
    patient.herald.reloading()
    patient.herald.reloaded()
    assert patient.told.new() == ["RELOADING=1", "READY=1"]


def test_whoever_stops_says_so_and_gets_time_while_he_moves() -> None:
    patient = Patient(watchdog_s=30.0)
    patient.facts = SERVING
    patient.herald.look(0.0)
    patient.told.new()
    patient.herald.stopping()
    assert patient.told.new() == ["STOPPING=1", "STATUS=stopping: what is in hand is finished"]
    patient.herald.look(6.0)
    assert patient.told.new() == ["EXTEND_TIMEOUT_USEC=30000000"]
    assert patient.herald.phase is Phase.STOPPING


def test_whoever_waits_for_the_health_hears_of_every_change_once() -> None:
    patient = Patient()
    for facts, changes in ((WAITING, 1), (WAITING, 1), (SERVING, 2), (HUNG, 3), (HUNG, 3)):
        patient.facts = facts
        patient.herald.look(0.0)
        assert patient.changes == changes


def test_a_look_that_fails_feeds_nobody(tmp_path: Path) -> None:
    def fails() -> Health:
        raise RuntimeError("no health today")

    with ServiceManager(str(tmp_path / "notify")) as manager:
        herald = Herald(Notifier(manager.address, 0.3), fails, lambda: None)
        herald.start()
        herald.stopping()
        until("the thread lives on", lambda: manager.all("STOPPING"))
        herald.stop()
        assert not manager.all("WATCHDOG")
        assert not manager.ready


FINE = SlotFacts("toy@1.0", "release")
DISK = "3 MiB free at /var/lib/edged; at least 16 are needed"


@pytest.mark.parametrize(
    ("facts", "ready", "moves", "what"),
    [
        (Facts(), True, True, []),
        (Facts(looped=False), False, True, []),
        (Facts(slots={"eye": SlotFacts()}), True, True, []),  # no model yet, and none is meant to be
        (Facts(slots={"eye": FINE, "phi": SlotFacts(None, "seed")}), False, True, ["slot phi"]),
        (Facts(slots={"phi": SlotFacts(None, "release")}), False, True, ["slot phi"]),
        (Facts(slots={"eye": FINE}, stalled={"control": 61.0}), True, False, ["thread control"]),
        (Facts(slots={"eye": FINE}, ended=("pipeline line",)), True, False, ["thread pipeline line"]),
        (Facts(slots={"eye": FINE}, network=False), True, False, ["thread network"]),
        # What a restart cannot mend is said, and does not end the daemon.
        (Facts(slots={"eye": FINE}, disk_free=3 << 20, state_dir="/var/lib/edged"), True, True, ["disk"]),
        (Facts(slots={"eye": FINE}, disk_free=3 << 20, write_errors=True), True, True, ["disk"]),
        (Facts(slots={"eye": FINE}, disk_free=1 << 30, write_errors=True), True, True, ["store"]),
        (Facts(slots={"eye": FINE}, store_error="edged.db: disk I/O error"), True, True, ["store"]),
        (Facts(slots={"eye": FINE}, broker="no connection to host:8883"), True, True, ["broker"]),
        (Facts(slots={"eye": FINE}, refused=("edged/v1/x",)), True, True, ["broker rights"]),
        (Facts(slots={"eye": FINE}, config_error="no such slot"), True, True, ["config"]),
        (Facts(more=(Problem("heat", "88 C", "cool it"),)), True, True, ["heat"]),
    ],
)
def test_health(facts: Facts, ready: bool, moves: bool, what: list[str]) -> None:
    health = assess(facts)
    assert (health.ready, health.moves) == (ready, moves)
    assert [problem.what for problem in health.problems] == what
    assert all(problem.text and problem.fix for problem in health.problems)
    shown = health.document()
    assert shown["ready"] is ready
    assert [set(problem) for problem in shown["problems"]] == [{"what", "text", "fix"}] * len(what)


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (Facts(looped=False), "starting; broker: not connected yet"),
        (Facts(slots={"eye": SlotFacts()}, broker="connected"), "ready; no model yet; broker: connected"),
        (Facts(slots={"a": FINE, "b": FINE}, broker="connected"), "serving 2 models; broker: connected"),
        (
            Facts(slots={"a": FINE}, broker="x" * 80, disk_free=0),
            f"serving 1 model; broker: {'x' * 57}...; 2 problems",
        ),
    ],
)
def test_the_summary_is_one_line_for_people(facts: Facts, line: str) -> None:
    assert assess(facts).summary == line


def test_a_full_disk_says_how_much_is_missing_and_where() -> None:
    problem = assess(Facts(disk_free=3 << 20, state_dir="/var/lib/edged")).problems[0]
    assert problem.text == DISK
