"""A certificate authority of one's own: one for a site, or one to throw away after a test."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trainer.files import write_whole

CA_DAYS, CERTIFICATE_DAYS = 3650, 825
# Also a topic level; `~` separates a device's second identity.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.~-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9.-]+")


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


LOCAL = ("localhost", "127.0.0.1")


def create_ca(folder: Path, name: str = "edged CA", *, passphrase: bytes | None = None) -> Authority:
    """The authority in `folder`, made when it is not there yet; raises CaError when only half of it is.

    `passphrase` encrypts the key when it is made.
    """
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
    _write_pair(builder.sign(key, hashes.SHA256()), key, authority.certificate, authority.key, passphrase)
    return authority


def load_ca(folder: Path, passphrase: bytes | None = None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority's certificate and its key, for signing; raises CaError."""
    authority = Authority(folder / "ca.crt", folder / "ca.key")
    if not _complete(authority.certificate, authority.key):
        raise CaError(f"{folder} holds no authority: make one with `trainer ca init`")
    try:
        key = serialization.load_pem_private_key(authority.key.read_bytes(), password=passphrase)
    except (TypeError, ValueError) as error:  # TypeError: a passphrase is missing, or one too many
        raise CaError(f"{authority.key} cannot be read with this passphrase: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CaError(f"{authority.key}: not an elliptic curve key; use an authority that `create_ca` made")
    return x509.load_pem_x509_certificate(authority.certificate.read_bytes()), key


def issue(
    folder: Path, cn: str, *, hosts: Sequence[str] = LOCAL, passphrase: bytes | None = None, renew: bool = False
) -> Issued:
    """A certificate for `cn` from the authority in `folder`, for both sides of a connection; the same one every time,
    until `renew`. It lies in `folder`/issued.

    `hosts`: the names and addresses at which it is a server, with `cn` where that is a host name, because current TLS
    libraries ignore the common name. None: it cannot pass for any server. Raises CaError.
    """
    if not _NAME.fullmatch(cn):
        raise CaError(f"common name {cn!r}: use up to 64 letters, digits and _.~- (it becomes a topic level)")
    # Not beside the authority: a device named `ca` would be given the authority's own key.
    issued = Issued(folder / "issued" / f"{cn}.crt", folder / "issued" / f"{cn}.key")
    # The certificate is written last. Where it is missing the key is of nobody, left by a crash.
    if issued.certificate.exists() and not renew and _complete(issued.certificate, issued.key):
        return issued
    names = _names(cn, hosts)
    if not (folder / "ca.crt").exists():
        create_ca(folder, passphrase=passphrase)
    ca_certificate, ca_key = load_ca(folder, passphrase)
    issued.certificate.unlink(missing_ok=True)
    issued.key.parent.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
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


def _names(cn: str, hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not _HOST.fullmatch(host):
                raise CaError(f"host {host!r} is no host name and no address; write broker.plant.example") from None
            names.append(x509.DNSName(host))
    if hosts and _HOST.fullmatch(cn) and cn not in hosts:
        return [x509.DNSName(cn), *names]
    # Not a host name: strict verifiers refuse `_` and `~` in a DNS name.
    return names if cn in hosts else [x509.UniformResourceIdentifier(f"urn:edged:{cn}"), *names]


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
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    certificate_path: Path,
    key_path: Path,
    passphrase: bytes | None = None,
) -> None:
    encryption = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )  # fmt: skip
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    write_whole(key_path, private)  # mode 0600 from the first byte on
    write_whole(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
