"""A certificate authority of one's own: one for a site, or one to throw away after a test."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS, CERTIFICATE_DAYS = 3650, 825
_NAME = re.compile(
    r"^[A-Za-z0-9][A-Za-z0-9_.~-]{0,63}$"
)  # also a topic level; `~` separates a device's second identity


class CaError(ValueError):
    """The authority's files or a common name cannot be used; the message names which and the fix."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's certificate (give it to everybody) and its key (never leaves this folder)."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its key, PEM files of mode 0600."""

    certificate: Path
    key: Path


def create_ca(folder: Path, name: str = "edged CA") -> Authority:
    """The authority in `folder`, made when it is not there yet; raises CaError when only half of it is."""
    authority = Authority(folder / "ca.crt", folder / "ca.key")
    if _complete(authority.certificate, authority.key):
        return authority
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    _write_pair(builder.sign(key, hashes.SHA256()), key, authority.certificate, authority.key)
    return authority


def issue(folder: Path, cn: str) -> Issued:
    """A certificate for `cn` from the authority in `folder`, for both sides of a connection; the same one every time.

    Its names are `cn`, localhost and 127.0.0.1, because current TLS libraries ignore the common name. Raises CaError.
    """
    if not _NAME.match(cn):
        raise CaError(f"common name {cn!r}: use up to 64 letters, digits and _.~- (it becomes a topic level)")
    issued = Issued(folder / f"{cn}.crt", folder / f"{cn}.key")
    if _complete(issued.certificate, issued.key):
        return issued
    authority = create_ca(folder)
    ca_certificate = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    ca_key = serialization.load_pem_private_key(authority.key.read_bytes(), password=None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise CaError(f"{authority.key}: not an elliptic curve key; use an authority that `create_ca` made")
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    if re.fullmatch(r"[A-Za-z0-9.-]+", cn):
        names.insert(0, x509.DNSName(cn))
    else:  # not a host name: strict verifiers refuse `_` and `~` in a DNS name
        names.insert(0, x509.UniformResourceIdentifier(f"urn:edged:{cn}"))
    builder = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)]),
            ca_certificate.subject,
            key.public_key(),
            CERTIFICATE_DAYS,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    _write_pair(builder.sign(ca_key, hashes.SHA256()), key, issued.certificate, issued.key)
    return issued


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # a device's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _complete(certificate: Path, key: Path) -> bool:
    if certificate.exists() != key.exists():
        there, missing = (certificate, key) if certificate.exists() else (key, certificate)
        raise CaError(f"{missing} is missing though {there} exists: restore it, or remove both to make new ones")
    return certificate.exists()


def _write_pair(
    certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, certificate_path: Path, key_path: Path
) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(key_path, private)
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))


def _write(path: Path, data: bytes) -> None:
    # mkstemp makes the file with mode 0600: the key is never readable by others, not even for a moment.
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
