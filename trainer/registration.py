"""Servers are told of releases over HTTP: LlamaFarm, or any other that can be asked to serve a new model.

Law of this file: what is to be said is a row before it is sent, and a row is done only after the server has said so. A kill
in between sends it again with the same key of idempotency, so that a server that knows it answers the same or 409.
Who is to be told follows from the registry and the rollouts, not from a moment: whoever registered a release, and when.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, insert, select, update

from edged.core.address import BadEndpoint, check_url
from edged.engines.endpoint import EndpointError, Halted, Limits, Reply, read_secret, send, tls
from edged.wire.manifest import FileEntry, ReleaseId
from trainer.config_registration import Registration
from trainer.core.registration import (
    AIMS,
    CONFLICT,
    REASON,
    REVOKE,
    WAITING,
    Told,
    answered,
    first_states,
    is_due,
    reached_all,
    render,
    revocation,
    unanswered,
)
from trainer.core.rollout import Phase
from trainer.database import devices, registrations, rollouts
from trainer.host import Host
from trainer.keys import TrustError
from trainer.releases import ReleaseError, StoredRelease
from trainer.signing import repository_of

log = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks for what is new and what is due
STOP_S_MAX = 5.0  # a request under way is given up at once; its row stays
ANSWER_BYTES_MAX = 64 << 10
# What a person may have tried again, and what the row becomes.
RETRIED = dict.fromkeys(("refused", "gave_up", "skipped", "withdrawn", "waiting"), WAITING) | dict.fromkeys(
    ("revoking", "still_there"), REVOKE.asked
)
NOT_CONFIGURED = "revoked, and its [registration.revocation] is not configured: take it out of the server by hand"


class Registrations:
    """A thread for each configured server, so that one that hangs keeps no other waiting."""

    def __init__(self, host: Host, url: Callable[[], str], chance: Callable[[], float] = random.random) -> None:
        """`url`: where this trainer's files are fetched from; `chance`: an even one from 0 to 1."""
        self._host, self._url, self._chance = host, url, chance
        self._stopping = threading.Event()
        self._said: dict[str, str] = {}  # server -> why it waits, as it was last said
        self._threads = [
            threading.Thread(target=self._serve, args=(target,), name=f"registration-{target.name}", daemon=True)
            for target in host.config.registration
        ]

    def start(self) -> None:
        """Begin to tell."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End: what is under way is given up, and said again after the next start."""
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_S_MAX)

    def _serve(self, target: Registration) -> None:
        while not self._stopping.is_set():
            try:
                self.look(target)
            except Exception:  # a full disk, a damaged release: it must not end the thread
                log.exception("registration %s", target.name)
            self._stopping.wait(LOOK_S)

    def look(self, target: Registration) -> None:
        """Note what the server is to be told of, and send what is due, oldest first."""
        try:
            self._note(target)
            self._note_revoked(target)
            for row in self._due(target):
                if self._stopping.is_set():
                    return
                self._tell(target, row)
        except (TrustError, ReleaseError, OSError) as error:  # nobody can say now what may be told: it is tried again
            if self._said.get(target.name) != str(error):
                self._said[target.name] = str(error)
                log.warning("registration %s waits: %s", target.name, error)

    def _note(self, target: Registration) -> None:
        """A row for every release that it is to be told of and has none; raises what the database does."""
        host = self._host
        with host.database.read() as connection:
            known = set(
                connection.execute(
                    select(registrations.c.release).where(registrations.c.target == target.name)
                ).scalars()
            )
            found = {
                each.ref.release: each
                for each in host.registry.list()
                if each.manifest.kind in target.kinds and _wanted(target, each)
            }
            if target.when == "promoted":
                found = _promoted(connection, found)
        if not found.keys() - known:
            return
        found = {release: found[release] for release in _installable(host, found)}
        states = first_states(found, known)
        if not states:
            return
        now = host.now()
        with host.database.write() as connection:
            for release, state in states.items():
                skipped = "older than the first that it was told of; send it with --retry" if state == "skipped" else ""
                row = {"target": target.name, "release": release, "sha256": found[release].ref.sha256, "state": state}
                connection.execute(insert(registrations).values(**row, error=skipped, created=now, updated=now))

    def _note_revoked(self, target: Registration) -> None:
        """What the server may know and was revoked: it is told so, or a person is. Raises TrustError."""
        repository = repository_of(self._host.config)
        gone = repository.revoked() if repository is not None else {}
        if not gone:
            return
        query = select(registrations).where(registrations.c.target == target.name)
        with self._host.database.read() as connection:
            rows = [row for row in connection.execute(query) if row.release in gone]
        for row in rows:
            state = revocation(row.state, sent=row.body is not None, told_of_revocations=target.revocation is not None)
            if state == REVOKE.asked:
                self._save(target, row, Told(state), tries=0, status=None, body=None)
            elif state == REVOKE.refused:
                self._save(target, row, Told(state, error=NOT_CONFIGURED))
            elif state == "withdrawn":
                self._save(target, row, Told(state, error="revoked before it was told of it"))

    def _due(self, target: Registration) -> list[Any]:
        query = select(registrations).where(registrations.c.target == target.name, registrations.c.state.in_(AIMS))
        with self._host.database.read() as connection:
            rows = connection.execute(query).all()
        now = self._host.now()
        due = [row for row in rows if is_due(row.due, target.pace(), now)]
        return sorted(due, key=lambda row: (row.created, ReleaseId(row.release)))

    def _tell(self, target: Registration, row: Any) -> None:
        try:
            stored = self._host.registry.get(row.release)
        except ReleaseError as error:  # removed by hand, or damaged: the other releases go on
            self._save(target, row, Told("withdrawn" if row.state == WAITING else REVOKE.refused, error=str(error)))
            return
        if row.state == WAITING and row.release not in _installable(self._host, {row.release: stored}):
            self._save(target, row, Told("withdrawn", error="not signed any more, before it was told of it"))
            return
        if row.state == REVOKE.asked and target.revocation is None:
            self._save(target, row, Told(REVOKE.refused, error=NOT_CONFIGURED))
            return
        body = row.body if row.body is not None else self._body(target, row, stored)
        tries, status, aim = row.tries + 1, None, AIMS[row.state]
        try:
            reply = self._send(target, row, stored, body)
        except Halted:
            return  # it was not this server's fault, and is no try
        except BadEndpoint as error:
            told = Told(aim.refused, error=f"{error}; then `trainer release registrations --retry {row.release}`")
        except EndpointError as error:
            told = unanswered(str(error), tries, target.pace(), self._host.now(), self._chance(), aim=aim)
        else:
            status = reply.status
            told = answered(
                status, reply.said(), tries, target.pace(), self._host.now(), self._chance(),
                reply.headers.get("retry-after", "").strip(), aim,
            )  # fmt: skip
        self._save(target, row, told, tries=tries, status=status)

    def _body(self, target: Registration, row: Any, stored: StoredRelease) -> Any:
        """What is said, saved before it is sent: a try that comes again says the same under the same key."""
        body = render(_words(target, row)[2], self._values(row, stored, self._url()))
        with self._host.database.write() as connection:
            connection.execute(_row(target.name, row.release).values(body=body))
        return body

    def _send(self, target: Registration, row: Any, stored: StoredRelease, body: Any) -> Reply:
        """Raises BadEndpoint, EndpointError, Halted."""
        quoted = {name: quote(str(value), safe="") for name, value in self._values(row, stored, "").items()}
        method, url, _ = _words(target, row)
        url = render(url, quoted)
        check_url(url, plain=target.allow_plain)
        key = key_of(row.release, row.sha256) + ("" if row.state == WAITING else f":{REVOKE.done}")
        headers = {**target.headers, "Content-Type": "application/json", "Idempotency-Key": key}
        secret = read_secret(target.token_file) if target.token_file else ""
        if secret:
            bearer = target.token_header.lower() == "authorization"
            headers[target.token_header] = f"Bearer {secret}" if bearer else secret
        limits = Limits(target.timeout_s, ANSWER_BYTES_MAX, lambda: "stopping" if self._stopping.is_set() else "")
        context = tls(target.ca, target.certificate, target.key)
        data = b"" if row.state == REVOKE.asked and not body else json.dumps(body).encode()
        reply = send(method, url, headers, data, context, limits)
        # Servers repeat a wrong key in their answer.
        return Reply(reply.status, reply.headers, reply.said(secret).encode())

    def _values(self, row: Any, stored: StoredRelease, url: str) -> dict[str, Any]:
        """What placeholders mean for a row. Raises TrustError."""
        values = values_of(stored, url)
        repository = repository_of(self._host.config) if row.state == REVOKE.asked else None
        return values | ({REASON: repository.revoked().get(row.release, "")} if repository is not None else {})

    def _save(self, target: Registration, row: Any, told: Told, **tried: Any) -> None:
        host, now = self._host, self._host.now()
        values = {"state": told.state, "due": told.due, "error": told.error, "updated": now, **tried}
        with host.database.write() as connection:
            # A person may have set it back meanwhile; what the server said of the same release still holds.
            connection.execute(_row(target.name, row.release).values(**values))
            event = _event(told, tried.get("status"))
            if event is not None:
                kind, text = event
                told_of = {} if kind == "release_told" else {"server": target.name}
                host.announce(connection, kind, f"{row.release}: {target.name} {text}", release=row.release, **told_of)
        if told.state in AIMS and told.error:
            pause_s = max(0.0, told.due - now)
            log.warning("registration %s: %s: %s; again in %.0f s", target.name, row.release, told.error, pause_s)


def _event(told: Told, status: int | None) -> tuple[str, str] | None:
    """The kind of event that a new state is, and what is said of the server; None: it is on its way."""
    if told.state in AIMS:
        return None
    if told.state == "done":
        return "release_told", "knew it already" if status == CONFLICT else "was told"
    if told.state == REVOKE.done:
        return "release_revoked_there", "was told that it is revoked"
    if told.state == REVOKE.refused:
        return "release_still_there", f"may still serve it: {told.error}"
    return f"release_{told.state}", f"was not told: {told.error}"


def _words(target: Registration, row: Any) -> tuple[str, str, dict[str, Any]]:
    """Method, address and body with their placeholders."""
    said = target.revocation if row.state == REVOKE.asked and target.revocation is not None else target
    return said.method, said.url, said.body


def key_of(release: str, sha256: str) -> str:
    """What a server knows a repetition by."""
    return f"{release}:{sha256}"


def values_of(stored: StoredRelease, url: str) -> dict[str, Any]:
    """What the placeholders of a body mean for a release whose files are fetched from the trainer at `url`."""
    manifest, release = stored.manifest, ReleaseId(stored.ref.release)
    role = "adapter" if manifest.kind == "lora" else "model"
    role = role if role in manifest.files else next(iter(manifest.files))

    def described(entry: FileEntry) -> dict[str, Any]:
        path = str((stored.folder / entry.path).absolute())
        at = f"{url.rstrip('/')}/blobs/{entry.sha256}"
        return {"file": entry.path, "path": path, "bytes": entry.bytes, "sha256": entry.sha256, "url": at}

    return {
        "release": str(release), "name": release.name, "version": ".".join(map(str, release.version)),
        "kind": manifest.kind, "engine": manifest.engine, "base": manifest.base.release if manifest.base else "",
        "role": role, "release_sha256": stored.ref.sha256, **described(manifest.files[role]),
        "files": {name: described(entry) for name, entry in manifest.files.items()},
    }  # fmt: skip


def listing(connection: Connection, state: str | None = None, target: str | None = None) -> list[dict[str, Any]]:
    """Who was told of which release, or why not, newest first."""
    query = select(registrations).order_by(registrations.c.created.desc(), registrations.c.target)
    if state is not None:
        query = query.where(registrations.c.state == state)
    if target is not None:
        query = query.where(registrations.c.target == target)
    return [dict(row._mapping) for row in connection.execute(query)]


def retry(host: Host, release: str, target: str | None) -> dict[str, Any]:
    """Tell servers of a release (again), now, with a body made anew; the answer to show, or an `error`."""
    names = [each.name for each in host.config.registration]
    if target is not None and target not in names:
        return {"error": f"--target {target}: no such [[registration]]; there are {', '.join(names) or 'none'}"}
    now = host.now()
    with host.database.write() as connection:
        rows = connection.execute(select(registrations).where(registrations.c.release == str(ReleaseId(release)))).all()
        rows = [row for row in rows if row.target in ([target] if target else names)]
        if not rows:
            known = connection.execute(select(registrations.c.release).distinct()).scalars().all()
            return {"error": f"{release} is to be told to nobody; there are {', '.join(sorted(known)) or 'none'}"}
        again = [row.target for row in rows if row.state in RETRIED]
        for row in rows:
            if row.state in RETRIED:
                fresh = {"state": RETRIED[row.state], "tries": 0, "due": 0.0, "body": None, "updated": now}
                connection.execute(_row(row.target, row.release).values(**fresh))
    return {
        "release": rows[0].release,
        "again": again,
        "done_before": [r.target for r in rows if r.target not in again],
    }


def _row(target: str, release: str) -> Any:
    return update(registrations).where(registrations.c.target == target, registrations.c.release == release)


def _wanted(target: Registration, stored: StoredRelease) -> bool:
    return not target.models or ReleaseId(stored.ref.release).name in target.models


def _promoted(connection: Connection, found: dict[str, StoredRelease]) -> dict[str, StoredRelease]:
    """Those that everybody has: a rollout has brought the model, or every slot with its base runs the adapter."""
    query = select(rollouts.c.release, rollouts.c.sha256).where(rollouts.c.phase == Phase.DONE.value)
    rolled = {(row.release, row.sha256) for row in connection.execute(query)}
    slots = [slot for models in connection.execute(select(devices.c.models)).scalars() for slot in models.values()]

    def everywhere(release: str, each: StoredRelease) -> bool:
        base = each.manifest.base
        if each.manifest.kind == "lora" and base is not None:
            return reached_all(release, base.release, slots)
        return (release, each.ref.sha256) in rolled

    return {release: each for release, each in found.items() if everywhere(release, each)}


def _installable(host: Host, found: dict[str, StoredRelease]) -> list[str]:
    """Those that devices could install too: nobody is told of what is not signed yet, or was revoked. Raises TrustError."""
    repository = repository_of(host.config)
    if repository is None:
        return list(found)
    signed, revoked = repository.signed(), repository.revoked()
    return [name for name, each in found.items() if signed.get(name) == each.ref.sha256 and name not in revoked]
