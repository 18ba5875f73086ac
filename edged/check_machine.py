"""What `edged check` finds out about the machine: memory, permissions, disk, clock."""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import stat
import tempfile
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

from edged.config import MIB
from edged.core.secrecy import hide
from edged.findings import Finding, Look
from edged.machine import Memory

PACKAGED = Path("/etc/edged/edged.toml")  # the configuration of the packaged service, and its user
SERVICE_USER = "edged"
FREE_BYTES_MIN = 64 * MIB
INODES_SHARE_MIN = 0.02
BASE_BYTES = 150 * MIB  # the daemon and its libraries, without a model
MODEL_FACTOR = 1.5  # bytes in memory for each byte of a model's files: weights, and what it works with
AHEAD_S_MAX = 60.0  # a file of ours may be this much newer than the clock: file systems round
DAY_S = 86400.0
UNSYNCHRONISED = 0x40  # STA_UNSYNC of <sys/timex.h>

# What a state folder on such a file system means, and what to do.
FILE_SYSTEMS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("tmpfs", "ramfs"),
        ("lies in memory: samples, models and what is to be sent are gone after a restart", "move state_dir to a disk"),
    ),
    **dict.fromkeys(
        ("overlay", "aufs"),
        ("is a container's own layer, gone with the container", "mount a volume there"),
    ),
    **dict.fromkeys(
        ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "fuse.glusterfs"),
        ("is on the network: SQLite's log needs memory and locks of one machine", "move state_dir to a local disk"),
    ),
    **dict.fromkeys(
        ("vfat", "exfat", "msdos"),
        ("knows neither owners nor safe renames", "use a Linux file system such as ext4"),
    ),
}  # fmt: skip


def memory(look: Look) -> Iterator[Finding]:
    """Memory against the models that the slots begin with."""
    seeds = [slot.seed for slot in look.settings.slots.values() if slot.seed is not None and slot.seed.is_dir()]
    models = sum(path.stat().st_size for seed in seeds for path in seed.iterdir() if path.is_file())
    needed = int(BASE_BYTES + MODEL_FACTOR * models)
    least = min(Memory().bounds(), key=lambda bound: bound.limit, default=None)
    text = f"the daemon and its seeds need about {needed // MIB} MiB of {least.name if least else 'memory'}"
    if least is not None and needed > least.limit:
        yield Finding("memory", "warning", text, "use smaller models, or raise the limit of the service (MemoryMax)")
    else:
        yield Finding("memory", "ok", text)


def permissions(look: Look) -> Iterator[Finding]:
    """Who may read and write what is ours."""
    folder = look.settings.device.state_dir
    yield _state_dir(folder)
    if look.config is None:
        return
    mode = stat.S_IMODE(look.config.stat().st_mode)
    values = str(tomllib.loads(look.config.read_text()))
    if mode & stat.S_IWOTH:
        fix = f"chmod o-w {look.config}"
        yield Finding("config file", "error", f"{look.config} (mode {mode:04o}) can be changed by every user", fix)
    elif mode & stat.S_IROTH and hide(values) != values:
        text = f"{look.config} (mode {mode:04o}) holds a password and can be read by every user"
        yield Finding("config file", "error", text, f"chmod 640 {look.config}; chgrp edged {look.config}")
    else:
        yield Finding("config file", "ok", f"{look.config} is readable (mode {mode:04o})")


def _state_dir(folder: Path) -> Finding:
    try:
        found = folder.stat()
    except FileNotFoundError:
        parent = _nearest(folder)
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding("state_dir", "ok", f"{folder} is made at the start")
        text = f"{folder} is missing and {parent} is not writable"
        return Finding("state_dir", "error", text, f"create it: install -d -o edged -m 750 {folder}")
    except OSError as error:
        fix = "create it and give it to the user that runs edged"
        return Finding("state_dir", "error", f"{folder}: {error.strerror}", fix)
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        return Finding("state_dir", "error", f"{folder} is no folder", "name a folder in state_dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        text = f"{folder} (owner {found.st_uid}, mode {mode:04o}) is not writable for user {os.geteuid()}"
        return Finding("state_dir", "error", text, f"give it to the user that runs edged: chown -R edged {folder}")
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        text = f"{folder} (mode {mode:04o}) can be changed by every user: models could be swapped"
        return Finding("state_dir", "error", text, f"chmod 750 {folder}")
    if mode & stat.S_IROTH:
        text = f"{folder} (mode {mode:04o}) can be read by every user: it holds images and texts"
        return Finding("state_dir", "warning", text, f"chmod 750 {folder}")
    return Finding("state_dir", "ok", f"{folder} is writable (mode {mode:04o})")


def service_user(look: Look) -> Iterator[Finding]:
    """Whether the packaged service's user may use what root, who looks, may use anyway."""
    if look.config is None or look.config.resolve() != PACKAGED or os.geteuid() != 0:
        return
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        text = f"there is no user {SERVICE_USER!r}, as whom the service runs"
        yield Finding("service user", "error", text, "install the package again: it makes the user")
        return
    groups = {user.pw_gid, *os.getgrouplist(user.pw_name, user.pw_gid)}
    broker, refused = look.settings.broker, False
    files = (
        broker.ca,
        broker.certificate,
        broker.key,
        broker.bulk_certificate,
        broker.bulk_key,
        look.settings.trust.root,
    )
    for path in (look.config, *files, look.settings.device.state_dir):
        if path is None or not path.exists():
            continue
        wanted = os.W_OK | os.X_OK if path.is_dir() else os.R_OK
        for part, bits in ((path, wanted), *((folder, os.X_OK) for folder in path.resolve().parents)):
            if not may(part.stat(), user.pw_uid, groups, bits):
                refused = True
                text = f"{path}: the service's user {SERVICE_USER} may not use {part} (mode {_mode(part):04o})"
                fix = (
                    f"chgrp {SERVICE_USER} {part}; chmod g+rX {part}"
                    if part == path
                    else f"move it to {PACKAGED.parent}"
                )
                yield Finding("service user", "error", text, fix)
                break
    if not refused:
        yield Finding("service user", "ok", f"{SERVICE_USER} may read the configuration and use the state folder")


def may(found: os.stat_result, user: int, groups: Collection[int], bits: int) -> bool:
    """Whether a user may do what `bits` (os.R_OK, W_OK, X_OK) say, by owner, group and mode alone."""
    shift = 6 if found.st_uid == user else 3 if found.st_gid in groups else 0
    return user == 0 or (found.st_mode >> shift) & bits == bits


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def disk(look: Look) -> Iterator[Finding]:
    """Room, inodes, and whether what is written stays."""
    limits, folder = look.settings.store, _nearest(look.settings.device.state_dir)
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    used = sum(path.stat().st_size for path in folder.glob("blobs/*/*")) if (folder / "blobs").is_dir() else 0
    allowed = limits.blob_bytes_max + limits.outbox_bytes_max - used
    text = f"{free // MIB} MiB free at {folder}"
    if free < FREE_BYTES_MIN:
        fix = f"free some or move state_dir: at least {FREE_BYTES_MIN // MIB} MiB are needed"
        yield Finding("disk", "error", text, fix)
    elif free < allowed:
        fix = "lower blob_bytes_max and outbox_bytes_max in [store], or free some"
        yield Finding("disk", "warning", f"{text}, less than the {allowed // MIB} MiB that [store] still allows", fix)
    else:
        yield Finding("disk", "ok", text)
    if found.f_files and found.f_favail < INODES_SHARE_MIN * found.f_files:
        text = f"{found.f_favail} of {found.f_files} inodes free at {folder}: each image kept takes one"
        yield Finding("inodes", "warning", text, "delete small files that are not needed, or move state_dir")
    yield _durable(folder)
    yield from _file_system(folder, Path("/proc/self/mountinfo").read_text())


def _durable(folder: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".edged-check-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        fix = "look at `dmesg` for a broken disk and at `mount` for one that is mounted read-only"
        return Finding("writing", "error", f"a file in {folder} cannot be written and synchronised: {error}", fix)
    return Finding("writing", "ok", f"a file in {folder} was written and synchronised")


def _file_system(folder: Path, mounts: str, sys: Path = Path("/sys")) -> Iterator[Finding]:
    kind, device = mount_of(mounts, folder)
    meaning = FILE_SYSTEMS.get(kind)
    card = re.match(r"/dev/(mmcblk\d+)", device)
    if meaning is not None:
        yield Finding("file system", "warning", f"{folder} ({kind}) {meaning[0]}", meaning[1])
    elif card is not None and _read(sys / "block" / card[1] / "device" / "type") == "SD":
        text = f"{folder} is on an SD card ({device}), which wears out with every image kept"
        yield Finding("file system", "warning", text, "use an industrial card, eMMC or an SSD; keep [store] small")
    else:
        yield Finding("file system", "ok", f"{folder} is on {kind} ({device})")


def mount_of(mounts: str, folder: Path) -> tuple[str, str]:
    """File system and device of a folder, from the text of /proc/self/mountinfo (proc(5))."""
    best, found = "", ("unknown", "unknown")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        # Of two on the same point, the later hides the earlier.
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, found = point, (after.split()[0], after.split()[1])
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def clock(look: Look) -> Iterator[Finding]:
    """Whether the time can be right, and whether somebody keeps it right."""
    fix = (
        "set the clock, and let systemd-timesyncd, chrony or a battery keep it: certificates and deadlines count on it"
    )
    built = Path(__file__).stat().st_mtime
    newest = max(_times(look.settings.device.state_dir), default=0.0)
    if look.now < built - DAY_S:
        text = f"the clock is {(built - look.now) / DAY_S:.0f} days before this program was installed"
        yield Finding("clock", "error", text, fix)
    elif look.now < newest - AHEAD_S_MAX:
        text = f"the clock is {newest - look.now:.0f} s before the newest file in {look.settings.device.state_dir}"
        yield Finding("clock", "warning", text, fix)
    elif synchronised() is False:
        yield Finding("clock", "warning", "nothing keeps the clock right: it is not synchronised (adjtimex)", fix)
    else:
        yield Finding("clock", "ok", "the clock is plausible and not known to be off")


def _times(folder: Path) -> Iterator[float]:
    for path in (folder, *folder.glob("edged.db*"), *folder.glob("releases/*")):
        try:
            yield path.stat().st_mtime
        except OSError:  # gone meanwhile, or not ours to see
            continue


class _Timex(ctypes.Structure):
    """The beginning of struct timex; the kernel writes the rest behind it."""

    _fields_ = [
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_char * 256),
    ]  # fmt: skip


def synchronised() -> bool | None:
    """Whether the kernel's clock is kept by somebody (adjtimex(2)); None where that cannot be asked."""
    try:
        answer = _Timex()
        status = ctypes.CDLL(None).adjtimex(ctypes.byref(answer))
    except (OSError, AttributeError):
        return None
    return None if status < 0 else not answer.status & UNSYNCHRONISED
