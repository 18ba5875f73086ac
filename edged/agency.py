"""The agents in a daemon: nothing of them is imported where none is configured."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged.core.confidence import answer_probability
from edged.core.health import Problem
from edged.prompts import UNFINISHED
from edged.recent import Recent
from edged.store import StoreError
from edged.wire import topics
from edged.wire.manifest import Calibration

if TYPE_CHECKING:
    from edged.agents.feedback import Execution
    from edged.daemon import Daemon

log = logging.getLogger(__name__)

PIPELINE = "agent:"  # before the agent's name, where others have a pipeline's
MISSING = "install edged with its extra `agents` (Debian: the package edged-llm), then restart it"
AGENT = "agent"  # reason of an answer that no policy has judged


class Agency:
    """What the composition root starts, asks and stops of the agents."""

    def __init__(self, daemon: Daemon, config: Path | None, recent: Recent | None) -> None:
        """`config`: the file that the settings came from; beside it modules of agents may lie. `recent`: what they see."""
        self._config, self._recent, self._daemon = config, recent, daemon
        self._missing = ""  # why no agent runs although some are configured
        self._hosted: Any = None
        self._socket: Any = None
        settings = daemon.settings
        if not settings.agents and not settings.peers:
            return
        try:
            from edged.agents.hosted import Hosted
            from edged.agents.local import AgentSocket
            from edged.agents.peers import Mail
            from edged.agents.recorded import StoreRecorder
        except ImportError as error:  # what does not need it serves on
            self._missing = f"none runs: a package is missing: {error.name}"
            log.error("agents: %s; %s", self._missing, MISSING)
            return
        control, store, clock = daemon.control, daemon.store, daemon.clock
        recorder = StoreRecorder(store, clock, daemon.told, control.wake, self._observe)
        self._hosted = Hosted(
            settings.agents, daemon.slots, store, recorder, clock, daemon.pace, self._failed, control.say
        )
        mail = Mail(self._hosted, store, daemon.link, daemon.told, clock, control.wake)
        self._hosted.with_peers(settings.peers, mail)
        control.also[topics.INVOKE], control.also[topics.INVOKED] = mail.on_invoke, mail.on_invoked
        self._socket = AgentSocket(settings.device.state_dir, self._hosted)

    def start(self) -> None:
        """Make the agents and listen. Raises OSError."""
        self._forget_others()
        if self._hosted is not None:
            from edged.agents.learnable import offer_training
            from edged.agents.sight import offer_sight

            offer_sight(self._recent)
            offer_training(self._wish)
            self._hosted.start(self._config)
            self._socket.start()

    def _forget_others(self) -> None:
        """What agents have said that are configured no longer, or remember nothing any more, goes."""
        remember = [name for name, agent in self._daemon.settings.agents.items() if agent.remember]
        try:
            gone = self._daemon.store.conversations.keep_only(remember)
        except StoreError as error:
            log.error("conversations of agents that are gone were kept: %s", error)
            return
        if gone:
            log.info("the conversations of agents that are configured no longer were removed: %s", ", ".join(gone))

    def stop(self) -> bool:
        """End what runs; false when it did not end in time."""
        if self._hosted is None:
            return True
        self._socket.stop()
        ended: bool = self._hosted.stop()
        from edged.agents.learnable import offer_training
        from edged.agents.sight import offer_sight

        offer_sight(None)
        offer_training(None)
        return ended

    def status(self) -> dict[str, Any]:
        """The agents, for the status document."""
        if self._hosted is None:
            return {}
        shown = ("slot", "device", "running", "error")  # the rest: `edged agent list`
        found: dict[str, dict[str, Any]] = self._hosted.status()
        return {"agents": {name: {key: each[key] for key in shown if key in each} for name, each in found.items()}}

    def problems(self) -> Iterable[Problem]:
        """Agents that do not run."""
        if self._missing:
            return (Problem("agents", self._missing, MISSING),)
        return () if self._hosted is None else self._hosted.problems()

    def _observe(self, execution: Execution) -> None:
        """Count what a model said for an agent, as what it says for a pipeline: its release is judged by both."""
        d, name = self._daemon, f"{PIPELINE}{execution.agent}"
        for asked in execution.asked:
            said, slot = asked.said, d.slots.get(execution.model)
            if said.end.reason in UNFINISHED or slot is None:
                continue
            release, live = said.adapter or said.release, slot.live
            same = live is not None and release in (live.ref.release, live.adapter and live.adapter.release)
            calibration = live.calibration if live is not None and same else Calibration()
            p = answer_probability(said.end.mean_logprob, calibration).p
            d.window.answer(name, release, "accept", AGENT, p, asked.latency_ms)
            d.tallies.answer(
                slot.name, release, reason=AGENT, empty=not said.text.strip(),
                latency_ms=asked.latency_ms / max(1, said.end.answer_tokens),
            )  # fmt: skip

    def _wish(self, wish: Mapping[str, Any]) -> Mapping[str, Any]:
        """An agent asks for a training. A device commands no trainer: its samples are announced, and people are told."""
        text = f"agent {wish['agent']} asks for a training of {wish['model']} with {len(wish['samples'])} judged runs"
        asked = {key: wish[key] for key in ("agent", "model", "learning_head", "learning_head_config", "samples")}
        self._daemon.control.say("training_wanted", text, **asked)
        reason = "its samples are announced; the triggers of the trainer decide, or a person with `trainer train`"
        return {"action": "announced", "reason": reason}

    def _failed(self, slot: str, *, ended: bool) -> None:
        """An engine failed under an agent."""
        d, live = self._daemon, self._daemon.slots[slot].live
        d.updater.engine_error(slot, ended=ended)
        if live is not None:
            d.window.error(f"{PIPELINE}{slot}", live.adapter.release if live.adapter else live.ref.release)
