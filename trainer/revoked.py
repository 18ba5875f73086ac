"""Revoked certificates at our own HTTPS server: refused in the handshake, and on connections that were open before.

The list is read again as soon as its file has changed: nobody has to be restarted, or told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.ca import CaError
from trainer.crl import CRL, read_crl

log = logging.getLogger(__name__)


def list_of(ca: Path | None, crl: Path | None) -> Path | None:
    """The file that a server goes by: `crl`, or the one beside its authority, where there is one."""
    if crl is not None or ca is None:
        return crl
    beside = ca.with_name(CRL)
    return beside if beside.exists() else None


class Revoked:
    """What the list in `path` says now. Belongs to one thread, the server's. Raises OSError where that is no list."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._serials: frozenset[int] = frozenset()
        self._contexts: list[ssl.SSLContext] = []
        try:
            self._read()
        except CaError as error:
            raise OSError(str(error)) from None

    def guard(self, context: ssl.SSLContext) -> None:
        """From now on `context` refuses the handshake of a revoked certificate."""
        context.load_verify_locations(self._path)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.sni_callback = lambda *_: self._refresh()  # called at the beginning of every handshake
        self._contexts.append(context)

    def protocol(self) -> type[asyncio.Protocol]:
        """uvicorn's HTTP, which ends a connection at its next bytes once its certificate is revoked."""
        revoked = self

        class Guarded(H11Protocol):
            def data_received(self, data: bytes) -> None:
                if revoked.holds(self.transport.get_extra_info("ssl_object")):
                    self.transport.abort()
                else:
                    super().data_received(data)

        return Guarded

    def holds(self, connection: Any) -> bool:
        """Whether the other side's certificate is revoked by now."""
        self._refresh()
        certificate = (connection.getpeercert() if connection is not None else None) or {}
        return int(certificate.get("serialNumber", "0"), 16) in self._serials

    def _refresh(self) -> None:
        try:
            self._read()
        except (OSError, CaError) as error:
            # What was revoked before stays so. A list that is being replaced is there the next time.
            log.error("the list of revoked certificates cannot be read, the last one stays in force: %s", error)

    def _read(self) -> None:
        found = os.stat(self._path)
        now = (found.st_mtime_ns, found.st_size, found.st_ino)
        if now == self._seen:
            return
        self._serials = frozenset(entry.serial_number for entry in read_crl(self._path))
        for context in self._contexts:
            context.load_verify_locations(self._path)  # OpenSSL goes by the newest that it has
        self._seen = now
