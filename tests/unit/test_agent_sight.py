"""What an agent sees of its device's pipelines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from edged.agents.sight import last_detections, offer_sight
from edged.agents.tools import Tool
from edged.recent import KEPT_MAX, PIPELINES_MAX, Recent, Seen
from edged.wire.messages import Box


@pytest.fixture
def recent() -> Iterator[Recent]:
    made = Recent()
    offer_sight(made)
    yield made
    offer_sight(None)


def seen(number: int) -> Seen:
    return Seen(
        f"{number}.jpg", float(number), [Box(label="cat", box=(1, 2, 3, 4.04), score=0.8765)], 0.9, "accept", "e@1.0"
    )


def test_the_newest_are_seen_first_and_no_more_than_were_asked_for(recent: Recent) -> None:
    for number in range(KEPT_MAX + 5):
        recent.add("gate", seen(number))
    found = last_detections("gate", 2)
    assert [each["item"] for each in found] == [f"{KEPT_MAX + 4}.jpg", f"{KEPT_MAX + 3}.jpg"]
    assert found[0]["objects"] == [{"label": "cat", "score": 0.876, "box": [1.0, 2.0, 3.0, 4.0]}]
    assert recent.newest("gate", 1000)[-1].item == "5.jpg", "the oldest are forgotten"
    for number in range(PIPELINES_MAX + 5):
        recent.add(f"p{number}", seen(1))
    assert len(recent.pipelines()) == PIPELINES_MAX


def test_what_cannot_be_seen_is_an_observation_that_says_why(recent: Recent) -> None:
    tool = Tool("last_detections", last_detections)
    assert tool.parameters["properties"]["pipeline"]["description"] == "name of the pipeline"
    recent.add("gate", seen(1))
    said = asyncio.run(tool.call({"pipeline": "gaze"}))
    assert not said.ok and "pipeline 'gaze' has detected nothing; those that have: gate" in said.text
    assert "use 1 to 20" in asyncio.run(tool.call({"pipeline": "gate", "limit": 21})).text
    offer_sight(None)
    assert "no daemon runs here" in asyncio.run(tool.call({"pipeline": "gate"})).text
