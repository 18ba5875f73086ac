from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from trainer.broker import BrokerTls, mosquitto_config
from trainer.ca import CaError, create_ca, issue
from trainer.crl import CRL, read_crl, write_crl


def test_a_certificate_serves_both_sides_and_stays_the_same(tmp_path: Path) -> None:
    ca, issued = create_ca(tmp_path), issue(tmp_path, "cam1")
    assert issue(tmp_path, "cam1") == issued
    before = issued.certificate.read_bytes(), ca.certificate.read_bytes()
    issue(tmp_path, "cam1")
    create_ca(tmp_path)
    assert (issued.certificate.read_bytes(), ca.certificate.read_bytes()) == before
    certificate = x509.load_pem_x509_certificate(before[0])
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(before[1]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["cam1", "localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert path.stat().st_mode & 0o777 == 0o600, path
    context = ssl.create_default_context(cafile=str(ca.certificate))
    context.load_cert_chain(issued.certificate, issued.key)  # key and certificate belong together


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaError, match="common name 'a/b'"):
        issue(tmp_path, "a/b")
    with pytest.raises(CaError, match=r"host 'a b' is no host name and no address"):
        issue(tmp_path, "server", hosts=["a b"])
    create_ca(tmp_path).key.unlink()
    with pytest.raises(CaError, match=r"ca\.key is missing though .*ca\.crt exists"):
        create_ca(tmp_path)


def test_a_device_cannot_pass_for_a_server_nor_for_the_authority(tmp_path: Path) -> None:
    ca = create_ca(tmp_path)
    device = issue(tmp_path, "ca", hosts=())
    assert device.key.read_bytes() != ca.key.read_bytes()
    certificate = x509.load_pem_x509_certificate(device.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == []
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:edged:ca"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_server_is_known_by_the_names_it_was_given(tmp_path: Path) -> None:
    issued = issue(tmp_path, "broker", hosts=["mq.plant.example", "10.0.0.7", "fd00::7"])
    certificate = x509.load_pem_x509_certificate(issued.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker", "mq.plant.example"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "fd00::7"]


def test_a_renewed_certificate_is_another_one_and_a_crash_in_between_is_mended(tmp_path: Path) -> None:
    first = issue(tmp_path, "cam1").certificate.read_bytes()
    second = issue(tmp_path, "cam1", renew=True)
    assert second.certificate.read_bytes() != first
    second.certificate.unlink()  # a crash: the key was written, its certificate not yet
    third = issue(tmp_path, "cam1")
    ssl.create_default_context().load_cert_chain(third.certificate, third.key)


def test_the_key_of_the_authority_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    create_ca(tmp_path, passphrase=b"correct horse")
    for wrong in (None, b"wrong"):
        with pytest.raises(CaError, match=r"ca\.key cannot be read with this passphrase"):
            issue(tmp_path, "cam1", passphrase=wrong)
    issue(tmp_path, "cam1", passphrase=b"correct horse")


def test_revoked_stays_revoked_and_a_newer_list_says_that_it_is_newer(tmp_path: Path) -> None:
    ca = x509.load_pem_x509_certificate(create_ca(tmp_path).certificate.read_bytes())
    write_crl(tmp_path, {11: 1_700_000_000.0})
    first = read_crl(tmp_path / CRL)
    write_crl(tmp_path, {12: 1_700_000_001.0})  # from a record that has forgotten 11
    second = read_crl(tmp_path / CRL)
    assert {entry.serial_number for entry in second} == {11, 12}
    assert (tmp_path / CRL).stat().st_mode & 0o777 == 0o644  # servers run as other users
    assert second.last_update_utc > first.last_update_utc
    assert second.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    assert second.next_update_utc == ca.not_valid_after_utc  # one that ends before would refuse everybody
    (tmp_path / CRL).write_text("nonsense")
    with pytest.raises(CaError, match=r"crl\.pem is no list of revoked certificates.*restore"):
        write_crl(tmp_path, {})


def test_the_broker_takes_the_certificate_for_the_client_id(tmp_path: Path) -> None:
    tls = BrokerTls(tmp_path / "ca.crt", tmp_path / "b.crt", tmp_path / "b.key")
    lines = mosquitto_config(tmp_path, 8883, tls=tls).splitlines()
    for line in (
        "listener 8883 127.0.0.1", "require_certificate true", "use_identity_as_username true",
        "use_username_as_clientid true", "allow_anonymous false", "set_tcp_nodelay true", "max_packet_size 1048576",
    ):  # fmt: skip
        assert line in lines
    assert "allow_anonymous true" in mosquitto_config(tmp_path, 1883).splitlines()
