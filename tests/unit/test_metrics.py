"""Windows of metrics: what was counted is sent once, in the window in which it happened."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.metrics import LATENCIES_MAX, Window
from edged.wire.messages import Metrics


def test_a_window_holds_what_happened_in_it_per_pipeline_and_release() -> None:
    window = Window(100.0)
    window.answer("line", "toy@1.0", "accept", "confident", 0.95, 10.0)
    window.answer("line", "toy@1.0", "escalate", "unsure", 0.31, 20.0, suppressed="duplicate", unheard=True)
    window.answer("line", "toy@1.0", "audit", "audit", 1.0, 30.0)
    window.answer("line", "toy@1.1", "escalate", "novel", 0.0, 5.0)
    window.error("line", "toy@1.0")
    window.error("chat", "")
    first, second, third = window.close(160.0)
    assert first == {
        "start": 100.0, "end": 160.0, "pipeline": "line", "release": "toy@1.0",
        "items": 3, "accepted": 1, "audited": 1, "escalated": 1, "errors": 1,
        "reasons": {"confident": 1, "unsure": 1, "audit": 1}, "suppressed": {"duplicate": 1}, "unheard": 1,
        "confidence_histogram": [0, 0, 0, 1, 0, 0, 0, 0, 0, 2],
        "latency_ms_p50": 20.0, "latency_ms_p95": 30.0,
        "latency_histogram": [0] * 14 + [1, 0, 0, 0, 1, 0, 1],
    }  # fmt: skip
    assert (second["release"], second["items"], second["confidence_histogram"][0]) == ("toy@1.1", 1, 1)
    assert (third["pipeline"], third["errors"], third["items"], third["latency_ms_p50"]) == ("chat", 1, 0, 0.0)
    assert window.close(220.0) == []
    window.error("line", "toy@1.0")
    assert (window.close(280.0)[0]["start"], window.close(300.0)) == (220.0, [])


@pytest.mark.parametrize(("count", "p50", "p95"), [(1, 1, 1), (2, 1, 2), (20, 10, 19), (100, 50, 95)])
def test_quantiles_are_nearest_rank(count: int, p50: float, p95: float) -> None:
    window = Window(0)
    for latency in range(count, 0, -1):
        window.answer("line", "toy@1.0", "accept", "confident", 0.5, float(latency))
    row = window.close(1)[0]
    assert (row["latency_ms_p50"], row["latency_ms_p95"]) == (p50, p95)


@given(st.lists(st.tuples(st.sampled_from(["accept", "audit", "escalate"]), st.floats(0, 1)), max_size=50))
def test_every_item_is_in_exactly_one_place(items: list[tuple[str, float]]) -> None:
    window = Window(0)
    for action, p in items:
        window.answer("line", "toy@1.0", action, action, p, 1.0)
    made = window.close(1)
    assert len(made) == bool(items)
    for row in made:
        assert row["items"] == len(items) == row["accepted"] + row["audited"] + row["escalated"]
        assert row["items"] == sum(row["confidence_histogram"]) == sum(row["reasons"].values())
        assert Metrics(id="m1", ts=0, boot="b", seq=1, **row).items == len(items)


def test_latencies_are_bounded_and_items_are_not() -> None:
    window = Window(0)
    for _ in range(LATENCIES_MAX + 10):
        window.answer("line", "toy@1.0", "accept", "confident", 0.5, 1.0)
    assert window.close(1)[0]["items"] == LATENCIES_MAX + 10


def test_nothing_is_lost_between_a_worker_and_the_closing_of_windows() -> None:
    window, closed = Window(0), []
    done = threading.Event()

    def work() -> None:
        for _ in range(5000):
            window.answer("line", "toy@1.0", "accept", "confident", 0.5, 1.0)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        closed += window.close(1)
    thread.join()
    closed += window.close(2)
    assert sum(row["items"] for row in closed) == 5000
