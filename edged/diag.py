"""`edged diag`: one archive that tells support how a device is. It works with and without a running daemon, with a
configuration that cannot be used and with a database that is broken.

Law of this file: what leaves the device here is named one by one, and what is not named stays. No key, no password, no
image, no prompt, no answer, no payload. Whatever is collected is searched once more for the secrets of the configuration.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import stat
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from edged.config import ConfigError, Settings, load
from edged.core.secrecy import HIDDEN, cleaned, hide, is_secret, secrets_in, without

MIB = 1 << 20
PART_BYTES_MAX = 1 * MIB  # of one file in the archive; the log keeps its end, the others their beginning
ARCHIVE_MIB_MAX = 16  # unpacked: fewer parts than this of at most a MiB each
LOG_LINES = 2000
LOG_S_MAX = 10.0
FILES_MAX = 5000
KEY_LINE_MIN = 16  # characters of a line of a private key that are searched for
PACKAGES = (
    "edged", "numpy", "onnxruntime", "opencv-python-headless", "paho-mqtt", "sqlite-utils", "watchdog", "pydantic",
    "pydantic-settings", "httpx", "typer", "psutil", "prometheus-client", "llama-cpp-python", "tokenizers", "jinja2", "av",
)  # fmt: skip
# What a message was that could not be read: a piece of what somebody sent.
_QUOTED = re.compile(r"\(got .*\)")


@dataclass(frozen=True, slots=True)
class Subject:
    """What the archive is about. `settings` None: the configuration cannot be used, `error` says why."""

    config: Path
    settings: Settings | None
    error: str
    tables: dict[str, Any]  # of the configuration file, as far as it is TOML
    now: float
    proving: bool = False

    @property
    def state_dir(self) -> Path | None:
        """Where the device keeps what it knows."""
        if self.settings is not None:
            return self.settings.device.state_dir
        device = self.tables.get("device")
        named = device.get("state_dir") if isinstance(device, dict) else None
        return Path(named) if isinstance(named, str) else None

    @property
    def device(self) -> str:
        """A name for the archive."""
        return self.settings.device.id if self.settings is not None else "device"


def subject(config: Path, *, proving: bool = False) -> Subject:
    """Read what can be read of a configuration."""
    settings, error, tables = None, "", {}
    try:
        settings = load(config)
    except ConfigError as problem:
        error = str(problem)
    try:
        tables = tomllib.loads(config.read_text())
    except (OSError, ValueError) as problem:
        error = error or str(problem)
    return Subject(config, settings, error, tables, time.time(), proving)


def collect(about: Subject) -> dict[str, bytes]:
    """File name -> content. A part that cannot be collected says why in its place."""
    parts: dict[str, Callable[[Subject], Any]] = {
        "about.json": _about,
        "machine.json": _machine,
        "configuration.json": _configuration,
        "certificates.json": _certificates,
        "status.json": _status,
        "check.txt": _check,
        "store.json": _store,
        "files.json": _files,
        "log.txt": _log,
    }
    secrets = _secrets(about)
    out = {}
    for name, make in parts.items():
        try:
            made = make(about)
        except Exception as error:
            made = f"this could not be collected: {type(error).__name__}: {error}"
        text = json.dumps(cleaned(made), indent=1, default=str) if name.endswith(".json") else hide(made)
        out[name] = _sealed(text, secrets, keep_end=name == "log.txt")
    return out


def _sealed(text: str, secrets: set[str], *, keep_end: bool) -> bytes:
    """The bytes of a part, without the secrets of the configuration, cut where it is too long."""
    text = _QUOTED.sub(f"(got {HIDDEN})", without(text, secrets))
    data = text.encode(errors="replace")
    if len(data) <= PART_BYTES_MAX:
        return data
    note = f"[cut: {len(data)} bytes]\n".encode()
    return note + data[-PART_BYTES_MAX:] if keep_end else data[:PART_BYTES_MAX] + b"\n" + note


def write(path: Path, parts: dict[str, bytes], about: Subject) -> None:
    """Write the archive, readable by its owner only; replaces `path` as a whole. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, data in parts.items():
                entry = tarfile.TarInfo(f"edged-diag-{about.device}/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(about.now), 0o600
                archive.addfile(entry, io.BytesIO(data))
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def default_name(about: Subject) -> Path:
    """`edged-diag-DEVICE-TIME.tar.gz` in the current folder."""
    when = datetime.fromtimestamp(about.now, UTC)
    return Path(f"edged-diag-{about.device}-{when:%Y%m%dT%H%M%SZ}.tar.gz")


def _secrets(about: Subject) -> set[str]:
    """Everything secret that the configuration names, to be searched for in all that is collected."""
    found = secrets_in(about.tables)
    found |= secrets_in({name: value for name, value in os.environ.items() if name.startswith("EDGED_")})
    broker = about.tables.get("broker")
    named = [broker.get("key"), broker.get("bulk_key")] if isinstance(broker, dict) else []
    named += [about.settings.broker.key, about.settings.broker.bulk_key] if about.settings else []
    for key in named:
        try:
            lines = Path(str(key)).read_text(errors="replace").splitlines() if key else []
        except OSError:
            continue
        found |= {line for line in lines if len(line) >= KEY_LINE_MIN and not line.startswith("-----")}
    found |= {unquote(secret) for secret in found}  # as it is in an address, and as it is used
    return found | {json.dumps(secret)[1:-1] for secret in found}  # and as JSON shows it


def _about(about: Subject) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "made": datetime.fromtimestamp(about.now, UTC).isoformat(timespec="seconds"),
        "device": about.device,
        "python": sys.version,
        "executable": sys.executable,
        "packages": packages,
    }


def _machine(about: Subject) -> dict[str, Any]:
    from edged.check_machine import mount_of, synchronised

    def text(path: str, limit: int = 4000) -> str:
        try:
            return Path(path).read_text(errors="replace")[:limit]
        except OSError as error:
            return str(error)

    zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "system": re.findall(r'(?m)^PRETTY_NAME="?([^"\n]*)', text("/etc/os-release")),
        "processor": sorted(set(re.findall(r"(?m)^(?:model name|Model)\s*:\s*(.*)", text("/proc/cpuinfo", 1 << 16)))),
        "board": text("/proc/device-tree/model").strip("\0") if Path("/proc/device-tree/model").exists() else None,
        "cores": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "uptime_s": text("/proc/uptime").split()[0],
        "memory": text("/proc/meminfo").splitlines()[:8],
        "pressure": {name: text(f"/proc/pressure/{name}").splitlines() for name in ("cpu", "memory", "io")},
        "cgroup": text("/proc/self/cgroup").strip(),
        "cgroup_memory_max": text("/sys/fs/cgroup/memory.max").strip(),
        "cgroup_cpu_max": text("/sys/fs/cgroup/cpu.max").strip(),
        "temperatures_millicelsius": {zone.parent.name: text(str(zone)).strip() for zone in zones},
        "clock_synchronised": synchronised(),
        "time_zone": time.tzname,
    }
    folder = about.state_dir
    if folder is not None and folder.is_dir():
        disk = os.statvfs(folder)
        kind, device = mount_of(text("/proc/self/mountinfo", 1 << 20), folder.resolve())
        found["disk"] = {
            "folder": str(folder), "file_system": kind, "device": device, "bytes": disk.f_blocks * disk.f_frsize,
            "bytes_free": disk.f_bavail * disk.f_frsize, "inodes": disk.f_files, "inodes_free": disk.f_favail,
        }  # fmt: skip
    return found


def _configuration(about: Subject) -> dict[str, Any]:
    variables = {name: value for name, value in os.environ.items() if name.startswith("EDGED_")}
    return {
        "file": str(about.config),
        "error": about.error,
        "as_written": about.tables,
        "in_force": about.settings.model_dump(mode="json") if about.settings is not None else None,
        "environment": {name: HIDDEN if is_secret(name) else value for name, value in variables.items()},
    }


def _certificates(about: Subject) -> Any:
    from edged.check_broker import decoded

    if about.settings is None:
        return "the configuration cannot be used"
    broker = about.settings.broker
    out: dict[str, Any] = {}
    for name, path in (("ca", broker.ca), ("certificate", broker.certificate)):
        if path is None:
            continue
        try:
            document = decoded(path)
        except OSError as error:  # ssl's errors are of this kind
            out[name] = {"file": str(path), "error": str(error)}
            continue
        shown = {key: document.get(key) for key in ("subject", "issuer", "notBefore", "notAfter", "subjectAltName")}
        out[name] = {"file": str(path), **shown}
    if broker.key is not None:
        try:
            found = broker.key.stat()
            out["key"] = {"file": str(broker.key), "mode": f"{stat.S_IMODE(found.st_mode):04o}", "owner": found.st_uid}
        except OSError as error:
            out["key"] = {"file": str(broker.key), "error": str(error)}
    return out


def _status(about: Subject) -> Any:
    from edged.status_socket import ask_status

    found = ask_status(about.state_dir) if about.state_dir is not None else None
    return found if found is not None else "no daemon answers"


def _check(about: Subject) -> str:
    from edged import check

    if about.settings is None:
        findings = check.unusable(ConfigError(about.error))
    else:
        findings = check.inspect(about.settings, about.config, proving=about.proving)
    return "\n".join(check.screen(findings)) + "\n"


def _store(about: Subject) -> Any:
    from edged.store.survey import survey

    path = about.state_dir / "edged.db" if about.state_dir is not None else None
    if path is None or not path.is_file():
        return f"{path}: there is none"
    return {"database": str(path), "bytes": path.stat().st_size, **survey(path)}


def _files(about: Subject) -> Any:
    if about.state_dir is None or not about.state_dir.is_dir():
        return f"{about.state_dir}: there is none"
    rows: list[dict[str, Any]] = []
    for number, (path, found) in enumerate(_walk(about.state_dir)):
        if number == FILES_MAX:
            rows.append({"cut": f"only the first {FILES_MAX} files are listed"})
            break
        when = datetime.fromtimestamp(found.st_mtime, UTC).isoformat(timespec="seconds")
        name = str(path.relative_to(about.state_dir))
        rows.append({"file": name, "bytes": found.st_size, "changed": when, "mode": stat.filemode(found.st_mode)})
    return rows


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not ours to see: its own row is there
        return
    for entry in entries:
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:  # gone meanwhile
            continue
        yield Path(entry.path), found
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(Path(entry.path))


def _log(_about: Subject) -> str:
    command = ["journalctl", "-u", "edged", "-n", str(LOG_LINES), "--no-pager", "-o", "short-iso-precise"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LOG_S_MAX, check=False, env=_plain()
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}: {error}"
    return (done.stdout + done.stderr).decode(errors="replace")


def _plain() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
