"""Agents that run on the device's own models, and learn (docs/agents.md)."""

from edged.agents.agent import Agent
from edged.agents.base import BaseAgent, RunLimits
from edged.agents.feedback import BadFeedback, Feedback, FeedbackMechanism, Preference, Recorder
from edged.agents.guild import AgentBuilder, AgentSpec, Guild, GuildBuilder
from edged.agents.learnable import BaseLearnableAgent, LearnableAgent, LearningConfig, LearningMemory
from edged.agents.memory import MemoryManager
from edged.agents.messages import LogLevel, Message, RequestContext
from edged.agents.models import BaseLLM, ModelConfig, ServerModel
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

# Names of the documented interface for kinds of models: here every model is a language model, of this device or of a server.
BaseVLM = BaseLLM
BaseAPIModel = ServerModel

__all__ = [
    "Agent",
    "AgentBuilder",
    "AgentRegistry",
    "AgentSpec",
    "BadFeedback",
    "BadSchema",
    "BaseAPIModel",
    "BaseAgent",
    "BaseLLM",
    "BaseLearnableAgent",
    "BaseVLM",
    "Feedback",
    "FeedbackMechanism",
    "GenerationPromptRequest",
    "GenerationPromptResponse",
    "Guild",
    "GuildBuilder",
    "LLMPhiAgent",
    "LearnableAgent",
    "LearningConfig",
    "LearningMemory",
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
