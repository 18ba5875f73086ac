"""`dataset.jsonl` (docs/language.md): its lines, and the examples that answers are learned from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from edged.core.transcript import transcript

LINE_BYTES_MAX = 4 << 20

Bad = list[tuple[int, str]]  # line number from 1, why it is left out

_GENERATE = "generate"  # the step of a language request
_RESPOND = "final_response"  # the step that ends an agent's run with its response
_ESCALATE = "escalate"  # the step of somebody else who answered it
_FAILED = ("failure", "failed", "error")
_ROLES = ("system", "user", "assistant")


class Turn(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Example(TypedDict):
    """One prompt and the answer that the model should continue it with, without special tokens. `messages`: the prompt as
    a conversation, for a model with a chat template; `prompt` is the same as one text, as devices put it to a model without
    one (`edged.core.transcript`)."""

    prompt: str
    answer: str
    messages: NotRequired[list[Turn]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line: what was asked, and its response. `failed`: the response is one to avoid. `own`: nobody but the model
    itself stands behind it. `replaced`: the model's own answer where somebody else gave a better one. `confidence`: of
    the model that gave it; None for a person's word and for what was never labelled. `provenance`: who gave it and, where
    that is known, which device was asked when (`trainer.core.provenance`); empty for what was never labelled."""

    number: int
    goal: str
    context: str
    messages: tuple[Turn, ...]
    answer: str
    failed: bool
    own: bool
    replaced: str | None
    confidence: float | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def example(self, answer: str) -> Example:
        """What was asked, with `answer` to it. A request that was a bare prompt stays one, as its device will meet it."""
        if self.messages:
            said = transcript((turn["role"], turn["content"]) for turn in self.messages)
            return Example(prompt=said, answer=answer, messages=list(self.messages))
        return Example(prompt=self.goal, answer=answer)


def read_examples(path: Path, *, confidence_min: float = 0.0, own_answers: bool = False) -> tuple[list[Example], Bad]:
    """The examples of a `dataset.jsonl`, and the numbers of the lines that are none, each with the reason.

    Left out are lines that cannot be read, responses that failed, labels of a model that was less sure than
    `confidence_min`, and, without `own_answers`, what nobody but the model itself has said: its own confident answer is
    no label. Raises OSError.
    """
    labelled, bad, _ = read_labelled(path, confidence_min=confidence_min, own_answers=own_answers)
    return [example for example, _ in labelled], bad


def read_labelled(
    path: Path, *, confidence_min: float = 0.0, own_answers: bool = False
) -> tuple[list[tuple[Example, Mapping[str, Any]]], Bad, dict[str, int]]:
    """`read_examples`, each with its provenance, and how much was left out for another reason than a line's own: nothing."""
    examples: list[tuple[Example, Mapping[str, Any]]] = []
    bad: Bad = []
    for line in read_lines(path, bad):
        if reason := unfit(line, confidence_min, own_answers):
            bad.append((line.number, reason))
        else:
            examples.append((line.example(line.answer), line.provenance))
    return examples, sorted(bad), {}


def unfit(line: Line, confidence_min: float, own_answers: bool) -> str:
    """Why a line's response is none to learn; "" when it is one."""
    if line.failed:
        return "its execution failed: no response to learn"
    if line.own and not own_answers:
        return "only the model's own answer: nobody else has said that it is right"
    if line.confidence is not None and line.confidence < confidence_min:
        return f"its label's confidence {line.confidence:.2f} is below {confidence_min:.2f}"
    return ""


def read_lines(path: Path, bad: Bad) -> Iterator[Line]:
    """The lines that can be read; the others are added to `bad`. Empty lines are nothing. Raises OSError."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(LINE_BYTES_MAX + 1):
            number += 1
            if len(data) > LINE_BYTES_MAX:
                bad.append((number, f"longer than {LINE_BYTES_MAX} bytes"))
                while data and not data.endswith(b"\n"):
                    data = file.readline(LINE_BYTES_MAX)
            elif data.strip():
                try:
                    yield _line(number, json.loads(data))
                except (ValueError, RecursionError) as error:
                    bad.append((number, str(error)))


def _line(number: int, row: Any) -> Line:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    goal, answer = _text(row, "goal"), _text(row, "summary")
    context = row.get("context_summary", "")
    if not isinstance(context, str):
        raise ValueError("context_summary is not a text")
    plan, steps = _steps(row, "plan"), _steps(row, "execution")
    escalated = [step for step in steps if step.get("tool") == _ESCALATE]
    own = [step for step in steps if step.get("tool") in (_GENERATE, _RESPOND)]
    replaced = next((step.get("output") for step in own if escalated and _failed(step)), None)
    said = escalated[-1] if escalated else {}
    confidence = said.get("confidence")
    sure = (
        float(confidence) if isinstance(confidence, (int, float)) else 0.0
    )  # a model that does not say how sure it was
    return Line(
        number, goal, context, _messages(plan, goal, context), answer,
        failed=bool(steps) and _failed(steps[-1]),
        own=bool(own) and (len(own) == len(steps) or steps[-1].get("tool") == _RESPOND),
        replaced=replaced if isinstance(replaced, str) and replaced.strip() else None,
        confidence=sure if escalated and said.get("kind") != "person" else None,
        provenance=_provenance(said, own[0] if own else said, sure) if escalated else {},
    )  # fmt: skip


def _provenance(said: Mapping[str, Any], asked: Mapping[str, Any], sure: float) -> dict[str, Any]:
    """Who said it (`said`: the step of the answer), and which device had asked when (`asked`: the step of its own answer,
    where it is there)."""
    found = {name: str(said[name]) for name in ("kind", "who", "release") if isinstance(said.get(name), str)}
    found.setdefault("kind", "model")
    told: dict[str, Any] = {**found, **({} if found["kind"] == "person" else {"confidence": sure})}
    if isinstance(asked.get("device"), str):
        told["device"] = asked["device"]
    when = asked.get("ts")
    if isinstance(when, int | float) and not isinstance(when, bool):
        told["captured"] = float(when)
    if isinstance(said.get("opinions"), list):
        told["opinions"] = said["opinions"]
    asked_by = "" if asked is said else asked.get("adapter") or asked.get("release")
    return {**told, **({"asked_by": asked_by} if isinstance(asked_by, str) and asked_by else {})}


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is missing, empty or not a text")
    return value


def _steps(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The steps that are objects; `plan` and `execution` may be told in other forms too, by other writers."""
    value = row.get(key, [])
    return [step for step in value if isinstance(step, dict)] if isinstance(value, list) else []


def _failed(step: dict[str, Any]) -> bool:
    status = step.get("status")
    if isinstance(status, str):
        return status.lower() in _FAILED
    return bool(step.get("error")) or step.get("success") is False


def _messages(plan: list[dict[str, Any]], goal: str, context: str) -> tuple[Turn, ...]:
    """The conversation of a request, or what was asked as one; empty for a bare prompt."""
    first = plan[0] if plan else {}
    arguments = first.get("arguments")
    turns = arguments.get("messages") if isinstance(arguments, dict) else None
    if turns:
        if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
            raise ValueError(f"messages need a role of {', '.join(_ROLES)} and a content each")
        return tuple(Turn(role=turn["role"], content=turn["content"]) for turn in turns)
    if first.get("tool") == _GENERATE:
        return ()
    return (Turn(role="user", content=f"{context}\n\n{goal}" if context.strip() else goal),)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)
