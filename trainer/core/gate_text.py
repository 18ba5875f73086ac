"""The gate for adapters of language models. Pure, and it fails closed: what was not measured did not pass.

What counts is the loss, in nats a token, of answers that were held out: how improbable the model that ships finds what it
should say. exp(loss) is the perplexity. For pairs (DPO) it is how much likelier the wanted answer is than the other one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core.checks import Check, Parity, Verdict, maximum, minimum, parity_checks
from trainer.core.crossed import Crossed
from trainer.core.targets import Footprint, Target, target_checks


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds; losses and margins in nats."""

    examples_min: int = 10
    gain_confidence: float = 0.95  # of the one-sided bootstrap interval of the gain
    bootstrap_draws: int = 2000
    parity_max: float = 0.05  # a token: the shipped adapter may be so much worse than the trained one on the checkpoint
    base_parity_max: float = (
        0.25  # a token: between the base that devices run, which may be quantised, and the checkpoint
    )
    matching_pairs_min: int = (
        5  # of examples with different answers, by which it shows that they follow from the questions
    )
    matching_kept_min: float = 0.9  # share of the base's lead that an adapter must surely not have fallen below
    preferred_min: float = 0.5  # share of pairs of which the wanted answer is the likelier one, whatever it was before
    wanted_drop_max: float = 0.2  # a token: pairs may make the wanted answer itself so much less likely
    kept_examples_min: int = 10  # of what must not be forgotten; 0: nobody has to look, what is there is looked at
    forget_max: float = 0.05  # a token: so much worse may the answers become that must not be forgotten
    near_duplicates_max: int = 0
    calibration_items_min: int = 0  # 0: an adapter may go out uncalibrated; devices then trust none of its answers
    ece_max: float = 0.1
    latency_ratio_max: float = 2.0
    latency_slack_ms: float = 50.0  # of an answer: so much longer than before is never too slow

    def __post_init__(self) -> None:
        for name, (low, high) in _ALLOWED.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} = {getattr(self, name)}: use a number from {low:g} to {high:g}")


# Key of Rules -> its smallest and largest value: a bound that would bound nothing is none.
_ALLOWED: Mapping[str, tuple[float, float]] = {
    "examples_min": (1, 1_000_000),
    "gain_confidence": (0.5, 0.9999),
    "bootstrap_draws": (100, 1_000_000),
    "parity_max": (0, 1),
    "base_parity_max": (0, 2),
    "matching_pairs_min": (5, 1_000_000),
    "matching_kept_min": (0, 1),
    "preferred_min": (0, 1),
    "wanted_drop_max": (0, 2),
    "kept_examples_min": (0, 1_000_000),
    "forget_max": (0, 2),
    "near_duplicates_max": (0, 1_000_000),
    "calibration_items_min": (0, 1_000_000),
    "ece_max": (0, 1),
    "latency_ratio_max": (0, 1000),
    "latency_slack_ms": (0, 3_600_000),
}


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model makes of the examples of a set, in order. `losses` are the nats of each whole wanted answer and
    `tokens` its length, the end of text included; `margins`: log p(wanted) - log p(unwanted), of pairs only."""

    release: str
    examples: tuple[str, ...]  # identities
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    margins: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Nats a token over the set; NaN without a token."""
        return sum(self.losses) / sum(self.tokens) if sum(self.tokens) else math.nan

    def summary(self) -> dict[str, Any]:
        """The figures without the lists, JSON-able (what is no number becomes None)."""
        loss = self.loss
        values = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,  # beyond it the double overflows
            "margin": float(np.mean(self.margins)) if self.margins else math.nan,
            "preferred": float(np.mean(np.asarray(self.margins) > 0)) if self.margins else math.nan,
        }
        return {
            "release": self.release,
            "examples": len(self.examples),
            "tokens": sum(self.tokens),
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was measured. `base` is the whole model without adapter, `current` the adapter that was released last, if
    any. `kept_out` are the examples of what must not be forgotten (the base set), `kept*` the scores on it. None means: not
    measured. Hashes are of the adapters' files; `checkpoint_*` are losses a token of the checkpoint on some examples, and
    `shipped_*` those of the shipped files on the same. `parity`: the logits of the adapter that ships beside those of the
    trained one, on a base that nothing rounds; none: nobody compared, which is refused. `near_duplicates`: held-out examples
    that ask nearly what one that trained or calibrated asks. `matching`, `base_matching`: the leads of answers to their own
    questions over exchanged ones. `latency_ms`: of an answer of a fixed length; `before_*` is the
    current adapter's, the bare base's where there is none. `model_bytes`: of base and adapter together."""

    held_out: frozenset[str]
    trained: frozenset[str]
    candidate: Scores | None
    base: Scores | None
    current: Scores | None = None
    pairs: bool = False
    has_current: bool = False
    adapter_sha256: str = ""
    current_sha256: str = ""
    checkpoint_base: float | None = None
    checkpoint_adapter: float | None = None
    shipped_base: float | None = None
    shipped_adapter: float | None = None
    parity: Sequence[Parity] = ()
    matching: Crossed | None = None
    base_matching: Crossed | None = None
    kept_out: frozenset[str] = frozenset()
    kept: Scores | None = None
    kept_base: Scores | None = None
    near_duplicates: frozenset[str] | None = None
    calibration_method: str = ""
    calibration_items: int = 0
    calibration_ece: float | None = None
    latency_ms: float | None = None
    before_latency_ms: float | None = None
    model_bytes: int | None = None
    footprints: tuple[Footprint, ...] = ()
    before_footprints: tuple[Footprint, ...] = ()


def judge(found: Evidence, rules: Rules, rng: np.random.Generator, targets: Sequence[Target] = ()) -> Verdict:
    """Judge the adapter that would ship against the bare base and, where there is one, the adapter before it.

    `rng` drives the paired bootstrap over examples (Efron & Tibshirani 1993, chapter 13); `targets` are the profiles of
    the devices that it is for.
    """
    apart = found.held_out | found.kept_out
    checks = [
        minimum("holdout_examples", len(found.held_out), rules.examples_min, "held-out examples"),
        minimum("base_examples", len(found.kept_out), rules.kept_examples_min,
                "examples of what must not be forgotten (`trainer holdout freeze MODEL --set base --from FILE`)"),
        minimum("training_known", len(found.trained), 1, "examples known to have been trained on"),
        maximum("disjoint", len(apart & found.trained), 0, "held-out examples that were trained on"),
        _near_check(found, rules),
        _measured("candidate", found.candidate, found.held_out),
        _measured("base", found.base, found.held_out),
        _gain("gain", "the bare base", found.candidate, found.base, found.pairs, rules, rng),
        maximum("base_parity", _distance(found.shipped_base, found.checkpoint_base), rules.base_parity_max,
                 "nats a token between the base release and the checkpoint that the adapter was trained on"),
        maximum("export", _less(found.shipped_adapter, _moved(found)), rules.parity_max,
                 "nats a token lost between the trained adapter and the one that ships"),
        *parity_checks(found.parity),
    ]  # fmt: skip
    if not found.pairs:  # whose two answers are to the same question
        checks += _matching_checks(found, rules, rng)
    if found.pairs:
        drop = _less(_loss(found.candidate), _loss(found.base))
        checks += [
            _preferred(found.candidate, rules),
            maximum("wanted", drop, rules.wanted_drop_max, "nats a token lost on the wanted answers themselves"),
        ]
    if found.has_current:
        known = bool(found.adapter_sha256) and bool(found.current_sha256)
        text = f"adapter {found.adapter_sha256[:12]!r} against the current {found.current_sha256[:12]!r}"
        checks += [
            Check("new_bytes", known and found.adapter_sha256 != found.current_sha256, found.adapter_sha256 or None,
                  found.current_sha256 or None, f"{text}: must be known and differ"),
            _measured("current adapter", found.current, found.held_out),
            _gain("gain (current)", "the current adapter", found.candidate, found.current, found.pairs, rules, rng),
        ]  # fmt: skip
    checks += _calibration_checks(found, rules)
    checks.append(_latency_check(found, rules))
    checks += target_checks(
        targets, found.model_bytes, found.footprints, found.before_footprints, rules.latency_ratio_max
    )
    checks += _forgetting_checks(found, rules)
    return Verdict(tuple(checks))


def _matching_checks(found: Evidence, rules: Rules, rng: np.random.Generator) -> list[Check]:
    """A gain may be nothing but the look of the answers: one that was trained on shuffled ones has it too."""
    new, old = found.matching, found.base_matching
    text = "nats that held-out answers lead by when asked their own questions and not each other's"
    count = 0 if new is None else len(new.leads)
    checks = [
        minimum("matching_pairs", count, rules.matching_pairs_min, "pairs of held-out examples with different answers")
    ]
    if new is None or old is None or not count or new.pairs != old.pairs or len(old.leads) != count:
        return [*checks, Check("matching", False, None, 0.0, f"{text}: not measured, or not on the same pairs")]
    kept = [a - rules.matching_kept_min * b for a, b in zip(new.leads, old.leads, strict=True)]
    if not all(math.isfinite(each) for each in (*new.leads, *kept)):
        return [*checks, Check("matching", False, None, 0.0, f"{text}: a score is no number")]
    each = [1.0] * count
    lead, low = gain_interval(new.leads, each, rules, rng)
    before = sum(old.leads) / count
    # Turned round: the upper end of the interval of what is left above the bound.
    high = -gain_interval([-value for value in kept], each, rules, rng)[1]
    sure = f"{rules.gain_confidence:.0%} sure of"
    return [
        *checks,
        Check("matching", low > 0, low, 0.0, f"{text} {lead:.3f}, {sure} more than {low:.3f}, must be above 0"),
        Check("matching (base)", high >= 0, lead, rules.matching_kept_min * before,
              f"{text} {lead:.3f}, the bare base's {before:.3f}; must not surely be below {rules.matching_kept_min:.0%} "
              f"of that, {sure} no more than {high:+.3f} above it"),
    ]  # fmt: skip


def _forgetting_checks(found: Evidence, rules: Rules) -> list[Check]:
    """Against the bare base, not the adapter before: what each one loses a little of would be gone after many."""
    if not found.kept_out and not rules.kept_examples_min:
        return []
    new, old = found.kept, found.kept_base
    same = new is not None and old is not None and (new.examples, new.tokens) == (old.examples, old.tokens)
    drop = _less(_loss(new), _loss(old)) if same else None
    return [
        _measured("candidate, base set", new, found.kept_out),
        _measured("base, base set", old, found.kept_out),
        maximum("forgetting", drop, rules.forget_max, "nats a token lost on what must not be forgotten"),
    ]


def gain_interval(gains: Sequence[float], weights: Sequence[float], rules: Rules, rng: np.random.Generator) -> Any:
    """(gain, lower end of its one-sided interval) of sum(gains) / sum(weights), both over the same examples."""
    above, below = np.asarray(gains, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    count = len(above)
    drawn: NDArray[np.int64] = rng.multinomial(count, np.full(count, 1 / count), size=rules.bootstrap_draws)
    low = np.quantile((drawn @ above) / (drawn @ below), 1 - rules.gain_confidence)
    return float(above.sum() / below.sum()), float(low)


def _gain(
    name: str, other: str, new: Scores | None, old: Scores | None, pairs: bool, rules: Rules, rng: np.random.Generator
) -> Check:
    what = "margin of the wanted answer over the other" if pairs else "nats a token on held-out answers"
    text = f"no better than {other}: gain in {what}"
    if new is None or old is None or not new.examples:
        return Check(name, False, None, 0.0, f"{text}: not measured")
    if (new.examples, new.tokens) != (old.examples, old.tokens):
        return Check(name, False, None, 0.0, f"{text}: the two were not scored on the same answers")
    if pairs:
        if not len(new.margins) == len(old.margins) == len(new.examples):
            return Check(name, False, None, 0.0, f"{text}: not measured")
        gains, weights = [a - b for a, b in zip(new.margins, old.margins, strict=True)], [1.0] * len(new.margins)
    else:
        gains = [b - a for a, b in zip(new.losses, old.losses, strict=True)]
        weights = [float(count) for count in new.tokens]
    if not all(math.isfinite(each) for each in gains) or not all(each > 0 for each in weights):
        return Check(name, False, None, 0.0, f"{text}: a score is no number")
    gain, low = gain_interval(gains, weights, rules, rng)
    said = text if low <= 0 else f"gain over {other} in {what}"
    sure = f"{rules.gain_confidence:.0%} sure of more than {low:+.4f}, must be above 0"
    return Check(name, low > 0, low, 0.0, f"{said} {gain:+.4f}, {sure}")


def _preferred(candidate: Scores | None, rules: Rules) -> Check:
    margins = candidate.margins if candidate is not None else ()
    share = sum(each > 0 for each in margins) / len(margins) if margins else None
    text = f"share of pairs whose wanted answer is the likelier one (at least): {share}, bound {rules.preferred_min:g}"
    return Check("preferred", share is not None and share >= rules.preferred_min, share, rules.preferred_min, text)


def _measured(what: str, scores: Scores | None, held_out: frozenset[str]) -> Check:
    """Every held-out example was scored, once, and nothing else."""
    name = f"measured ({what})"
    if scores is None or not held_out:
        return Check(name, False, None, len(held_out), f"{what}: not scored, or nothing is held out")
    odd = len(set(scores.examples) ^ held_out)
    whole = len(scores.examples) == len(scores.losses) == len(scores.tokens) == len(held_out)
    finite = math.isfinite(scores.loss)
    text = f"{what}: {odd} examples differ between what is held out and what was scored; loss {scores.loss:.4g}"
    return Check(name, odd == 0 and whole and finite, odd, 0, text)


def _moved(found: Evidence) -> float | None:
    """What the trained adapter's loss would be on the base that devices run: its gain on the checkpoint, there."""
    values = found.checkpoint_adapter, found.checkpoint_base, found.shipped_base
    if any(value is None for value in values):
        return None
    adapter, base, shipped = (float(value) for value in values if value is not None)
    return adapter - base + shipped


def _loss(scores: Scores | None) -> float | None:
    return None if scores is None else scores.loss


def _less(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _distance(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else abs(first - second)


def _near_check(found: Evidence, rules: Rules) -> Check:
    apart = found.held_out | found.kept_out
    near = None if found.near_duplicates is None else len(apart & found.near_duplicates)
    text = "held-out examples that ask nearly what one that trained or calibrated asks"
    return maximum("near_duplicates", near, rules.near_duplicates_max, text)


def _calibration_checks(found: Evidence, rules: Rules) -> list[Check]:
    method, items = found.calibration_method, found.calibration_items
    fitted = bool(method) and method != "uncalibrated"
    if fitted:
        text = f"confidence was fitted on {items} answers"
    else:
        text = f"uncalibrated: {items} answers are too few to fit confidence on, so devices trust none of its answers"
    text = f"{text} (at least): {items}, bound {rules.calibration_items_min}"
    # Too few examples are no fault of the adapter's, and a device that knows so asks; that nobody looked is one.
    good = bool(method) and items >= rules.calibration_items_min and (fitted or rules.calibration_items_min == 0)
    checks = [Check("calibrated", good, method or None, "fitted" if rules.calibration_items_min else None, text)]
    if fitted:
        checks.append(maximum("calibration", found.calibration_ece, rules.ece_max, "expected calibration error"))
    return checks


def _latency_check(found: Evidence, rules: Rules) -> Check:
    new, old = found.latency_ms, found.before_latency_ms
    text = f"milliseconds of an answer, {'the current adapter' if found.has_current else 'the bare base'} takes {old}"
    if old is None or not 0 < old < math.inf:
        return Check("latency", False, None, None, f"{text}: not measured")
    # Of an answer of a few milliseconds the ratio is mostly the noise of the machine.
    return maximum("latency", new, max(old * rules.latency_ratio_max, old + rules.latency_slack_ms), text)
