"""An agent that thinks in steps: it calls a tool, asks another agent, or answers, until it answers or may not go on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from edged.agents.base import BaseAgent, peer_schemas
from edged.agents.feedback import Execution, ModelStep, Recorder, offered_recorder
from edged.agents.memory import MemoryFull, MemoryManager
from edged.agents.messages import LogLevel, Message, RequestContext
from edged.agents.models import Said, ask
from edged.agents.refs import written_out
from edged.agents.registry import AgentRegistry
from edged.agents.schemas import BadSchema, faults
from edged.agents.shown import raised
from edged.agents.steps import THOUGHT_CHARS_MAX, BadStep, Step, read_step, step_schema
from edged.agents.turns import QueueFull
from edged.engines.base import ChatMessage, EngineError, PromptTooLong

MAX_STEPS = 10
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
    """One run on its way: what it may still use, and what it has done (`steps` become the record of the execution)."""

    goal: Any
    until: float
    tokens_left: int
    cancelled: bool = False
    steps: list[tuple[Step, str, bool]] = field(default_factory=list)  # with what came of it, and whether it went well
    before: str = ""  # what had been said when it began
    asked: list[ModelStep] = field(default_factory=list)


class Agent(BaseAgent):
    """An agent with a memory, that runs by itself. One run at a time: a second one waits for the first."""

    def __init__(
        self, *args: Any, memory: MemoryManager | None = None, memory_type: str = "conversation_history",
        recorder: Recorder | None = None, system_message_processor: Processor | None = None,
        user_message_processor: Processor | None = None, assistant_message_processor: Processor | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """As BaseAgent; `memory`: one that outlives the process, else the conversation lives as long as the agent.
        `memory_type`: only "conversation_history" is there. `recorder`: who keeps the runs, else whom the daemon offers.

        The processors get a text and answer with the one to use instead: of the system prompt before each turn of the model,
        of the request before it is remembered, and of what the model said before it is remembered and read as a step."""
        if memory_type != "conversation_history":
            raise ValueError(f'memory_type {memory_type!r}: the one kind of memory is "conversation_history"')
        super().__init__(*args, **kwargs)
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
        self, initial_request: Any, request_context: RequestContext | None = None, max_steps: int = MAX_STEPS
    ) -> Message:
        """Work on a request in at most `max_steps` steps; answers with the final response, or a message of role `error`.

        Raises ValueError for `max_steps` outside 1..limits.steps_max.
        """
        if not 1 <= max_steps <= self.limits.steps_max:
            raise ValueError(f"max_steps {max_steps}: use 1 to {self.limits.steps_max} (limits.steps_max)")
        context = request_context or RequestContext()
        if why := faults(initial_request, self.input_schema):
            return self.error(f"Request validation failed: agent {self.name} was not run: {why}")
        until = time.monotonic() + self.limits.seconds_max
        if context.deadline is None or context.deadline > until:
            context = replace(context, deadline=until)
        assert context.deadline is not None
        # Whoever waits for this answer must not be waited for.
        async with nullcontext() if self.name in context.path else self._one_at_a_time:
            run = Run(initial_request, context.deadline, self.limits.tokens_max, before=_before(self.memory))
            self._runs.append(run)
            try:
                answer = await self._steps(run, context, max_steps)
                await self._record(run, answer, context)
                return answer
            except asyncio.CancelledError:
                await self._record(run, self.error(f"agent {self.name} stopped: it was cancelled"), context)
                raise
            finally:
                self._runs.remove(run)

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        return await self.auto_run(request, request_context)

    def cancel(self) -> bool:
        """End the run that is on its way, at its next token or step; answers whether there is one."""
        for run in self._runs:
            run.cancelled = True
        return bool(self._runs)

    async def _steps(self, run: Run, context: RequestContext, max_steps: int) -> Message:
        prompt: Any = Message("user", run.goal)
        repairs = 0
        for number in range(1, max_steps + 1):
            if ended := self._ended(run):
                return self.error(f"agent {self.name} stopped: {ended}")
            try:
                said = await self._run(prompt, context, AUTO_STEP)
            except StepFailed as error:
                return self.error(f"agent {self.name}, step {number}: {error}")
            if said.role == "error":
                return said
            try:
                step = read_step(said.text)
            except BadStep as error:
                prompt = self.error(str(error))
                continue
            await self._log_progress(context, LogLevel.DEBUG, f"step {number}: {step.action} {step.target}")
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
        return self.error(f"agent {self.name} gave no final response within {max_steps} steps; see max_steps")

    def _ended(self, run: Run) -> str:
        if run.cancelled:
            return "it was cancelled"
        if time.monotonic() >= run.until:
            return f"its time is over ({self.limits.seconds_max:g} s at most)"
        return f"it has used its {self.limits.tokens_max} tokens" if run.tokens_left <= 0 else ""

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
            seen = await tool.call(step.value)
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
        if said.end.reason in UNFINISHED and (schema is not None or said.end.reason != "length"):
            raise StepFailed(f"the answer of model {self.model_config.name} {UNFINISHED[said.end.reason]}")
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
            tokens = max(1, min(self.max_tokens, run.tokens_left))
            turns, config, began = _turns(system, self.memory), self.model_config, time.monotonic()
            try:
                said = await ask(
                    self.model, config, turns, schema, tokens_max=tokens, until=run.until,
                    cancelled=lambda: run.cancelled,
                )  # fmt: skip
            except PromptTooLong as error:
                try:
                    self.memory.make_room()
                except MemoryFull:
                    raise StepFailed(str(error)) from None
                continue
            except (EngineError, QueueFull) as error:
                raise StepFailed(str(error)) from None
            run.tokens_left -= said.end.answer_tokens
            took_ms = said.took_ms or (time.monotonic() - began) * 1000
            run.asked.append(
                ModelStep(
                    tuple(turns), schema, said, schema is not None, tokens, config.temperature, config.seed, took_ms
                )
            )
            if not self._out_of_room(said, tokens):
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
        """Hand the run to the recorder, if there is one. What it cannot keep costs the record, never the answer."""
        recorder = self.recorder or offered_recorder()
        if recorder is None:
            return
        execution = _execution(self, run, answer, context)
        try:
            self.last_execution = await asyncio.to_thread(recorder.record, execution)
        except Exception as error:  # a store has many ways to fail, and the answer is made
            self.last_execution = None
            self.logger.error("the run was not recorded: %s", error)

    def _remember(self, message: Message) -> None:
        try:
            self.memory.update_memory(message)
        except MemoryFull as error:
            raise StepFailed(str(error)) from None

    def _construct_full_system_prompt(self, base_description: str, json_mode_for_output: bool = False) -> str:
        """The description, the tools and peers, and what a step looks like. The same for every step of a run, so that what
        an engine has read of it need not be read again."""
        parts = [base_description.strip()]
        if self.tools:
            parts.append("Tools:\n" + "\n".join(_described(tool.schema["function"]) for tool in self.tools.values()))
        peers = peer_schemas(self.allowed_peers)
        if peers:
            parts.append("Agents that you can ask:\n" + "\n".join(_peer(name, peers[name]) for name in peers))
        if json_mode_for_output:
            parts.append(_how_to_step(bool(self.tools), bool(peers), self.output_schema))
        return "\n\n".join(part for part in parts if part)


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
    )  # fmt: skip


_INPUTS: Mapping[str, Callable[[Step], dict[str, Any]]] = {
    "invoke_agent": lambda step: {"agent_name": step.target, "request": step.value},
    "final_response": lambda step: {"response": step.value},
}


def _turns(system: str, memory: MemoryManager) -> list[ChatMessage]:
    """The conversation as chat templates take it: the system's turn, then user and assistant in turn, the user first."""
    turns = [ChatMessage("system", system)] if system else []
    for said in memory.to_llm_format():
        if turns and turns[-1].role == said["role"]:
            turns[-1] = ChatMessage(said["role"], f"{turns[-1].content}\n\n{said['content']}")
        else:
            turns.append(ChatMessage(said["role"], said["content"]))
    return turns


def _described(function: Mapping[str, Any]) -> str:
    return f"- {function['name']}: {function['description']} Arguments: {_short(function['parameters'])}"


def _peer(name: str, schema: Mapping[str, Any] | None) -> str:
    agent = AgentRegistry.get(name)
    about = " ".join(agent.description.split())[:200] if agent else ""
    return f"- {name}: {about} Request: {_short(schema) if schema else 'a text'}"


def _short(schema: Mapping[str, Any]) -> str:
    written = written_out(schema)
    return json.dumps(written.get("properties", written), ensure_ascii=False)


def _how_to_step(tools: bool, peers: bool, output_schema: Mapping[str, Any] | None) -> str:
    forms = []
    if tools:
        forms.append('"call_tool" with {"tool_name", "arguments"}')
    if peers:
        forms.append('"invoke_agent" with {"agent_name", "request"}')
    forms.append('"final_response" with {"response"}')
    response = (
        f"\nThe response must fit {json.dumps(written_out(output_schema), ensure_ascii=False)}" if output_schema else ""
    )
    return (
        'Answer with one step as JSON: {"thought", "next_action", "action_input"}. next_action is '
        f"{' or '.join(forms)}. The thought has at most {THOUGHT_CHARS_MAX} characters.{response}"
    )
