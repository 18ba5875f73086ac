"""Which profile a machine gets, and why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edged import profile_facts, profiles
from edged.cli import app
from edged.core.detect import WEIGHTS, Facts, Rule, choose, conditions
from tests.support.boards import BOARDS, Board

SHIPPED = Path(__file__).parents[2] / "firmware_profiles"
NAMES = {path.stem for path in SHIPPED.iterdir()}
PI = Facts("arm64", 4, 8062, "Raspberry Pi 5 Model B Rev 1.0")


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiles of this checkout, whatever is installed on the machine."""
    monkeypatch.setattr(profiles, "folders", lambda: (SHIPPED,))


@pytest.mark.parametrize(("board", "expected"), [row[1:] for row in BOARDS], ids=[row[0] for row in BOARDS])
def test_a_machine_gets_its_profile(tmp_path: Path, board: Board, expected: str | None) -> None:
    facts = profile_facts.facts(board.write(tmp_path))
    choice = profiles.detect(facts)
    assert choice.name == expected
    assert {other.name for other in choice.others} | ({expected} - {None}) == NAMES
    assert all(other.why for other in choice.others)
    best = profiles.find(expected).detect.rule if expected else Rule()
    equal = [o.name for o in choice.others if o.fits and _weight(profiles.find(o.name).detect.rule) >= _weight(best)]
    assert not equal, "two profiles say as much about this machine"


def _weight(rule: Rule) -> int:
    return sum(WEIGHTS[condition.topic] for condition in conditions(rule, Facts("", 0, 0)))


def test_the_reasons_name_what_was_seen_and_what_was_asked_for(tmp_path: Path) -> None:
    choice = profiles.detect(
        profile_facts.facts(Board(model="Raspberry Pi 5 Model B Rev 1.0", memory_mib=2006).write(tmp_path))
    )
    assert choice.reasons == ("architecture 'arm64'",)
    others = {other.name: other for other in choice.others}
    assert others["raspberry-pi-5"].why == ("2006 MiB of memory; it is for at least 3600",)
    assert others["jetson-orin-nano"].why[0] == ("board 'Raspberry Pi 5 Model B Rev 1.0'; it is for 'Orin Nano'")
    assert choice.others[0].name == "raspberry-pi-5", "the nearest comes first"


def test_what_a_container_leaves_is_the_machine(tmp_path: Path) -> None:
    tree = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": f"{512 << 20}\n",
            "sys/fs/cgroup/a/b/memory.max": f"{700 << 20}\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}  # fmt: skip
    facts = profile_facts.facts(Board(memory_mib=8000, files=tree).write(tmp_path))
    assert (facts.memory_mib, facts.cores) == (512, 2)
    assert facts.narrowed == ("its control group allows 512 of 8000 MiB", "its control group allows 2 of 4 cores")


def test_an_empty_tree_is_a_machine_of_which_nothing_is_known(tmp_path: Path) -> None:
    facts = profile_facts.facts(tmp_path, "aarch64")
    assert facts == Facts("arm64", 0, 0)
    assert profiles.detect(facts).name == "generic-arm64"


def test_a_condition_that_is_not_stated_asks_for_nothing() -> None:
    rules = {"any": Rule(), "word": Rule(hints=("acme",)), "board": Rule(model=("Acme 1",))}
    facts = Facts("x86-64", 4, 4000, "ACME 1 rev 2", hints=("Acme Corp",))
    choice = choose(rules, facts)
    assert choice.name == "board"
    assert [(other.name, other.fits) for other in choice.others] == [("word", True), ("any", True)]
    assert choose({}, facts).name is None


def test_the_facts_of_this_machine_are_those_of_the_kernel() -> None:
    facts = profile_facts.facts()
    assert facts.architecture in ("x86-64", "arm64") or facts.architecture == os.uname().machine
    assert 1 <= facts.cores <= len(os.sched_getaffinity(0))
    assert facts.memory_mib > 0


def test_a_profile_that_cannot_be_used_does_not_keep_the_others_from_being_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours.toml").write_text('name = "ours"\n[slot]\nthread = 1')
    monkeypatch.setattr(profiles, "folders", lambda: (tmp_path, SHIPPED))
    choice = profiles.detect(PI)
    assert choice.name == "raspberry-pi-5"
    assert choice.others[-1].name == "ours"
    assert "slot.thread" in choice.others[-1].why[0]
    assert run("list").exit_code == 1


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_detect_prints_the_profile_the_reasons_and_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_facts, "facts", lambda *_: PI)
    done = run("detect")
    assert done.exit_code == 0
    assert done.stdout.startswith("raspberry-pi-5: ")
    assert "  board 'Raspberry Pi 5 Model B Rev 1.0'\n" in done.stdout
    assert "  generic-arm64: fits too, but says less about this machine\n" in done.stdout
    assert 'profile = "raspberry-pi-5"' in done.stdout
    answer = json.loads(run("detect", "--json").stdout)
    assert answer["profile"] == "raspberry-pi-5"
    assert answer["machine"]["cores"] == 4
    assert {"name", "fits", "why"} == answer["others"][0].keys()
    monkeypatch.setattr(profile_facts, "facts", lambda *_: Facts("riscv64", 4, 8000))
    done = run("detect", "--json")
    assert (done.exit_code, json.loads(done.stdout)["profile"]) == (1, None)
    assert "no profile fits this machine" in done.stderr
