"""Agents that learn: the documented configuration of an adapter, feedback that becomes samples, an honest report."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.agents import AgentRegistry, BadFeedback, Feedback, LearnableAgent, ModelConfig, Preference
from edged.agents.learnable import NothingToLearn, offer_training
from edged.agents.lessons import LESSONS_MAX, KeptLessons, LearningMemory, Lesson
from edged.agents.memory import Kept, MemoryManager
from edged.agents.models import LentModel
from edged.agents.recorded import StoreRecorder
from edged.clock import SystemClock
from edged.core.lora import SettingsError
from edged.engines.base import Finished, GenerateRequest, Token
from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import Store
from tests.support.scripted import Scripted, final
from trainer.tools import ToolRefused
from trainer.tuners.settings import LoraSettings

DOCUMENTED = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "bias": "none"}


def learner(*lines: Any, **more: Any) -> LearnableAgent:
    given: dict[str, Any] = {"learning_head": "peft", "learning_head_config": DOCUMENTED} | more
    return LearnableAgent(Scripted(*lines), "You inspect.", **given)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def recorder(store: Store) -> StoreRecorder:
    clock = SystemClock()
    return StoreRecorder(store, clock, Outgoing("plant", "dev1", Stamp(clock)))


def test_the_documented_configuration_means_here_what_it_means_to_the_trainer() -> None:
    """A1."""
    agent = learner()
    assert agent.peft_config == LoraSettings.parse(DOCUMENTED)
    assert agent.learning_head_config == DOCUMENTED
    assert (agent.learning_head, agent.max_tokens) == ("peft", 512)
    assert learner(learning_head_config=None).learning_head_config["r"] == 16
    plain = LearnableAgent(Scripted(), "x")
    assert (plain.learning_head, plain.learning_head_config) == (None, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_head": "reft"}, "learning_head 'reft': known are peft"),
        ({"learning_head": None}, "learning_head_config without a learning_head"),
        ({"learning_head_config": {"r": 0}}, "learning_head_config.r = 0: "),
        ({"learning_head_config": {"r": 8.5}}, "learning_head_config.r = 8.5: "),
        ({"learning_head_config": {"alpha": 32}}, "learning_head_config.alpha = 32: .* known keys are r, lora_alpha"),
        ({"learning_head_config": {"target_modules": "q_proj"}}, "target_modules = 'q_proj': .* name at least one"),
        ({"learning_head_config": {"lora_dropout": 1}}, "lora_dropout = 1: "),
        ({"learning_head_config": {"bias": "some"}}, "bias = 'some': .*; fix: use"),
        ({"model": ModelConfig(type="api", name="gpt-4-turbo")}, "needs a model whose weights the trainer has"),
    ],
)
def test_a_wrong_configuration_is_named_and_takes_no_name(given: dict[str, Any], said: str) -> None:
    whole = {
        "model": Scripted(),
        "description": "x",
        "learning_head": "peft",
        "learning_head_config": DOCUMENTED,
    } | given
    with pytest.raises(SettingsError, match=said):
        LearnableAgent(agent_name="unlucky", **whole)
    assert AgentRegistry.get("unlucky") is None


def test_the_configuration_is_checked_without_anything_of_the_trainers() -> None:
    code = f"""
import sys
from edged.agents import LearnableAgent
from tests.support.scripted import Scripted
LearnableAgent(Scripted(), "x", learning_head="peft", learning_head_config={DOCUMENTED!r})
print(sorted({{"torch", "peft", "transformers", "trainer", "onnxruntime", "llama_cpp"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_each_kind_of_feedback_becomes_a_sample(store: Store, recorder: StoreRecorder) -> None:
    """A10."""
    agent = learner(final("fine"), final("bad"), final("fine"), recorder=recorder)
    asyncio.run(agent.auto_run("Is part 7 fine?"))
    agent.learn_from_feedback(Feedback(score=1.0, who="ann"))
    asyncio.run(agent.auto_run("Is part 8 fine?"))
    first = agent.last_execution
    asyncio.run(agent.auto_run("Is part 9 fine?"))
    agent.learn_from_feedback(Feedback(preference=Preference("scratched", "fine"), who="ann"))
    agent.learn_from_feedback(Feedback(correction="dented", who="bob"), execution=first)
    samples = store.samples(limit=10)
    assert len(samples) == 3
    assert {sample.state for sample in samples} == {"labelled"}
    said = sorted(str(sample.label) for sample in samples)
    assert ["dented" in said[0], "fine" in said[1], "scratched" in said[2]] == [True, True, True]
    assert {(sample.provenance or {})["who"] for sample in samples} == {"ann", "bob"}
    assert [lesson.feedback.who for lesson in agent.learning_memory.lessons] == ["ann", "ann", "bob"]


def test_feedback_that_nothing_can_be_learned_from_is_refused(recorder: StoreRecorder) -> None:
    right = Feedback(score=1.0, who="ann")
    with pytest.raises(NothingToLearn, match="has no recorded run yet"):
        learner(recorder=recorder).learn_from_feedback(right)
    alone = learner(final("x"))
    asyncio.run(alone.auto_run("?"))
    with pytest.raises(NothingToLearn, match="nobody keeps its runs"):
        alone.learn_from_feedback(right)
    headless = LearnableAgent(Scripted(final("x")), "x", recorder=recorder)
    asyncio.run(headless.auto_run("?"))
    with pytest.raises(NothingToLearn, match="has no learning head"):
        headless.learn_from_feedback(right)
    typed = learner(final({"n": 1}), recorder=recorder, output_schema={"n": int})
    asyncio.run(typed.auto_run("?"))
    with pytest.raises(BadFeedback, match="correction does not fit the agent's output_schema"):
        typed.learn_from_feedback(Feedback(correction={"n": "one"}, who="ann"))
    assert typed.learning_memory.lessons == (), "what was not taken is not remembered as taken"


class Slot:
    """A slot whose release changes."""

    def __init__(self) -> None:
        self.live = ("clerk@1.0", "")

    @contextmanager
    def lent(self, halt: Any = None) -> Any:
        yield self, *self.live

    def generate(self, request: GenerateRequest) -> Any:
        yield Token('{"thought": "", "next_action": "final_response", "action_input": {"response": "x"}}', -0.1)
        yield Finished("stop", 1, 1, -0.1)


def test_adapt_behavior_asks_for_a_training_and_says_what_runs_before_and_after(recorder: StoreRecorder) -> None:
    slot, asked = Slot(), []

    def train(wish: Any) -> dict[str, Any]:
        asked.append(wish)
        return {"action": "training_triggered", "reason": "manual", "training_job_id": "clerk-1"}

    agent = LearnableAgent(LentModel(slot, "tongue"), "x", learning_head="peft",  # type: ignore[arg-type]
                           learning_head_config=DOCUMENTED, recorder=recorder, training=train)  # fmt: skip
    idle = agent.adapt_behavior()
    assert (asked, idle.samples, idle.answer, idle.adapted) == ([], (), None, False)
    assert "nothing new to learn" in str(idle)

    asyncio.run(agent.auto_run("?"))
    run = agent.last_execution
    agent.learn_from_feedback(Feedback(correction="y", who="ann"))
    told = agent.adapt_behavior()
    assert asked == [{
        "agent": agent.name, "model": "tongue", "learning_head": "peft", "learning_head_config": DOCUMENTED,
        "samples": [run],
    }]  # fmt: skip
    assert (told.samples, told.answer["training_job_id"]) == ((run,), "clerk-1")  # type: ignore[index]
    assert (told.before, told.after, told.adapted) == (("clerk@1.0", ""), ("clerk@1.0", ""), False)
    assert "clerk@1.0 still answers" in str(told)

    slot.live = ("clerk@1.0", "clerk@1.1")  # the adapter has come back
    later = agent.adapt_behavior()
    assert len(asked) == 1, "the same lessons are asked for once"
    assert (later.before, later.after, later.adapted) == (("clerk@1.0", ""), ("clerk@1.0", "clerk@1.1"), True)
    assert "clerk@1.0 was replaced by clerk@1.0 with clerk@1.1" in str(later)


def test_a_refusal_is_reported_and_the_lessons_are_asked_for_again(recorder: StoreRecorder) -> None:
    refusals = [ToolRefused("within the minimum interval"), ToolRefused("too few samples")]

    def train(_wish: Any) -> dict[str, Any]:
        if refusals:
            raise refusals.pop(0)
        return {"action": "training_triggered"}

    offer_training(train)
    try:
        agent = learner(final("x"), recorder=recorder)
        asyncio.run(agent.auto_run("?"))
        agent.learn_from_feedback(Feedback(score=0.0, who="ann"))
        first, second, third = (agent.adapt_behavior() for _ in range(3))
    finally:
        offer_training(None)
    assert (first.refused, second.refused) == ("within the minimum interval", "too few samples")
    assert "training refused: within the minimum interval" in str(first)
    assert first.samples == second.samples == third.samples
    assert third.answer == {"action": "training_triggered"}


@pytest.mark.parametrize("kept", [False, True])
def test_experience_is_limited(store: Store, kept: bool) -> None:
    where = KeptLessons(store.conversations, "inspector") if kept else None
    memory = LearningMemory(3, kept=where)
    lessons = [Lesson(str(number), Feedback(score=1, who="ann")) for number in range(5)]
    for lesson in lessons[:2]:
        memory.keep(lesson)
    memory.asked(memory.fresh)
    for lesson in lessons[2:]:
        memory.keep(lesson)
    for each in (memory, LearningMemory(3, kept=where)) if kept else (memory,):
        assert (each.lessons, each.fresh) == (tuple(lessons[2:]), tuple(lessons[2:]))
    assert LESSONS_MAX >= 100
    tight = LearningMemory(bytes_max=3000)
    for number in range(5):
        tight.keep(Lesson(str(number), Feedback(correction="x" * 1000, who="ann")))
    assert [lesson.execution for lesson in tight.lessons] == ["3", "4"]
    tight.keep(Lesson("huge", Feedback(correction="x" * 10_000, who="ann")))
    assert [lesson.execution for lesson in tight.lessons] == ["huge"], "the newest one always"


def test_what_comes_while_a_training_is_asked_for_is_asked_for_next() -> None:
    memory = LearningMemory()
    first, second = (Lesson(each, Feedback(score=0, who="ann")) for each in "ab")
    memory.keep(first)
    asking = memory.fresh
    memory.keep(second)
    memory.asked(asking)
    assert memory.fresh == (second,)


def test_what_an_agent_was_told_outlives_its_process(tmp_path: Path) -> None:
    """Every kind of feedback, and what a training was asked for with; the conversation is not mixed up with it."""
    wishes: list[Any] = []

    def begun(*lines: Any) -> tuple[Store, LearnableAgent]:
        store, clock = Store(tmp_path / "state"), SystemClock()
        agent = learner(
            *lines, agent_name="keeper", memory=MemoryManager(Kept(store.conversations, "keeper")),
            recorder=StoreRecorder(store, clock, Outgoing("plant", "dev1", Stamp(clock))),
            training=lambda wish: wishes.append(wish["samples"]) or {"action": "announced"},  # type: ignore[func-returns-value]
        )  # fmt: skip
        return store, agent

    store, agent = begun(final("fine"), final("bad"), final("fine"))
    runs = []
    for feedback in (
        Feedback(score=0.0, who="ann", note="no"), Feedback(correction="dented", who="bob"),
        Feedback(preference=Preference("scratched", "fine"), who="ann"),
    ):  # fmt: skip
        if len(runs) == 2:
            agent.adapt_behavior()
        asyncio.run(agent.auto_run("Is it fine?"))
        agent.learn_from_feedback(feedback)
        runs.append(agent.last_execution)
    told = agent.learning_memory.lessons
    assert len(told) == 3 and wishes == [runs[:2]]
    store.close()
    AgentRegistry.unregister("keeper")

    store, again = begun()
    assert again.learning_memory.lessons == told
    assert [message.text for message in again.memory.history if message.role == "user"] == ["Is it fine?"] * 3
    again.adapt_behavior()
    assert wishes == [runs[:2], runs[2:]], "only what is new"
    store.close()
    AgentRegistry.unregister("keeper")

    store, third = begun()
    third.adapt_behavior()
    assert len(wishes) == 2 and third.learning_memory.fresh == ()
    store.close()
