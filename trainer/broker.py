"""A complete configuration for Mosquitto 2, with the limits and settings that the rest of the system counts on."""

from __future__ import annotations

import json
import os
import pwd
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edged.link import RECEIVE_MAX
from trainer.core.access import Identity
from trainer.core.dynsec import document
from trainer.files import write_whole

CONFIG, STATE, ACCESS, DROP_IN = "mosquitto.conf", "state", "dynamic-security.json", "mosquitto.service.d/edged.conf"
CRL = "tls/crl.pem"
SERVICE_USER = "mosquitto"
KEEPALIVE_S_MAX = 3600  # as much as a device's configuration allows
PLUGIN = "mosquitto_dynamic_security.so"
_PLUGIN_FOLDERS = ("/usr/lib/*-linux-gnu*", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")


class BrokerError(ValueError):
    """The broker cannot be configured; the message says what is missing and the fix."""


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """The broker's own certificate and key, and the authority that every client's certificate must come from; `crl`: the
    ones that it has revoked."""

    ca: Path
    certificate: Path
    key: Path
    crl: Path | None = None


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What one broker takes. A packet holds any message of ours; queues are a subscriber's window and no store: what must
    not be lost waits in outboxes. Beyond them the broker drops without a word to whoever published.

    The largest is the trainer's, who hears everybody: when it comes, two retained states of each of 10 000 devices are
    handed to it at once.
    """

    packet_bytes_max: int = 1 << 20
    queued_messages_max: int = 50_000
    queued_bytes_max: int = 64 << 20
    connections_max: int = 25_000  # 10 000 devices have two each


def find_plugin() -> Path:
    """The dynamic security plugin as Debian and others install it; raises BrokerError."""
    for folder in _PLUGIN_FOLDERS:
        for path in sorted(Path("/").glob(f"{folder[1:]}/{PLUGIN}")):
            return path
    raise BrokerError(
        f"{PLUGIN} is in none of {', '.join(_PLUGIN_FOLDERS)}: install mosquitto, or give its path with --plugin"
    )


def mosquitto_config(
    folder: Path,
    port: int,
    *,
    host: str = "127.0.0.1",
    tls: BrokerTls | None = None,
    plugin: Path | None = None,
    user: str | None = None,
    limits: BrokerLimits | None = None,
) -> str:
    """The text of a mosquitto.conf that keeps its state in `folder`/state and listens on `host`:`port`.

    Without `tls` anybody may connect: for tests on loopback only. Without `plugin` everybody who may connect may do
    everything. `user`: whom it becomes when root starts it.
    """
    limits = limits or BrokerLimits()
    lines = [
        "per_listener_settings false",
        *([f"user {user}"] if user else []),
        *([f"plugin {plugin}", f"plugin_opt_config_file {folder / STATE / ACCESS}"] if plugin else []),
        f"listener {port} {host}",
        # Each side without TCP_NODELAY adds 44 ms to a small round trip.
        "set_tcp_nodelay true",
        f"max_connections {limits.connections_max}",
        f"max_packet_size {limits.packet_bytes_max}",
        f"max_inflight_messages {RECEIVE_MAX}",
        f"max_queued_messages {limits.queued_messages_max}",
        f"max_queued_bytes {limits.queued_bytes_max}",
        f"max_keepalive {KEEPALIVE_S_MAX}",
        "persistence true",
        f"persistence_location {folder / STATE}/",
        "autosave_interval 60",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "connection_messages true",
    ]
    if tls is None:
        lines.append("allow_anonymous true")
    else:
        lines += [
            "allow_anonymous false",
            f"cafile {tls.ca}",
            f"certfile {tls.certificate}",
            f"keyfile {tls.key}",
            *([f"crlfile {tls.crl}"] if tls.crl else []),
            "require_certificate true",
            "use_identity_as_username true",
            # Without this a valid certificate can take over another client's id, and with it its session.
            "use_username_as_clientid true",
        ]
    return "\n".join(lines) + "\n"


def write_broker_config(
    folder: Path,
    port: int,
    *,
    host: str = "127.0.0.1",
    tls: BrokerTls | None = None,
    clients: Iterable[Identity] | None = None,
    plugin: Path | None = None,
    user: str | None = None,
    limits: BrokerLimits | None = None,
    at: Path | None = None,
) -> Path:
    """Write `mosquitto.conf` into `folder`, and return its path; with `tls` also copies of its files, with `clients` what
    each of them may do. The same again when nothing has changed.

    `at`: where the folder will lie when mosquitto reads it, by default where it is written. `user` (where root writes) owns
    what the broker reads or changes itself; by default the present one. Raises BrokerError.
    """
    folder = folder.resolve()
    if clients is not None and plugin is None:
        plugin = find_plugin()
    # Started as root, mosquitto would become another user, who could not read what is root's.
    user = user or (pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None)
    _folder(folder, 0o755, None)
    _folder(folder / STATE, 0o700, user)
    if tls is not None:
        tls = _copies(folder / "tls", (at or folder) / "tls", tls, user)
    if clients is not None:
        text = json.dumps(document(clients), separators=(",", ":"))
        _put(folder / STATE / ACCESS, text.encode(), 0o600, user)
    else:
        plugin = None
    path = folder / CONFIG
    text = mosquitto_config(at or folder, port, host=host, tls=tls, plugin=plugin, user=user, limits=limits)
    _put(path, text.encode(), 0o644, None)
    return path


def write_drop_in(folder: Path, limits: BrokerLimits | None = None, at: Path | None = None) -> Path:
    """A drop-in for the unit `mosquitto.service` that starts it with the configuration in `folder`, or then in `at`."""
    binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    files = (limits or BrokerLimits()).connections_max + 1024
    path = folder.resolve() / DROP_IN
    text = (
        f"[Service]\nExecStart=\nExecStart={binary or '/usr/sbin/mosquitto'} -c {(at or folder.resolve()) / CONFIG}\n"
        # Without SIGHUP a revoked certificate opens new connections until the next start.
        'ExecReload=\nExecReload=/bin/sh -c "kill -HUP $MAINPID"\n'
        f"LimitNOFILE={files}\nRestart=always\nRestartSec=2\n"
    )
    _folder(path.parent, 0o755, None)
    _put(path, text.encode(), 0o644, None)
    return path


def put_crl(folder: Path, crl: Path, user: str | None = None) -> bool:
    """Give the broker in `folder` the list of revoked certificates; false when no broker was configured there."""
    target = folder / CRL
    if not target.parent.is_dir():
        return False
    _put(target, crl.read_bytes(), 0o644, user)
    return True


def _copies(folder: Path, at: Path, tls: BrokerTls, user: str | None) -> BrokerTls:
    """Copies that the broker's user can read again on SIGHUP: the originals lie beside the authority's key. Their paths
    are those that they will have in `at`."""
    _folder(folder, 0o755, None)
    for source, name, mode in (
        (tls.ca, "ca.crt", 0o644), (tls.certificate, "broker.crt", 0o644), (tls.key, "broker.key", 0o600),
        (tls.crl, "crl.pem", 0o644),
    ):  # fmt: skip
        if source is not None:
            _put(folder / name, source.read_bytes(), mode, user)
    return BrokerTls(at / "ca.crt", at / "broker.crt", at / "broker.key", at / "crl.pem" if tls.crl else None)


def _folder(path: Path, mode: int, user: str | None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)
    _give(path, user)


def _put(path: Path, data: bytes, mode: int, user: str | None) -> None:
    write_whole(path, data)  # mode 0600 from the first byte on
    path.chmod(mode)
    _give(path, user)


def _give(path: Path, user: str | None) -> None:
    if user is not None and os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise BrokerError(f"there is no user {user!r}: install mosquitto, or name another with --user") from None
        os.chown(path, entry.pw_uid, entry.pw_gid)
