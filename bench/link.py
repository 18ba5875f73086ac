"""Questions to the next tier over MQTT: the daemon's durable way against paho and sqlite3 alone."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import link_side
from bench.measure import Benchmark, Result, Say, Target, alternate, ratio
from bench.vision import DEVICE, ROOT
from tests.system.broker import Broker


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: questions as fast as they go, questions one after the other, rounds."""

    flood: int
    ping: int
    rounds: int


FULL, QUICK = Plan(300, 60, 9), Plan(60, 15, 3)


@dataclass(slots=True)
class Side:
    """Does what a line says: the seconds that it took, and the processor time of each question. `cpu_ms`: of every flood."""

    ask: Callable[[str], tuple[float, float]]
    cpu_ms: list[float] = field(default_factory=list)

    def rate(self, count: int) -> float:
        """Questions a second, as fast as they go."""
        took, used = self.ask(f"flood {count}")
        self.cpu_ms.append(used * 1000)
        return count / took

    def delay_ms(self, count: int) -> float:
        """Milliseconds of one question, the median of `count`."""
        return self.ask(f"ping {count}")[0] * 1000


@contextmanager
def side(role: str, broker: Broker, folder: Path) -> Iterator[Side]:
    """A process of `link_side`."""
    assert broker.ca is not None
    certificate, key = broker.certificate(role)
    where = [str(broker.port), *map(str, (broker.ca, certificate, key, folder))]
    with (folder.parent / f"{role}.log").open("ab") as log:
        process = subprocess.Popen(
            [DEVICE / "python", "-P", link_side.__file__, role, *where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    pipe_in, pipe_out = process.stdin, process.stdout

    def ask(line: str) -> tuple[float, float]:
        pipe_in.write(line + "\n")
        pipe_in.flush()
        took, used = said(pipe_out.readline()).split()
        return float(took), float(used)

    def said(line: str) -> str:
        if not line:
            raise RuntimeError(f"{role} ended: {(folder.parent / f'{role}.log').read_text()[-2000:]}")
        return line

    try:
        said(pipe_out.readline())
        yield Side(ask)
    finally:
        pipe_in.close()
        process.wait(30)
        pipe_out.close()


def run(quick: bool, say: Say) -> Result:
    """Measure both ways in turn."""
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        broker = stack.enter_context(Broker(folder / "broker", tls=True))
        stack.enter_context(side("echo", broker, folder / "echo"))
        sides = {name: stack.enter_context(side(name, broker, folder / name)) for name in ("edged", "raw")}
        for each in sides.values():  # what is only done once is done
            each.ask(f"flood {plan.ping}")
        rate = alternate(
            plan.rounds, *(partial(each.rate, plan.flood) for each in sides.values()), say=say,
            names=[f"{name} questions/s" for name in sides],
        )  # fmt: skip
        delay = alternate(
            plan.rounds, *(partial(each.delay_ms, plan.ping) for each in sides.values()), say=say,
            names=[f"{name} ms" for name in sides],
        )  # fmt: skip
    keys = {"throughput_vs_raw": ratio(*rate), "rtt_vs_raw": ratio(*delay)}
    facts = {f"{name}_questions_per_s": round(statistics.median(v), 1) for name, v in zip(sides, rate, strict=True)}
    facts |= {f"{name}_rtt_ms": round(statistics.median(v), 2) for name, v in zip(sides, delay, strict=True)}
    facts |= {f"{name}_cpu_ms_a_question": round(statistics.median(each.cpu_ms), 2) for name, each in sides.items()}
    return Result(keys, {**facts, "image_bytes": link_side.IMAGE_BYTES, "broker": "mosquitto, TLS, loopback"})


BENCHMARK = Benchmark(
    "link",
    "questions to a responder that echoes a verdict, from the commit of the image and the question to the commit of the "
    "verdict: the daemon's store, control loop and link against raw paho QoS 1 and sqlite3 with the same TLS and fsyncs",
    {"throughput_vs_raw": Target(">=", 0.8), "rtt_vs_raw": Target("<=", 1.5)},
    run,
)
