"""The list of revoked certificates, signed by the authority: what brokers and servers refuse a handshake by."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from trainer.ca import CaError, load_ca
from trainer.files import write_whole

CRL = "crl.pem"
_SLACK = datetime.timedelta(hours=1)  # a verifier's clock may be behind


def write_crl(folder: Path, revoked: Mapping[int, float], passphrase: bytes | None = None) -> Path:
    """Write the list of the authority in `folder`: serial number -> when it was revoked, in seconds since the epoch.

    What the list held before stays on it, so that a lost database lets nobody in again. Raises CaError.
    """
    certificate, key = load_ca(folder, passphrase)
    path = folder / CRL
    before = read_crl(path) if path.exists() else None
    # Verifiers that read it again keep the older list beside it and go by the newer date, in whole seconds.
    made = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - _SLACK
    if before is not None:
        made = max(made, before.last_update_utc + datetime.timedelta(seconds=1))
    # A list that has ended refuses everybody: it ends with the authority itself.
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(made)
        .next_update(certificate.not_valid_after_utc)
    )
    entries = {entry.serial_number: entry.revocation_date_utc for entry in before or ()}
    for serial, when in revoked.items():
        entries.setdefault(serial, datetime.datetime.fromtimestamp(int(when), datetime.UTC))
    for serial, date in sorted(entries.items()):
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(date).build()
        )
    write_whole(path, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    path.chmod(0o644)  # nothing in it is secret, and servers that run as other users must read it
    return path


def read_crl(path: Path) -> x509.CertificateRevocationList:
    """The list in a file; raises CaError."""
    try:
        return x509.load_pem_x509_crl(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CaError(f"{path} is no list of revoked certificates: {error}; restore it from a backup") from None
