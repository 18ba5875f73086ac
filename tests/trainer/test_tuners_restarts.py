"""Processes of a training that their launcher starts again by itself: they find each other, and continue."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_tuners_processes import DATA, LAUNCH, ROOT, base, environment, furthest, launched, tuned, work
from torch import distributed

from trainer.tuners.joining import meet

__all__ = ["base"]
pytestmark = pytest.mark.usefixtures("one_thread")
WAIT = timedelta(seconds=20)


def met(store: Any, size: int, start: str) -> list[str]:
    """What each of `size` processes of a start has heard."""
    heard = [""] * size

    def process(rank: int) -> None:
        heard[rank] = meet(store, rank, size, f"{start}-{rank}", WAIT)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in reversed(range(size))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    return heard


def test_each_start_has_a_word_of_its_own_whatever_an_earlier_one_left_in_the_store() -> None:
    store = distributed.HashStore()
    for start in ("one", "two", "three"):
        assert met(store, 3, start) == [f"{start}-0"] * 3


def test_a_start_that_was_killed_while_it_met_does_not_mislead_the_next() -> None:
    store = distributed.HashStore()
    store.set("asked/1", "killed-1")  # it had asked, and then ended
    store.set("told/killed-1", "killed-0")
    assert met(store, 2, "next") == ["next-0", "next-0"]


def test_a_process_that_never_comes_is_named() -> None:
    with pytest.raises(distributed.DistStoreError, match=r"\[1, 2\] did not join within 0 s"):
        meet(distributed.HashStore(), 0, 3, "mine", timedelta(seconds=0.2))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_launcher_with_restarts_continues_after_a_kill_and_ends_with_the_same_adapter(
    base: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"epochs": 8, "checkpoint_steps": 2, "held_out": DATA["dpo"][:4], "patience": 8}
    job = work(base, tmp_path / "out", "dpo", **settings)
    launcher = subprocess.Popen(
        [*LAUNCH, "--max_restarts", "2", "-m", "trainer.tuners.run", str(job)],
        env=environment() | {"TRAINER_COLLECTIVE_S_MAX": "120"}, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stderr is not None and launcher.stdout is not None
    said, killed = [], False
    for line in launcher.stderr:
        said.append(line)
        if not killed and line.startswith('{"epoch"') and json.loads(line)["step"] >= 7:
            (second,) = [each for each in psutil.Process(launcher.pid).children() if each.environ()["RANK"] == "1"]
            second.send_signal(signal.SIGKILL)
            killed = True
    out = launcher.stdout.read()
    assert launcher.wait(60) == 0, "".join(said)[-3000:]
    assert killed and any("continuing at step" in line for line in said)
    continued = json.loads(out.splitlines()[-1])
    assert 6 <= continued["facts"]["continued_at_step"] < 24 == continued["facts"]["steps"]
    whole = tuned(launched("-m", "trainer.tuners.run", str(work(base, tmp_path / "whole", "dpo", **settings))))
    assert furthest(tmp_path / "out", tmp_path / "whole") == 0.0
    assert continued["history"] == whole["history"]
    assert not (tmp_path / "out-scratch").exists()
