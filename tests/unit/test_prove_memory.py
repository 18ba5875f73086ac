"""The proving child: modest, held to the memory that there is, and exact about what it took."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edged.engines.base import EngineOptions
from edged.prove import NICENESS, OOM_SCORE, ProveFailed, ProveShort, _outcome, prove
from tests.support.heavy import make_heavy

MIB = 1 << 20
GOOD = b'{"load_s": 1.0, "golden_s": 1.0, "golden": 2, "memory_bytes": 5, "process_bytes": 6}'


@pytest.mark.parametrize(
    ("status", "stdout", "stderr", "limit", "error", "text"),
    [
        (-signal.SIGKILL, b"", "", MIB, ProveShort, "the kernel ended the proving process: memory ran out"),
        (
            -signal.SIGABRT,
            b"",
            "terminate called: std::bad_alloc",
            MIB,
            ProveShort,
            "within 1 MiB: the proving process",
        ),
        (-signal.SIGABRT, b"", "terminate called: std::bad_alloc", None, ProveFailed, "ended with status -6"),
        (-signal.SIGSEGV, b"", "", MIB, ProveFailed, "ended with status -11: no output"),
        (1, b'{"error": "Failed to allocate memory", "short": true}', "", MIB, ProveShort, "Failed to allocate"),
        (1, b'{"error": "it answers nonsense", "short": false}', "", MIB, ProveFailed, "it answers nonsense"),
    ],
)
def test_what_memory_is_to_blame_for_is_told_apart(
    status: int, stdout: bytes, stderr: str, limit: int | None, error: type[ProveFailed], text: str
) -> None:
    with pytest.raises(ProveFailed, match=text) as caught:
        _outcome(status, stdout, stderr, limit)
    assert type(caught.value) is error


def test_a_good_proof_says_what_it_took() -> None:
    proof = _outcome(0, GOOD, "", None)
    assert (proof.golden, proof.memory_bytes, proof.process_bytes) == (2, 5, 6)


def test_weights_are_measured_and_libraries_are_not(tmp_path: Path, toy: Path) -> None:
    make_heavy(tmp_path / "heavy", "heavy@1.0", weights_mib=64)
    small, heavy = (prove(folder, EngineOptions(), 60.0) for folder in (toy, tmp_path / "heavy"))
    assert small.memory_bytes < 16 * MIB, "ONNX Runtime itself is many times that"
    assert 64 * MIB <= heavy.memory_bytes - small.memory_bytes <= 64 * 3 * MIB
    assert heavy.process_bytes - heavy.memory_bytes > 16 * MIB


def test_a_model_gets_no_more_than_it_may_take(tmp_path: Path) -> None:
    make_heavy(tmp_path / "hungry", "hungry@1.0", computed_mib=300)
    with pytest.raises(ProveShort, match=r"it cannot be loaded and answer within 100 MiB: .*Failed to allocate memory"):
        prove(tmp_path / "hungry", EngineOptions(), 60.0, None, lambda: False, 100 * MIB)
    with pytest.raises(ProveShort, match="it took more than 262 MiB and was stopped"):  # which the system would grant
        prove(tmp_path / "hungry", EngineOptions(), 60.0, None, lambda: False, 262 * MIB)
    for enough in (330, 450, 500, 700):  # whatever the runtime reserves beyond what it takes
        proof = prove(tmp_path / "hungry", EngineOptions(), 60.0, None, lambda: False, enough * MIB)
        assert proof.memory_bytes > 290 * MIB


def test_the_child_goes_last_and_is_the_first_to_be_killed() -> None:
    told = subprocess.run(
        [
            sys.executable, "-c",
            "import os, psutil; from edged.prove import _be_modest; _be_modest(); print(os.nice(0), "
            "os.sched_getscheduler(0) == os.SCHED_BATCH, int(psutil.Process().ionice().ioclass), "
            "open('/proc/self/oom_score_adj').read())",
        ],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert told == [str(min(os.nice(0) + NICENESS, 19)), "True", "3", str(OOM_SCORE)]
