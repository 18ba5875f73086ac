"""What `trainer.train` asks of every kind of model."""

from __future__ import annotations

from typing import Any, Protocol

from trainer.core.gate import Verdict


class Training(Protocol):
    """One training of one kind, a step after another: each goes on from what those before it left.

    Every step raises DatasetError, ReleaseError, EngineError, ValueError or OSError with a message for people.
    """

    def read(self) -> int:
        """Take in the data and keep its parts (training, calibration, holdouts) apart; how many samples are usable."""
        ...

    def check(self) -> None:
        """Refuse what could only fail, or be refused, after the training: too little to train on or to judge by, a
        checkpoint or settings that do not fit. What is refused here has used no sample."""
        ...

    def tune(self) -> None:
        """Train: the trainable result lies in the run's folder."""
        ...

    def export(self) -> None:
        """Make the files that ship, in `candidate/` of the run."""
        ...

    def calibrate(self) -> None:
        """Fit how sure the shipped files may be, on data that trained nothing."""
        ...

    def evaluate(self) -> None:
        """Measure the shipped files, and the release that runs now, on the frozen holdout."""
        ...

    def judge(self) -> Verdict:
        """The gate's word on what was measured."""
        ...

    def summary(self) -> dict[str, Any]:
        """The few figures that a job's status shows."""
        ...

    def complete(self, verdict: Verdict) -> None:
        """Make `candidate/` of the run a release: golden set, evaluation, lineage, release.json."""
        ...
