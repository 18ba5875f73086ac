"""A training in processes of its own: what `accelerate launch` and `torchrun` start.

    accelerate launch --num_processes 2 -m trainer.tuners.run work.json     # two GPUs
    torchrun --standalone --nproc_per_node 2 -m trainer.tuners.run work.json     # two processes, with or without GPUs

`work.json` is what `write_work` writes. Standard output is one JSON object, `Tuned`, from the first process; progress goes
to standard error, a JSON object a line. The exit status is 0 when the adapter is there, 2 for settings or data that cannot
be used, 75 when another process of the training was lost: start all of them again. The reason is the last line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.files import write_json
from trainer.tuners.base import Tuned, Tuner, Work, tuner

log = logging.getLogger(__name__)

EXIT_LOST = 75  # EX_TEMPFAIL
# What gloo says, as a plain RuntimeError, when a peer is gone or silent.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo/transport")


def write_work(path: Path, name: str, work: Work) -> Path:
    """Write a training for other processes to run; its data must be made of what JSON knows."""
    told = asdict(work) | {"tuner": name, "settings": work.settings.model_dump(mode="json", exclude_unset=True)}
    del told["report"]
    paths = {key: str(Path(told[key]).absolute()) for key in ("base", "out", "scratch")}
    write_json(path, told | paths | {"data": list(work.data), "held_out": list(work.held_out)})
    return path


def read_work(path: Path) -> tuple[Tuner, Work]:
    """What `write_work` wrote; raises ValueError when it is something else."""
    told: dict[str, Any] = json.loads(path.read_bytes())
    chosen = tuner(told.pop("tuner"))
    settings = chosen.settings.model_validate(told.pop("settings"))
    base, out, scratch = (Path(told.pop(key)) for key in ("base", "out", "scratch"))
    return chosen, Work(base=base, out=out, scratch=scratch, settings=settings, report=_report, **told)


def _report(values: Mapping[str, float]) -> None:
    print(json.dumps(dict(values)), file=sys.stderr, flush=True)


def _told(tuned: Tuned) -> dict[str, Any]:
    return asdict(tuned) | {"path": str(tuned.path), "history": list(tuned.history)}


def _lost(error: RuntimeError) -> str | None:
    """What to do when another process of this training has ended or stands still; None for any other error."""
    from torch.distributed import DistError

    from trainer.tuners.together import Lost, lost

    if isinstance(error, Lost):
        return str(error)
    known = isinstance(error, DistError) or any(words in str(error) for words in _LOST)
    return lost(error) if known and os.environ.get("WORLD_SIZE", "1") != "1" else None


def main(path: Path) -> int:
    """Train; 0, or 2 or 75 with the reason on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        chosen, work = read_work(path)
        tuned = chosen.tune(work)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        reason = _lost(error)
        if reason is None:
            raise
        log.exception("this process cannot go on alone")
        print(reason, file=sys.stderr, flush=True)
        # Not by way of the interpreter's end: what waits for the other processes would wait there again.
        os._exit(EXIT_LOST)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(_told(tuned), default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
