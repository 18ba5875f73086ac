"""Pairs of answers, the better and the worse one, from `dataset.jsonl`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from trainer.tuners.lora.data import Bad, Line, Turn, read_lines, unfit

PAIRS_PER_GOAL_MAX = 16  # a question that was asked all day must not drown the others


class Pair(TypedDict):
    """What was asked (`lora.data.Example`), the answer to prefer and the one to avoid."""

    prompt: str
    chosen: str
    rejected: str
    messages: NotRequired[list[Turn]]


def read_pairs(path: Path, *, confidence_min: float = 0.0, own_answers: bool = False) -> tuple[list[Pair], Bad]:
    """The pairs of a `dataset.jsonl`, and the numbers of the lines that could not be used, each with the reason.

    A pair is an escalation (chosen: what a larger model or a person said; rejected: the local answer), or a success and a
    failure of the same goal in the same context. What is chosen must be fit to learn (`lora.data.read_examples`). A line
    that finds no other to be paired with is left out: `read_labelled` counts them. Raises OSError.
    """
    labelled, bad, _ = read_labelled(path, confidence_min=confidence_min, own_answers=own_answers)
    return [pair for pair, _ in labelled], bad


def read_labelled(
    path: Path, *, confidence_min: float = 0.0, own_answers: bool = False
) -> tuple[list[tuple[Pair, Mapping[str, Any]]], Bad, dict[str, int]]:
    """`read_pairs`, each with the provenance of what is chosen, and how much was left out, by reason: lines with
    `no_partner`, pairs `over_limit` of their goal."""
    bad: Bad = []
    pairs: list[tuple[Pair, Mapping[str, Any]]] = []
    good: dict[tuple[str, str], list[Line]] = defaultdict(list)
    failed: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in read_lines(path, bad):
        if line.failed:
            failed[line.goal, line.context].append(line)
        elif reason := unfit(line, confidence_min, own_answers):
            bad.append((line.number, reason))
        else:
            good[line.goal, line.context].append(line)
            if line.replaced is not None:
                pairs += _pair(line, line.replaced)
    left_out: Counter[str] = Counter()
    for key in [*failed, *(key for key in good if key not in failed)]:
        better, worse = good.get(key, []), failed.get(key, [])
        made = [pair for each in better for other in worse for pair in _pair(each, other.answer)]
        pairs += made[:PAIRS_PER_GOAL_MAX]
        left_out["over_limit"] += len(made[PAIRS_PER_GOAL_MAX:])
        alone = [each for each in better if each.replaced is None or not _pair(each, each.replaced)]
        left_out["no_partner"] += 0 if made else len(alone) + len(worse)
    unique = {(pair["prompt"], pair["chosen"], pair["rejected"]): (pair, who) for pair, who in pairs}
    return list(unique.values()), sorted(bad), {reason: count for reason, count in left_out.items() if count}


def _pair(better: Line, worse: str) -> list[tuple[Pair, Mapping[str, Any]]]:
    if better.answer.strip() == worse.strip():
        return []
    asked = better.example(better.answer)
    pair = Pair(prompt=asked["prompt"], chosen=asked["answer"], rejected=worse)
    if "messages" in asked:
        pair["messages"] = asked["messages"]
    return [(pair, better.provenance)]
