"""A complete configuration for Mosquitto 2, with the limits and settings that the rest of the system counts on."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edged.link import RECEIVE_MAX
from edged.wire import topics


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """The broker's own certificate and key, and the authority that every client's certificate must come from."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Clients:
    """Who is more than a device, by the common name of the certificate. Everybody else may only act as himself."""

    trainers: Sequence[str] = ()
    responders: Sequence[str] = ()  # answer escalations of every device
    observers: Sequence[str] = ()  # read everything, ask devices to infer, and cancel


def mosquitto_config(
    folder: Path,
    port: int,
    *,
    host: str = "127.0.0.1",
    tls: BrokerTls | None = None,
    acl: Path | None = None,
    packet_bytes_max: int = 1048576,
    queued_messages_max: int = 200,
    queued_bytes_max: int = 1048576,
) -> str:
    """The text of a mosquitto.conf that keeps its state in `folder` and listens on `host`:`port`.

    Without `tls` anybody may connect: for tests on loopback only.
    """
    lines = [
        "per_listener_settings false",
        f"listener {port} {host}",
        # Each side without TCP_NODELAY adds 44 ms to a small round trip.
        "set_tcp_nodelay true",
        f"max_packet_size {packet_bytes_max}",
        f"max_inflight_messages {RECEIVE_MAX}",
        f"max_queued_messages {queued_messages_max}",
        f"max_queued_bytes {queued_bytes_max}",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "connection_messages true",
    ]
    if os.geteuid() == 0:
        # Started as root, mosquitto would become another user, who cannot read keys of mode 0600.
        lines.append(f"user {pwd.getpwuid(0).pw_name}")
    if tls is None:
        lines.append("allow_anonymous true")
    else:
        lines += [
            "allow_anonymous false",
            f"cafile {tls.ca}",
            f"certfile {tls.certificate}",
            f"keyfile {tls.key}",
            "require_certificate true",
            "use_identity_as_username true",
            # Without this a valid certificate can take over another client's id, and with it its session.
            "use_username_as_clientid true",
        ]
    if acl is not None:
        lines.append(f"acl_file {acl}")
    return "\n".join(lines) + "\n"


def acl_text(clients: Clients) -> str:
    """The text of an acl_file: a device writes its own `up` and reads its own `down`; `clients` may more.

    An acl_file alone does not stop a device from joining a shared subscription ($share/...) and so stealing other
    devices' escalations: it is enough on one machine and among devices one trusts, not for a fleet that one does not.
    """
    own_up = topics.STATE.filter(site="+", dev="%u").removesuffix("state") + "#"
    own_down = topics.DESIRED.filter(site="+", dev="%u").removesuffix("desired") + "#"
    all_up, all_down = own_up.replace("%u", "+"), own_down.replace("%u", "+")
    lines = [
        f"pattern write {own_up}",
        f"pattern read {own_down}",
        f"pattern read {topics.GROUP_DESIRED.filter()}",
        f"pattern read {topics.HOST.filter()}",
        f"pattern read {topics.RESPONDER.filter()}",
    ]
    for name in clients.trainers:
        lines += [
            f"user {name}",
            f"topic read {all_up}",
            f"topic write {all_down}",
            f"topic write {topics.GROUP_DESIRED.filter()}",
            f"topic write {topics.HOST.filter(trainer=name)}",
        ]
    for name in clients.responders:
        lines += [
            f"user {name}",
            f"topic read {topics.ESCALATION.filter()}",
            f"topic write {topics.VERDICT.filter()}",
            f"topic write {topics.RESPONDER.filter()}",  # a device may answer for several tiers, each under a name
        ]
    everything = topics.HOST.template.partition("_host")[0] + "#"
    for name in clients.observers:
        lines += [
            f"user {name}",
            f"topic read {everything}",
            f"topic write {topics.INFER.filter()}",
            f"topic write {topics.COMMAND.filter(type='cancel')}",
        ]
    return "\n".join(lines) + "\n"


def write_broker_config(
    folder: Path, port: int, *, host: str = "127.0.0.1", tls: BrokerTls | None = None, clients: Clients | None = None
) -> Path:
    """Write `mosquitto.conf` (and `acl` when `clients` are given) into `folder`, and return its path."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    acl = None
    if clients is not None:
        acl = folder / "acl"
        acl.write_text(acl_text(clients))
        acl.chmod(0o600)
    path = folder / "mosquitto.conf"
    path.write_text(mosquitto_config(folder, port, host=host, tls=tls, acl=acl))
    return path
