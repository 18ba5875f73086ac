"""How a run goes, on standard error: a bar where that is a terminal, plain lines where it is none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer.run import Hear

_SHOWN = ("loss", "eval_loss", "lr", "what")


@contextmanager
def shown() -> Iterator[Hear]:
    """What a run tells its progress to."""
    if not sys.stderr.isatty():
        yield _say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def hear(line: Mapping[str, Any]) -> None:
            stage = str(line["stage"])
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, total=1, completed=1)
                    progress.stop_task(task)
                tasks[stage] = progress.add_task(stage, total=None, said="")
            if "epochs" in line:
                progress.update(tasks[stage], total=line["epochs"], completed=line["epoch"])
            progress.update(tasks[stage], said=_text(line))

        yield hear


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """What libraries print to standard output goes to standard error while the block runs: stdout is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _say(line: Mapping[str, Any]) -> None:
    stamp = time.strftime("%H:%M:%S", time.localtime(line["ts"]))
    print(f"{stamp} {line['stage']} {_text(line)}".rstrip(), file=sys.stderr, flush=True)


def _text(line: Mapping[str, Any]) -> str:
    parts = [f"epoch {line['epoch']:g}/{line['epochs']:g}"] if "epochs" in line else []
    for key, value in line.items():
        if key in _SHOWN or key.endswith("_loss"):
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}")
    return " ".join(dict.fromkeys(parts))
