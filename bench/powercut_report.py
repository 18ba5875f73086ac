"""docs/powercut.md, written by the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INTRODUCTION = """\
`edged run`, from the Debian package, in a virtual machine (Debian 12 with its cloud kernel, ext4, emulated by QEMU
{qemu} on {machine}): pictures come in through a folder, requests over MQTT with TLS, new releases over a slow line, and
what the device is unsure of is escalated to a second one. A cut is the SIGKILL of QEMU at a random instant; its disk is
written past the host's page cache, so that what the guest had not flushed is gone. After each boot, before the daemon
starts, everything on the disk is compared with all that was heard before the cut, and in the end with all that went in.

What this does not show: a disk that says "flushed" before it is, the loss of what a disk's own cache holds, and a cut in
the middle of a sector.
"""
CHECKED = """\
Checked after each boot: SQLite's integrity_check; every blob against its hash; every file of the active and the
previous release, and of a candidate that was verified, against its manifest; every picture that was on the disk is
there, in one place; every sample that a result or a catalogue entry named is there, once, with its picture's bytes, and
no state moved back; what the kernel and e2fsck say about the file system. After each boot, but for those cut at the
start, a request must be answered by the model. In the end the last release is committed, everything is answered and
labelled, once, and `e2fsck -f -n` finds nothing. No release is bad, so none may be taken for one.

The run sees what it should: with SQLite's `synchronous` set to OFF in the image, four cuts lost 32 acknowledged samples
and a database.

To repeat it: `make powercut` as root on Debian or Ubuntu (`ARGS="--cuts 3 --seed 7"`); the first run makes the image.
"""


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Two columns."""
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def markdown(result: Mapping[str, Any]) -> str:
    """The report."""
    failures = [line.replace("\n", " ") for line in result["failures"]]
    verdict = "nothing lost, doubled, damaged or moved back" if result["passed"] else "FAILED: " + "; ".join(failures)
    boots = "\n".join(
        f"| {number} | {boot['phase']} | {boot['put']} | {boot['seconds']} |"
        for number, boot in enumerate(result["boots"], 1)
    )
    tables = (("Cut in", "by_phase"), ("Put in", "put_in"), ("Came out", "came_out"))
    return "\n".join([
        "# Power cuts", "",
        f"`make powercut` cut the power {result['cuts']} times (seed {result['seed']}): **{verdict}**.", "",
        INTRODUCTION.format(**result), *(table(title, result[key]) + "\n" for title, key in tables), CHECKED,
        "| cut | in | pictures put in since the boot | seconds |", "|---|---|---|---|", boots, "",
    ])  # fmt: skip
