"""What an agent did, and what a person says of it: the seam between agents and whoever keeps their executions.

An agent hands each run to its `Recorder`; feedback names the run by the id that it answered. The device's recorder
(`agents.recorded`) makes samples of it, which are trained on as every other text is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from edged.agents.models import Said
from edged.dataset import GOOD_FROM as GOOD_FROM
from edged.engines.base import ChatMessage

Json = dict[str, Any]
NOTE_CHARS_MAX = 2000


class BadFeedback(ValueError):
    """Feedback that no sample can be made of, because it says nothing or too much; the message says what to give."""


class UnknownExecution(BadFeedback):
    """No execution of this id is kept here."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Of two final responses to the same request the better one and the worse one."""

    chosen: Any
    rejected: Any


@dataclass(frozen=True, slots=True)
class Feedback:
    """What `who` says of a run: exactly one of a score, a correction and a preference.

    `score`: 0 (wrong) to 1 (right); from GOOD_FROM on the agent's own response is one to learn. `correction`: the final
    response as it should have been. `preference`: two final responses in order. `note` is for people.
    """

    score: float | None = None
    correction: Any = None
    preference: Preference | None = None
    who: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("score", "correction", "preference") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "nothing"
            raise BadFeedback(f"feedback gives {said}; give one of score, correction, preference")
        for name, value in (("who", self.who), ("note", self.note)):
            if not isinstance(value, str):
                raise BadFeedback(f"{name} {value!r}: give a text")
        if self.score is not None and (isinstance(self.score, bool) or not isinstance(self.score, int | float)):
            raise BadFeedback(f"score {self.score!r}: give a number from 0 (wrong) to 1 (right)")
        if not self.who.strip():
            raise BadFeedback("feedback without who; say whose it is: every label has a provenance")
        if self.score is not None and not (math.isfinite(self.score) and 0 <= self.score <= 1):
            raise BadFeedback(f"score {self.score!r}: use 0 (wrong) to 1 (right)")
        if self.preference is not None and self.preference.chosen == self.preference.rejected:
            raise BadFeedback("chosen and rejected are the same response; a preference needs two")
        if len(self.note) > NOTE_CHARS_MAX:
            raise BadFeedback(f"note of {len(self.note)} characters; write at most {NOTE_CHARS_MAX}")


@dataclass(frozen=True, slots=True)
class ModelStep:
    """One answer of the model in a run: what it was shown, what it said. `stepwise`: the answer is the JSON of a step
    (`agents.steps`), else plain text; `aside`: it is neither, but about one, as a critic's verdict is. `latency_ms` is
    without the wait for the model's turn, where that is known."""

    messages: tuple[ChatMessage, ...]
    schema: Json | None
    said: Said
    stepwise: bool
    tokens_max: int = 0
    temperature: float = 0.0
    seed: int = 0
    latency_ms: float = 0.0
    prompt: str = ""  # instead of messages: a text that was gone on from
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of an agent from request to response.

    `plan`: the steps with their arguments, `{"tool", "arguments"}`; `execution`: what came of each, `{"tool", "status",
    "output"}`; `summary`: the response as text; `error`: why there is none, "" where there is one.
    """

    agent: str
    goal: str
    context_summary: str
    plan: list[Json]
    execution: list[Json]
    summary: str
    error: str = ""
    model: str = ""
    request_id: str = ""  # of the task that the run was part of
    output_schema: Json | None = None
    asked: tuple[ModelStep, ...] = field(default=(), repr=False)
    seconds: float | None = None  # that it took, its waiting for the model's turn included


class Recorder(Protocol):
    """Keeps executions, and makes samples of what people say of them. Both calls block until what they took is on the
    disk; they may be made from any thread."""

    def record(self, execution: Execution) -> str:
        """Keep a run; answers the sample id by which feedback names it. Raises OSError and StoreError."""
        ...

    def feedback(self, sample_id: str, feedback: Feedback) -> None:
        """Label the run's sample. Raises BadFeedback (UnknownExecution), and StoreError."""
        ...


FeedbackMechanism = Recorder  # as agents that learn call it
_offered: list[Recorder] = []  # of the daemon that hosts this process's agents; one at most


def offer_recorder(recorder: Recorder | None) -> None:
    """The daemon offers its recorder to agents of this process; None takes it back."""
    _offered[:] = [] if recorder is None else [recorder]


def offered_recorder() -> Recorder | None:
    """What agents record with that were given no recorder of their own."""
    return _offered[0] if _offered else None
