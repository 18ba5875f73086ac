"""A release to a fleet over MQTT: what it costs the trainer, the devices, the broker, and a command that comes meanwhile."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench import delivery_side
from bench.delivery_side import SITE
from bench.measure import Benchmark, Result, Say, Target
from bench.vision import DEVICE, ROOT
from edged.wire.manifest import ReleaseRef
from tests.support.slow_link import SlowLink
from tests.system.broker import Broker
from trainer.blocks import Blocks
from trainer.config import TrainerConfig
from trainer.config_network import Broker as BrokerConfig
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes

MIB = 1 << 20
SLOW_BYTES_S = 128 << 10
PROCESSES = 3  # that the fast devices are spread over
ADAPTER_BYTES = 512 << 10  # rank 8 on a model of 20 million parameters
WAIT_S = 480.0
IDLE_S = 5.0  # without a transfer, for the commands' sake


@dataclass(frozen=True, slots=True)
class Plan:
    """How many devices fetch how many bytes; `patience_s`: None is the trainer's default."""

    devices: int
    size: int
    patience_s: float | None = None


FULL, QUICK = Plan(20, 20 * 1000 * 1000), Plan(6, 3 * MIB)


def releases(folder: Path, size: int) -> tuple[Registry, ReleaseRef, ReleaseRef]:
    """A full model of `size` bytes and an adapter on it."""
    registry, rng = Registry(folder / "registry"), random.Random(1)
    base: ReleaseRef | None = None
    for name, role, file, length in (("clerk@1.0", "model", "model.gguf", size),
                                     ("clerk-lora@1.0", "adapter", "adapter.gguf", ADAPTER_BYTES)):  # fmt: skip
        source = folder / name
        source.mkdir()
        (source / file).write_bytes(rng.randbytes(length))
        manifest = build_manifest(
            source, name, kind="lora" if base else "llm", engine="llama", roles={role: file}, base=base
        )
        (source / MANIFEST).write_bytes(canonical_bytes(manifest))
        ref = registry.register(source)
        base, adapter = base or ref, ref
    assert base is not None
    return registry, base, adapter


@dataclass(slots=True)
class Fleet:
    """The processes with the devices in them, and what they have received."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, port: int, release: str, sha256: str, *names: str) -> subprocess.Popen[bytes]:
        """Devices in a process of their own."""
        with (self.folder / "devices.log").open("ab") as log:
            command = [
                str(DEVICE / "python"),
                "-P",
                delivery_side.__file__,
                str(port),
                str(self.folder),
                release,
                sha256,
            ]
            process = subprocess.Popen([*command, *names], stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def received(self, *names: str) -> int:
        """Bytes of blocks that came to these devices, whatever became of them."""
        files = (self.folder / f"{name}.received" for name in names)
        return sum(sum(map(int, file.read_text().split())) for file in files if file.is_file())

    def done(self, names: list[str]) -> bool:
        """Whether each has its release."""
        return all((self.folder / f"{name}.done").is_file() for name in names)

    def close(self) -> None:
        """End the processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


class Commands:
    """What the process says that sends commands to the control connections and times their answers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        until("the control connections", lambda: len(self.since(0.0)) > 20, 30)

    def since(self, when: float) -> list[float]:
        """Seconds of each command that was sent after `when` (seconds since the epoch)."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        rows = [line.split() for line in lines if len(line.split()) == 2]
        return [float(took) for at, took in rows if float(at) >= when]


def until(what: str, found: Callable[[], Any], seconds: float = WAIT_S) -> None:
    """Wait for it; raises RuntimeError when it does not come."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


@contextmanager
def trainer(folder: Path, broker: Broker, registry: Registry, patience_s: float | None) -> Iterator[Blocks]:
    """The trainer's half, serving."""
    plan = {} if patience_s is None else {"patience_s": patience_s}
    config = TrainerConfig(
        name="host", site=SITE, data_dir=folder / "host", broker=BrokerConfig(host=broker.host, port=broker.port),
        blocks=plan,  # type: ignore[arg-type]  # pydantic makes it one
    )  # fmt: skip
    blocks = Blocks(config, registry, claimed=lambda _: False, arrived=lambda _: None)
    blocks.start()
    try:
        yield blocks
    finally:
        blocks.stop()


def deliver(plan: Plan, folder: Path, say: Say) -> dict[str, float]:
    """One delivery to the whole fleet, with everything that goes wrong in it; what it cost."""
    registry, full, adapter = releases(folder, plan.size)
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(folder / "broker"))
        blocks = stack.enter_context(trainer(folder, broker, registry, plan.patience_s))
        fleet = Fleet(folder)
        stack.callback(fleet.close)
        assert broker._process is not None
        memory = psutil.Process(broker._process.pid)
        fast = [f"dev{n}" for n in range(plan.devices - 2)]
        slow, late = "slow", "late"
        fleet.start(broker.port, "echo", "", *(f"c-{name}" for name in fast))
        fleet.start(broker.port, "ping", "", *(f"c-{name}" for name in fast))
        commands = Commands(folder / "commands")
        link = SlowLink(broker.port, SLOW_BYTES_S)
        stack.callback(link.close)
        groups = [fast[n::PROCESSES] for n in range(PROCESSES)]
        running = [fleet.start(broker.port, full.release, full.sha256, *group) for group in groups]
        fleet.start(link.port, full.release, full.sha256, slow)
        firsts = [slow, *(group[0] for group in groups)]
        until("the devices", lambda: all((folder / f"{name}.ready").exists() for name in firsts))
        told = time.time()
        time.sleep(IDLE_S)
        idle = commands.since(told)
        before, begun, told = memory.memory_info().rss, time.monotonic(), time.time()
        (folder / "go").touch()  # they are told of the release at once, as daemons that run are
        grown, joined, at = 0, False, {"joined": 0.0, "fast": 0.0}
        everybody = [*fast, slow, late]
        while not fleet.done(everybody):
            grown = max(grown, memory.memory_info().rss - before)
            if not joined and fleet.received(fast[0]) > plan.size / 2:
                joined, at["joined"] = True, time.monotonic() - begun
                published = blocks.counters["block_bytes_published"]
                fleet.start(broker.port, full.release, full.sha256, late)
                running[0].kill()  # a third of the fleet loses its power, and comes back
                running[0].wait()
                fleet.start(broker.port, full.release, full.sha256, *groups[0])
            if not at["fast"] and fleet.done(fast):
                at["fast"] = time.monotonic() - begun
            if time.monotonic() - begun > WAIT_S:
                raise RuntimeError(f"not done within {WAIT_S:.0f} s: {(folder / 'devices.log').read_text()[-2000:]}")
            time.sleep(0.05)
        took, latencies = time.monotonic() - begun, commands.since(told)
        cost = blocks.counters["block_bytes_published"] / plan.size
        say(f"{plan.devices} devices: {took:.0f} s, {cost:.2f} of the release published")
        size = plan.size + (registry.get(full.release).folder / MANIFEST).stat().st_size
        egress = blocks.counters["block_bytes_published"]
        received = fleet.received(*everybody)

        (folder / f"{fast[0]}.done").unlink()
        already = fleet.received(fast[0])
        fleet.start(broker.port, adapter.release, adapter.sha256, fast[0])
        until("the adapter", lambda: fleet.done([fast[0]]))
        return {
            "egress_vs_size": egress / size,
            "egress_vs_least": egress / (size + published),
            "received_vs_missing": received / (size * plan.devices),
            "command_latency_vs_idle": statistics.median(latencies) / statistics.median(idle),
            "broker_growth_mib": grown / MIB,
            "adapter_share": (fleet.received(fast[0]) - already) / size,
            "seconds": took, "fast_seconds": at["fast"], "joined_at_s": at["joined"],
            "idle_ms": statistics.median(idle) * 1000, "slowest_command_ms": max(latencies) * 1000,
            "asked_again": blocks.counters.get("blocks_asked", 0) - blocks.counters.get("blocks_answered", 0),
        }  # fmt: skip


KEYS = ("egress_vs_size", "received_vs_missing", "command_latency_vs_idle", "broker_growth_mib", "adapter_share")


def run(quick: bool, say: Say) -> Result:
    """One whole delivery as it comes, and one in which nobody waits for the slow device."""
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build") as scratch:
        (Path(scratch) / "one").mkdir()
        (Path(scratch) / "two").mkdir()
        found = deliver(plan, Path(scratch) / "one", say)
        hasty = deliver(Plan(plan.devices, plan.size, 0.2), Path(scratch) / "two", say)
    facts: dict[str, Any] = {name: round(value, 3) for name, value in found.items() if name not in KEYS}
    facts |= {"without_patience": json.dumps({name: round(value, 3) for name, value in hasty.items()})}
    return Result({key: found[key] for key in KEYS}, {**facts, "broker": "mosquitto, loopback, no TLS"})


BENCHMARK = Benchmark(
    "delivery",
    "a release of 20 MB to 20 devices over MQTT: one behind a link of 128 KiB/s, one that joins at half, a third of them "
    "killed at half; then an adapter release to one that has the base",
    {
        "egress_vs_size": Target("<=", 1.3), "received_vs_missing": Target("<=", 1.05),
        "command_latency_vs_idle": Target("<=", 1.5), "broker_growth_mib": Target("<=", 8.0),
        "adapter_share": Target("<=", 0.03),
    },
    run,
)  # fmt: skip
