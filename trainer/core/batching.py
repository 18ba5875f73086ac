"""How one optimiser step's examples are shared out: over processes, and over passes where memory holds fewer at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batching:
    """Each of `processes` takes `at_once` examples `passes` times for one step of `batch` examples."""

    batch: int
    processes: int
    at_once: int
    passes: int

    def smaller(self) -> Batching | None:
        """The same step with fewer examples at once, half or less of them; None when it is one already."""
        if self.at_once == 1:
            return None
        return shared(self.batch, self.processes, self.at_once // 2)


def shared(batch: int, processes: int = 1, at_once_max: int | None = None) -> Batching:
    """The fewest passes with at most `at_once_max` examples at once (None: all), so that every step has `batch` examples.

    Raises ValueError when the processes cannot share the batch evenly.
    """
    own, rest = divmod(batch, processes)
    if own < 1 or rest:
        raise ValueError(
            f"batch = {batch}: {processes} processes cannot share it evenly; use a multiple of {processes}"
        )
    limit = own if at_once_max is None else max(1, min(own, at_once_max))
    at_once = next(size for size in range(limit, 0, -1) if own % size == 0)
    return Batching(batch, processes, at_once, own // at_once)
