"""The device and the trainer in a simulated world, seed by seed (docs/development.md, "Simulation").

SIM_SEEDS=10 runs ten times as many seeds. A failure prints its seed, and the command that runs just it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.sim.mutants import sites
from tests.support.sim.noticed import NOT_SIMULATED, NOTICED

ROOT = Path(__file__).parents[2]
PROCESSES = 2
SEEDS = {
    "updates": 500,
    "samples": 500,
    "rollouts": 60,
    "repairs": 1000,
    "ceremonies": 40,
    "commands": 300,
    "folders": 200,
}
TIMES = int(os.environ.get("SIM_SEEDS", "1"))


def start(scenario: str, seeds: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.sim.run", scenario, seeds, *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(1200 * TIMES)
@pytest.mark.parametrize("scenario", SEEDS)
def test_nothing_that_must_never_happen_happens(scenario: str) -> None:
    share = SEEDS[scenario] * TIMES // PROCESSES
    running = [start(scenario, f"{n * share}:{(n + 1) * share}") for n in range(PROCESSES)]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, "\n".join(said)


@pytest.mark.parametrize("scenario", SEEDS)
def test_a_seed_is_the_same_run_every_time(scenario: str) -> None:
    running = [start(scenario, "7:9", "--trace") for _ in range(2)]
    first, second = (process.communicate()[0] for process in running)
    assert first == second
    assert first.count("start") >= 2


def test_every_fsync_of_the_product_is_accounted_for() -> None:
    found = set(sites("edged", "trainer"))
    new = found - NOTICED.keys() - NOT_SIMULATED.keys()
    assert not new, "which scenario notices when it is left out? add it to tests/support/sim/noticed.py"
    assert found == NOTICED.keys() | NOT_SIMULATED.keys(), (
        "these are gone: take them out of tests/support/sim/noticed.py"
    )
    assert not NOTICED.keys() & NOT_SIMULATED.keys()


@pytest.fixture(scope="session")
def said_without(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """site -> what a run without that fsync says, several at a time."""

    def run(site: str) -> str:
        scenario, seeds = NOTICED[site]
        return start(scenario, f"0:{seeds}", "--without", site).communicate()[0]

    asked: list[Any] = [item for item in request.session.items if "said_without" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield {site: pool.submit(run, site) for site in (item.callspec.params["site"] for item in asked)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("site", NOTICED)
def test_without_any_one_fsync_something_is_lost(site: str, said_without: dict[str, Future[str]]) -> None:
    said = said_without[site].result()
    assert "FAILED seed" in said, f"nothing noticed that {site} was left out: {said}"
