"""What tests and benches keep below build/ is made once, whole, whoever else wants it at the same time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kept import kept
from tests.support.device import until
from tests.support.ports import HELD_MAX, free_port

MAKER = """
import sys, time
from pathlib import Path
from bench.kept import kept
folder = Path(sys.argv[1])
def make(beside):
    beside.mkdir()
    (beside / "first").write_text("1")
    (folder / f"began-{sys.argv[2]}").touch()
    while not (folder / "go on").exists():
        time.sleep(0.01)
    (beside / "second").write_text("2")
print(sorted(path.name for path in kept(folder / "made", make).iterdir()))
"""


def maker(folder: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, str(folder), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_one_makes_it_and_the_others_wait_until_it_is_whole(tmp_path: Path) -> None:
    makers = [maker(tmp_path, str(number)) for number in range(3)]
    until("one has begun", lambda: list(tmp_path.glob("began-*")))
    assert not (tmp_path / "made").exists()
    (tmp_path / "go on").touch()
    assert [process.communicate(timeout=60)[0] for process in makers] == ["['first', 'second']\n"] * 3
    assert len(list(tmp_path.glob("began-*"))) == 1


def test_after_a_kill_the_next_one_makes_it_and_clears_up(tmp_path: Path) -> None:
    killed = maker(tmp_path, "killed")
    until("it has begun", lambda: (tmp_path / "began-killed").exists())
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    (tmp_path / "go on").touch()
    assert kept(tmp_path / "made", lambda beside: beside.write_text("whole")).read_text() == "whole"
    assert not list(tmp_path.glob("*.half")) and not list(tmp_path.glob(".*.half"))


def test_what_cannot_be_made_is_not_there(tmp_path: Path) -> None:
    def fails(beside: Path) -> None:
        beside.write_text("half")
        raise ValueError("it does not learn")

    with pytest.raises(ValueError, match="does not learn"):
        kept(tmp_path / "made", fails)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]


def test_two_processes_are_never_given_one_port() -> None:
    given = "from tests.support.ports import free_port\n"
    given += f"print([free_port() for _ in range({HELD_MAX})], flush=True); input()"
    others = [
        subprocess.Popen([sys.executable, "-c", given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         cwd=Path(__file__).parents[2])
        for _ in range(2)
    ]  # fmt: skip
    theirs = []
    for each in others:
        assert each.stdout is not None
        theirs += json.loads(each.stdout.readline())
    ours = [free_port() for _ in range(10)]
    for each in others:
        each.communicate("\n", timeout=60)
    assert len({*theirs, *ours}) == 2 * HELD_MAX + 10
