"""The second look of a browser agent's model is part of its run: of its tokens, steps and time, and of its record."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from edged.agents import Message, RunLimits
from edged.agents.browser import BrowserAgent
from edged.agents.feedback import Feedback
from edged.agents.recorded import StoreRecorder
from edged.clock import SystemClock
from edged.engines.base import GenerateRequest
from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import Store
from tests.support.scripted import Scripted, call, final

WRONG, RIGHT = {"accept": False, "reason": "the page says 12"}, {"accept": True, "reason": ""}


def run(model: Scripted, max_steps: int = 10, **more: Any) -> Message:
    agent = BrowserAgent(model, critic_description="Check the answer.", **more)
    return asyncio.run(agent.auto_run("How many bolts?", max_steps=max_steps))


def test_what_the_critic_says_is_of_the_runs_tokens() -> None:
    model = Scripted(final("13"), WRONG, final("12"), RIGHT, tokens=40)
    answer = run(model, limits=RunLimits(tokens_max=130), max_tokens=64)
    assert [request.tokens_max for request in model.asked] == [64, 64, 50, 10]
    assert answer.content == "12"
    spent = Scripted(final("13"), WRONG, final("12"), RIGHT, tokens=40)
    answer = run(spent, limits=RunLimits(tokens_max=120), max_tokens=64)
    assert answer.role == "error" and len(spent.asked) == 3
    assert "stopped before its answer was checked: it has used its 120 tokens" in answer.text


def test_both_attempts_have_the_runs_steps_together() -> None:
    look = call("look")
    model = Scripted(look, final("13"), WRONG, look, look, final("12"))
    answer = run(model, max_steps=4, tools={"look": lambda: "12 bolts"})
    assert answer.role == "error" and "gave no final response within 4 steps" in answer.text
    assert len(model.asked) == 5


def test_a_run_that_is_cancelled_ends_while_the_critic_speaks() -> None:
    def cancelling(request: GenerateRequest) -> str:
        assert agent.cancel() and request.halt() == "cancelled"
        return json.dumps(WRONG)

    agent = BrowserAgent(Scripted(final("13"), cancelling, final("12")), critic_description="Check the answer.")
    answer = asyncio.run(agent.auto_run("How many bolts?"))
    assert answer.role == "error" and "it was cancelled" in answer.text


def test_the_run_is_recorded_once_with_all_that_its_model_said(tmp_path: Path) -> None:
    clock, store = SystemClock(), Store(tmp_path)
    recorder = StoreRecorder(store, clock, Outgoing("plant", "dev1", Stamp(clock)))
    run(Scripted(final("13"), WRONG, final("12"), RIGHT), agent_name="reader", recorder=recorder)
    (kept,) = store.runs.newest(10)
    assert (kept.record["summary"], kept.record["error"], kept.record["stepwise"]) == ("12", "", True)
    assert [step["status"] for step in kept.record["execution"]] == ["failure", "success"]
    assert kept.record["execution"][0]["error"] == "not accepted: the page says 12"
    said = [json.loads(store.request(each).answer) for each in kept.record["requests"]]  # type: ignore[union-attr]
    assert said == [final("13"), WRONG, final("12"), RIGHT]
    recorder.feedback(kept.id, Feedback(correction="14", who="ann"))
    (sample,) = store.samples(limit=10)
    assert json.loads(sample.prediction[0]["text"]) == final("12"), "the answer is corrected, not what was said of it"
    store.close()
