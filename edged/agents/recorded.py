"""Runs of agents in the device's store, and what people say of them as samples that train.

Every answer of a model in a run is kept as the language request that it is (pipeline `agent:NAME`), and the run itself
with its steps. Feedback makes a sample of the answer that it is about, with a person's provenance: from there on it is a
text like every other one, announced in the catalogue, claimed by a training, judged and shipped as an adapter.

- A correction labels the step that gave the response with the step as it should have been.
- A preference is a sample of its own: what is preferred is its label, what is not stands as the answer of the model.
- A score from GOOD_FROM on labels the step with itself, and so the steps before it that went well: whoever calls a run right
  stands behind how it got there. Without them a training that corrects last steps would forget the calls of tools.
- One below leaves the step without a label, as a failure of which `dataset.jsonl` makes pairs with successes.

Law: the run is kept before its id is known to anybody, and a sample is labelled before its feedback is written down: said
again, the same feedback changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from edged.agents.feedback import (
    GOOD_FROM,
    BadFeedback,
    Execution,
    Feedback,
    Json,
    ModelStep,
    Preference,
    UnknownExecution,
)
from edged.agents.messages import Message
from edged.agents.schemas import faults
from edged.agents.steps import BadStep, final_step, read_step
from edged.cases import EXCERPT_CHARS_MAX, question
from edged.clock import Clock, new_id
from edged.dataset import FEEDBACK
from edged.engines.base import ChatMessage, GenerateRequest
from edged.outgoing import GENERATE
from edged.store import AgentRun, LanguageRequest, NewSample, OutboxMessage, Sample, StorageFull, Store
from edged.wire.ids import derived

PIPELINE = "agent:"  # before the agent's name, in requests and samples
TEXT_CHARS_MAX = 16_000  # of a text in the record of a run; the whole one stands in the requests
LABEL_WITHIN_S = 60.0  # between the sample and its label, which follow each other at once
OPEN = ("escalated", "labelled", "unresolved")  # states of a sample in which a person's word still counts
UNFINISHED = ("truncated", "invalid", "cancelled", "deadline")  # ends that are no whole answer


class Catalogue(Protocol):
    """Who makes the catalogue entry of a sample."""

    def catalogue(self, sample: Sample) -> OutboxMessage: ...


class StoreRecorder:
    """The device's recorder. Safe to use from any thread, as the store is."""

    def __init__(
        self, store: Store, clock: Clock, outgoing: Catalogue, wake: Callable[[], None] = lambda: None,
        observe: Callable[[Execution], None] = lambda execution: None,
    ) -> None:  # fmt: skip
        """`outgoing` announces what was labelled; `wake` is called when that is in the outbox; `observe` with each run."""
        self._store, self._clock, self._outgoing, self._wake = store, clock, outgoing, wake
        self._observe = observe

    def record(self, execution: Execution) -> str:
        """As Recorder. Raises StoreError."""
        now, run_id = self._clock.now(), new_id(self._clock)
        requests = [
            _request(derived(run_id, f"step {number}"), execution.agent, asked, now)
            for number, asked in enumerate(execution.asked)
        ]
        answering = _answering(execution.asked)
        record = _record(execution) | {
            "requests": [request.id for request in requests],
            "answer": None if answering is None else requests[answering].id,
            "before": [requests[number].id for number in _went_well(execution) if number != answering],
            "stepwise": any(asked.stepwise for asked in execution.asked),
        }
        self._store.record_run(AgentRun(run_id, execution.agent, now, record), requests)
        self._store.count("agent_runs_failed" if execution.error else "agent_runs")
        self._observe(execution)
        return run_id

    def feedback(self, sample_id: str, feedback: Feedback) -> None:
        """As Recorder. Raises BadFeedback, UnknownExecution, StoreError."""
        run = self._store.runs.get(sample_id)
        if run is None:
            raise UnknownExecution(
                f"no run {sample_id!r} is kept here; `edged agent runs` lists those that are (the oldest make room)"
            )
        if not run.record["answer"]:
            raise BadFeedback(
                f"run {sample_id}: there is nothing to learn from: no answer of a model belongs to it; agent {run.agent} "
                "answers by code of its own, or its model said nothing"
            )
        request = self._store.request(run.record["answer"])
        if request is None:
            raise BadFeedback(f"run {sample_id}: the answer that the feedback is about was given up for newer ones")
        form = _Form(run)
        if feedback.preference is not None:
            self._prefer(run, request, form, feedback.preference, feedback)
        elif feedback.correction is not None:
            self._label(run, request, form.text(feedback.correction, "correction"), feedback)
        elif feedback.score is not None and feedback.score >= GOOD_FROM:
            if run.record["error"]:
                raise BadFeedback(f"run {sample_id} gave no response to call right: {run.record['error'][:200]}")
            self._label(run, request, request.answer, feedback)
        else:
            self._label(run, request, None, feedback)
        right = feedback.score is not None and feedback.score >= GOOD_FROM
        for each in run.record.get("before", []):
            self._stand_behind(run, each, feedback, right=right)
        self._store.runs.add_feedback(sample_id, _said(feedback))
        self._store.count("agent_feedback")
        self._wake()

    def _prefer(
        self, run: AgentRun, request: LanguageRequest, form: _Form, preference: Preference, feedback: Feedback
    ) -> None:
        chosen, rejected = form.text(preference.chosen, "chosen"), form.text(preference.rejected, "rejected", fit=False)
        if rejected == request.answer:
            self._label(run, request, chosen, feedback)
            return
        asked = LanguageRequest(
            derived(request.id, f"{chosen}\0{rejected}"), request.pipeline, request.ts, request.prompt, request.messages,
            request.options, rejected, finish_reason="stop", release=request.release, adapter=request.adapter,
            reason=f"not said by the model: the worse one of two responses that {feedback.who} compared",
        )  # fmt: skip
        self._store.record_request(asked)
        self._label(run, asked, chosen, feedback)

    def _stand_behind(self, run: AgentRun, request_id: str, feedback: Feedback, *, right: bool) -> None:
        """A step before the one that answered is right as it is, or, `right` or not, nobody says so any more."""
        request, sample = self._store.request(request_id), self._store.sample(request_id)
        if request is None or (sample is not None and sample.state not in OPEN):
            return  # given up for newer ones, or taken by a training: the answer itself is what counts
        if right:
            self._label(run, request, request.answer, feedback)
        elif sample is not None:
            self._store.label(
                request_id, "rejected", [], 1.0, {"kind": "person", "who": feedback.who, "release": ""},
                _reason(feedback), self._clock.now(), self._outgoing.catalogue,
            )  # fmt: skip

    def _label(self, run: AgentRun, request: LanguageRequest, text: str | None, feedback: Feedback) -> None:
        """Make a sample of a request and label it; `text` None: its answer is wrong, and nobody has said what is right."""
        now = self._clock.now()
        content = question(_asked(request))
        sample = _sample(run, request, content, now)
        try:
            self._store.capture(sample, content)
        except StorageFull:
            self._store.evict(len(content))
            self._store.capture(sample, content)
        status = "unresolved" if text is None else "labelled"
        labelled = self._store.label(
            sample.id, "unresolved" if text is None else "labelled", [] if text is None else [{"text": text}], 1.0,
            {"kind": "person", "who": feedback.who, "release": ""}, _reason(feedback), now, self._outgoing.catalogue,
        )  # fmt: skip
        if labelled is None or labelled.state != status:
            state = "gone" if labelled is None else labelled.state
            raise BadFeedback(
                f"run {run.id}: its sample is {state}: a training has taken it already, or it was rejected"
            )


class _Form:
    """How responses of a run stand in the texts that its model says."""

    def __init__(self, run: AgentRun) -> None:
        self._stepwise, self._schema = bool(run.record["stepwise"]), run.record["output_schema"]

    def text(self, response: Any, what: str, *, fit: bool = True) -> str:
        """The text that would have given `response`. Raises BadFeedback for one that the agent may not give (`fit`)."""
        if fit and (why := faults(response, self._schema)):
            raise BadFeedback(f"{what} does not fit the agent's output_schema: {why}")
        if fit and self._stepwise and self._schema is None and not isinstance(response, str):
            raise BadFeedback(
                f"{what} {Message('assistant', response).text[:80]}: an agent without output_schema answers in text"
            )
        if not self._stepwise:
            return Message("assistant", response).text
        try:
            return final_step(response)
        except (TypeError, ValueError) as error:
            raise BadFeedback(f"{what}: {error}; a response is JSON") from None


def _answering(asked: tuple[ModelStep, ...]) -> int | None:
    """Which of a run's model steps gave its response: the last whole one, or the last of all; None where there is none."""
    whole = [number for number, each in enumerate(asked) if not each.aside and each.said.end.reason not in UNFINISHED]
    for number in reversed(whole):
        if not asked[number].stepwise:
            return number
        try:
            if read_step(asked[number].said.text).action == "final_response":
                return number
        except BadStep:
            continue
    return whole[-1] if whole else None


def _went_well(execution: Execution) -> list[int]:
    """Which of a run's model steps did what they were for. Each that can be read is one of the run's steps, in order."""
    read = [number for number, each in enumerate(execution.asked) if _is_step(each)]
    if len(read) != len(execution.execution):
        return []  # what was said and what was done cannot be told to belong together
    done = zip(read, execution.execution, strict=True)
    return [number for number, step in done if step["status"] == "success"]


def _is_step(asked: ModelStep) -> bool:
    if not asked.stepwise or asked.said.end.reason in UNFINISHED:
        return False
    try:
        read_step(asked.said.text)
    except BadStep:
        return False
    return True


def _request(request_id: str, agent: str, asked: ModelStep, now: float) -> LanguageRequest:
    said, reason = asked.said, asked.said.end.reason
    options = {name: getattr(asked, name) for name in ("tokens_max", "temperature", "seed", "schema")}
    return LanguageRequest(
        request_id, f"{PIPELINE}{agent}", now, asked.prompt, [asdict(turn) for turn in asked.messages],
        {name: value for name, value in options.items() if value}, said.text, None,
        reason if reason in UNFINISHED else "ok", "", reason, said.end.prompt_tokens, said.end.answer_tokens,
        asked.latency_ms, said.release, said.adapter or "",
    )  # fmt: skip


def _asked(request: LanguageRequest) -> GenerateRequest:
    """The request as its model was asked."""
    known = {name: value for name, value in request.options.items() if name != "stop"}
    turns = tuple(ChatMessage(**turn) for turn in request.messages)
    return GenerateRequest(request.prompt, messages=turns, stop=tuple(request.options.get("stop", ())), **known)


def _record(execution: Execution) -> Json:
    record = {name: getattr(execution, name) for name in _KEPT}
    for name in ("goal", "context_summary", "summary", "error"):
        record[name] = record[name][:TEXT_CHARS_MAX]
    record["execution"] = [step | {"output": step["output"][:TEXT_CHARS_MAX]} for step in execution.execution]
    last = execution.asked[-1].said if execution.asked else None
    return record | {"release": last.release if last else "", "adapter": last.adapter if last else ""}


_KEPT = ("goal", "context_summary", "plan", "execution", "summary", "error", "model", "request_id", "output_schema",
         "seconds")  # fmt: skip


def _sample(run: AgentRun, request: LanguageRequest, content: bytes, now: float) -> NewSample:
    """The sample of a request. It waits for the label that follows at once; the policy had no part in it."""
    shown = request.messages[-1]["content"] if request.messages else request.prompt
    return NewSample(
        id=request.id, pipeline=request.pipeline, task=GENERATE, model=run.record["model"],
        release=request.adapter or request.release, state="escalated", reason=FEEDBACK, decision="accept",
        confidence=request.confidence or 0.0, inclusion_probability=1.0, sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content), prediction=[{"text": request.answer}], item=run.id, captured=min(request.ts, now),
        label_by=now + LABEL_WITHIN_S,
        evidence={"question": shown[:EXCERPT_CHARS_MAX], "question_chars": len(shown), "run": run.id},
    )  # fmt: skip


def _reason(feedback: Feedback) -> str:
    what = "preference" if feedback.preference else "correction"
    if feedback.score is not None:
        what = f"score {feedback.score:g}"
    return f"{FEEDBACK}: {what}{f': {feedback.note}' if feedback.note else ''}"


def _said(feedback: Feedback) -> Json:
    return {name: value for name, value in asdict(feedback).items() if value not in (None, "")}
