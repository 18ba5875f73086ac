"""Agents that run on the device's own models, and learn (docs/agents.md)."""

from edged.agents.agent import Agent
from edged.agents.base import BaseAgent, RunLimits
from edged.agents.feedback import BadFeedback, Feedback, Preference, Recorder
from edged.agents.guild import AgentBuilder, AgentSpec, Guild, GuildBuilder
from edged.agents.learnable import BaseLearnableAgent, LearnableAgent
from edged.agents.memory import MemoryManager
from edged.agents.messages import LogLevel, Message, RequestContext
from edged.agents.models import BaseLLM, ModelConfig
from edged.agents.orchestra import Orchestra, OrchestraLimits
from edged.agents.phi import (
    GenerationPromptRequest,
    GenerationPromptResponse,
    LLMPhiAgent,
    PhiAgent,
    PhiAgentProps,
    PyTorchAgentProps,
)
from edged.agents.registry import AgentRegistry, NameTaken
from edged.agents.schemas import BadSchema
from edged.agents.tools import Tool

__all__ = [
    "Agent",
    "AgentBuilder",
    "AgentRegistry",
    "AgentSpec",
    "BadFeedback",
    "BadSchema",
    "BaseAgent",
    "BaseLLM",
    "BaseLearnableAgent",
    "Feedback",
    "GenerationPromptRequest",
    "GenerationPromptResponse",
    "Guild",
    "GuildBuilder",
    "LLMPhiAgent",
    "LearnableAgent",
    "LogLevel",
    "MemoryManager",
    "Message",
    "ModelConfig",
    "NameTaken",
    "Orchestra",
    "OrchestraLimits",
    "PhiAgent",
    "PhiAgentProps",
    "Preference",
    "PyTorchAgentProps",
    "Recorder",
    "RequestContext",
    "RunLimits",
    "Tool",
]
