"""How the processes of one training find each other, also after their launcher has started them again.

`torchrun --max_restarts` keeps one store for all its attempts (torch's c10d and static rendezvous), and what processes say
there is not named by the attempt: those of the second one read the addresses of the first one's and wait for processes
that are gone (https://github.com/pytorch/pytorch/issues/135712). The count of restarts that it tells is a host's own, so it
names no attempt either. So here the first process gives each start a word of its own, and all look below that word only.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.tuners.together import patience

_POLL_S = 0.05
_WORD_BYTES = 16


def join(backend: str) -> None:
    """Make the default group of the processes that a launcher started, where nobody has; raises torch's DistError when one
    of them does not come in time."""
    if distributed.is_initialized():
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, rank, size = next(rendezvous("env://", rank, size, timeout=patience()))
    store.set_timeout(patience())
    word = meet(store, rank, size, secrets.token_hex(_WORD_BYTES), patience())
    mine = PrefixStore(f"start/{word}", store)
    distributed.init_process_group(backend, store=mine, rank=rank, world_size=size, timeout=patience())


def meet(
    store: Any,
    rank: int,
    size: int,
    word: str,
    wait: timedelta,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """The word of the first process, in all `size` processes of this start and in none of an earlier one.

    `word`: this process's own, never used before. Raises DistStoreError when a process is not there within `wait`.
    """
    if rank:
        store.set(f"asked/{rank}", word)
        store.wait([f"told/{word}"], wait)
        first = str(store.get(f"told/{word}").decode())
        store.set(f"heard/{first}/{rank}", "")
        return first
    told: set[str] = set()
    missing = set(range(1, size))
    end = clock() + wait.total_seconds()
    while missing:
        for each in sorted(missing):
            # What an earlier start left may be read first: then it is told to nobody, and read again until it changes.
            if store.check([f"asked/{each}"]) and (asked := store.get(f"asked/{each}").decode()) not in told:
                store.set(f"told/{asked}", word)
                told.add(asked)
        missing = {each for each in missing if not store.check([f"heard/{word}/{each}"])}
        if missing and clock() > end:
            raise distributed.DistStoreError(
                f"processes {sorted(missing)} did not join within {wait.total_seconds():.0f} s"
            )
        time.sleep(_POLL_S if missing else 0)
    return word
