"""What a rollout goes by: its steps, its watches, its limits. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.core.canary import CanaryRules


@dataclass(frozen=True, slots=True)
class RolloutRules:
    """`steps`: the share of the fleet that each step reaches, the last is everybody. `watches`: seconds after each other
    one. `disruption_max`: devices on their way at once, 0: no limit."""

    steps: tuple[float, ...] = (0.1, 1.0)
    watches: tuple[float, ...] = (3600.0,)
    extend_max: int = 3  # how many times each watch may be made longer, each time by itself
    failed_fraction_max: float = 0.1  # of those who were told, while rolling
    canary_failed_fraction_max: float = 0.02  # of the canaries; below 50 of them a single one is too many
    install_s_max: float = 3600.0  # for the devices of a step to commit the release
    disruption_max: int = 0
    canary: CanaryRules = field(default_factory=CanaryRules)

    def __post_init__(self) -> None:
        shares = self.steps
        if len(shares) < 2 or shares[-1] != 1 or shares[0] <= 0 or sorted(set(shares)) != list(shares):
            raise ValueError(
                f"steps {list(shares)}: name growing shares of the fleet with 1 as the last, like [0.1, 1.0]"
            )
        if len(self.watches) != len(shares) - 1 or min(self.watches) <= 0:
            raise ValueError(
                f"{len(self.watches)} watches for {len(shares)} steps: every step but the last needs its seconds, "
                f"{len(shares) - 1} in all"
            )
