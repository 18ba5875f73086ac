"""docs/gate.md says what the gate does: every rule with its default, every check."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from tests.unit.test_gate import CANDIDATE, CURRENT, FAILURES, HOLDOUT, LABELS, RULES
from tests.unit.test_gate_targets import FAST, NO_CLAIM, PI
from trainer.core.gate import Rules, judge

TEXT = (Path(__file__).parents[2] / "docs" / "gate.md").read_text()


def table(heading: str) -> list[list[str]]:
    rows = []
    for line in TEXT[TEXT.index(f"## {heading}") :].splitlines()[1:]:
        if line.startswith("## "):
            break
        if line.startswith("| `"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_rule_is_documented_with_its_default_and_why() -> None:
    shown = [(row[0].strip("`"), row[1]) for row in table("Rules")]
    assert shown == [(rule.name, f"{getattr(Rules(), rule.name)}") for rule in fields(Rules)]
    assert all(row[2] for row in table("Rules"))


def test_every_rule_belongs_to_a_check() -> None:
    named = {name for row in table("Checks") for name in re.findall(r"`(\w+)`", row[2])}
    assert named == {rule.name for rule in fields(Rules)}


def general(name: str) -> str:
    """The name of a check as the table writes it."""
    what, found, _ = name.partition(" (")
    if not found:
        return name
    inside = {"measured": "WHAT", "parity": "WHAT", "size": "PROFILE", "memory": "PROFILE", "latency": "PROFILE"}
    label = what in [f"class {label}" for label in LABELS]
    return f"{'class LABEL' if label else what} ({inside.get(what, 'HOLDOUT')})"


def test_every_check_is_documented_and_no_other() -> None:
    documented = {row[0].strip("`") for row in table("Checks")}
    assert all(row[1] for row in table("Checks"))
    seen = set()
    rows = [(CANDIDATE, CURRENT, HOLDOUT), *((row[0], row[1], row[2]) for row in FAILURES.values())]
    for candidate, current, holdout in rows:
        measured = replace(candidate, model_bytes=1)
        verdict = judge(measured, current, holdout, RULES, np.random.default_rng(0), [PI, FAST, NO_CLAIM])
        seen |= {general(check.name) for check in verdict.checks}
    assert seen == documented
