"""The soak's verdict: what counts as growing, and what does not."""

from __future__ import annotations

import pytest

from bench.soak_report import ALLOWED, Reading, markdown, trends

SECONDS = 1200.0


def readings(rss_rise: float = 0.0, pss_rise: float = 0.0, spike: float = 0.0) -> list[Reading]:
    """Of a run: memory rises by so many MiB from the warm-up to the end; one reading in ten is higher by `spike`."""
    out = []
    for number in range(121):
        late = max(0.0, (number - 30) / 90)
        high = spike if number % 10 == 0 else 0.0
        out.append(Reading(number * 10.0, 180.0 + rss_rise * late + high, 140.0 + pss_rise * late, 49, 31))
    return out


@pytest.mark.parametrize(
    ("rise", "flat"), [(0.0, True), (ALLOWED["rss_mib"] - 0.1, True), (ALLOWED["rss_mib"] + 0.1, False), (-50.0, True)]
)
def test_memory_that_rises_further_than_allowed_is_growing(rise: float, flat: bool) -> None:
    found = trends(readings(rss_rise=rise), SECONDS)
    assert found["rss_mib"].flat is flat
    assert found["rss_mib"].rise == pytest.approx(rise)


def test_peaks_are_no_growth() -> None:
    found = trends(readings(spike=32.0), SECONDS)
    assert (found["rss_mib"].flat, found["rss_mib"].rise) == (True, 0.0)


def test_what_other_processes_share_is_shown_and_not_judged() -> None:
    found = trends(readings(pss_rise=20.0), SECONDS)
    assert found["pss_mib"].rise == pytest.approx(20.0)
    assert all(trend.flat for trend in found.values())


def test_the_report_says_of_each_quantity_whether_it_is_flat() -> None:
    rows = {
        name: {"median": t.median, "highest": t.highest, "rise": t.rise, "allowed": t.allowed, "flat": t.flat}
        for name, t in trends(readings(rss_rise=9.0, pss_rise=20.0), SECONDS).items()
    }
    nothing: dict[str, int] = {}
    result = {"passed": False, "failures": ["rss_mib rises"], "minutes": 20.0, "machine": "a machine", "camera": True,
              "trends": rows, "put_in": nothing, "came_out": nothing, "disturbed": nothing, "counters": nothing}  # fmt: skip
    text = markdown(result, "soak.svg")
    assert "| memory (RSS), MiB | 184.5 | 189.0 | +9.00 | 8 | NO |" in text
    assert "+20.00 | not judged |" in text
    assert "| threads | 31.0 | 31.0 | +0.00 | 2 | yes |" in text
