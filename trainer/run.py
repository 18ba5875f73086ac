"""A training run: the folder that it writes, how long its stages took, what is known of it, and who hears how it goes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.child import PROGRESS
from trainer.files import write_json
from trainer.jobfile import TrainJob

log = logging.getLogger(__name__)

FACTS = "facts.json"  # what is known so far, in the run's folder: all that is left when the process dies
HISTORY_MAX = 2000  # rows of metadata.json's history

Hear = Callable[[Mapping[str, Any]], None]  # "ts", "stage", and what else is known: "epoch", "epochs", "loss", ...


@dataclass(slots=True)
class Run:
    """One run of `job`. `facts` become part of metadata.json; `history` is what each epoch of the training gave."""

    job: TrainJob
    hear: Hear = lambda _line: None
    timings_s: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where everything of the run lies."""
        return self.job.run

    @property
    def candidate(self) -> Path:
        """The folder of the release that is being made."""
        return self.job.run / "candidate"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage: said at its beginning, timed to its end."""
        started = time.perf_counter()
        self.progress(name)
        yield
        self.timings_s[name] = round(time.perf_counter() - started, 2)
        log.info("%s took %.1f s", name, self.timings_s[name])
        known = {"timings_s": self.timings_s, "history": self.history, "facts": self.facts}
        write_json(self.folder / FACTS, known)

    def progress(self, stage: str, **fields: Any) -> None:
        """One line of progress for whoever watches: in the run's folder, and for `hear`."""
        line = {"ts": time.time(), "stage": stage, **fields}
        with (self.folder / PROGRESS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.hear(line)

    def epoch(self, values: Mapping[str, float]) -> None:
        """What an epoch (or a step) of the training gave, numbers by name, with `epoch` and `epochs` among them."""
        self.history.append(dict(values))
        if len(self.history) > HISTORY_MAX:  # a long training tells every step: every second one shows as much
            del self.history[1::2]
        self.progress("train", **values)
