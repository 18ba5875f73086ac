"""How a release reaches the fleet: the table `[rollout]`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trainer.config_parts import Seconds, Section, Share
from trainer.core.canary import CanaryRules
from trainer.core.rollout import RolloutRules

STEPS_MAX = 10
Factor = Annotated[float, Field(gt=1)]
Count = Annotated[int, Field(ge=0)]


class Rollout(Section):
    """The same words as `core.rollout.RolloutRules` and `core.canary.CanaryRules`.

    `watch_s`: of every step but the last; one number is for all of them.
    """

    steps: Annotated[list[Share], Field(min_length=2, max_length=STEPS_MAX)] = [0.1, 1.0]
    watch_s: Seconds | list[Seconds] = 3600.0
    extend_max: Count = 3
    disruption_max: Count = 0  # devices on their way at once; 0: no limit
    failed_fraction_max: Share = 0.1
    canary_failed_fraction_max: Share = 0.02
    install_s_max: Seconds = 3600.0
    failed_grace_s: Annotated[float, Field(ge=0)] = 30.0  # a failed (not a reverted) update counts when it lasts
    baseline_s: Seconds = 86400.0  # of each device before the rollout, to compare it with
    items_min: Annotated[int, Field(ge=1)] = 100
    audits_planned: Count = 400  # 0: audited agreement is not judged
    accuracy_loss_max: Annotated[float, Field(gt=0, le=1)] = 0.1
    escalation_margin: Share = 0.02
    error_margin: Share = 0.01
    latency_factor: Factor = 1.2
    memory_factor: Factor = 1.2
    temperature_margin: Annotated[float, Field(gt=0)] = 5.0
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05

    @model_validator(mode="after")
    def _whole(self) -> Rollout:
        self.rules()
        return self

    def rules(self) -> RolloutRules:
        """What `core.rollout` needs; raises ValueError for steps and watches that do not fit together."""
        watches = self.watch_s if isinstance(self.watch_s, list) else [self.watch_s] * (len(self.steps) - 1)
        return RolloutRules(
            tuple(self.steps), tuple(watches), self.extend_max, self.failed_fraction_max, self.canary_failed_fraction_max,
            self.install_s_max, self.disruption_max, self.canary_rules(),
        )  # fmt: skip

    def canary_rules(self) -> CanaryRules:
        """What `core.canary` needs."""
        return CanaryRules(
            self.items_min, self.audits_planned, self.accuracy_loss_max, self.escalation_margin, self.error_margin,
            self.latency_factor, self.memory_factor, self.temperature_margin, self.alpha,
        )  # fmt: skip
