"""The five tools of the learning loop (L3), for Python, for `trainer tool` and, through MCP, for agents on language models.

    collect_samples   request_training   deploy_model   query_metrics   notify

A tool looks things up, or places an order that the running `trainer serve` decides on. Law of this file: no tool writes
anything but orders, and every order says that an agent asks, so that nothing of L15 can be got around from here: no training
within the minimum interval, no release that no gate has passed; and no tool removes or relabels a sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import select

from trainer.config import ConfigError, TrainerConfig
from trainer.config_drift import GROUP_BY_MAX, Label
from trainer.config_text import own_names
from trainer.core.selectors import BadSelector
from trainer.database import Database, jobs, rollouts
from trainer.figures import LATEST, latest_detections, release_figures, sample_figures
from trainer.fleet import free_samples, training_counts
from trainer.inventory import chosen, known_labels
from trainer.live import KEEP_S
from trainer.orders import await_answer, place, withdraw
from trainer.ready import decision
from trainer.rollouts import Known, progress
from trainer.status import job_status, promised

WAIT_S = 15.0
VALUE_MAX = 80  # characters of a wrong value in an error
Selector = Annotated[
    str, Field(max_length=4096, description="Devices, as site=plant1,profile!=pi4,line in (a,b); empty: all.")
]


class ToolRefused(Exception):
    """A tool cannot do what was asked; the message says why and what would help."""


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CollectSamples(_Arguments):
    """Count the samples that devices keep, by model, device, state and class, with the confidence of their labels; say
    whether they are enough for a training; with `pull` fetch the pixels of the newest labelled ones from the devices."""

    model: str = Field(description="The model, as it is configured.")
    selector: Selector = ""
    state: Literal["", "captured", "escalated", "labelled", "unresolved", "claimed", "used", "archived", "rejected"] = (
        ""
    )
    pull: bool = Field(False, description="Fetch pixels of labelled samples into the pool; the devices keep theirs.")
    limit: int = Field(100, ge=1, le=5000, description="At most this many are pulled.")
    seconds: float = Field(3600.0, gt=0, le=604800.0, description="How long devices may take to hand pixels over.")


class RequestTraining(_Arguments):
    """Train a model on the new labelled samples. It is refused while a training or a rollout of the model is open, within
    the minimum interval since the last one, and with too few new samples."""

    model: str = Field(description="The model, as it is configured.")


class DeployModel(_Arguments):
    """Bring a release that passed the gate to the fleet: first to a few devices, which are watched, then to all."""

    release: str = Field(description="name@version, registered; `query_metrics` names releases.")


class QueryMetrics(_Arguments):
    """What the fleet answered with each release and how right it was, as an estimate with its 95 % interval (value null: too
    little was checked), by the hour for 180 days; the newest trainings and rollouts, and drift that was found."""

    model: str = Field("", description="Only this model; empty: all.")
    selector: Selector = ""
    hours: float = Field(24.0, gt=0, le=KEEP_S / 3600, description="How far to look back, from a whole hour on.")
    group_by: list[Label] = Field(
        [],
        max_length=GROUP_BY_MAX,
        description="Labels, as site, profile or line: figures for each of their values too.",
    )


class Notify(_Arguments):
    """Tell the people who look after the fleet something, on the ways that are configured (mail, chat, webhooks, MQTT)."""

    text: str = Field(min_length=1, max_length=2000)
    title: str = Field("", max_length=120)
    level: Literal["info", "warning", "error"] = "info"


def shown_value(value: Any) -> str:
    """A value that was given, as an error names it."""
    text = repr(value)
    return text if len(text) <= VALUE_MAX else f"{text[:VALUE_MAX]}..."


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool: what it takes, and what it does with a checked `_Arguments` of that type."""

    name: str
    takes: type[_Arguments]
    changes: bool  # it places an order
    act: Callable[[Tools, Any], dict[str, Any]]

    @property
    def description(self) -> str:
        """What it is for, in words."""
        return " ".join((self.takes.__doc__ or "").split())

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of its arguments."""
        return self.takes.model_json_schema()


class Tools:
    """The tools at work on one trainer's database. Every method takes the arguments that its schema names, returns plain
    data and raises ToolRefused."""

    def __init__(self, config: TrainerConfig, database: Database, wait_s: float = WAIT_S) -> None:
        """`wait_s`: how long the running `trainer serve` may take for an order; one that it did not begin is withdrawn."""
        self._config, self._database, self._wait_s = config, database, wait_s

    def call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Check the arguments of a tool and use it; raises ToolRefused, also for an unknown tool or argument."""
        tool = TOOLS.get(name)
        if tool is None:
            raise ToolRefused(f"tool {name!r} is unknown; there are {', '.join(TOOLS)}")
        try:
            checked = tool.takes.model_validate(arguments)
        except ValidationError as error:
            wrong = (
                f"{'.'.join(map(str, each['loc'])) or 'arguments'}: {each['msg']}, not {shown_value(each['input'])}"
                for each in error.errors()
            )
            raise ToolRefused(
                f"{name}: {'; '.join(wrong)}; its arguments are {', '.join(tool.takes.model_fields)}"
            ) from None
        try:
            return tool.act(self, checked)
        except (ConfigError, BadSelector) as error:
            raise ToolRefused(f"{name}: {error}") from None

    def collect_samples(self, **arguments: Any) -> dict[str, Any]:
        """Counts and quality of samples, and a pull of their pixels when it is asked for."""
        return self.call("collect_samples", arguments)

    def request_training(self, **arguments: Any) -> dict[str, Any]:
        """The answer of L16."""
        return self.call("request_training", arguments)

    def deploy_model(self, **arguments: Any) -> dict[str, Any]:
        """The rollout that begins."""
        return self.call("deploy_model", arguments)

    def query_metrics(self, **arguments: Any) -> dict[str, Any]:
        """Figures by release, job statuses (L17), rollouts and drift."""
        return self.call("query_metrics", arguments)

    def notify(self, **arguments: Any) -> dict[str, Any]:
        """Whether it was taken: sending goes on in `trainer serve`."""
        return self.call("notify", arguments)

    def _order(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        order = place(self._database, kind, {**body, "by": "agent"})
        answer = await_answer(self._database, order, self._wait_s)
        if answer is None and withdraw(self._database, order):
            raise ToolRefused(f"no answer within {self._wait_s:g} s, nothing was done: is `trainer serve` running?")
        answer = answer if answer is not None else await_answer(self._database, order, 0.0) or {}
        if "error" in answer:
            raise ToolRefused(str(answer["error"]))
        return answer

    def _collect(self, asked: CollectSamples) -> dict[str, Any]:
        settings, now = self._config.any_model(asked.model), time.time()
        with self._database.read() as connection:
            names = set(chosen(connection, self._config.site, asked.selector))
            counts = sample_figures(connection, asked.model, asked.state, names)
            new, usable = training_counts(
                connection, asked.model, settings.label_confidence_min, own_names(asked.model, settings)
            )
            rules = settings.trigger_rules()
            decided = decision(connection, self._config, asked.model, rules, now=now, wish="agent")
            wanted = free_samples(connection, asked.model, sorted(names), asked.limit) if asked.pull else []
        found = {
            "model": asked.model,
            "samples": counts,
            "samples_new": new,
            "samples_usable": usable,
            "trains_at": rules.threshold + 1,
            "training_now": decided.reason,
        }
        if asked.pull:
            if not wanted:
                raise ToolRefused("collect_samples: no labelled sample of these devices is free to be pulled")
            found |= self._order("pull", {"samples": wanted, "seconds": asked.seconds})
            found["pulled"] = len(wanted)
        return found

    def _train(self, asked: RequestTraining) -> dict[str, Any]:
        self._config.any_model(asked.model)
        return self._order("train", {"model": asked.model})

    def _deploy(self, asked: DeployModel) -> dict[str, Any]:
        return self._order("rollout_start", {"release": asked.release})

    def _query(self, asked: QueryMetrics) -> dict[str, Any]:
        if asked.model:
            self._config.any_model(asked.model)
        with self._database.read() as connection:
            names = set(chosen(connection, self._config.site, asked.selector))
            known_labels(connection, self._config.site, asked.group_by)

            known: Known = {}

            def latest(table: Any) -> list[Any]:
                query = select(table).order_by(table.c.created.desc()).limit(LATEST)
                return list(connection.execute(query.where(table.c.model == asked.model) if asked.model else query))

            return {
                "devices": sorted(names),
                "releases": release_figures(
                    connection, self._config, time.time() - 3600 * asked.hours, asked.model, names, asked.group_by
                ),
                "jobs": [promised(job_status(connection, self._config, row)) for row in latest(jobs)],
                "rollouts": [progress(connection, row, known) for row in latest(rollouts)],
                "drift": latest_detections(connection, asked.model),
            }

    def _notify(self, asked: Notify) -> dict[str, Any]:
        return self._order("notify", asked.model_dump())


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("collect_samples", CollectSamples, True, Tools._collect),
        Tool("request_training", RequestTraining, True, Tools._train),
        Tool("deploy_model", DeployModel, True, Tools._deploy),
        Tool("query_metrics", QueryMetrics, False, Tools._query),
        Tool("notify", Notify, True, Tools._notify),
    )
}
