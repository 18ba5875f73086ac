"""What the processes of one training do together: agree that the memory is too small, and share their gradients.

A process that runs out of memory in the middle of a step must not leave the others waiting for its gradients. So nothing
inside a step waits for another process; when each is through with its share they agree (`agree`), and only then do they
add up (`average`). Imported by what has torch already; the limit is for everybody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# How long a process waits for the others, to join and in every exchange: longer than the first process takes for what it
# does alone (loading, validation, a checkpoint). Then it ends with an error, and so the training does.
COLLECTIVE_S_MAX = 1800.0
_LIMIT = "TRAINER_COLLECTIVE_S_MAX"  # replaces it, in the environment


class OutOfMemoryTogether(RuntimeError):
    """Some process ran out of memory, and all of them know it and have stopped at the same step."""


class Lost(RuntimeError):
    """Another process ended or did not answer in time; the message says what to do."""


def patience() -> timedelta:
    """How long to wait for the other processes; raises ValueError for a limit that is none."""
    given = os.environ.get(_LIMIT, str(COLLECTIVE_S_MAX))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise ValueError(f"{_LIMIT} = {given!r}: use a number of seconds from 1 to 86400")
    return timedelta(seconds=seconds)


def lost(error: Exception) -> str:
    """What to say when the other processes are gone or silent."""
    return (
        f"another process of this training ended, or did not answer for {patience().total_seconds():.0f} s: its own output "
        f"says why. Start all of them again: the training continues from its last checkpoint ({error})"
    )


class Together:
    """The processes of a training that has been joined; of a single one each word is the last."""

    def __init__(self, processes: int) -> None:
        """Collective: every process makes one, at the same point."""
        self.processes = processes
        self._sum: torch.Tensor | None = None
        # On the CPU whatever the training runs on: to agree costs a GPU no wait.
        self._group: Any = distributed.new_group(backend="gloo", timeout=patience()) if processes > 1 else None

    def agree(self, mine: bool) -> bool:
        """Whether it is so in any process. Collective; raises Lost."""
        if self.processes == 1:
            return mine
        said = torch.tensor([int(mine)])
        try:
            distributed.all_reduce(said, distributed.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise Lost(lost(error)) from None
        return bool(said.item())

    def room(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Have the memory that `average` needs, where running out of it can still be agreed upon."""
        if self.processes > 1 and self._sum is None:
            learning = [each for each in parameters if each.requires_grad]
            size = sum(each.numel() for each in learning)
            self._sum = torch.zeros(size, dtype=torch.float32, device=learning[0].device if learning else "cpu")

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the mean of all gradients. Collective; one that is missing counts as nothing."""
        if self.processes == 1:
            return
        learning = [each for each in parameters if each.requires_grad]
        self.room(learning)
        assert self._sum is not None
        parts = torch.split(self._sum, [each.numel() for each in learning])
        for part, each in zip(parts, learning, strict=True):
            part.copy_(each.grad.flatten()) if each.grad is not None else part.zero_()
        distributed.all_reduce(self._sum)
        self._sum /= self.processes
        for part, each in zip(parts, learning, strict=True):
            if each.grad is not None:
                each.grad.copy_(part.view_as(each))
            elif bool(part.any()):
                each.grad = part.view_as(each).to(each.dtype, copy=True)
