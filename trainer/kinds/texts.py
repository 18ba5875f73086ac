"""The examples of a language job: read, told apart, and kept on their side for ever."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from trainer.datasets import DatasetError
from trainer.files import write_json
from trainer.likelihood import Said

BAD_SHOWN_MAX = 20


@dataclass(frozen=True, slots=True)
class Text:
    """One example: `given` is what the tuner takes, `wanted` the answer that it should give; `other` the one of a pair
    that it should not."""

    given: Any
    prompt: str
    wanted: str
    other: str | None
    messages: tuple[tuple[str, str], ...] = ()
    provenance: str = "unknown"

    @property
    def identity(self) -> str:
        """SHA-256 of what is said, whoever said it and wherever it was written."""
        return sha256(json.dumps([self.prompt, self.wanted, self.other]).encode()).hexdigest()

    @property
    def said(self) -> Said:
        """What was asked with the wanted answer."""
        return Said(self.prompt, self.wanted, self.messages)

    @property
    def avoided(self) -> Said:
        """What was asked with the other answer of a pair."""
        return Said(self.prompt, self.other or "", self.messages)


@dataclass(frozen=True, slots=True)
class Texts:
    """What a data set gave, apart from each other, and what was left out of it by reason."""

    training: list[Text]
    validation: list[Text]
    holdout: list[Text]
    left_out: dict[str, int]
    bad: list[str]  # the first lines that are none, with their numbers

    @property
    def usable(self) -> int:
        """How many examples may train or judge."""
        return len(self.training) + len(self.validation) + len(self.holdout)


def read(path: Path, strategy: str) -> tuple[list[Text], list[str]]:
    """The examples of a dataset.jsonl for `strategy`, and what is wrong with its other lines; raises DatasetError."""
    from trainer.kinds.tuning import reader

    try:
        given, bad = reader(strategy)(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {error}; --dataset names a dataset.jsonl") from None
    return [_text(each) for each in given], [f"line {number}: {reason}" for number, reason in bad]


def split(
    texts: Sequence[Text], bad: Sequence[str], *, held_out: Sequence[Text] | None, holdout_share: float,
    validation_share: float,
) -> Texts:  # fmt: skip
    """Keep apart what trains, what ends a training early and what judges. `held_out`: a set of its own that judges.

    By hash of the prompt, spaces and case aside: the same question falls on the same side in every job, so that what once
    judged never trains.
    """
    left_out: dict[str, int] = {"bad_line": len(bad)} if bad else {}
    judging = {_side(each.prompt): each for each in held_out or ()}
    parts: dict[str, list[Text]] = {"training": [], "validation": [], "holdout": []}
    seen: set[str] = set()
    for each in texts:
        side = _side(each.prompt)
        if each.identity in seen:
            left_out["duplicate"] = left_out.get("duplicate", 0) + 1
        elif held_out is not None and side in judging:
            left_out["in_holdout"] = left_out.get("in_holdout", 0) + 1
        elif held_out is None and _place(side, "holdout") < holdout_share:
            parts["holdout"].append(each)
        else:
            parts["validation" if _place(side, "validation") < validation_share else "training"].append(each)
        seen.add(each.identity)
    if held_out is not None:
        parts["holdout"] = list({each.identity: each for each in held_out}.values())
    return Texts(**parts, left_out=left_out, bad=list(bad[:BAD_SHOWN_MAX]))


def check_frozen(record: Path, name: str, texts: Sequence[Text]) -> str:
    """The hash of a configured holdout, remembered in the file `record` at its first use; raises DatasetError when it
    changed."""
    found = sha256("\n".join(sorted(each.identity for each in texts)).encode()).hexdigest()
    known: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    if known.get(name, found) != found:
        raise DatasetError(
            f"holdout {name} has changed since it was first used ({known[name][:12]} -> {found[:12]}): a gate that moves "
            f"judges nothing; restore its file, or remove {name!r} from {record} to begin a new series of comparisons"
        )
    if name not in known:
        write_json(record, {**known, name: found})
    return found


def provenance(texts: Sequence[Text]) -> dict[str, int]:
    """How many examples came from whom."""
    counts: dict[str, int] = {}
    for each in texts:
        counts[each.provenance] = counts.get(each.provenance, 0) + 1
    return dict(sorted(counts.items()))


def _side(prompt: str) -> str:
    return " ".join(prompt.lower().split())


def _place(side: str, what: str) -> float:
    """A number in 0..1 that follows from the prompt alone, another one for each question asked of it."""
    return int(sha256(f"{what} {side}".encode()).hexdigest()[:8], 16) / 2**32


def _text(given: Any) -> Text:
    def get(name: str) -> Any:
        return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)

    wanted = get("answer") if get("chosen") is None else get("chosen")
    who = get("provenance")
    turns = tuple((turn["role"], turn["content"]) for turn in get("messages") or ())
    return Text(given, str(get("prompt")), str(wanted), get("rejected"), turns, str(who) if who else "unknown")
