"""Runs of agents in a real store: what is kept, what feedback makes of it, and that the trainer learns from it."""

from __future__ import annotations

import asyncio
import json
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edged import dataset
from edged.agents import Agent, PhiAgent
from edged.agents.feedback import BadFeedback, Execution, Feedback, Preference, UnknownExecution, offer_recorder
from edged.agents.recorded import StoreRecorder
from edged.clock import SystemClock
from edged.engines.base import GenerateRequest
from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import AgentRun, Store, StoreError, StoreLimits
from edged.wire import messages
from edged.wire.manifest import TrainingManifest, TrainingSample
from tests.support.scripted import Scripted, call, final
from trainer.kinds.catalogue import write_dataset
from trainer.tuners.dpo.data import read_pairs
from trainer.tuners.lora.data import read_examples

SCHEMA = {"verdict": str}
ANN = "ann"


class Kept:
    """A store with its recorder, and an agent that asks one tool and answers."""

    def __init__(self, folder: Path, limits: StoreLimits | None = None) -> None:
        clock = SystemClock()
        self.folder, self.store = folder, Store(folder / "state", limits)
        self.recorder = StoreRecorder(self.store, clock, Outgoing("plant", "dev1", Stamp(clock)))

    def agent(self, *lines: Any, **more: Any) -> Agent:
        given: dict[str, Any] = {
            "output_schema": SCHEMA,
            "tools": {"scratches": scratches},
            "recorder": self.recorder,
        } | more
        return Agent(Scripted(*lines), "You inspect.", **given)

    def run(self, *lines: Any, goal: Any = "Is part 7 fine?", **more: Any) -> str:
        agent = self.agent(*lines, **more)
        asyncio.run(agent.auto_run(goal))
        assert agent.last_execution
        return agent.last_execution

    def requests_file(self) -> Path:
        """As `edged requests export` writes it."""
        out = self.folder / "requests.jsonl"
        dataset.write(out, dataset.lines(reversed(self.store.requests(1000)), self.store.sample, "dev1"))
        return out

    def runs_file(self) -> Path:
        """As `edged agent export` writes it."""
        out = self.folder / "runs.jsonl"
        dataset.write(out, dataset.run_lines(reversed(self.store.runs.newest(1000)), "dev1"))
        return out

    def entries(self) -> list[messages.SampleEntry]:
        """The catalogue entries that wait to be sent."""
        kept = [row.message for row in self.store.due(SystemClock().now() + 1, 100)]
        rows = [messages.decode(message.topic, message.payload)[2] for message in kept]
        return [row for row in rows if isinstance(row, messages.SampleEntry)]


def scratches(part: int) -> int:
    """How many scratches a part has."""
    return part - 4


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    made = Kept(tmp_path)
    yield made
    made.store.close()


GOOD = (call("scratches", part=7), final({"verdict": "reject"}))
BAD = (call("scratches", part=7), final({"verdict": "accept"}))


def test_a_run_is_kept_with_its_steps_and_every_answer_of_its_model(kept: Kept) -> None:
    run = kept.store.runs.get(kept.run(*GOOD))
    assert run is not None
    record = run.record
    assert (record["goal"], record["summary"], record["error"]) == ("Is part 7 fine?", '{"verdict": "reject"}', "")
    assert record["plan"] == [
        {"tool": "scratches", "arguments": {"part": 7}},
        {"tool": "final_response", "arguments": {"response": {"verdict": "reject"}}},
    ]
    assert [(step["tool"], step["status"], step["output"]) for step in record["execution"]] == [
        ("scratches", "success", "3"), ("final_response", "success", '{"verdict": "reject"}'),
    ]  # fmt: skip
    asked = [kept.store.request(each) for each in record["requests"]]
    assert [each and (each.pipeline, json.loads(each.answer), each.release) for each in asked] == [
        (f"agent:{run.agent}", step, "scripted@1.0") for step in GOOD
    ]
    assert asked[1] is not None and asked[1].messages[-1] == {"role": "user", "content": "result of scratches: 3"}
    assert asked[1].options["schema"]["anyOf"], "what it was constrained to"


def test_a_correction_trains_the_step_that_was_wrong(kept: Kept) -> None:
    run_id = kept.run(*BAD)
    kept.recorder.feedback(run_id, Feedback(correction={"verdict": "reject"}, who=ANN, note="three scratches"))
    (entry,) = kept.entries()
    assert (entry.task, entry.state, entry.pipeline[:6]) == ("generate", "labelled", "agent:")
    assert entry.provenance and (entry.provenance.kind, entry.provenance.who) == ("person", ANN)
    assert entry.decision == "accept", "no policy has chosen it: it says nothing of the live accuracy"
    wanted = json.dumps(GOOD[1])
    assert [json.loads(part.text) for part in entry.label] == [GOOD[1]]  # type: ignore[union-attr]
    examples, _ = read_examples(kept.requests_file())
    (example,) = [each for each in examples if each["answer"] == wanted]
    assert example["messages"][-1]["content"] == "result of scratches: 3", "what the model saw at that step"
    (pair,), _ = read_pairs(kept.requests_file())
    assert (pair["chosen"], json.loads(pair["rejected"])) == (wanted, BAD[1])
    assert len(examples) == 1, "the step before it is the agent's own, and nobody stands behind that"


def test_a_correction_goes_the_way_of_every_text_that_the_fleet_trains_on(kept: Kept) -> None:
    kept.recorder.feedback(kept.run(*BAD), Feedback(correction={"verdict": "reject"}, who=ANN))
    (entry,) = kept.entries()
    blob = kept.store.blob(entry.sha256)
    assert blob is not None and kept.store.claim([entry.sample], "job-1").samples[0].state == "claimed"
    pulled = kept.folder / "pulled"
    pulled.mkdir()
    (pulled / entry.sha256).write_bytes(blob.read_bytes())
    assert sha256(blob.read_bytes()).hexdigest() == entry.sha256
    own, label = entry.prediction[0].text, entry.label[0].text  # type: ignore[union-attr]
    sample = TrainingSample(
        id=entry.sample, device="dev1", sha256=entry.sha256, label={"text": label, "other": own, "confidence": 1.0},
        provenance={"kind": "person", "who": ANN, "asked_by": entry.release, "captured": entry.captured},
    )  # fmt: skip
    manifest = TrainingManifest(
        job="job-1", model="clerk", source="clerk@1.0", target="clerk-lora@1.0", created="2026", config={}, samples=[sample]
    )  # fmt: skip
    assert write_dataset(manifest, pulled, kept.folder / "dataset.jsonl") == {}
    (pair,), bad = read_pairs(kept.folder / "dataset.jsonl")
    assert bad == [] and (pair["chosen"], pair["rejected"]) == (json.dumps(GOOD[1]), json.dumps(BAD[1]))


def test_scores_make_successes_failures_and_with_both_a_pair(kept: Kept) -> None:
    kept.recorder.feedback(kept.run(*GOOD), Feedback(score=1.0, who=ANN))
    kept.recorder.feedback(wrong := kept.run(*BAD), Feedback(score=0.0, who=ANN))
    assert [entry.state for entry in kept.entries()] == ["labelled", "labelled", "unresolved"]
    for file, learned in ((kept.requests_file(), [json.dumps(each) for each in GOOD]), (kept.runs_file(), None)):
        examples, bad = read_examples(file)
        assert [each["answer"] for each in examples] == (learned or ['{"verdict": "reject"}'])
        assert any("its execution failed" in reason for _, reason in bad)
        (pair,), _ = read_pairs(file)
        assert "reject" in pair["chosen"] and "accept" in pair["rejected"]
    kept.recorder.feedback(wrong, Feedback(correction={"verdict": "reject"}, who=ANN))
    assert kept.entries()[-1].state == "labelled", "who first said only that it is wrong may still say what is right"


def test_who_calls_a_run_right_stands_behind_the_steps_that_went_well(kept: Kept) -> None:
    failed, garbled = call("scratches", part="seven"), "no step"
    run_id = kept.run(failed, garbled, *GOOD)
    kept.recorder.feedback(run_id, Feedback(score=1.0, who=ANN))
    assert [each["answer"] for each in read_examples(kept.requests_file())[0]] == [json.dumps(each) for each in GOOD]
    kept.recorder.feedback(run_id, Feedback(score=1.0, who=ANN))
    assert len(kept.entries()) == 2, "said again, it changes nothing"
    kept.recorder.feedback(run_id, Feedback(correction={"verdict": "scrap"}, who=ANN))
    examples, bad = read_examples(kept.requests_file())
    assert [json.loads(each["answer"]) for each in examples] == [final({"verdict": "scrap"})], (
        "nobody stands behind the others"
    )
    assert not any("failed" in reason for _, reason in bad), "nor has anybody said that they are wrong"


def test_a_step_that_a_training_has_taken_stays_what_it_is(kept: Kept) -> None:
    run_id = kept.run(*GOOD)
    kept.recorder.feedback(run_id, Feedback(score=1.0, who=ANN))
    before = next(entry for entry in kept.entries() if "call_tool" in entry.label[0].text)  # type: ignore[union-attr]
    kept.store.claim([before.sample], "job-1")
    kept.recorder.feedback(run_id, Feedback(correction={"verdict": "scrap"}, who=ANN))
    assert (kept.store.sample(before.sample).state, kept.entries()[-1].state) == ("claimed", "labelled")  # type: ignore[union-attr]


def test_a_preference_is_a_pair_whatever_the_agent_itself_had_said(kept: Kept) -> None:
    run_id = kept.run(*GOOD)
    better, worse = {"verdict": "reject: 3 scratches"}, {"verdict": "no idea"}
    for _ in range(2):  # said again, it changes nothing
        kept.recorder.feedback(run_id, Feedback(preference=Preference(better, worse), who=ANN))
    assert len(kept.entries()) == 1
    pairs, _ = read_pairs(kept.requests_file())
    assert [(json.loads(pair["chosen"]), json.loads(pair["rejected"])) for pair in pairs] == [
        (final(better), final(worse))
    ]
    own = {"verdict": "reject"}
    kept.recorder.feedback(run_id, Feedback(preference=Preference(better, own), who=ANN))
    assert json.dumps(final(own)) in [pair["rejected"] for pair in read_pairs(kept.requests_file())[0]]


def test_lines_of_runs_have_the_five_fields_and_unjudged_ones_are_no_label(kept: Kept) -> None:
    kept.run(*GOOD, goal={"part": 7})
    (line,) = [json.loads(line) for line in kept.runs_file().read_text().splitlines()]
    assert list(line) == ["goal", "context_summary", "plan", "execution", "summary"]
    assert (line["goal"], line["summary"]) == ('{"part": 7}', '{"verdict": "reject"}')
    assert line["execution"][-1]["device"] == "dev1" and line["execution"][-1]["release"] == "scripted@1.0"
    examples, bad = read_examples(kept.runs_file())
    assert examples == [] and "only the model's own answer" in bad[0][1]
    assert len(read_examples(kept.runs_file(), own_answers=True)[0]) == 1


def test_a_run_that_failed_is_kept_and_can_be_corrected_but_not_called_right(kept: Kept) -> None:
    run_id = kept.run(final({"verdict": 5}), final({"verdict": 6}))
    run = kept.store.runs.get(run_id)
    assert run is not None and "Response validation failed" in run.record["error"] and run.record["summary"] == ""
    assert kept.runs_file().read_text() == "", "there is no response to learn or to avoid"
    with pytest.raises(BadFeedback, match="gave no response to call right"):
        kept.recorder.feedback(run_id, Feedback(score=1, who=ANN))
    kept.recorder.feedback(run_id, Feedback(correction={"verdict": "reject"}, who=ANN))
    assert json.loads(kept.runs_file().read_text())["summary"] == '{"verdict": "reject"}'
    assert [json.loads(each["answer"]) for each in read_examples(kept.requests_file())[0]] == [GOOD[1]]


def test_feedback_that_cannot_be_used_says_why(kept: Kept) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "gives nothing"), ({"score": 1, "correction": "x"}, "score and correction"), ({"score": 2}, "use 0"),
        ({"preference": Preference(1, 1)}, "same response"), ({"score": 1, "who": " "}, "without who"),
    ]  # fmt: skip
    for given, why in wrong:
        with pytest.raises(BadFeedback, match=why):
            Feedback(**{"who": ANN, **given})
    with pytest.raises(UnknownExecution, match="no run 'nobody'"):
        kept.recorder.feedback("nobody", Feedback(score=1, who=ANN))
    run_id = kept.run(*BAD)
    with pytest.raises(BadFeedback, match="output_schema: it: 'verdict' is a required property"):
        kept.recorder.feedback(run_id, Feedback(correction={"wrong_field": 1}, who=ANN))
    kept.recorder.feedback(run_id, Feedback(correction={"verdict": "reject"}, who=ANN))
    kept.store.claim([kept.entries()[0].sample], "job-1")
    with pytest.raises(BadFeedback, match="its sample is claimed: a training has taken it"):
        kept.recorder.feedback(run_id, Feedback(correction={"verdict": "unsure"}, who=ANN))
    free = kept.run(final("accept"), output_schema=None)
    with pytest.raises(BadFeedback, match="correction 5: an agent without output_schema answers in text"):
        kept.recorder.feedback(free, Feedback(correction=5, who=ANN))


def test_answers_of_the_model_that_are_plain_text_stay_so(kept: Kept) -> None:
    from edged.agents.feedback import ModelStep
    from edged.agents.models import Said
    from edged.engines.base import ChatMessage, Finished

    said = Said("Gray.", Finished("stop", 3, 2, -0.1), "phi@1.0")
    turn = ModelStep((ChatMessage("user", "What colour?"),), None, said, stepwise=False)
    run_id = kept.recorder.record(Execution("phi", "What colour?", "", [], [], "Gray.", asked=(turn,)))
    kept.recorder.feedback(run_id, Feedback(correction="Blue.", who=ANN))
    assert [(each["answer"], each["messages"]) for each in read_examples(kept.requests_file())[0]] == [
        ("Blue.", [{"role": "user", "content": "What colour?"}])
    ]


def test_a_prompt_that_an_agent_went_on_from_is_corrected_like_a_run(kept: Kept) -> None:
    offer_recorder(kept.recorder)
    try:
        phi = PhiAgent(Scripted("Gray."), agent_name="phi-recorded")
        said = asyncio.run(phi.generate("The sky is "))
    finally:
        offer_recorder(None)
    assert said.generated_response == "Gray." and phi.last_execution
    kept.recorder.feedback(phi.last_execution, Feedback(correction="Blue.", who=ANN))
    for file in (kept.requests_file(), kept.runs_file()):
        (example,) = read_examples(file)[0]
        assert (example["prompt"], example["answer"], example.get("messages")) == ("The sky is ", "Blue.", None)
        (pair,) = read_pairs(file)[0]
        assert (pair["chosen"], pair["rejected"]) == ("Blue.", "Gray.")


def test_a_run_that_was_cancelled_is_kept_with_what_it_had_done(kept: Kept) -> None:
    def endless(request: GenerateRequest) -> str:
        while not request.halt():
            time.sleep(0.005)
        return ""

    agent = kept.agent(GOOD[0], endless)

    async def cancelled() -> None:
        running = asyncio.create_task(agent.auto_run("Is part 7 fine?"))
        while len(agent.model.asked) < 2:  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()

    asyncio.run(cancelled())
    (run,) = kept.store.runs.newest(10)
    assert "it was cancelled" in run.record["error"]
    assert [step["tool"] for step in run.record["execution"]] == ["scratches"]


def test_runs_are_kept_up_to_a_limit_and_their_words_with_them(tmp_path: Path) -> None:
    small = Kept(tmp_path, StoreLimits(executions_max=2))
    ids = [small.run(*GOOD) for _ in range(3)]
    assert [run.id for run in small.store.runs.newest(10)] == ids[:0:-1]
    bytes_ = Kept(tmp_path / "other", StoreLimits(executions_bytes_max=1))
    assert bytes_.run(*GOOD) and bytes_.store.runs.newest(10) == []
    for each in (small, bytes_):
        each.store.close()


def test_what_people_say_of_runs_counts_and_makes_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody counted could fill the disk."""
    monkeypatch.setattr("edged.store.agents.FEEDBACK_MAX", 2)
    kept = Kept(tmp_path, StoreLimits(executions_bytes_max=100_000))
    runs, ids = kept.store.runs, [kept.run(*GOOD) for _ in range(4)]

    def held() -> int:
        return sum(len(json.dumps(run.record)) + len(json.dumps(run.feedback)) for run in runs.newest(10))

    size = held() // 4  # of a run
    for number in range(4):
        runs.add_feedback(ids[3], {"who": ANN, "note": f"{number} {'x' * 40_000}"})
        assert held() <= 100_000
    assert [run.id for run in runs.newest(10)] == ids[::-1], "what is forgotten of it counts no more"
    runs.add_feedback(ids[2], {"who": ANN, "note": "x" * (100_000 - held() + size)})
    assert [run.id for run in runs.newest(10)] == [ids[3], ids[2]], "the oldest made room"
    assert 90_000 < held() <= 100_000
    kept.store.close()


def test_a_store_that_fails_costs_the_record_not_the_answer(kept: Kept) -> None:
    class Broken:
        def record(self, execution: Execution) -> str:
            raise StoreError("the disk is full")

        def feedback(self, sample_id: str, feedback: Feedback) -> None: ...

    agent = kept.agent(*GOOD, recorder=Broken())
    assert asyncio.run(agent.auto_run("go")).content == {"verdict": "reject"}
    assert agent.last_execution is None


def test_the_recorder_that_the_daemon_offers_is_used_by_agents_without_one(kept: Kept) -> None:
    offer_recorder(kept.recorder)
    try:
        run_id = kept.run(*GOOD, recorder=None)
    finally:
        offer_recorder(None)
    assert isinstance(kept.store.runs.get(run_id), AgentRun)
