"""What the death of a training's process says of the model that it made (docs/gate.md). Pure."""

from __future__ import annotations

# Stages in which the candidate exists and is run: what ends the process there has to do with it.
JUDGING = ("export", "calibrate", "evaluate", "release")
# What a process does to itself. The others (SIGTERM, SIGINT, SIGHUP, SIGKILL) come from outside.
FAULTS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
# Releases that are measured beside the candidate, as the stage's progress names them.
_OTHERS = ("the current", "the base")


def blame(stage: str, what: str, ended: str, *, out_of_memory: bool) -> str | None:
    """Why the gate refuses the candidate of a training whose process ended without a verdict; None: it tells nothing of
    the candidate, and the training may be begun again.

    `stage` is the last one that was begun and `what` was measured in it ("" where nothing is said), `ended` a signal's
    name or "status N", `out_of_memory`: the kernel killed for memory meanwhile.
    """
    if stage not in JUDGING:
        return None
    if ended == "SIGKILL" and out_of_memory:
        how = "SIGKILL, out of memory"
    elif ended in FAULTS or ended.startswith("status "):
        how = ended
    else:
        return None
    who = next((name for name in _OTHERS if what.startswith(name)), "the candidate")
    if who == "the current":
        who = "the current release"
    whose = "it" if who == "the candidate" else "the candidate"
    where = f"{stage}: {what}" if what else stage
    return f"{who} killed the process that judged {whose}: {how} ({where})"
