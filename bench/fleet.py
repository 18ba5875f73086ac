"""A fleet on one broker and one coordinator: what a report costs the coordinator with 100 devices and with 10 000."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select

from bench.measure import Benchmark, Result, Say, Target
from bench.vision import ROOT
from tests.support.ports import free_port
from tests.system.broker import Broker
from trainer.database import Database, commands, devices, parts, seen, windows
from trainer.fleet import ENDED
from trainer.simulate.plan import Plan
from trainer.simulate.run import Seen, Simulation

SITE = "sim"
PROCESSES = 3
STALL_S_MAX = 180.0  # without one more device or message: something is broken
SETTLE_S = 5.0  # after the last device is known, before it is measured
DRAIN_S_MAX = 120.0  # for the last reports to be taken in
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """A fleet of `devices`, watched for `seconds`."""

    devices: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """The fleets, and how many windows of metrics all devices of each close in a second, whatever their number."""

    sizes: tuple[Size, ...]
    windows_s: float = 60.0
    connects_s: float = 150.0


FULL = Work((Size(100, 90.0), Size(1000, 90.0), Size(10_000, 180.0)))
QUICK = Work((Size(50, 10.0), Size(200, 10.0)), 20.0)


class Served:
    """`trainer serve` as a process, its database, and what it costs."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        folder.mkdir()
        self.folder = folder
        config = folder / "trainer.toml"
        config.write_text(
            f'name = "host"\nsite = "{SITE}"\ndata_dir = "data"\n[broker]\nport = {broker.port}\n[http]\n'
            f'port = {free_port()}\n[models.digits]\ncheckpoint = "none.pt"\nlabels = ["0", "1"]\nholdout = "holdout"\n'
            # Samples are counted, as for any model; what would train them is not measured here.
            'holdout_clean = "clean"\ncalibration = "calibration"\nthreshold = 1000000\n'
        )
        with (folder / "serve.log").open("ab") as log:
            command = [sys.executable, "-m", "trainer", "serve", "--config", str(config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        self.cost = psutil.Process(self._process.pid)
        path = folder / "data" / "trainer.sqlite"
        until("the trainer's database", path.is_file, 60.0)
        time.sleep(1.0)  # its tables are made by then: one transaction
        self.database = Database(path)

    def cpu_s(self) -> float:
        """Seconds of processor time so far."""
        times = self.cost.cpu_times()
        return float(times.user + times.system)

    def count(self, query: Any) -> int:
        """One number out of the database."""
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def missing(self, trail: Path) -> list[str]:
        """The reports that the broker took and that were not taken in."""
        told = [line for file in sorted(trail.glob("*.ids")) for line in file.read_text().split()]
        with self.database.read() as connection:
            found: set[str] = set()
            for part in parts(told):
                found.update(connection.execute(select(seen.c.id).where(seen.c.id.in_(part))).scalars())
        return sorted(set(told) - found)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.database.close()


def until(what: str, found: Callable[[], bool], seconds: float) -> None:
    """Wait for it; raises RuntimeError when it does not come."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.5)


ONLINE = select(func.count()).select_from(devices).where(devices.c.online.is_(True))
ASKED = select(func.count()).select_from(commands).where(commands.c.state.notin_(ENDED))
TAKEN = select(func.count()).select_from(seen)
WINDOWS = select(func.count()).select_from(windows)


def measure(size: Size, work: Work, folder: Path, say: Say) -> dict[str, float]:
    """One fleet from its first birth to its last word; what the coordinator made of it."""
    folder.mkdir()
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(folder / "broker"))
        served = Served(folder / "trainer", broker)
        stack.callback(served.close)
        assert broker._process is not None
        broker_cost = psutil.Process(broker._process.pid)
        empty = served.cost.memory_info().rss, broker_cost.memory_info().rss
        plan = Plan(
            host=broker.host, port=broker.port, site=SITE, devices=size.devices, processes=PROCESSES, model="digits",
            classes=["0", "1"], release="digits@1.0", window_s=size.devices / work.windows_s,
            connects_s=work.connects_s, trail=folder / "trail", end="offline",
        )  # fmt: skip
        begun, used = time.monotonic(), served.cpu_s()
        with Simulation(plan) as fleet:
            _wait_for_all(fleet, size, served)
            came_s, came_cpu = time.monotonic() - begun, served.cpu_s() - used
            time.sleep(SETTLE_S)
            first, at, used, broker_used = (
                served.count(TAKEN),
                time.monotonic(),
                served.cpu_s(),
                broker_cost.cpu_times(),
            )
            time.sleep(size.seconds)
            cpu, reports, took = served.cpu_s() - used, served.count(TAKEN) - first, time.monotonic() - at
            broker_now = broker_cost.cpu_times()
            memory = served.cost.memory_info().rss, broker_cost.memory_info().rss
        after: Seen = fleet.seen()
        deadline = time.monotonic() + DRAIN_S_MAX
        while (lost := served.missing(folder / "trail")) and time.monotonic() < deadline:
            time.sleep(1.0)
        found = {
            "devices": size.devices, "us_per_report": cpu / max(reports, 1) * 1e6, "reports_s": reports / took,
            "reports": after.counts["reports"], "lost": len(lost), "coordinator_cpu_share": cpu / took,
            "broker_cpu_share": (broker_now.user + broker_now.system - broker_used.user - broker_used.system) / took,
            "came_s": came_s, "came_cpu_s": came_cpu,
            "coordinator_kib_a_device": (memory[0] - empty[0]) / 1024 / size.devices,
            "broker_kib_a_device": (memory[1] - empty[1]) / 1024 / size.devices,
            "coordinator_mib": memory[0] / MIB, "broker_mib": memory[1] / MIB,
            "still_online": served.count(ONLINE), "dropped_by_devices": after.counts["overflowed"],
        }  # fmt: skip
        say(
            f"{size.devices} devices: {found['us_per_report']:.0f} us a report at {found['reports_s']:.0f} reports/s, "
            f"{len(lost)} of {after.counts['reports']} lost, all there after {came_s:.0f} s"
        )
        return found


def _wait_for_all(fleet: Simulation, size: Size, served: Served) -> None:
    """Until the inventory has every device and each has sent its catalogue; raises RuntimeError when it does not go on."""
    before, since = (-1, -1, -1), time.monotonic()
    while True:
        now = fleet.seen()
        found = served.count(ONLINE), now.online, served.count(TAKEN)
        if min(found[:2]) == size.devices <= now.counts["commands"] and served.count(ASKED) == 0:
            return
        if found != before:
            before, since = found, time.monotonic()
        elif time.monotonic() - since > STALL_S_MAX:
            raise RuntimeError(
                f"{found[1]} of {size.devices} devices are connected, {found[0]} in the inventory: no more come"
            )
        time.sleep(1.0)


def run(quick: bool, say: Say) -> Result:
    """The fleets one after the other, each with a broker and a trainer of its own."""
    work = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build") as scratch:
        found = [measure(size, work, Path(scratch) / str(size.devices), say) for size in work.sizes]
    small, large = found[0], found[-1]
    facts: dict[str, Any] = {
        f"{row['devices']:.0f} devices": {name: round(value, 2) for name, value in row.items() if name != "devices"}
        for row in found
    }
    keys = {
        "coordinator_us_per_report_ratio": large["us_per_report"] / small["us_per_report"],
        "reports_lost": sum(row["lost"] for row in found),
    }
    return Result(keys, {**facts, "broker": "mosquitto, loopback, no TLS", "database": "SQLite, synchronous=FULL"})


BENCHMARK = Benchmark(
    "fleet",
    "simulated devices on one broker and one coordinator, with the same total rate of reports: processor time of the "
    "coordinator for each report with the largest fleet against the smallest, and reports that the broker took and the "
    "coordinator did not",
    {"coordinator_us_per_report_ratio": Target("<=", 1.5), "reports_lost": Target("<=", 0.0)},
    run,
)
