"""An agent that thinks in steps: it calls a tool, asks another agent, or answers, until it answers or may not go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from edged.agents import told
from edged.agents.base import BaseAgent, RunLimits, peer_schemas, time_limit, within
from edged.agents.feedback import Execution, ModelStep, Recorder
from edged.agents.memory import MemoryFull, MemoryManager
from edged.agents.messages import LogLevel, Message, RequestContext
from edged.agents.models import Said, ask
from edged.agents.registry import AgentRegistry
from edged.agents.schemas import BadSchema, faults
from edged.agents.shown import raised
from edged.agents.steps import BadStep, Step, read_step, step_schema
from edged.engines.base import ChatMessage, EngineError, PromptTooLong
from edged.turns import QueueFull

MAX_STEPS = 10  # of a run that does not say how many
HISTORY, SINGLE = "conversation_history", "single_request"  # kinds of memory
AUTO_STEP, PLAIN = "auto_step", "plain"  # modes of a `_run`
BEFORE_CHARS_MAX = 4000  # of what was said before a run, in its record
REPAIRS_MAX = 1  # of a final answer that does not fit its schema
UNFINISHED = {"truncated": "was cut off", "length": "was cut off", "invalid": "did not keep to the form of a step",
              "cancelled": "was cancelled", "deadline": "took too long"}  # fmt: skip


Processor = Callable[[str], str]  # a message's text in, the text to use instead out


class StepFailed(Exception):
    """The model gave no step; the message says why."""


@dataclass(slots=True)
class Run:
    """One run on its way: what it may still use, and what it has done (`steps` become the record of the execution).

    `limit` cancels what the run waits for, at its deadline and when somebody calls `cancel`.
    """

    goal: Any
    until: float
    tokens_left: int
    limit: asyncio.Timeout | None = None
    loop: asyncio.AbstractEventLoop | None = None
    steps_max: int = MAX_STEPS
    taken: int = 0  # steps that the model was asked for
    began: float = field(default_factory=time.monotonic)
    first: Message | None = None  # what it was asked, as the model is shown it
    cancelled: bool = False
    over: bool = False  # there is an answer
    recorded: bool = False
    steps: list[tuple[Step, str, bool]] = field(default_factory=list)  # with what came of it, and whether it went well
    before: str = ""  # what had been said when it began
    asked: list[ModelStep] = field(default_factory=list)

    def cancel(self) -> None:
        """End it, from any thread."""
        self.cancelled = True
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if not self.over and self.loop is not None:
            self._reschedule(self.loop.time())

    def keep(self) -> None:
        """There is an answer: nothing ends the run any more."""
        self.over = True
        self._reschedule(None)

    def _reschedule(self, when: float | None) -> None:
        if self.limit is not None and not self.limit.expired():
            self.limit.reschedule(when)


class Agent(BaseAgent):
    """An agent with a memory, that runs by itself. One run at a time: a second one waits for the first.

    `auto_run` records the runs; a class whose `handle` does without it sets `recorded_by_invoke`.
    """

    recorded_by_invoke = False

    def __init__(
        self, *args: Any, memory: MemoryManager | None = None, memory_type: str = HISTORY,
        recorder: Recorder | None = None, max_steps: int | None = None,
        system_message_processor: Processor | None = None, user_message_processor: Processor | None = None,
        assistant_message_processor: Processor | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """As BaseAgent; `memory`: one that outlives the process, else the conversation lives as long as the agent.
        `memory_type`: "conversation_history", or "single_request" for an agent whose requests have nothing to do with each
        other: each one begins a new conversation. `recorder`: who keeps the runs, else whom the daemon offers.
        `max_steps`: of a run that does not say how many, none: MAX_STEPS, or fewer where `limits.steps_max` says so.

        The processors get a text and answer with the one to use instead: of the system prompt before each turn of the model,
        of the request before it is remembered, and of what the model said before it is remembered and read as a step."""
        if memory_type not in (HISTORY, SINGLE):
            raise ValueError(f"memory_type {memory_type!r}: use {HISTORY} or {SINGLE}")
        limits: RunLimits = kwargs.get("limits") or RunLimits()
        self.max_steps = min(MAX_STEPS, limits.steps_max) if max_steps is None else max_steps
        _check_steps(self.max_steps, limits)
        super().__init__(*args, **kwargs)
        self.memory_type = memory_type
        try:
            step_schema(self.tools, dict.fromkeys(self.allowed_peers), self.output_schema)
        except BadSchema:
            AgentRegistry.unregister(self.name, self)
            raise
        self.memory = memory or MemoryManager()
        self.recorder = recorder
        self._processors = {
            "system": system_message_processor, "user": user_message_processor, "assistant": assistant_message_processor,
        }  # fmt: skip
        self.last_execution: str | None = None  # by which feedback names the newest run that was recorded
        self._one_at_a_time = asyncio.Lock()
        self._runs: list[Run] = []  # the one on its way, and within it those that its own calls came back with

    async def auto_run(
        self, initial_request: Any, request_context: RequestContext | None = None, max_steps: int | None = None
    ) -> Message:
        """Work on a request in at most `max_steps` steps (None: the agent's own number); answers with the final response,
        or a message of role `error`. At the deadline, and on `cancel`, whatever the run waits for is cancelled.

        Raises ValueError for `max_steps` outside 1..limits.steps_max.
        """
        steps = self.max_steps if max_steps is None else max_steps
        _check_steps(steps, self.limits)
        if why := faults(initial_request, self.input_schema):
            return self.error(f"Request validation failed: agent {self.name} was not run: {why}")
        context = within(request_context or RequestContext(), self.limits)
        assert context.deadline is not None
        limit, loop = time_limit(context), asyncio.get_running_loop()
        run = Run(initial_request, context.deadline, self.limits.tokens_max, limit, loop, steps)
        try:
            async with limit:
                return await self._in_turn(run, context)
        except TimeoutError:
            if not limit.expired():
                raise  # of a `_run` of somebody's own
            return self._stopped(run)

    async def _in_turn(self, run: Run, context: RequestContext) -> Message:
        """Wait for the run before this one, work, and hand the record over, also of a run that is ended from outside."""
        try:
            # Whoever waits for this answer must not be waited for.
            async with nullcontext() if self.name in context.path else self._one_at_a_time:
                if self.memory_type == SINGLE and not self._runs:  # what calls back into a run belongs to its request
                    self.memory.clear()
                run.before = _before(self.memory)
                self._runs.append(run)
                try:
                    run.first = Message("user", run.goal)
                    answer = await self._answer(run, context, run.first)
                    run.keep()
                finally:
                    self._runs.remove(run)
                await self._record(run, answer, context)
                return answer
        except asyncio.CancelledError:
            await self._record(run, self._stopped(run), context)
            raise

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        return await self.auto_run(request, request_context)

    def cancel(self) -> bool:
        """End the run that is on its way, with what it waits for: its model at the next token, a tool, another agent;
        answers whether there is one. May be called on any thread."""
        runs = list(self._runs)
        for run in runs:
            run.cancel()
        return bool(runs)

    async def _answer(self, run: Run, context: RequestContext, prompt: Message) -> Message:
        """Take steps until there is a response, an error, or nothing left of what the run may use."""
        repairs = 0
        while run.taken < run.steps_max:
            if self._ended(run):
                return self._stopped(run)
            run.taken += 1
            try:
                said = await self._run(prompt, context, AUTO_STEP)
            except StepFailed as error:
                return self.error(f"agent {self.name}, step {run.taken}: {error}")
            if said.role == "error":
                return said
            try:
                step = read_step(said.text)
            except BadStep as error:
                prompt = self.error(str(error))
                continue
            await self._log_progress(context, LogLevel.DEBUG, f"step {run.taken}: {step.action} {step.target}")
            if step.action == "final_response":
                why = faults(step.value, self.output_schema)
                run.steps.append((step, why, not why))
                if not why:
                    return Message("assistant", step.value, name=self.name)
                if repairs == REPAIRS_MAX:
                    return self.error(f"Response validation failed: the answer of agent {self.name} is wrong: {why}")
                repairs += 1
                prompt = self.error(f"Your response does not fit the schema: {why}. Answer again.")
            else:
                prompt = await self._act(step, run, context)
        return self.error(f"agent {self.name} gave no final response within {run.steps_max} steps; see max_steps")

    def _ended(self, run: Run) -> str:
        if run.cancelled:
            return "it was cancelled"
        if time.monotonic() >= run.until:
            return self._late()
        return f"it has used its {self.limits.tokens_max} tokens" if run.tokens_left <= 0 else ""

    def _stopped(self, run: Run) -> Message:
        return self.error(f"agent {self.name} stopped: {self._ended(run) or 'it was cancelled'}")

    async def _act(self, step: Step, run: Run, context: RequestContext) -> Message:
        """Do what a step says; what came of it is what the model sees next."""
        if step.action == "invoke_agent":
            reply = await self.invoke_agent(step.target, step.value, context)
            run.steps.append((step, reply.text, reply.role != "error"))
            return Message("agent_response" if reply.role != "error" else "error", reply.content, name=step.target)
        tool = self.tools.get(step.target)
        if tool is None:
            text, ok = f"there is no tool {step.target!r}; there are: {', '.join(self.tools) or 'none'}", False
        else:
            seen = await tool.call(step.value, run.until - time.monotonic())
            text, ok = seen.text, seen.ok
        run.steps.append((step, text, ok))
        return Message("tool", f"{'result' if ok else 'error'} of {step.target}: {text}", name=step.target)

    async def _run(self, prompt: Any, request_context: RequestContext, run_mode: str = PLAIN, **kwargs: Any) -> Message:
        """One turn of the model: the prompt goes into the memory, the model answers, the answer goes into the memory.

        Override it for another way to take a step; in the mode `auto_step` the content of the answer is the JSON of a step.
        Raises StepFailed when the model gave none.
        """
        message = prompt if isinstance(prompt, Message) else Message("user", prompt)
        if message.role == "user":
            message = replace(message, content=self._processed("user", message.content))
            if self._runs and self._runs[-1].first is prompt:
                self._runs[-1].first = message
        self._remember(message)
        schema = None
        if run_mode == AUTO_STEP:
            try:
                schema = step_schema(self.tools, peer_schemas(self.allowed_peers), self.output_schema)
            except BadSchema as error:
                raise StepFailed(str(error)) from None
        system = self._construct_full_system_prompt(self.description, json_mode_for_output=run_mode == AUTO_STEP)
        system = self._processed("system", system)
        said = await self._ask(system, schema)
        ended = said.end.reason
        if ended in UNFINISHED and not (ended == "length" and schema is None) and not _readable(ended, run_mode):
            raise StepFailed(f"the answer of model {self.model_config.name} {UNFINISHED[ended]}")
        answer = Message("assistant", self._processed("assistant", said.text), name=self.name)
        self._remember(answer)
        return answer

    def _processed(self, role: str, content: Any) -> Any:
        """A content as the processor of its role wants it. Raises StepFailed for what that raises."""
        processor = self._processors[role]
        if processor is None:
            return content
        try:
            said = processor(Message("user", content).text)
        except Exception as error:  # a person's code may raise anything
            raise StepFailed(f"{role}_message_processor failed: {raised(error)}") from error
        if not isinstance(said, str):
            raise StepFailed(f"{role}_message_processor answered with {type(said).__name__}; a text is expected")
        return said

    async def _ask(self, system: str, schema: dict[str, Any] | None) -> Said:
        """The model's answer to the conversation, of which as much is shown as its context takes."""
        run = (
            self._runs[-1]
            if self._runs
            else Run("", time.monotonic() + self.limits.seconds_max, self.limits.tokens_max)
        )
        while True:
            try:
                said = await self._think(run, told.turns(system, self.memory, run.first), schema)
            except PromptTooLong as error:
                try:
                    self.memory.make_room()
                except MemoryFull:
                    raise StepFailed(str(error)) from None
                continue
            except (EngineError, QueueFull) as error:
                raise StepFailed(str(error)) from None
            if not self._out_of_room(said, run.asked[-1].tokens_max):
                return said

    async def _think(
        self, run: Run, turns: list[ChatMessage], schema: dict[str, Any] | None, *, aside: bool = False
    ) -> Said:
        """One answer of the model, whatever it is for: of the run's tokens and time, and in its record. Raises EngineError,
        QueueFull."""
        tokens, config, began = max(1, min(self.max_tokens, run.tokens_left)), self.model_config, time.monotonic()
        said = await ask(
            self.model, config, turns, schema, tokens_max=tokens, until=run.until, cancelled=lambda: run.cancelled
        )
        run.tokens_left -= said.end.answer_tokens
        took_ms = said.took_ms or (time.monotonic() - began) * 1000
        stepwise = schema is not None and not aside
        step = ModelStep(
            tuple(turns), schema, said, stepwise, tokens, config.temperature, config.seed, took_ms, aside=aside
        )
        run.asked.append(step)
        return said

    def _out_of_room(self, said: Said, tokens: int) -> bool:
        """Whether the context ended before the answer did, and less of the conversation is shown from now on."""
        if said.end.reason not in ("truncated", "length") or not 0 < said.end.answer_tokens < tokens:
            return False
        try:
            return self.memory.make_room() > 0
        except MemoryFull:
            return False

    async def _record(self, run: Run, answer: Message, context: RequestContext) -> None:
        """Hand the run over, once."""
        if not run.recorded:
            run.recorded = True
            self.last_execution = await self._keep(lambda: _execution(self, run, answer, context), self.recorder)

    def _remember(self, message: Message) -> None:
        try:
            self.memory.update_memory(message)
        except MemoryFull as error:
            raise StepFailed(str(error)) from None

    def _construct_full_system_prompt(self, base_description: str, json_mode_for_output: bool = False) -> str:
        """The description, the tools and peers, and what a step looks like. The same for every step of a run, so that what
        an engine has read of it need not be read again."""
        return told.system_prompt(
            base_description,
            self.tools,
            peer_schemas(self.allowed_peers),
            self.output_schema,
            stepwise=json_mode_for_output,
        )


def _check_steps(steps: int, limits: RunLimits) -> None:
    if not 1 <= steps <= limits.steps_max:
        raise ValueError(f"max_steps {steps}: use 1 to {limits.steps_max} (limits.steps_max)")


def _readable(ended: str, run_mode: str) -> bool:
    """Whether an answer is whole although its form is wrong: who reads it as a step says what is wrong with it."""
    return ended == "invalid" and run_mode == AUTO_STEP


def _before(memory: MemoryManager) -> str:
    """The end of the conversation so far, a line a message."""
    said = "\n".join(f"{message.role}: {message.text}" for message in memory.shown)
    return said[-BEFORE_CHARS_MAX:]


def _execution(agent: Agent, run: Run, answer: Message, context: RequestContext) -> Execution:
    """The record of a run that has ended with `answer`."""
    plan, done = [], []
    for step, outcome, ok in run.steps:
        tool = step.target if step.action == "call_tool" else step.action
        arguments = step.value if step.action == "call_tool" else _INPUTS[step.action](step)
        responds = step.action == "final_response"
        output = Message("assistant", step.value).text if responds else outcome
        plan.append({"tool": tool, "arguments": arguments})
        why = {"error": outcome} if responds and not ok else {}
        done.append({"tool": tool, "status": "success" if ok else "failure", "output": output, **why})
    failed = answer.role == "error"
    return Execution(
        agent=agent.name, goal=Message("user", run.goal).text, context_summary=run.before, plan=plan, execution=done,
        summary="" if failed else answer.text, error=answer.text if failed else "", model=agent.model_config.name,
        request_id=context.request_id, output_schema=agent.output_schema, asked=tuple(run.asked),
        seconds=time.monotonic() - run.began,
    )  # fmt: skip


_INPUTS: Mapping[str, Callable[[Step], dict[str, Any]]] = {
    "invoke_agent": lambda step: {"agent_name": step.target, "request": step.value},
    "final_response": lambda step: {"response": step.value},
}
