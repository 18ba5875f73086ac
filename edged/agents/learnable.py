"""Agents that learn: what people say of their runs becomes samples, and the trainer's adapter comes back into the slot.

The device trains nothing. Its agent holds the configuration of the adapter (`learning_head_config`, checked here with the
trainer's own rules) and the experience (`learning_memory`); the weights, and `PeftHead`, live with the trainer. A release
or an adapter that comes back replaces the running one underneath: the agent notices it in what `adapt_behavior` reports.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edged.agents.agent import Agent
from edged.agents.base import BaseAgent
from edged.agents.feedback import BadFeedback, Feedback, Recorder, offered_recorder
from edged.agents.lessons import KeptLessons, LearningMemory, Lesson
from edged.agents.memory import Kept
from edged.agents.models import LentModel, Model, ModelConfig, ServerModel
from edged.core.lora import LoraSettings, SettingsError
from edged.engines.base import EngineError

HEADS = ("peft",)
ANSWER_CHARS_MAX = 2000  # of a refusal
Json = Mapping[str, Any]

# Asks whoever trains: `{"agent", "model", "learning_head", "learning_head_config", "samples"}` in, what came of it out
# (`action`, `reason`, `training_job_id`, ... as `request_training` answers). Blocks; raises whatever says no.
Training = Callable[[Json], Json]


class NothingToLearn(ValueError):
    """There is no run, or nobody who keeps it, that feedback could be of."""


@dataclass(frozen=True, slots=True)
class LearningConfig:
    """What an agent learns with, in one piece: `learning_head` and `learning_head_config` of its constructor."""

    learning_head: str | None = "peft"
    learning_head_config: Json | None = None


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What `adapt_behavior` did: `asked` for what, the `answer` to it (None: nobody could be asked), and what runs.

    `before` and `after` are (release, adapter) under which the oldest fresh lesson was given, and that answer now;
    `samples`: the runs with feedback since a training was last asked for.
    """

    samples: tuple[str, ...]
    asked: Json
    answer: Json | None
    refused: str
    before: tuple[str, str]
    after: tuple[str, str]

    @property
    def adapted(self) -> bool:
        """Whether what answers now is not what was corrected."""
        return self.before != self.after

    def __str__(self) -> str:
        runs = _named(self.after)
        changed = f"{_named(self.before)} was replaced by {runs}" if self.adapted else f"{runs} still answers"
        if self.refused:
            said = f"training refused: {self.refused}"
        elif self.answer is None:
            said = "nobody was asked to train: there is nothing new to learn, or no way to the trainer"
        else:
            said = ", ".join(f"{key}: {value}" for key, value in self.answer.items())
        return f"{len(self.samples)} runs with new feedback; {said}; {changed}"


_training: list[Training] = []  # of the daemon that hosts this process's agents; one at most


def offer_training(training: Training | None) -> None:
    """The daemon offers its way to the trainer to agents of this process; None takes it back."""
    _training[:] = [] if training is None else [training]


class BaseLearnableAgent(BaseAgent, ABC):
    """An agent whose model has weights at hand somewhere: it says which adapter is to be learned for them."""

    def __init__(
        self, model: ModelConfig | Model, description: str, learning_head: str | None = None,
        learning_head_config: dict[str, Any] | None = None, max_tokens: int | None = 512, agent_name: str | None = None,
        allowed_peers: Iterable[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """`learning_head`: "peft", or None for an agent that does not learn; its configuration has PEFT's keys `r`,
        `lora_alpha`, `target_modules`, `lora_dropout` and `bias`. Raises SettingsError (ValueError) naming what is wrong."""
        if learning_head is None and learning_head_config:
            raise SettingsError('learning_head_config without a learning_head; give learning_head="peft"')
        if learning_head is not None and learning_head not in HEADS:
            raise SettingsError(f"learning_head {learning_head!r}: known are {', '.join(HEADS)}")
        if isinstance(model, ServerModel) or (isinstance(model, ModelConfig) and model.type == "api"):
            raise SettingsError(
                "a learnable agent needs a model whose weights the trainer has, not a server's; use Agent, or "
                'ModelConfig(type="local", ...)'
            )
        self.learning_head = learning_head
        self.peft_config = (
            LoraSettings.parse(learning_head_config or {}, "learning_head_config") if learning_head else None
        )
        super().__init__(
            model, description, max_tokens=max_tokens, agent_name=agent_name, allowed_peers=allowed_peers, **kwargs
        )

    @property
    def learning_head_config(self) -> dict[str, Any]:
        """The whole configuration of the adapter, defaults included; {} without a learning head."""
        return self.peft_config.model_dump(mode="json") if self.peft_config else {}

    def running(self) -> tuple[str, str]:
        """The release and the adapter that answer now, "" where it is not known."""
        model = self.model
        if not isinstance(model, LentModel):
            return "", ""
        try:
            return model.running()
        except EngineError:
            return "", ""  # nothing answers at this moment


class LearnableAgent(BaseLearnableAgent, Agent):
    """An Agent that learns from feedback on its runs."""

    def __init__(
        self, *args: Any, training: Training | None = None, learning_config: LearningConfig | None = None, **kwargs: Any
    ) -> None:
        """As BaseLearnableAgent and Agent; `training`: the way to the trainer, else what the daemon offers. Where the
        conversation outlives the process, so does what the agent was told. `learning_config`: instead of `learning_head` and
        `learning_head_config`."""
        if learning_config is not None:
            twice = {"learning_head", "learning_head_config"} & kwargs.keys()
            if twice:
                raise SettingsError(f"learning_config and {min(twice)}: give one of them")
            kwargs |= {
                "learning_head": learning_config.learning_head,
                "learning_head_config": dict(learning_config.learning_head_config or {}),
            }
        super().__init__(*args, **kwargs)
        self._train = training
        kept = self.memory.conversation
        lessons = KeptLessons(kept.conversations, kept.agent) if isinstance(kept, Kept) else None
        self.learning_memory = LearningMemory(kept=lessons)

    @property
    def feedback_mechanism(self) -> Recorder | None:
        """Who keeps the runs and makes samples of the feedback."""
        return self.recorder or offered_recorder()

    def learn_from_feedback(self, feedback: Feedback, execution: str | None = None) -> None:
        """Make a labelled sample, or a pair, of what somebody says of a run: the newest one, or the one recorded as
        `execution`. It is on the disk when this returns.

        Raises NothingToLearn, BadFeedback for feedback that does not fit the run, and the recorder's errors.
        """
        if self.learning_head is None:
            raise NothingToLearn(f'agent {self.name} has no learning head; make it with learning_head="peft"')
        recorder = self.feedback_mechanism
        if recorder is None:
            raise NothingToLearn(
                f"agent {self.name}: nobody keeps its runs; give it a recorder, or run it in the daemon"
            )
        of = execution or self.last_execution
        if of is None:
            raise NothingToLearn(f"agent {self.name} has no recorded run yet; run it first, or name the execution")
        release, adapter = self.running()
        recorder.feedback(of, feedback)
        self.learning_memory.keep(Lesson(of, feedback, release, adapter))

    def adapt_behavior(self) -> Adaptation:
        """Ask for a training with what is new, and report what came of it and what runs now. Never raises for a refusal:
        too few samples, a minimum interval and a gate are the trainer's to say (L15)."""
        fresh = self.learning_memory.fresh
        samples = tuple(dict.fromkeys(lesson.execution for lesson in fresh))
        wish = {
            "agent": self.name, "model": self.model_config.name, "learning_head": self.learning_head,
            "learning_head_config": self.learning_head_config, "samples": list(samples),
        }  # fmt: skip
        lessons = self.learning_memory.lessons
        after = self.running()
        told = fresh or lessons[-1:]
        before = (told[0].release, told[0].adapter) if told else after
        train = self._train or next(iter(_training), None)
        answer, refused = None, ""
        if samples and train is not None:
            try:
                answer = dict(train(wish))
            except Exception as error:  # what says no is whoever was asked; each has its own error
                refused = str(error)[:ANSWER_CHARS_MAX] or type(error).__name__
                self.logger.info("training refused: %s", refused)
            else:
                self.learning_memory.asked(fresh)
        return Adaptation(samples, wish, answer, refused, before, after)


def _named(running: tuple[str, str]) -> str:
    release, adapter = running
    return f"{release or 'the model'}{f' with {adapter}' if adapter else ''}"


__all__ = [
    "Adaptation", "BadFeedback", "BaseLearnableAgent", "Feedback", "LearnableAgent", "LearningMemory", "Lesson",
    "NothingToLearn", "Training", "offer_training",
]  # fmt: skip
