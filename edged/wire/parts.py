"""What messages are made of, and what a model is asked in words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import to_json

from edged.wire import topics

ANSWER_SCHEMA_BYTES_MAX = 64 * 1024
STOPS_MAX, STOP_CHARS_MAX = 8, 64
TURNS_MAX = 256

Finite = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[str, Field(pattern=f"^{topics.LEVEL}$")]  # replies to a message go to a topic that names its id


class Part(BaseModel):
    """Base of everything inside a message."""

    # Ids never come again: pydantic's cache of the last 16 384 strings took 1.4 MiB of a device and hit nothing.
    model_config = ConfigDict(extra="allow", cache_strings="none")


class Message(Part):
    """The envelope: protocol version, unique id (uuid7), time of sending (seconds since the epoch), the sender's boot
    and its sequence number within that boot. Receivers drop duplicates by `id`."""

    v: Literal[1] = 1
    id: Id
    ts: Finite
    boot: str
    seq: int


class ChatTurn(Part):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(Part):
    """What a model is asked in words: exactly one of a text to continue and a conversation.

    `tokens_max` 0: as many as the context leaves room for. `temperature` 0: the likeliest token each time, else `seed`
    decides. `stop`: the answer ends before the first of these texts. `answer_schema`: a JSON Schema that the answer must
    follow; it is then valid, or ends with the error `truncated` or, from a server, `invalid`.
    """

    generation_prompt: str | None = None
    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=TURNS_MAX)] | None = None
    tokens_max: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX)]], Field(max_length=STOPS_MAX)
    ] = []
    answer_schema: dict[str, Any] | None = None

    @field_validator("answer_schema")
    @classmethod
    def _small(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        size = 0 if schema is None else len(to_json(schema))
        if size > ANSWER_SCHEMA_BYTES_MAX:
            raise ValueError(f"a schema of {size} bytes; send at most {ANSWER_SCHEMA_BYTES_MAX}")
        return schema
