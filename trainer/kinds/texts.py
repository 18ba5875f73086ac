"""The examples of a language job: read, told apart, and kept on their side for ever."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from trainer.core.near_texts import RESEMBLANCE, Sketch, plain, sketch
from trainer.core.provenance import confidence_of, is_disputed, is_own, refusal, taken_at
from trainer.core.split import SplitRules
from trainer.core.text_split import TRAINING, Asked, Seen, place
from trainer.datasets import DatasetError
from trainer.likelihood import Said

BAD_SHOWN_MAX = 20


@dataclass(frozen=True)
class Text:
    """One example: `given` is what the tuner takes, `wanted` the answer that it should give; `other` the one of a pair
    that it should not. `provenance`: who gave the answer (`trainer.core.provenance`); empty where nobody is named."""

    given: Any
    prompt: str
    wanted: str
    other: str | None
    messages: tuple[tuple[str, str], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """SHA-256 of what is said, whoever said it and wherever it was written."""
        return sha256(json.dumps([self.prompt, self.wanted, self.other]).encode()).hexdigest()

    @property
    def question(self) -> str:
        """What was asked, without the instructions that every conversation of a program begins with."""
        turns = [content for role, content in self.messages if role != "system"]
        return "\n".join(turns) or self.prompt

    @cached_property
    def sketch(self) -> Sketch:
        """The question, ready to be compared with others."""
        return sketch(self.question)

    @property
    def said(self) -> Said:
        """What was asked with the wanted answer."""
        return Said(self.prompt, self.wanted, self.messages)

    @property
    def avoided(self) -> Said:
        """What was asked with the other answer of a pair."""
        return Said(self.prompt, self.other or "", self.messages)

    @property
    def seen(self) -> Seen:
        """The example as the split knows it once it is in a set, or has trained."""
        return Seen(self.sketch, *taken_at(self.provenance), self.identity)


@dataclass(frozen=True, slots=True)
class Texts:
    """What a data set gave, apart from each other, and what was left out of it by reason. `holdout` judges; it and
    `calibration` and `test` hold what was frozen before too, `new` is what this data set adds to each."""

    training: list[Text]
    validation: list[Text]
    holdout: list[Text]
    left_out: dict[str, int]
    bad: list[str]  # the first lines that are none, with their numbers
    calibration: list[Text] = field(default_factory=list)
    test: list[Text] = field(default_factory=list)
    new: Mapping[str, Sequence[Text]] = field(default_factory=dict)
    usable: int = 0  # examples of the data set that train, calibrate or judge


def read(path: Path, strategy: str) -> tuple[list[Text], list[str], dict[str, int]]:
    """The examples of a dataset.jsonl for `strategy`, what is wrong with its other lines, and how much was left out besides,
    by reason (pairs: `no_partner`, `over_limit`); raises DatasetError."""
    from trainer.kinds.tuning import reader

    try:
        given, bad, left_out = reader(strategy)(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {error}; --dataset names a dataset.jsonl") from None
    return [_text(*each) for each in given], [f"line {number}: {reason}" for number, reason in bad], left_out


def arrange(
    texts: Sequence[Text], bad: Sequence[str], *, frozen: Mapping[str, Sequence[Text]], trained: Sequence[Seen],
    rules: SplitRules, names: Sequence[str], confidence_min: float, validation_share: float,
    judge: str = "gate", resemblance: float = RESEMBLANCE,
) -> Texts:  # fmt: skip
    """Keep apart what trains, what ends a training early, what calibrates, what judges, and what nobody looks at.

    `frozen`: the sets as they are, by name; `judge`: the one that judges. `trained`: what trained in earlier jobs. `names`:
    those of the model and its adapters, whose own answers are no labels. `confidence_min`: the floor of a model's label;
    `resemblance`: of near-duplicates.
    """
    left_out: dict[str, int] = {"bad_line": len(bad)} if bad else {}
    known = {name: [each.seen for each in rows] for name, rows in frozen.items()}
    falls = place([_asked(each, names, confidence_min) for each in texts], known, trained, rules, resemblance)
    training: list[Text] = []
    validation: list[Text] = []
    sets = {name: list(rows) for name, rows in frozen.items()}
    new: dict[str, list[Text]] = {}
    usable = 0
    held = {name: {each.identity for each in rows} for name, rows in known.items()}
    for each, where in zip(texts, falls, strict=True):
        if where == TRAINING:
            (validation if _place(each.question, "validation") < validation_share else training).append(each)
        elif where in ("gate", "calibration", "test"):
            if each.identity not in held.get(where, ()):
                sets.setdefault(where, []).append(each)
                new.setdefault(where, []).append(each)
        else:
            reason = "in_holdout" if where in frozen else where
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        usable += 1
    return Texts(
        training, validation, sets.get(judge, []), left_out, list(bad[:BAD_SHOWN_MAX]), sets.get("calibration", []),
        sets.get("test", []), new, usable,
    )  # fmt: skip


def may_not_train(text: Text, names: Sequence[str], confidence_min: float) -> str:
    """Why an answer may be in no set, whatever else is there; "" when it may. One that nobody is named for may: an agent's
    execution."""
    who = text.provenance
    if any(is_own(name, who, str(who.get("device") or "")) for name in names):
        return "own_prediction"
    sure = confidence_of(who)
    if not sure >= confidence_min:
        return "below_label_confidence"
    return "disputed" if is_disputed([{"text": text.wanted}], who, sure, confidence_min) else ""


def may_not_judge(text: Text, names: Sequence[str], confidence_min: float) -> str:
    """Why an answer is not the truth for a gate; "" when it is."""
    reasons = (refusal(name, text.provenance, confidence_min) for name in names)
    return next((reason for reason in reasons if reason), "")


def provenance(texts: Sequence[Text]) -> dict[str, int]:
    """How many examples came from whom: "person ann", "model site-1 (large@1.0)"."""
    counts: dict[str, int] = {}
    for each in texts:
        who = " ".join(filter(None, (str(each.provenance.get(name) or "") for name in ("kind", "who"))))
        release = each.provenance.get("release")
        name = f"{who} ({release})" if release else who or "unknown"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def sureness(texts: Sequence[Text]) -> dict[str, float] | None:
    """How sure the models were that labelled (lowest and mean confidence); None where none did."""
    sure = [confidence_of(each.provenance) for each in texts if each.provenance.get("kind") == "model"]
    return {"lowest": min(sure), "mean": sum(sure) / len(sure)} if sure else None


def _asked(text: Text, names: Sequence[str], confidence_min: float) -> Asked:
    device, captured = taken_at(text.provenance)
    return Asked(
        text.identity, sha256(plain(text.question).encode(errors="surrogatepass")).hexdigest(), text.sketch, device,
        captured, may_not_train(text, names, confidence_min), not may_not_judge(text, names, confidence_min),
    )  # fmt: skip


def _place(question: str, what: str) -> float:
    """A number in 0..1 that follows from the question alone, another one for each thing asked of it."""
    said = f"{what} {plain(question)}"
    return int(sha256(said.encode(errors="surrogatepass")).hexdigest()[:8], 16) / 2**32


def _text(given: Any, who: Mapping[str, Any]) -> Text:
    def get(name: str) -> Any:
        return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)

    wanted = get("answer") if get("chosen") is None else get("chosen")
    turns = tuple((turn["role"], turn["content"]) for turn in get("messages") or ())
    return Text(given, str(get("prompt")), str(wanted), get("rejected"), turns, dict(who))
