"""A training in a process of its own, watched by one that loads no model.

A model can kill the process that runs it: a bug in native code, memory that the kernel takes back. Then nobody is left in
that process to say so. So `trainer train` starts `python -m trainer.watched`, which does the work of `trainer.train`; when
it dies without a verdict, what it did last decides (`core.ended`): a death while the candidate was judged is the gate's
refusal, written like any other; of any other death nothing follows, and this process dies the same way.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.child import METADATA, PROGRESS, read_progress
from trainer.core.checks import Check, Verdict
from trainer.core.ended import blame
from trainer.ending import Known, TooFewSamples, end
from trainer.jobfile import TrainJob
from trainer.releases import MANIFEST
from trainer.run import FACTS

log = logging.getLogger(__name__)

VMSTAT = Path("/proc/vmstat")  # counts what the kernel killed for memory, in control groups too


class Unwritten(OSError):
    """The run's folder cannot be written, so that nothing there says how the run ended."""


class Died(Exception):
    """The training's process ended and nothing is known of its model; `number`: the signal, or None."""

    def __init__(self, ended: str, number: int | None) -> None:
        super().__init__(f"the training was ended by {ended}, and nothing is known of its model")
        self.number = number


def watch(job: TrainJob, samples_min: int | None, locks: Sequence[int] = ()) -> dict[str, Any]:
    """`trainer.train.train` in a process of its own, which holds `locks` (descriptors) too and dies with this one.

    Raises TooFewSamples as `train` does, Unwritten, and Died.
    """
    before, killed = _identity(job.run / METADATA), _killed_for_memory()
    (job.run / PROGRESS).unlink(missing_ok=True)
    started = time.time()
    command = [sys.executable, "-m", "trainer.watched", str(job.run), str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=tuple(locks))
    try:
        said, _ = process.communicate(pickle.dumps((job, samples_min)))
    finally:
        if process.poll() is None:  # we are being ended
            process.kill()
            process.wait()
    if _identity(job.run / METADATA) not in (None, before):
        # Its word counts, also when it died after that.
        metadata: dict[str, Any] = json.loads((job.run / METADATA).read_bytes())
        return metadata
    answer = json.loads(said.splitlines()[-1]) if said.strip() else {}
    if answer.get("ended") == "too_few":
        raise TooFewSamples(answer["reason"])
    if answer.get("ended") == "unwritten":
        raise Unwritten(answer["reason"])
    code = process.returncode
    ended = signal.Signals(-code).name if code < 0 else f"status {code}"
    last = read_progress(job.run) or {}
    more = _killed_for_memory()
    reason = blame(
        str(last.get("stage", "")), str(last.get("what", "")), ended,
        out_of_memory=killed is not None and more is not None and more > killed,
    )  # fmt: skip
    if reason is None:
        raise Died(ended, -code if code < 0 else None)
    log.error("%s", reason)
    return _refuse(job, reason, started)


def die(error: Died) -> NoReturn:
    """End as the training did, so that whoever waits for this process sees what became of it."""
    sys.stderr.flush()
    if error.number is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the training's own core is the one to look at
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {error.number})
        if error.number != signal.SIGKILL:
            signal.signal(error.number, signal.SIG_DFL)
        os.kill(os.getpid(), error.number)
    sys.exit(1)


def _refuse(job: TrainJob, reason: str, started: float) -> dict[str, Any]:
    """The gate's refusal of a candidate that ended the process which judged it; everything else in the folder stays."""
    (job.run / "candidate" / MANIFEST).unlink(missing_ok=True)  # it is no release
    verdict = Verdict((Check("measurable", False, None, None, reason),))
    known = _facts(job.run)
    facts = {**known.facts, "gate": verdict.to_dict()}
    return end(
        job, "refused", reason, Known(known.timings_s, known.history, facts), summary={}, started=started,
        finished=time.time(),
    )  # fmt: skip


def _facts(run: Path) -> Known:
    try:
        return Known(**json.loads((run / FACTS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return Known()


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is: another one after it was written anew."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _killed_for_memory() -> int | None:
    """How many processes the kernel of this host has killed for memory since it started; None where it does not say."""
    try:
        counts = dict(line.split() for line in VMSTAT.read_text().splitlines())
        return int(counts["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def logged() -> None:
    """Logs of a training, on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it reports every figure that the gate reports
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nobody asked for


def main(parent: int) -> int:
    """The training's process: the job comes on standard input, how it ended goes to standard output as one line of JSON."""
    import faulthandler

    from trainer.cli_train import die_with

    die_with(parent)
    faulthandler.enable()  # where native code died is the first question
    logged()
    job, samples_min = pickle.loads(sys.stdin.buffer.read())
    from trainer.progress import shown, stdout_kept_clean
    from trainer.train import train

    try:
        with stdout_kept_clean(), shown() as hear:
            train(job, samples_min=samples_min, hear=hear)
        said = {"ended": "written"}
    except TooFewSamples as error:
        said = {"ended": "too_few", "reason": str(error)}
    except OSError as error:
        said = {"ended": "unwritten", "reason": f"{job.run}: {error}"}
    print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[2])))
