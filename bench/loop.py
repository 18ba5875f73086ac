"""One turn of the whole loop: a stream shifts, devices ask, the trainer learns, the fleet gets the better model.

The demo does it with real parts (`bench.demo`) and scores it by a party that alone holds the truth; here its report is held
against the targets. Escalations count as the policy decides them, before dedupe and budget.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.demo.run import TARGET_RISK
from bench.measure import Benchmark, Result, Say, Target
from bench.vision import ROOT

OUT, CACHE = Path("build/bench-loop"), Path("build/demo-cache")
_FACTS = (
    "shift", "seed", "target_risk", "escalation_rate_before", "escalation_rate_after", "accuracy_before",
    "accuracy_after", "accuracy_teacher", "accepted_before", "accepted_error_before", "accepted_after",
    "accepted_error_after", "frames_in", "frames_lost", "labels_used", "release_after",
)  # fmt: skip


def run(quick: bool, say: Say) -> Result:
    """Run the demo and read its report; raises RuntimeError when it leaves none."""
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    command = [sys.executable, "-m", "bench.demo", "--out", str(OUT), "--cache", str(CACHE)]
    with subprocess.Popen(
        [*command, *(["--reduced"] if quick else [])], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
    try:
        report = json.loads((ROOT / OUT / "report.json").read_text())
    except OSError as error:
        raise RuntimeError(f"the demo ended with {process.returncode} and left no report: {error}") from None
    return Result(keys_of(report), {**facts_of(report), "demo_status": process.returncode})


def keys_of(report: dict[str, Any]) -> dict[str, float]:
    """What the demo's report says, in the terms of the targets; NaN where it cannot say."""

    def figure(name: str) -> float:
        value = report.get(name)
        return math.nan if value is None else float(value)

    rate_before, rate_after = figure("escalation_rate_before"), figure("escalation_rate_after")
    before, after, teacher = figure("accuracy_before"), figure("accuracy_after"), figure("accuracy_teacher")
    errors = [value for when in ("before", "after") if not math.isnan(value := figure(f"accepted_error_{when}"))]
    return {
        "escalations_down": 1 - rate_after / rate_before if rate_before > 0 else math.nan,
        "accuracy_regained": (after - before) / (teacher - before) if teacher > before else math.nan,
        # The worse of before and after; where nothing was accepted nothing accepted was wrong.
        "error_among_accepted": max(errors, default=math.nan),
    }


def facts_of(report: dict[str, Any]) -> dict[str, Any]:
    """What explains the keys, with the demo's own checks that failed."""
    failed = [check["text"] for check in report.get("checks", []) if not check["passed"]]
    return {**{name: report.get(name) for name in _FACTS}, "failed_checks": failed}


BENCHMARK = Benchmark(
    "loop",
    "one turn of the loop on a stream that shifts, before and after, at the same target risk: how far escalations fall, how "
    "much of the teacher's lead in accuracy is regained, and how many accepted answers are wrong (the demo, scored by a "
    "party that alone holds the truth)",
    {
        "escalations_down": Target(">=", 0.8),
        "accuracy_regained": Target(">=", 0.9),
        "error_among_accepted": Target("<=", TARGET_RISK),
    },
    run,
)
