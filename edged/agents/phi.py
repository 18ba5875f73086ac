"""An agent that is a language model and nothing else: a prompt in, the prompt and what the model writes after it out.

It answers with a small model of the device (Phi, or any other), offline, in the model's whole context, and says how sure it
is. A prompt that does not fit is an error that names both numbers; special tokens are never part of the answer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edged.agents.base import BaseAgent
from edged.agents.feedback import Execution, ModelStep, offered_recorder
from edged.agents.messages import Message, RequestContext
from edged.agents.models import Hear, Model, ModelConfig, Said, open_model, speak
from edged.engines.base import EngineError, Finished, GenerateRequest
from edged.turns import QueueFull

MODEL_ID = "microsoft/phi-2"
ERRORS = {
    "cancelled": "was cancelled",
    "deadline": "took too long",
    "invalid": "is no answer",
    "truncated": "was cut off",
}


class GenerationPromptRequest(BaseModel):
    """A text to go on from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation_prompt: str = Field(min_length=1)


class GenerationPromptResponse(BaseModel):
    """The prompt, and what the model wrote after it.

    `confidence`: the geometric mean of the probabilities of the answer's tokens, 0 to 1, not calibrated; `finish_reason`:
    `stop`, or `length` where the context or `max_tokens` ended it; `release`: whose words they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation_prompt: str
    generated_response: str
    confidence: float | None = Field(default=None, ge=0, le=1)
    finish_reason: str | None = None
    release: str | None = None


class PyTorchAgentProps(BaseModel):
    """Where an agent's model runs: "auto" is the GPU where the engine finds one, else the CPU; "cuda" fails without one.

    Torch itself is not used on a device. A model that is a slot of the daemon runs where the slot says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    torch_device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:0)?)$")


class PhiAgentProps(PyTorchAgentProps):
    """`model_id`: a slot of this device's daemon, or the folder of a release. `max_tokens`: of an answer, 0 for as many as
    the context has left."""

    model_id: str = Field(default=MODEL_ID, min_length=1, max_length=512)
    max_tokens: int = Field(default=0, ge=0, le=1 << 20)
    temperature: float = Field(default=0.0, ge=0, le=10)
    seed: int = 0


class NotGenerated(RuntimeError):
    """The model gave no whole answer; the message says why, `written` what there was until then."""

    def __init__(self, text: str, written: str = "") -> None:
        super().__init__(text)
        self.written = written


class PhiAgent(BaseAgent):
    """Answers each `GenerationPromptRequest` with a `GenerationPromptResponse`. It keeps no conversation."""

    accepts = GenerationPromptRequest
    recorded_by_invoke = False

    def __init__(
        self, model: ModelConfig | Model | None = None, description: str = "", *, props: PhiAgentProps | None = None,
        agent_name: str | None = None, max_tokens: int | None = None, **more: Any,
    ) -> None:  # fmt: skip
        """`props` says which model, where no `model` is given; where one is, `max_tokens` is the limit of an answer (none:
        the context's). Raises ValueError and EngineError, as BaseAgent."""
        if props is None and isinstance(model, ModelConfig):
            props = PhiAgentProps(
                model_id=model.name, max_tokens=max_tokens or 0, temperature=model.temperature, seed=model.seed
            )
        self.props = props or PhiAgentProps(max_tokens=max_tokens or 0)
        self.last_execution: str | None = None  # by which feedback names the newest request that was recorded
        if model is None:
            model = _model(self.props)
        super().__init__(
            model, description, agent_name=agent_name, max_tokens=max_tokens,
            input_schema=GenerationPromptRequest.model_json_schema(), output_schema=_answer_schema(), **more,
        )  # fmt: skip

    async def generate(
        self, request: GenerationPromptRequest | str, request_context: RequestContext | None = None, *,
        hear: Hear | None = None, cancelled: Callable[[], bool] = lambda: False,
    ) -> GenerationPromptResponse:  # fmt: skip
        """Go on from a prompt. `hear` gets each piece of the answer as it is made, on another thread.

        Raises EngineError (PromptTooLong for a prompt that does not fit the context), QueueFull, and NotGenerated for an
        answer that was ended before it was whole.
        """
        if isinstance(request, str):
            request = GenerationPromptRequest(generation_prompt=request)
        until = time.monotonic() + self.limits.seconds_max
        if request_context is not None and request_context.deadline is not None:
            until = min(until, request_context.deadline)
        most = min(self.props.max_tokens or self.limits.tokens_max, self.limits.tokens_max)  # a context may hold more
        asked = GenerateRequest(
            request.generation_prompt, tokens_max=most, temperature=self.props.temperature, seed=self.props.seed
        )
        said = await speak(self.model, asked, until=until, cancelled=cancelled, hear=hear)
        if said.end.reason in ERRORS:
            why = f"the answer of {said.release or 'the model'} {ERRORS[said.end.reason]}"
            raise NotGenerated(f"{why} after {said.end.answer_tokens} tokens", said.text)
        await self._record(asked, said, request_context)
        return GenerationPromptResponse(
            generation_prompt=request.generation_prompt, generated_response=said.text, confidence=_confidence(said.end),
            finish_reason=said.end.reason, release=said.adapter or said.release or None,
        )  # fmt: skip

    async def _record(self, asked: GenerateRequest, said: Said, request_context: RequestContext | None) -> None:
        """Hand the request to the daemon's recorder. What that cannot keep costs the record, never the answer."""
        recorder = offered_recorder()
        if recorder is None:
            return
        step = ModelStep(
            (), None, said, False, asked.tokens_max, asked.temperature, asked.seed, said.took_ms, asked.prompt
        )
        task = request_context.request_id if request_context else ""
        done = {"tool": "generate", "status": "success", "output": said.text}
        execution = Execution(
            self.name, asked.prompt, "", [{"tool": "generate", "arguments": {}}], [done], said.text,
            model=self.model_config.name, request_id=task, asked=(step,),
        )  # fmt: skip
        try:
            self.last_execution = await asyncio.to_thread(recorder.record, execution)
        except Exception as error:  # a store has many ways to fail, and the answer is made
            self.logger.error("the request was not recorded: %s", error)

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        """As BaseAgent: the response as a mapping, or an error."""
        try:
            made = await self.generate(GenerationPromptRequest.model_validate(request), request_context)
        except ValidationError as error:
            return self.error(f"Request validation failed: {error.errors(include_url=False)[0]['msg']}")
        except (EngineError, QueueFull, NotGenerated) as error:
            return self.error(str(error))
        return Message("assistant", made.model_dump(exclude_none=True), name=self.name)


LLMPhiAgent = PhiAgent


def _model(props: PhiAgentProps) -> Model:
    try:
        return open_model(ModelConfig(type="local", name=props.model_id, device=props.torch_device))
    except EngineError as error:
        if Path(props.model_id).is_dir():
            raise
        raise EngineError(
            f"model_id {props.model_id!r}: {error}. Make its release with `trainer release make-phi`, give its folder or "
            "the slot's name: nothing is downloaded here"
        ) from None


def _answer_schema() -> Mapping[str, Any]:
    return GenerationPromptResponse.model_json_schema()


def _confidence(end: Finished) -> float | None:
    return min(1.0, math.exp(end.mean_logprob)) if end.answer_tokens else None
