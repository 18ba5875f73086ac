"""`dataset.jsonl`: the language requests that this device answered, as examples to learn from.

One JSON object a line: `goal` (what was asked), `context_summary` (what came before it in the conversation), `plan` (the
steps with their arguments), `execution` (what each step gave) and `summary` (the response to learn). An answer that a limit
or its requester cut off is no response to learn: only those that the model ended are written.

Where a larger model or a person has answered too, that is a second step, its text is the response to learn, and a local
answer in other words is a `failure`: the pair that preference training wants.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from edged.files import sync
from edged.store import AgentRun, LanguageRequest, Sample
from edged.store.records import Json

TOOL = "generate"  # the step of every language request
ESCALATE = "escalate"  # the step of those that somebody else has answered too
RESPOND = "final_response"  # the step of an agent's run that gives its response
GOOD_FROM = 0.5  # of a person's score: from here on a response is one to learn, below it one to avoid
FEEDBACK = "feedback"  # the reason of samples that somebody's word about an agent made
UNLABELLED = ("captured", "escalated", "unresolved", "rejected")
_RESULT = ("release", "adapter", "confidence", "finish_reason", "prompt_tokens", "answer_tokens", "latency_ms", "ts")


def example(request: LanguageRequest, sample: Sample | None = None, device: str = "") -> Json | None:
    """The line for a request that `device` answered, with what was said of its sample, if it became one; None when it has
    no whole answer."""
    if request.finish_reason != "stop" or not request.answer.strip():
        return None
    goal, before = _conversation(request)
    if not goal.strip():
        return None
    arguments: Json = {"pipeline": request.pipeline, **request.options}
    if request.messages:
        arguments["messages"] = request.messages
    kept = asdict(request)
    result = {"tool": TOOL, "status": "success", "output": request.answer, "request": request.id}
    if device:
        result["device"] = device
    line: Json = {
        "goal": goal,
        "context_summary": before,
        "plan": [{"tool": TOOL, "arguments": arguments}],
        "execution": [result | {name: kept[name] for name in _RESULT}],
        "summary": request.answer,
    }
    text = _verdict(sample)
    if sample is not None and sample.provenance is not None and text is not None:
        said = {"tool": ESCALATE, "status": "success", "output": text, "sample": sample.id, "reason": sample.reason}
        line["plan"].append({"tool": ESCALATE, "arguments": {"reason": sample.reason}})
        line["execution"].append(said | sample.provenance | {"confidence": sample.label_confidence})
        if text.strip() != request.answer.strip():
            line["execution"][0]["status"] = "failure"
        line["summary"] = text
    elif sample is not None and sample.reason == FEEDBACK and sample.state == "unresolved":
        line["execution"][0]["status"] = "failure"  # a person has said that it is wrong, and not what is right
    return line


def run_line(run: AgentRun, device: str = "") -> Json | None:
    """The line for a run of an agent: its steps, its response, and what people said of that last; None where it has no
    response and nobody has said what it should have been.

    The response of a run that nobody has judged is the agent's own, as that of a language request is: readers that learn
    only from what somebody stands behind leave it out.
    """
    record, goal = run.record, run.record["goal"]
    corrected = bool(run.feedback) and not {"correction", "preference"}.isdisjoint(run.feedback[-1])
    if not goal.strip() or not (record["summary"].strip() or corrected):
        return None
    steps = [dict(step) for step in record["execution"]]
    plan = [dict(step) for step in record["plan"]]
    if not steps and not record["error"]:
        plan.append({"tool": RESPOND, "arguments": {}})
        steps.append({"tool": RESPOND, "status": "success", "output": record["summary"]})
    if record["error"]:
        plan.append({"tool": RESPOND, "arguments": {}})
        steps.append({"tool": RESPOND, "status": "failure", "output": "", "error": record["error"]})
    of = {"run": run.id, "agent": run.agent, "release": record["release"], "adapter": record["adapter"], "ts": run.ts}
    steps[-1] |= {**of, **({"device": device} if device else {})}
    line: Json = {
        "goal": goal, "context_summary": record["context_summary"], "plan": plan, "execution": steps,
        "summary": record["summary"],
    }  # fmt: skip
    if run.feedback:
        _judge(line, run.feedback[-1])
    return line


def _judge(line: Json, said: Json) -> None:
    """Put somebody's word about a run into its line."""
    last, text = line["execution"][-1], line["summary"]
    if "score" in said and said["score"] < GOOD_FROM:
        last["status"] = "failure"
        return
    right = said.get("correction", said.get("preference", {}).get("chosen"))
    if right is not None:
        line["summary"] = right if isinstance(right, str) else json.dumps(right, ensure_ascii=False)
        last["status"] = "success" if line["summary"] == text else "failure"
    line["plan"].append({"tool": ESCALATE, "arguments": {"reason": FEEDBACK}})
    line["execution"].append({"tool": ESCALATE, "status": "success", "output": line["summary"], "kind": "person",
                              "who": said["who"], "confidence": 1.0})  # fmt: skip


def run_lines(runs: Iterable[AgentRun], device: str = "") -> list[str]:
    """The lines of runs, in their order, each with its end of line."""
    found = (run_line(run, device) for run in runs)
    return [json.dumps(row) + "\n" for row in found if row is not None]


def _verdict(sample: Sample | None) -> str | None:
    """What somebody else answered; None without an answer in words."""
    if sample is None or sample.state in UNLABELLED or not sample.label:
        return None
    text = sample.label[0].get("text")
    return text if isinstance(text, str) and text.strip() else None


def _conversation(request: LanguageRequest) -> tuple[str, str]:
    """What the user asked for last, and the turns around it, a line each."""
    asked = [number for number, turn in enumerate(request.messages) if turn["role"] == "user"]
    if not asked:
        return request.prompt, "\n".join(f"{turn['role']}: {turn['content']}" for turn in request.messages)
    others = (turn for number, turn in enumerate(request.messages) if number != asked[-1])
    return request.messages[asked[-1]]["content"], "\n".join(f"{turn['role']}: {turn['content']}" for turn in others)


def lines(requests: Iterable[LanguageRequest], sample: Callable[[str], Sample | None], device: str = "") -> list[str]:
    """The lines of the whole answers among `requests`, in their order, each with its end of line; `sample` finds what a
    request became, by its id."""
    found = (example(request, sample(request.id), device) for request in requests)
    # ASCII only: a line separator of Unicode in an answer would end the line for some readers.
    return [json.dumps(row) + "\n" for row in found if row is not None]


def write(path: Path, text: Iterable[str]) -> None:
    """Write beside `path`, then rename into place, durably: nobody ever reads half a file. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(text)
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)
