"""How many answers of the canaries are to be checked in a watch, so that a loss that matters is seen. Pure.

The power of the test at the first planned look (Cohen, "Statistical Power Analysis", 1988), with the device as the unit: the
canaries' mean has the variance (left + p (1 - p) / audits) / devices, where `left` is what a baseline leaves unknown of how
devices differ by nature. More audits make the second part small and never the first: with few canaries and no baseline no
sample is large enough, and the watch plans the most that it may.
"""

from __future__ import annotations

from statistics import NormalDist

from trainer.core.canary import CanaryRules, look_levels, measures

POWER = 0.97  # that is planned for: 0.95, and what the spread of a few devices is estimated wrongly
TIMES_MAX = 4  # of `audits_planned`, which are planned at most
ACCURACY = 0.9  # that is reckoned with, and a loss of `accuracy_loss_max` from there
_NORMAL = NormalDist()


def audits_needed(
    rules: CanaryRules, canaries: int, others: int, before: float, *, watches: int = 1, extensions: int = 0
) -> int:
    """Audited answers of all canaries together in a watch: `audits_planned`, or more when they would not be enough.

    `others`: devices that they are compared with, which check as many together. `before`: audited answers of each device in
    its baseline. 0 when agreement is not judged.
    """
    if rules.audits_planned <= 0 or canaries <= 0:
        return max(0, rules.audits_planned)
    most = TIMES_MAX * rules.audits_planned
    audits = rules.audits_planned
    while audits < most and power(rules, canaries, others, before, audits, watches, extensions) < POWER:
        audits = min(most, audits + max(1, rules.audits_planned // 4))
    return audits


def power(
    rules: CanaryRules, canaries: int, others: int, before: float, audits: float, watches: int = 1, extensions: int = 0
) -> float:
    """The chance that a loss of `accuracy_loss_max` is called worse at the first planned look. Without others the time
    before is compared with, and needs a baseline."""
    agreement = measures(rules)[0]
    level = look_levels(agreement, rules, watches, extensions)[1]
    worse = max(0.0, ACCURACY - rules.accuracy_loss_max)
    noise = ACCURACY * (1 - ACCURACY) / before if before > 0 else float("inf")
    left = agreement.spread**2 * noise / (agreement.spread**2 + noise) if before > 0 else agreement.spread**2
    left += agreement.drift**2 if before > 0 else 0.0
    variance = left / canaries + worse * (1 - worse) / audits
    if others > 0:
        variance += left / others + ACCURACY * (1 - ACCURACY) / audits
    error = variance**0.5
    return _NORMAL.cdf(rules.accuracy_loss_max / error - _NORMAL.inv_cdf(1 - level))
