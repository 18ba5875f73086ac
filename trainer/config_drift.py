"""The table [drift]: what counts as a change of the live stream, and how often it is looked for (docs/drift.md)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from trainer.config_parts import Seconds, Section, Share
from trainer.core.selectors import WORD

if TYPE_CHECKING:
    from trainer.core.drift import Rules

WEEK_S = 7 * 86400.0
GROUP_BY_MAX = 8
Label = Annotated[str, Field(pattern=f"^{WORD}$")]


class Drift(Section):
    """`check_s`: between two looks; `window_s`: what is compared with the baseline, each device's first `baseline_s` on a
    release; `cycle_s`: what repeats with this period is no change. `group_by`: labels whose values are looked at each for
    itself, beside the fleet as a whole. The others are `core.drift.Rules`."""

    enabled: bool = True
    check_s: Seconds = WEEK_S
    window_s: Seconds = WEEK_S
    baseline_s: Seconds = WEEK_S
    cycle_s: Seconds = WEEK_S
    group_by: Annotated[list[Label], Field(max_length=GROUP_BY_MAX)] = ["group"]
    items_min: Annotated[int, Field(ge=1)] = 100
    escalation_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.1
    accuracy_drop: Share = 0.05
    confidence_distance: Share = 0.1
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.005  # of a stream without drift, in one window

    def rules(self, streams: int = 1) -> Rules:
        """What `core.drift` needs, when a release is looked at as `streams` streams (the fleet, each group)."""
        from trainer.core.drift import Rules  # brings scipy: not for every command that reads the configuration

        return Rules(
            self.escalation_ratio, self.accuracy_drop, self.confidence_distance, self.items_min,
            self.false_alarms / max(1, streams), self.window_s, self.baseline_s, self.cycle_s,
            max(1, math.ceil(self.window_s / self.check_s)),
        )  # fmt: skip
