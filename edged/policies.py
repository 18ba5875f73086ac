"""The policies of this device's pipelines: what the fleet desires, laid over what is configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edged.core.policy import Policy
from edged.pipeline import Pipeline
from edged.store import Store


class Policies:
    """`say(kind, text)`: an event for people. All calls on the control loop."""

    def __init__(self, pipelines: Mapping[str, Pipeline], store: Store, say: Callable[[str, str], None]) -> None:
        self._pipelines, self._store, self._say = pipelines, store, say
        self._desired: dict[str, dict[str, Any]] = {}

    def desire(self, desired: dict[str, dict[str, Any]]) -> None:
        """The fleet has spoken: pipeline -> keys of its policy."""
        self._desired = desired
        self.apply()

    def apply(self) -> None:
        """Each pipeline has its policy; what cannot be one is said."""
        for name in self._desired.keys() - self._pipelines.keys():
            self._refuse(name, f"no such pipeline; known: {', '.join(sorted(self._pipelines)) or 'none'}")
        for name, pipeline in self._pipelines.items():  # one that is not named has its configured policy again
            try:
                policy: Policy = replace(pipeline.config.policy, **self._desired.get(name, {}))
                pipeline.policy = replace(policy, escalate=policy.escalate and bool(pipeline.config.escalate_to))
            except (TypeError, ValueError) as error:
                self._refuse(name, str(error))

    def _refuse(self, pipeline: str, reason: str) -> None:
        self._store.count("desired_invalid")
        self._say("bad_policy", f"desired policy of {pipeline!r}: {reason}")
