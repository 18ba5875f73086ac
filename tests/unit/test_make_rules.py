"""The bounds of a gate out of a configuration: a number that is none is an error that names its key."""

from __future__ import annotations

import math

import pytest

from trainer.config_parts import make_rules
from trainer.core import gate, gate_text


@pytest.mark.parametrize("rules", [gate.Rules, gate_text.Rules])
@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_bound_must_be_finite(rules: type, number: float) -> None:
    name = "bootstrap_draws"
    with pytest.raises(ValueError, match=rf"{name} = {number}: use a finite number"):
        make_rules(rules, {name: number})
