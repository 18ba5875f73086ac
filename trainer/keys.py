"""Private keys as files: the offline ones encrypted with a passphrase, on whatever medium their folder is on, and the
online ones beside the metadata, readable by the trainer alone.

A key is called by the first digits of its id; a file by its role and those: `root-1f2e3d4c.key`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner

from trainer.files import make_folder, sync_folder

PASSPHRASE_CHARS_MIN = 12
ID_DIGITS = 8
SUFFIX = ".key"

Passphrase = Callable[[Path], str]  # of the key in (or to be written to) this file


class TrustError(ValueError):
    """Keys or signed metadata are not as they must be; the message names the file or role, and the fix."""


def short(keyid: str) -> str:
    """What people call a key."""
    return keyid[:ID_DIGITS]


class Key:
    """A private key and its role. `signer` signs with it."""

    def __init__(self, role: str, private: Ed25519PrivateKey) -> None:
        self.role, self._private = role, private
        self.signer = CryptoSigner(private)

    @classmethod
    def new(cls, role: str) -> Key:
        """A fresh key."""
        return cls(role, Ed25519PrivateKey.generate())

    @property
    def keyid(self) -> str:
        """Its id in metadata, of 64 hexadecimal digits."""
        return self.signer.public_key.keyid

    @property
    def file_name(self) -> str:
        """How its file is called."""
        return f"{self.role}-{short(self.keyid)}{SUFFIX}"

    def save(self, folder: Path, passphrase: Passphrase | None) -> Path:
        """Write it into `folder`, encrypted unless `passphrase` is None; raises TrustError, also where a file is there."""
        path = folder / self.file_name
        encryption: KeySerializationEncryption = NoEncryption()
        if passphrase is not None:
            secret = passphrase(path)
            if len(secret) < PASSPHRASE_CHARS_MIN:
                raise TrustError(
                    f"{path}: a passphrase of {len(secret)} characters; use at least {PASSPHRASE_CHARS_MIN}, for "
                    "whoever finds the file may try as many as they like"
                )
            encryption = BestAvailableEncryption(secret.encode())
        data = self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        try:
            make_folder(folder, 0o700)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(folder)
        except FileExistsError:
            raise TrustError(f"{path} is there already: a key is never overwritten; move it away first") from None
        except OSError as error:
            raise TrustError(f"{path}: {error.strerror}; name a folder that can be written") from None
        return path


def load(path: Path, passphrase: Passphrase | None = None) -> Key:
    """The key in this file; raises TrustError."""
    try:
        data = path.read_bytes()
        secret = passphrase(path).encode() if passphrase is not None else None
        private = load_pem_private_key(data, secret)
    except OSError as error:
        raise TrustError(f"key {path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise TrustError(f"key {path}: {error}; is it the right passphrase?") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise TrustError(f"key {path}: not an Ed25519 key; use one that `trainer keys` made")
    return Key(path.name.rpartition("-")[0], private)


def load_offline(folders: Iterable[Path], keyids: set[str], passphrase: Passphrase) -> list[Key]:
    """Those of the keys `keyids` that lie in these folders; only their files ask for a passphrase. Raises TrustError."""
    wanted = {short(keyid) for keyid in keyids}
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise TrustError(f"--offline {folder}: no such folder; is its medium mounted?")
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            if path.stem.rpartition("-")[2] in wanted:
                found.append(load(path, passphrase))
    return [key for key in found if key.keyid in keyids]


def load_online(folder: Path, role: str, keyids: Iterable[str]) -> list[Key]:
    """The keys of an online role; raises TrustError when none of them is in `folder`."""
    names = [f"{role}-{short(keyid)}{SUFFIX}" for keyid in keyids]
    found = [load(folder / name) for name in names if (folder / name).is_file()]
    if not found:
        raise TrustError(
            f"role {role}: none of its keys ({', '.join(names)}) is in {folder}; "
            f"put it back, or make a new one with `trainer keys rotate {role}`"
        )
    return found
