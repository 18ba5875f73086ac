"""An agent as the configuration describes it. What is wrong with it is said with the key, the value and the fix."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edged.agents.agent import Agent
from edged.agents.base import BaseAgent, RunLimits
from edged.agents.feedback import Recorder
from edged.agents.memory import MemoryManager
from edged.agents.models import ModelConfig
from edged.agents.schemas import BadSchema, compile_schema
from edged.agents.tools import Tool
from edged.config_agents import KINDS, Peer, form
from edged.config_agents import Agent as AgentConfig

MODULES = "modules"  # folder beside the configuration file in which factories and tools are looked for, too


class BadAgent(ValueError):
    """An agent that cannot be made; the message names the key, the value and the fix."""


def let_find(config: Path | None) -> None:
    """Modules beside the configuration file can be imported from now on."""
    folder = None if config is None else str(config.resolve().parent / MODULES)
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)


def faults(name: str, config: AgentConfig) -> Iterator[str]:
    """What is wrong with an agent, as far as it can be told without making it."""
    for key in ("input_schema", "output_schema"):
        try:
            compile_schema(form(getattr(config, key)), f"agents.{name}.{key}")
        except BadSchema as error:
            yield str(error)
    functions: dict[str, Tool] = {}
    try:
        functions = tools(name, config)
    except BadAgent as error:
        yield str(error)
    try:
        maker = found(f"agents.{name}.factory", config.made_by)
        inspect.signature(maker).bind(**given(name, config, functions), **config.options)
    except BadAgent as error:
        yield str(error)
    except TypeError as error:
        yield (
            f"agents.{name}.factory = {config.factory!r} cannot be called as an agent is made: {error}; "
            "see agents.NAME.options, and docs/agents.md for what a factory is given"
        )
    except ValueError:
        pass  # a signature that nobody can read: it is called at the start


def peer_faults(name: str, peer: Peer) -> Iterator[str]:
    """What is wrong with a peer."""
    for key in ("input_schema", "output_schema"):
        try:
            compile_schema(form(getattr(peer, key)), f"peers.{name}.{key}")
        except BadSchema as error:
            yield str(error)


def build(name: str, config: AgentConfig, memory: MemoryManager, recorder: Recorder) -> BaseAgent:
    """The agent, registered under its name. Raises BadAgent."""
    wrong = list(faults(name, config))
    if wrong:
        raise BadAgent("; ".join(wrong))
    maker = found(f"agents.{name}.factory", config.made_by)
    try:
        agent = maker(**given(name, config, tools(name, config), memory, recorder), **config.options)
    except Exception as error:  # a person's code may raise anything
        raise BadAgent(f"agents.{name}: {config.factory} failed: {type(error).__name__}: {error}") from error
    if not isinstance(agent, BaseAgent) or agent.name != name:
        what = f"an agent called {agent.name!r}" if isinstance(agent, BaseAgent) else repr(agent)[:80]
        raise BadAgent(
            f"agents.{name}: {config.factory} made {what}; it must make an agent with the agent_name it is given"
        )
    return agent


def given(
    name: str, config: AgentConfig, functions: dict[str, Tool], memory: MemoryManager | None = None,
    recorder: Recorder | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a factory is called with, besides its `options`: `model`, `agent_name`, `description`, `max_tokens` and `limits`;
    `tools`, `allowed_peers` and the schemas where they are set; `memory`, `recorder` and `max_steps` unless it makes agents
    that have none of them (a class that is no `Agent`)."""
    model = ModelConfig(
        type="local", name=config.slot, max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed
    )
    always = {
        "model": model, "agent_name": name, "description": config.instruction, "max_tokens": _tokens(config),
        "limits": RunLimits(**config.limits.model_dump()),
    }  # fmt: skip
    wanted = {
        "tools": functions, "allowed_peers": config.allowed_peers, "input_schema": form(config.input_schema),
        "output_schema": form(config.output_schema),
    }  # fmt: skip
    return always | {key: value for key, value in wanted.items() if value} | _keeping(config, memory, recorder)


def _tokens(config: AgentConfig) -> int:
    """Of one answer; 0 for as many as the context has left, which is what a Phi agent writes unless it is told otherwise."""
    told = "max_tokens" in config.model_fields_set or config.made_by != KINDS["phi"]
    return config.max_tokens if told else 0


def _keeping(config: AgentConfig, memory: MemoryManager | None, recorder: Recorder | None) -> dict[str, Any]:
    maker = found("factory", config.made_by)
    if isinstance(maker, type) and not issubclass(maker, Agent):
        return {}
    return {"memory": memory, "recorder": recorder, "max_steps": config.max_steps}


def tools(name: str, config: AgentConfig) -> dict[str, Tool]:
    """The agent's tools by their names. Raises BadAgent."""
    made = {}
    for each in config.tools:
        key, called = f"agents.{name}.tools", each.rpartition(":")[2]
        try:
            made[called] = Tool(called, found(key, each))
        except BadSchema as error:
            raise BadAgent(f"{key}: {each!r}: {error}") from None
    return made


def found(key: str, where: str) -> Callable[..., Any]:
    """The callable `module:name`. Raises BadAgent."""
    module, _, name = where.partition(":")
    try:
        holder = importlib.import_module(module)
    except Exception as error:  # a module may raise anything when it is imported
        raise BadAgent(
            f"{key} = {where!r}: module {module} cannot be imported ({type(error).__name__}: {error}); install it where "
            f"edged runs, or put it into the folder {MODULES!r} beside the configuration file"
        ) from None
    value = getattr(holder, name, None)
    if not callable(value):
        near = sorted(each for each in vars(holder) if not each.startswith("_") and callable(getattr(holder, each)))
        raise BadAgent(
            f"{key} = {where!r}: module {module} has no callable {name!r}; it has: {', '.join(near[:20]) or 'none'}"
        )
    return value  # type: ignore[no-any-return]
