"""How a batch is shared out, how the learning rate goes, and what an epoch gave."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.batching import Batching, shared
from trainer.core.curves import by_epoch, named, warm_then_decay


@pytest.mark.parametrize(
    ("batch", "processes", "at_once_max", "at_once", "passes"),
    [
        (16, 1, None, 16, 1),
        (16, 1, 16, 16, 1),
        (16, 1, 99, 16, 1),
        (16, 1, 7, 4, 4),
        (25, 1, 12, 5, 5),
        (7, 1, 6, 1, 7),
        (16, 4, None, 4, 1),
        (24, 2, 5, 4, 3),
        (16, 1, 0, 1, 16),
    ],
)
def test_a_step_has_all_its_examples(
    batch: int, processes: int, at_once_max: int | None, at_once: int, passes: int
) -> None:
    assert shared(batch, processes, at_once_max) == Batching(batch, processes, at_once, passes)


@given(st.integers(1, 200), st.integers(1, 8))
def test_it_gets_smaller_until_one_and_stays_the_same_step(each: int, processes: int) -> None:
    batching: Batching | None = shared(each * processes, processes)
    sizes = []
    while batching is not None:
        assert batching.at_once * batching.passes * processes == each * processes
        sizes.append(batching.at_once)
        batching = batching.smaller()
    assert sizes[0] == each and sizes[-1] == 1
    assert all(two <= one // 2 for one, two in pairwise(sizes))


@pytest.mark.parametrize(("batch", "processes"), [(15, 2), (1, 2), (7, 3)])
def test_what_cannot_be_shared_evenly_says_so(batch: int, processes: int) -> None:
    with pytest.raises(ValueError, match=f"batch = {batch}: .*use a multiple of {processes}"):
        shared(batch, processes)


def test_the_rate_rises_at_once_and_ends_at_a_tenth() -> None:
    rates = [warm_then_decay(step, 100) for step in range(101)]
    assert rates[0] == 0.2 and rates[4] == rates[5] == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert warm_then_decay(0, 1) == 1.0  # the only step learns


def test_an_epoch_is_the_mean_over_its_steps() -> None:
    log = [
        {"step": 2, "epoch": 0.5, "loss": 4.0, "learning_rate": 1e-3, "grad_norm": 1.0},
        {"step": 3, "epoch": 0.75, "loss": 1.0, "learning_rate": 9e-4},
        {"step": 4, "epoch": 1.0, "loss": 3.0, "learning_rate": 8e-4},
        {"step": 4, "epoch": 1.0, "eval_loss": 2.5, "eval_runtime": 1.0},
        {"step": 8, "epoch": 2.0, "loss": 0.5, "learning_rate": 7e-4, "rewards/margins": 0.25},
        {"step": 8, "epoch": 2.0, "train_runtime": 3.0},
    ]
    assert by_epoch(log) == [
        {"epoch": 1, "loss": 3.0, "lr": 8e-4, "held_out_loss": 2.5},
        {"epoch": 2, "loss": 0.5, "lr": 7e-4, "margin": 0.25},
    ]
    assert named(log[-1]) == {}
