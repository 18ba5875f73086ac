"""What agents of different devices say to each other: a request with its deadline, and its answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_core import to_json

from edged.wire.parts import Id, Message

INVOKED_BYTES_MAX = 64 * 1024  # of a request or a response, as JSON
WITHIN_S_MAX = 3600.0
DEPTH_MAX, INTERACTIONS_MAX = 64, 1024


def _small(value: Any) -> Any:
    size = len(to_json(value))
    if size > INVOKED_BYTES_MAX:
        raise ValueError(f"{size} bytes as JSON; send at most {INVOKED_BYTES_MAX}")
    return value


class Invocation(Message):
    """A request to an agent of the device that the topic names; who asks is the topic's last level.

    `within_s`: how long its sender waits, from `ts` on: clocks differ, so the receiver counts from its arrival. `task`: of
    which the request is a part; `depth`, `interactions`, `path`: how many agents wait for this answer, how many calls were
    made so far, and the names of those who wait (`device/agent`), the first caller first. `cancels`: no request, but the
    end of an earlier one of the same sender, whose id this is: nobody waits for its answer any more.
    """

    request: Any = None
    cancels: Id | None = None
    within_s: Annotated[float, Field(gt=0, le=WITHIN_S_MAX, allow_inf_nan=False)]
    task: Id
    depth: Annotated[int, Field(ge=0, le=DEPTH_MAX)] = 0
    interactions: Annotated[int, Field(ge=0, le=INTERACTIONS_MAX)] = 0
    path: Annotated[list[Annotated[str, Field(max_length=260)]], Field(max_length=DEPTH_MAX)] = []

    _request = field_validator("request")(_small)


class Invoked(Message):
    """The answer to an invocation: a response, or an error that names the fix. `run`: its record at the device that
    answered, for feedback."""

    invocation: Id
    response: Any = None
    error: str | None = None
    run: str = ""

    _response = field_validator("response")(_small)
