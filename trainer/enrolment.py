"""Who may connect: certificates issued, bundles for devices, certificates revoked, and the record of all that.

Law of this file: nobody is handed a certificate that is not in the record, and who is revoked is so in the record before
anything else says it. A command that was cut off is given again, and ends as if it had never been cut off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from sqlalchemy import Connection, insert, select, update

from edged.wire.bundle import Bundle, Pair
from trainer.ca import LOCAL, Issued, create_ca, issue
from trainer.core.access import Identity
from trainer.crl import CRL, read_crl, write_crl
from trainer.database import Database, certificates, identities, put

ADMIN = "edged-admin"  # connects to the broker for `trainer revoke` and `trainer broker admit`


class EnrolmentError(ValueError):
    """Somebody cannot be given a certificate or lose it; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What the record knows of an identity. Times in seconds since the epoch; `expires`: when its first certificate ends."""

    identity: Identity
    expires: float
    revoked: float | None
    reason: str


class Enrolment:
    """The authority in `folder` and the record in `database`. `passphrase` opens the authority's key.

    Its methods raise EnrolmentError, CaError and BadName.
    """

    def __init__(self, folder: Path, database: Database, passphrase: bytes | None = None) -> None:
        self.folder, self._database, self._passphrase = folder, database, passphrase

    def create(self, name: str) -> None:
        """Make the authority, its empty list of revoked certificates and the identity that speaks to the broker's plugin.
        What is there already stays; a revoked identity of that kind gets new certificates."""
        create_ca(self.folder, name, passphrase=self._passphrase)
        if not (self.folder / CRL).exists():
            write_crl(self.folder, self._revoked_serials(), self._passphrase)
        admin = self.find(ADMIN)
        lost = admin is not None and admin.revoked is not None
        self.certify(Identity(ADMIN, roles=("admin",)), hosts=(), renew=lost)

    def certify(self, identity: Identity, *, hosts: Sequence[str] = LOCAL, renew: bool = False) -> list[Issued]:
        """A certificate for each common name: the one it has, or a new one with `renew`.

        A revoked identity gets new ones with `renew` only; the revoked ones stay revoked.
        """
        if not (self.folder / "ca.crt").exists():
            raise EnrolmentError(f"{self.folder} holds no authority: make one with `trainer ca init`")
        found = self.find(identity.name)
        if found is not None and set(found.identity.roles) != set(identity.roles):
            have, want = ", ".join(found.identity.roles), ", ".join(identity.roles)
            raise EnrolmentError(f"{identity.name} is enrolled as {have} and not as {want}: use another name")
        if found is not None and found.revoked is not None and not renew:
            why = f" ({found.reason})" if found.reason else ""
            raise EnrolmentError(f"{identity.name} is revoked{why}: --renew gives it new certificates")
        serials: list[dict[str, Any]] = []
        issued = []
        # Also where the record was lost: a revoked certificate is never handed out again.
        listed = {entry.serial_number for entry in read_crl(self.folder / CRL)}
        for cn in identity.common_names:
            pair = issue(self.folder, cn, hosts=hosts, passphrase=self._passphrase, renew=renew)
            certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
            if certificate.serial_number in listed:
                raise EnrolmentError(f"the certificate of {cn} is revoked: --renew gives {identity.name} new ones")
            serials.append(
                {
                    "serial": f"{certificate.serial_number:x}",
                    "cn": cn,
                    "expires": certificate.not_valid_after_utc.timestamp(),
                }
            )
            issued.append(pair)
        with self._database.write() as connection:
            _record(connection, identity, serials)
        return issued

    def bundle(self, identity: Identity, broker: tuple[str, int], root: bytes | None, *, renew: bool = False) -> Bundle:
        """What a device is enrolled with; `root` is the TUF root's file."""
        own, bulk = (
            Pair(certificate=each.certificate.read_text(), key=each.key.read_text())
            for each in self.certify(identity, hosts=(), renew=renew)
        )
        return Bundle(
            device=identity.name, site=identity.site, group=identity.group or None,
            broker_host=broker[0], broker_port=broker[1], ca=(self.folder / "ca.crt").read_text(),
            own=own, bulk=bulk, root=None if root is None else root.decode(),
        )  # fmt: skip

    def revoke(self, name: str, reason: str) -> Identity:
        """Every certificate that `name` ever had is revoked: in the record, then on the list. The broker is the caller's."""
        found = self.find(name)
        if found is None:
            raise EnrolmentError(f"{name!r} was never enrolled here; `trainer ca show` lists who was")
        now = time.time()
        with self._database.write() as connection:
            if found.revoked is None:
                connection.execute(
                    update(identities).where(identities.c.name == name).values(revoked=now, reason=reason)
                )
            unrevoked = (certificates.c.name == name) & certificates.c.revoked.is_(None)
            connection.execute(update(certificates).where(unrevoked).values(revoked=now))
        write_crl(self.folder, self._revoked_serials(), self._passphrase)
        return found.identity

    def find(self, name: str) -> Enrolled | None:
        """What is known of one."""
        return next(iter(self._rows(name)), None)

    def all(self) -> list[Enrolled]:
        """Everybody, by name."""
        return self._rows(None)

    def _rows(self, name: str | None) -> list[Enrolled]:
        query, ends = select(identities).order_by(identities.c.name), select(certificates)
        if name is not None:
            query, ends = query.where(identities.c.name == name), ends.where(certificates.c.name == name)
        with self._database.read() as connection:
            newest: dict[tuple[str, str], float] = {}  # (name, cn) -> when the certificate that ends last does
            for row in connection.execute(ends):
                newest[row.name, row.cn] = max(newest.get((row.name, row.cn), 0.0), row.expires)
            expires: dict[str, float] = {}
            for (whose, _), end in newest.items():
                expires[whose] = min(expires.get(whose, end), end)
            return [
                Enrolled(
                    Identity(row.name, row.site, row.group, tuple(row.roles)), expires.get(row.name, 0.0),
                    row.revoked, row.reason,
                )
                for row in connection.execute(query)
            ]  # fmt: skip

    def _revoked_serials(self) -> dict[int, float]:
        query = select(certificates.c.serial, certificates.c.revoked).where(certificates.c.revoked.is_not(None))
        with self._database.read() as connection:
            return {int(row.serial, 16): float(row.revoked) for row in connection.execute(query)}


def _record(connection: Connection, identity: Identity, serials: list[dict[str, Any]]) -> None:
    values = {
        "site": identity.site,
        "group": identity.group,
        "roles": list(identity.roles),
        "revoked": None,
        "reason": "",
    }
    known = connection.execute(select(identities.c.enrolled).where(identities.c.name == identity.name)).first()
    put(
        connection,
        identities,
        {"name": identity.name},
        {**values, "enrolled": known.enrolled if known else time.time()},
    )
    for row in serials:
        there = connection.execute(select(certificates.c.serial).where(certificates.c.serial == row["serial"])).first()
        if there is None:
            connection.execute(insert(certificates).values(name=identity.name, **row))


def revoked_names(connection: Connection) -> dict[str, str]:
    """Who is revoked, and why."""
    query = select(identities.c.name, identities.c.reason).where(identities.c.revoked.is_not(None))
    return {row.name: row.reason or "no reason given" for row in connection.execute(query)}


def newest_root(folder: Path) -> bytes:
    """The newest TUF root of the repository in `folder`; raises EnrolmentError."""
    found = [
        (int(p.name.split(".")[0]), p)
        for p in (folder / "metadata").glob("*.root.json")
        if p.name.split(".")[0].isdigit()
    ]
    if not found:
        raise EnrolmentError(
            f"{folder / 'metadata'} holds no root: make one with `trainer keys init`, "
            "or enroll devices that take unsigned releases with --unsigned"
        )
    return max(found)[1].read_bytes()
