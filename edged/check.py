"""What is wrong with a device before it is deployed: each finding names the thing, the value and the fix."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from edged.config import MIB, Settings
from edged.engines.base import EngineOptions
from edged.prove import ProveFailed, prove
from edged.releases import BadRelease, reference, verify

FREE_BYTES_MIN = 64 * MIB
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str


def inspect(settings: Settings) -> list[Finding]:
    """Look at the state folder, the disk, the certificates, the broker and every seed."""
    return [*_state(settings), *_broker(settings), *_seeds(settings)]


def _state(settings: Settings) -> Iterator[Finding]:
    folder = settings.device.state_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield Finding(
            "state_dir", False, f"{folder}: {error.strerror}; create it and give it to the user that runs edged"
        )
        return
    writable = os.access(folder, os.W_OK | os.X_OK)
    yield Finding(
        "state_dir", writable, f"{folder} is {'writable' if writable else 'not writable: chown it to this user'}"
    )
    free = shutil.disk_usage(folder).free
    enough = free >= FREE_BYTES_MIN
    fix = "" if enough else f"; at least {FREE_BYTES_MIN // MIB} MiB are needed: free some or move state_dir"
    yield Finding("disk", enough, f"{free // MIB} MiB free at {folder}{fix}")


def _broker(settings: Settings) -> Iterator[Finding]:
    broker = settings.broker
    context: ssl.SSLContext | None = None
    if broker.ca is not None:
        try:
            context = ssl.create_default_context(cafile=str(broker.ca))
            if broker.certificate is not None:
                context.load_cert_chain(str(broker.certificate), str(broker.key) if broker.key else None)
        except (OSError, ssl.SSLError) as error:
            yield Finding(
                "certificates", False, f"ca={broker.ca} certificate={broker.certificate} key={broker.key}: {error}"
            )
            return
        yield Finding("certificates", True, f"{broker.ca} and {broker.certificate} load")
    where = f"{broker.host}:{broker.port}"
    try:
        with socket.create_connection((broker.host, broker.port), CONNECT_S) as plain:
            if context is not None:
                with context.wrap_socket(plain, server_hostname=broker.host):
                    pass
    except ssl.SSLError as error:
        yield Finding("broker", False, f"{where}: TLS: {error}; is it the CA that signed the broker's certificate?")
    except OSError as error:
        yield Finding("broker", False, f"{where}: {error}; is the broker running, and the port open?")
    else:
        yield Finding("broker", True, f"{where} answers")


def _seeds(settings: Settings) -> Iterator[Finding]:
    for name, slot in settings.slots.items():
        if slot.seed is None:
            yield Finding(f"slots.{name}", True, "no seed: the first model comes from the fleet's desired state")
            continue
        try:
            ref = reference(slot.seed)
            verify(slot.seed, ref)
            proof = prove(slot.seed, EngineOptions(threads=slot.threads), slot.prove_s_max)
        except (BadRelease, ProveFailed) as error:
            yield Finding(f"slots.{name}", False, f"seed {slot.seed}: {error}")
        else:
            yield Finding(f"slots.{name}", True, f"{ref.release} answers {proof.golden} golden inputs as promised")
