"""The agent that looks after the fleet's learning: it collects, asks for trainings and rollouts, measures and tells people.

It has the trainer's five tools and nothing else. What it must not do (train constantly, deploy without validation, take
samples away, train on bad labels) is refused under the tools, by the running trainer, whatever its model says (L15).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edged.agents.agent import Agent
from edged.agents.models import Model, ModelConfig
from edged.agents.tools import Tool

NAME = "LearningAgent"
TOOL_S_MAX = 60.0  # an order waits for the running trainer's decision
FIVE = ("collect_samples", "request_training", "deploy_model", "query_metrics", "notify")
INSTRUCTION = """You keep the models of a fleet of edge devices good.

1. Look first: query_metrics and collect_samples, for each model that you are asked about.
2. Ask for a training (request_training) when there are more than 100 new labelled samples, when drift was found, or when
   an operator asks for it.
3. Bring a release to the fleet (deploy_model) only when its gate has passed it: it goes to a tenth of the devices, is
   watched for an hour, and then goes to all, or back.
4. Tell people (notify) what you began and what was refused.

Don't train constantly, don't deploy what was not validated, don't train on labels of low confidence. What is refused says
why; asking again at once changes nothing: report the refusal."""

_REASON = {"type": "string", "maxLength": 400}
_TRIGGERED: dict[str, Any] = {
    "action": {"const": "training_triggered"},
    "reason": _REASON,
    "samples_collected": {"type": "integer", "minimum": 0},
    "training_job_id": {"type": "string", "minLength": 1, "maxLength": 200},
    "target_model": {"type": "string", "minLength": 1, "maxLength": 200},
    "estimated_completion": {"type": "string", "minLength": 1, "maxLength": 40},
}
_OTHERWISE: dict[str, Any] = {"action": {"enum": ["deployment_started", "notified", "nothing"]}, "reason": _REASON}
# What it did: of a training that it asked for all the fields of the trainer's answer (L16), and nothing less.
ANSWER: dict[str, Any] = {
    "anyOf": [
        {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        for fields in (_TRIGGERED, _OTHERWISE)
    ]
}


class Described(Protocol):
    """One tool as the trainer describes it."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def schema(self) -> Mapping[str, Any]: ...


def trainer_tools(
    described: Mapping[str, Described], call: Callable[[str, dict[str, Any]], Mapping[str, Any]]
) -> dict[str, Tool]:
    """The five tools for an agent. `described`: by name (`trainer.tools.TOOLS`); `call`: uses one (`Tools.call`), raises
    what refuses. Raises ValueError when one of the five is missing; others are not handed on."""
    missing = [name for name in FIVE if name not in described]
    if missing:
        raise ValueError(f"the trainer has no tool {', '.join(missing)}; update it")

    def use(name: str) -> Callable[..., Any]:
        return lambda **arguments: call(name, arguments)

    return {
        name: Tool.described(
            name, described[name].description, described[name].schema, use(name), seconds_max=TOOL_S_MAX
        )
        for name in FIVE
    }


def learning_agent(
    model: ModelConfig | Model, tools: Mapping[str, Tool], *, agent_name: str = NAME, **more: Any
) -> Agent:
    """The agent. `tools` are those of `trainer_tools`; `more` as for Agent. Raises ValueError."""
    if set(tools) != set(FIVE):
        raise ValueError(f"the learning agent has the tools {', '.join(FIVE)}, not {', '.join(tools) or 'none'}")
    return Agent(model, INSTRUCTION, tools, agent_name, output_schema=ANSWER, **more)
