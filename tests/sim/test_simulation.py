"""The device and the trainer in a simulated world, seed by seed (docs/development.md, "Simulation").

SIM_SEEDS=10 runs ten times as many seeds. A failure prints its seed, and the command that runs just it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sim.mutants import sites

ROOT = Path(__file__).parents[2]
PROCESSES = 2
SEEDS = {"updates": 500, "samples": 500, "rollouts": 60, "repairs": 1000}
TIMES = int(os.environ.get("SIM_SEEDS", "1"))
WITHOUT_SEEDS = 1500  # at most, until a missing fsync must have been noticed
# Which scenarios notice a missing fsync: the first that fits the start of its file's name.
NOTICED_BY = (
    ("edged/store/", ("repairs", "samples")),
    ("edged/dataset.py", ("repairs",)),
    ("edged/releases.py", ("repairs", "updates")),
    ("edged/", ("updates",)),
    ("trainer/files.py", ("repairs",)),
    ("trainer/", ("rollouts",)),
)
NOT_SIMULATED = {
    "edged/check_machine.py": "tries whether the disk can do it; nothing is kept",
    "trainer/ca.py": "a person's command, repeated by hand",
    "trainer/export/gguf.py": "a step of a training, which begins anew after a power cut",
    "trainer/server.py": "uploads; a device hands the pixels over again until its claim is confirmed",
}


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
    first, second = (start(scenario, "7:9", "--trace").communicate()[0] for _ in range(2))
    assert first == second
    assert first.count("start") >= 2


def fsyncs() -> list[str]:
    return [site for site in sites("edged", "trainer") if site.partition(":")[0] not in NOT_SIMULATED]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("site", fsyncs())
def test_without_any_one_fsync_something_is_lost(site: str) -> None:
    scenarios = next(names for start_of, names in NOTICED_BY if site.startswith(start_of))
    said = []
    for scenario in scenarios:
        process = start(scenario, f"0:{WITHOUT_SEEDS}", "--without", site)
        said.append(process.communicate()[0])
        if "FAILED seed" in said[-1]:
            return
    pytest.fail(f"nothing noticed that {site} was left out: {said}")


def test_what_is_not_simulated_is_there() -> None:
    files = {site.partition(":")[0] for site in sites("edged", "trainer")}
    assert files >= NOT_SIMULATED.keys()
