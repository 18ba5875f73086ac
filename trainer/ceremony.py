"""What needs the offline keys: making a trust folder, changing keys, extending root and targets.

A change is prepared in `staged/`, gets signatures there, at one place or at several one after the other, and is published
when enough keys have signed everything in it. What is staged has no effect; published, it goes out in the order that
devices read: root, targets, then the online roles.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from edged.wire.trust import MODELS, MODELS_PATHS, SIGNED_AT
from trainer.files import make_folder, sync_folder, write_whole
from trainer.keys import Key, Passphrase, TrustError, load_offline, short
from trainer.repository import OFFLINE, ONLINE, Current, Lifetimes, Repository, read, write


@dataclass(frozen=True, slots=True)
class Quorum:
    """How many keys a role has, and how many of them must sign."""

    needed: int
    keys: int

    @classmethod
    def parse(cls, text: str) -> Quorum:
        """`2/3`; raises TrustError."""
        needed, found, keys = text.partition("/")
        if not found or not needed.isdigit() or not keys.isdigit() or not 1 <= int(needed) <= int(keys) <= 16:
            raise TrustError(f"{text!r}: write how many of how many keys must sign, for example 2/3; at most 16 keys")
        return cls(int(needed), int(keys))


# A lost key stops nobody, a stolen one permits nothing. Root and targets have the same custodians and one ceremony a year,
# so that a smaller quorum for targets would save nothing, and make one stolen key enough to name who signs releases.
QUORUM = Quorum(2, 3)


def create(
    folder: Path, media: Sequence[Path], passphrase: Passphrase, *, root: Quorum = QUORUM, targets: Quorum = QUORUM,
    lifetimes: Lifetimes | None = None,
) -> tuple[Repository, list[Path]]:  # fmt: skip
    """Make all keys and the first metadata: the repository, and the offline keys' files.

    `media`: folders for the offline keys; the keys of a role go to them in turn. Raises TrustError; nothing is overwritten.
    """
    if folder.exists() and any(folder.iterdir()):
        raise TrustError(f"{folder} is not empty: keys are made once; `trainer keys rotate` changes them")
    if not media:
        raise TrustError("no folder for the offline keys: name one or more with --offline")
    make_folder(folder.parent)
    offline = {
        Root.type: [Key.new(Root.type) for _ in range(root.keys)],
        Targets.type: [Key.new(Targets.type) for _ in range(targets.keys)],
    }
    online = {role: Key.new(role) for role in ONLINE}
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for sub in ("metadata", "keys"):
            (beside / sub).mkdir(mode=0o755 if sub == "metadata" else 0o700)
        for key in online.values():
            key.save(beside / "keys", None)
        _write_first(beside, lifetimes, offline, online, {Root.type: root.needed, Targets.type: targets.needed})
        # The offline keys last: whatever fails before leaves none behind.
        files = [
            key.save(media[number % len(media)], passphrase)
            for keys in offline.values()
            for number, key in enumerate(keys)
        ]
        beside.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        sync_folder(beside)
        os.rename(beside, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Repository(folder, lifetimes), files


def _write_first(
    folder: Path, lifetimes: Lifetimes | None, offline: dict[str, list[Key]], online: dict[str, Key],
    needed: dict[str, int],
) -> None:  # fmt: skip
    """Version 1 of all metadata; the online roles begin at 0, so that publishing them makes a 1 of it."""
    repository = Repository(folder, lifetimes)
    root = Root(expires=repository.expiry(Root.type), unrecognized_fields={SIGNED_AT: int(repository.now())})
    keys = {**offline, Snapshot.type: [online[Snapshot.type]], Timestamp.type: [online[Timestamp.type]]}
    for role, members in keys.items():
        for key in members:
            root.add_key(key.signer.public_key, role)
        root.roles[role].threshold = needed.get(role, 1)
    signer = online[MODELS].signer.public_key
    delegated = DelegatedRole(MODELS, [signer.keyid], 1, terminating=True, paths=[MODELS_PATHS])
    targets = Targets(
        expires=repository.expiry(Targets.type), delegations=Delegations({signer.keyid: signer}, {MODELS: delegated})
    )
    unsigned = (Metadata(Targets()), Metadata(Snapshot()), Metadata(Timestamp()))
    for metadata in unsigned:
        metadata.signed.version = 0
    current = Current(Metadata(root), Metadata(targets), *unsigned)
    for role in OFFLINE:
        for key in offline[role]:
            current.role(role).sign(key.signer, append=True)
        write(repository.metadata, role, current.role(role))
    repository.publish(current, set(ONLINE))


# Changes.


def rotate(
    repository: Repository, roles: Sequence[str], keyid: str | None, media: Sequence[Path], passphrase: Passphrase
) -> str:
    """Replace the keys of these roles (or of one role this one key) by new ones; what came of it.

    New offline keys are written into `media`, in turn. Raises TrustError.
    """
    with repository.locked():
        current = repository.current()
        staged, new = _Staged(repository, current), []
        for role in roles:
            delegator = staged.delegator(role)
            old = [_find(current, role, keyid)] if keyid is not None else current.keyids(role)
            if role in OFFLINE and not media:
                raise TrustError(f"a new {role} key needs a folder to be written to: name one with --offline")
            for number, key in enumerate(old):
                made = Key.new(role)
                delegator.revoke_key(key, role)
                delegator.add_key(made.signer.public_key, role)
                new.append((made, media[number % len(media)] if role in OFFLINE else None))
        for made, medium in new:  # before anything names them: a crash leaves a key that nobody uses
            made.save(medium or repository.keys, passphrase if medium else None)
        return staged.sign([made for made, _ in new], media, passphrase)


def add(repository: Repository, role: str, media: Sequence[Path], passphrase: Passphrase) -> str:
    """Give an offline role one more key, written into the first of `media`; what came of it. Raises TrustError."""
    if role not in OFFLINE or not media:
        raise TrustError(f"{role!r}: name {' or '.join(OFFLINE)}, and with --offline the folder of the new key first")
    with repository.locked():
        staged, made = _Staged(repository, repository.current()), Key.new(role)
        staged.delegator(role).add_key(made.signer.public_key, role)
        made.save(media[0], passphrase)
        return staged.sign([made], media, passphrase)


def drop(repository: Repository, keyid: str, media: Sequence[Path], passphrase: Passphrase) -> str:
    """Take a key out of its offline role without a successor; what came of it. Raises TrustError."""
    with repository.locked():
        current = repository.current()
        role = next((role for role in OFFLINE if any(key.startswith(keyid) for key in current.keyids(role))), None)
        if role is None:
            raise TrustError(
                f"{keyid!r} is no key of {' or '.join(OFFLINE)}; see `trainer keys list`. An online role has one key, "
                "which is replaced with `trainer keys rotate`"
            )
        threshold = current.root.signed.roles[role].threshold
        if len(current.keyids(role)) <= threshold:
            raise TrustError(
                f"role {role} has {threshold} keys left and needs {threshold}: `trainer keys rotate {role} --key {keyid}`"
            )
        staged = _Staged(repository, current)
        staged.delegator(role).revoke_key(_find(current, role, keyid), role)
        return staged.sign([], media, passphrase)


def extend(repository: Repository, role: str, media: Sequence[Path], passphrase: Passphrase) -> str:
    """Sign an offline role again, for another life; what came of it. Raises TrustError."""
    with repository.locked():
        staged = _Staged(repository, repository.current())
        staged.next(role)
        return staged.sign([], media, passphrase)


def sign(repository: Repository, media: Sequence[Path], passphrase: Passphrase) -> str:
    """Add signatures to what is staged; what came of it. Raises TrustError."""
    with repository.locked():
        staged = _Staged(repository, repository.current(), resume=True)
        if not staged.waiting:
            raise TrustError("nothing waits for signatures")
        return staged.sign([], media, passphrase)


def finish(repository: Repository) -> str:
    """Publish what is staged and signed by enough, where a crash kept it from being published; empty: there is none."""
    with repository.locked():
        folder = repository.folder / "staged"
        if not folder.is_dir():
            return ""
        staged = _Staged(repository, repository.current(), resume=True)
        return staged.finish()


def discard(repository: Repository) -> None:
    """Give up what is staged."""
    with repository.locked():
        shutil.rmtree(repository.folder / "staged", ignore_errors=True)


def _find(current: Current, role: str, keyid: str) -> str:
    found = [key for key in current.keyids(role) if key.startswith(keyid)]
    if len(found) != 1:
        raise TrustError(f"{keyid!r} is no key of {role}; its keys: {', '.join(map(short, current.keyids(role)))}")
    return found[0]


class _Staged:
    """The next versions of offline roles. The caller holds the repository's lock."""

    def __init__(self, repository: Repository, current: Current, *, resume: bool = False) -> None:
        self._repository, self._current = repository, current
        self._folder = repository.folder / "staged"
        self._next: dict[str, Metadata[Any]] = {}
        for role in OFFLINE:
            path = self._folder / f"{role}.json"
            if path.is_file():
                metadata = read(path)
                if metadata.signed.version > current.role(role).signed.version:  # else a crash came after publishing
                    self._next[role] = metadata
        if self._next and not resume:
            raise TrustError(
                f"a change of {', '.join(self._next)} waits for signatures: finish it with `trainer keys sign`, "
                "or give it up with `trainer keys sign --discard`"
            )

    @property
    def waiting(self) -> bool:
        """Whether there is anything."""
        return bool(self._next)

    def finish(self) -> str:
        """Publish if nothing is missing; a leftover of what was published goes."""
        return "" if self._missing() else self._publish()

    def next(self, role: str) -> Metadata[Any]:
        """The staged version of a role, begun when there is none."""
        if role not in self._next:
            signed = copy.deepcopy(self._current.role(role).signed)
            signed.version += 1
            signed.expires = self._repository.expiry(role)
            if role == Root.type:
                signed.unrecognized_fields[SIGNED_AT] = int(self._repository.now())
            self._next[role] = Metadata(signed)
        return self._next[role]

    def delegator(self, role: str) -> Any:
        """Who names the role's keys. Where the keys of targets change, targets is signed anew. Raises TrustError."""
        if role not in (*OFFLINE, *ONLINE):
            raise TrustError(f"{role!r} is no role; roles: {', '.join((*OFFLINE, *ONLINE))}")
        if role == Targets.type:
            self.next(Targets.type)
        return self.next(Targets.type if role == MODELS else Root.type).signed

    def sign(self, new: Sequence[Key], media: Sequence[Path], passphrase: Passphrase) -> str:
        """Sign with the keys at hand, save, and publish what is signed by enough; what came of it, in words."""
        keys = [*new, *load_offline(media, set().union(*map(self._keyids, self._next)), passphrase)]
        for role, metadata in self._next.items():
            for key in {key.keyid: key for key in keys}.values():
                if key.keyid in self._keyids(role):
                    metadata.sign(key.signer, append=True)
            write_whole(self._folder / f"{role}.json", metadata.to_bytes())
        missing = self._missing()
        if missing:
            return f"{'; '.join(missing)}: continue with `trainer keys sign --offline DIR` where the other keys are"
        return self._publish()

    def _root(self) -> Root:
        staged: Metadata[Root] = self._next.get(Root.type, self._current.root)
        return staged.signed

    def _keyids(self, role: str) -> set[str]:
        """Whose signatures count: a root is signed by the keys before and by its own."""
        keyids = set(self._root().roles[role].keyids)
        return keyids | set(self._current.keyids(role)) if role == Root.type else keyids

    def _missing(self) -> list[str]:
        """What still lacks signatures. Targets must be good under the root that it is published with."""
        out = []
        root = self._next.get(Root.type)
        if root is not None:
            both = root.signed.get_root_verification_result(
                self._current.root.signed, root.signed_bytes, root.signatures
            )
            for result, which in ((both.first, "present"), (both.second, "new")):
                if not result.verified:
                    out.append(f"root has {len(result.signed)} of {result.threshold} signatures of its {which} keys")
        targets = self._next.get(Targets.type, self._current.targets)
        result = self._root().get_verification_result(Targets.type, targets.signed_bytes, targets.signatures)
        if not result.verified:
            out.append(f"targets has {len(result.signed)} of {result.threshold} signatures")
        return out

    def _publish(self) -> str:
        repository, current = self._repository, self._current
        for role, metadata in self._next.items():
            setattr(current, role, metadata)
        # From the first write on devices may see the new root; a crash now is mended by the next `renew` or `sign`.
        for role in (Root.type, Targets.type):
            if role in self._next:
                write(repository.metadata, role, self._next[role])
        changed = {Targets.type} & self._next.keys()
        changed |= {role for role in ONLINE if not current.verified(role)}
        if changed:
            repository.publish(current, changed)
        shutil.rmtree(self._folder)
        used = {short(keyid) for role in ONLINE for keyid in current.keyids(role)}
        for path in repository.keys.glob("*.key"):
            if path.stem.rpartition("-")[2] not in used:
                path.unlink()
        return ", ".join(f"{role} {metadata.signed.version} is published" for role, metadata in self._next.items())
