"""Whom a dead training is blamed on, row by row."""

from __future__ import annotations

import pytest

from trainer.core.ended import FAULTS, JUDGING, blame


@pytest.mark.parametrize(
    ("stage", "what", "ended", "memory", "said"),
    [
        ("evaluate", "the candidate", "SIGSEGV", False,
         "the candidate killed the process that judged it: SIGSEGV (evaluate: the candidate)"),
        ("calibrate", "", "SIGFPE", False, "the candidate killed the process that judged it: SIGFPE (calibrate)"),
        ("evaluate", "the file before quantisation", "SIGABRT", False, "the candidate killed"),
        ("evaluate", "the trained adapter on the checkpoint", "SIGBUS", False, "the candidate killed"),
        ("evaluate", "the current release", "SIGSEGV", False, "the current release killed the process that judged the"),
        ("evaluate", "the current on 8 held-out examples", "SIGSEGV", False, "the current release killed"),
        ("evaluate", "the base on 8 held-out examples", "SIGSEGV", False, "the base killed the process that judged the"),
        ("export", "", "SIGKILL", True, "SIGKILL, out of memory (export)"),
        ("evaluate", "the candidate", "status 1", False, "judged it: status 1"),  # native code that calls exit()
    ],
)  # fmt: skip
def test_a_death_while_a_candidate_is_judged_refuses_it(
    stage: str, what: str, ended: str, memory: bool, said: str
) -> None:
    found = blame(stage, what, ended, out_of_memory=memory)
    assert found is not None and said in found


@pytest.mark.parametrize("ended", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_kill_from_outside_tells_nothing(ended: str) -> None:
    assert blame("evaluate", "the candidate", ended, out_of_memory=False) is None


@pytest.mark.parametrize("stage", ["", "data", "train"])
@pytest.mark.parametrize("ended", [*FAULTS, "SIGKILL", "status 1"])
def test_before_there_is_a_candidate_none_is_blamed(stage: str, ended: str) -> None:
    assert stage not in JUDGING
    assert blame(stage, "", ended, out_of_memory=True) is None
