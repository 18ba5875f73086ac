"""Makes this machine a device: takes a bundle from the trainer's host, looks whether it is what it says, and installs it.

Law: the files of an identity lie in a folder named by the bundle's hash, which nobody points at before it is whole; the
configuration then names it in one rename. A crash leaves the old identity or the new one, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import ssl
import tempfile
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edged.check_broker import common_name
from edged.config import ConfigError, load
from edged.core.toml_keys import Keys, Unwritable, with_keys
from edged.files import sync
from edged.wire.bundle import BULK, BUNDLE_BYTES_MAX, BadBundle, Bundle, Pair, decode

IDENTITY = "identity"  # the folder beside the configuration
SERVICE_USER = "edged"
ROUNDS_MAX = 10  # of a handshake in memory; two are needed


class CannotEnroll(Exception):
    """The bundle or this machine's configuration cannot be used; the message says why and the fix."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What enrolling will do: `files` go to `folder`, then `text` becomes the configuration."""

    bundle: Bundle
    folder: Path
    files: dict[str, bytes]
    config: Path
    before: str | None  # None: there is no configuration yet
    text: str
    keys: Keys

    def changes(self) -> list[str]:
        """The lines of the configuration that will differ; no secret is among them."""
        old = (self.before or "").splitlines()
        new = self.text.splitlines()
        return [f"- {line}" for line in old if line not in new] + [f"+ {line}" for line in new if line not in old]


def plan(source: Path, config: Path, *, unsigned: bool = False) -> Plan:
    """Read and check a bundle, and work out what it changes; nothing is written. Raises CannotEnroll.

    `unsigned`: a bundle without a TUF root will do.
    """
    data, bundle = _read(source)
    if bundle.root is None and not unsigned:
        raise CannotEnroll(
            f"{source} has no TUF root: this device would take releases that nobody signed; give --unsigned if it shall"
        )
    if bundle.root is not None:
        _look_at_root(source, bundle.root)
    _look_at_certificates(source, bundle)
    folder = config.resolve().parent / IDENTITY / hashlib.sha256(data).hexdigest()[:16]
    texts = {
        "ca.crt": bundle.ca, "own.crt": bundle.own.certificate, "own.key": bundle.own.key,
        "bulk.crt": bundle.bulk.certificate, "bulk.key": bundle.bulk.key,
        **({} if bundle.root is None else {"root.json": bundle.root}),
    }  # fmt: skip
    keys = _keys(bundle, folder)
    before = _text_of(config)
    try:
        text = with_keys(before or "", keys)
    except (Unwritable, tomllib.TOMLDecodeError) as error:
        raise CannotEnroll(f"{config}: {error}") from None
    _look_at_config(config, text)
    config = config.resolve()  # a link stays one
    return Plan(bundle, folder, {name: text.encode() for name, text in texts.items()}, config, before, text, keys)


def carry_out(plan: Plan, user: str | None = None) -> None:
    """Install what was planned; again: nothing changes. Raises OSError, and CannotEnroll for a user who is not there.

    `user`: who will read the files, where root installs them; by default `edged`, where there is one.
    """
    owner = _owner(user)
    for folder in (plan.folder.parent, plan.folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _give(folder, owner)
    for name, data in plan.files.items():
        _put(plan.folder / name, data, 0o600, owner)
    for folder in (plan.folder, plan.folder.parent, plan.folder.parent.parent):
        sync(folder)
    mode, keeper = 0o640, (0, owner[1]) if owner else None
    with suppress(FileNotFoundError):
        found = plan.config.stat()
        mode, keeper = found.st_mode & 0o7777, (found.st_uid, found.st_gid) if os.geteuid() == 0 else None
    if plan.text != plan.before:
        _put(plan.config, plan.text.encode(), mode, keeper)
        sync(plan.config.resolve().parent)
    _forget(plan)


def _read(source: Path) -> tuple[bytes, Bundle]:
    try:
        with source.open("rb") as file:
            data = file.read(BUNDLE_BYTES_MAX + 1)
        return data, decode(data)
    except OSError as error:
        raise CannotEnroll(f"{source}: {error.strerror}") from None
    except BadBundle as error:
        raise CannotEnroll(f"{source}: {error}") from None


def _look_at_root(source: Path, root: str) -> None:
    try:
        kind = json.loads(root)["signed"]["_type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        kind = None
    if kind != "root":
        raise CannotEnroll(f"{source}: its TUF root is none; make the bundle again with `trainer enroll`")


def _look_at_certificates(source: Path, bundle: Bundle) -> None:
    """The device's two certificates shake hands: each proves its key, and that the CA signed the other, now."""
    try:
        names = _handshake(bundle)
    except ssl.SSLCertVerificationError as error:
        fix = (
            "set this device's clock" if "not yet valid" in error.verify_message else "make it again: `trainer enroll`"
        )
        raise CannotEnroll(f"{source}: a certificate in it: {error.verify_message}; {fix}") from None
    except (ssl.SSLError, OSError, ValueError) as error:
        raise CannotEnroll(
            f"{source}: its certificates, keys and CA do not belong together: {error}; make it again: `trainer enroll`"
        ) from None
    expected = (bundle.device, bundle.device + BULK)
    if names != expected:
        raise CannotEnroll(
            f"{source} is for {bundle.device} and its certificates are {names[0]}'s and {names[1]}'s, which should be "
            f"{expected[0]}'s and {expected[1]}'s; make it again: `trainer enroll`"
        )


def _handshake(bundle: Bundle) -> tuple[str, str]:
    """The common names of `own` and `bulk`, after TLS between the two in memory."""
    contexts = []
    with tempfile.TemporaryDirectory(
        prefix="edged-enroll-"
    ) as folder:  # mode 0700; ssl reads certificates from files only
        for pair, side in ((bundle.own, ssl.PROTOCOL_TLS_CLIENT), (bundle.bulk, ssl.PROTOCOL_TLS_SERVER)):
            context = ssl.SSLContext(side)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=bundle.ca)
            _load(context, pair, Path(folder))
            contexts.append(context)
    to_own, to_bulk = ssl.MemoryBIO(), ssl.MemoryBIO()
    own = contexts[0].wrap_bio(to_own, to_bulk)
    bulk = contexts[1].wrap_bio(to_bulk, to_own, server_side=True)
    for _ in range(ROUNDS_MAX):
        waiting = False
        for end in (own, bulk):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting = True
        if not waiting:
            return common_name(dict(bulk.getpeercert() or {})), common_name(dict(own.getpeercert() or {}))
    raise ssl.SSLError("no end of the handshake")


def _load(context: ssl.SSLContext, pair: Pair, folder: Path) -> None:
    certificate, key = folder / "crt", folder / "key"
    certificate.write_text(pair.certificate)
    key.write_text(pair.key)
    # A key with a pass phrase fails instead of asking a terminal.
    context.load_cert_chain(certificate, key, password=lambda: "")


def _keys(bundle: Bundle, folder: Path) -> Keys:
    return {
        ("device", "id"): bundle.device,
        ("device", "site"): bundle.site,
        ("device", "group"): bundle.group,
        ("broker", "host"): bundle.broker_host,
        ("broker", "port"): bundle.broker_port,
        ("broker", "ca"): str(folder / "ca.crt"),
        ("broker", "certificate"): str(folder / "own.crt"),
        ("broker", "key"): str(folder / "own.key"),
        ("broker", "bulk_certificate"): str(folder / "bulk.crt"),
        ("broker", "bulk_key"): str(folder / "bulk.key"),
        ("trust", "root"): str(folder / "root.json") if bundle.root is not None else None,
        ("trust", "unsigned"): True if bundle.root is None else None,
    }


def _text_of(config: Path) -> str | None:
    try:
        return config.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CannotEnroll(f"{config}: {error}") from None


def _look_at_config(config: Path, text: str) -> None:
    """Refuse before anything is written what `edged run` would refuse afterwards."""
    with tempfile.TemporaryDirectory(prefix="edged-enroll-") as folder:
        trial = Path(folder) / "edged.toml"
        trial.write_text(text)
        try:
            load(trial)
        except ConfigError as error:
            raise CannotEnroll(f"with this bundle: {str(error).replace(str(trial), str(config))}") from None


def _owner(user: str | None) -> tuple[int, int] | None:
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(user or SERVICE_USER)
    except KeyError:
        if user is not None:
            raise CannotEnroll(f"there is no user {user!r} on this machine; name another with --user") from None
        return None
    return entry.pw_uid, entry.pw_gid


def _give(folder: Path, owner: tuple[int, int] | None) -> None:
    folder.chmod(0o700)
    if owner is not None:
        os.chown(folder, *owner)


def _put(path: Path, data: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    """Write beside, fsync, rename: mode 0600 from the first byte on."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _forget(plan: Plan) -> None:
    """Earlier identities go, except the one that was in use: a daemon that still runs with it may read it again."""
    for folder in plan.folder.parent.iterdir():
        if folder != plan.folder and str(folder) not in (plan.before or ""):
            shutil.rmtree(folder, ignore_errors=True)
