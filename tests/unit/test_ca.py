from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from trainer.broker import BrokerTls, Clients, acl_text, mosquitto_config
from trainer.ca import CaError, create_ca, issue


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
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    context = ssl.create_default_context(cafile=str(ca.certificate))
    context.load_cert_chain(issued.certificate, issued.key)  # key and certificate belong together


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaError, match="common name 'a/b'"):
        issue(tmp_path, "a/b")
    create_ca(tmp_path).key.unlink()
    with pytest.raises(CaError, match=r"ca\.key is missing though .*ca\.crt exists"):
        create_ca(tmp_path)


def test_the_broker_takes_the_certificate_for_the_client_id(tmp_path: Path) -> None:
    tls = BrokerTls(tmp_path / "ca.crt", tmp_path / "b.crt", tmp_path / "b.key")
    lines = mosquitto_config(tmp_path, 8883, tls=tls).splitlines()
    for line in (
        "listener 8883 127.0.0.1", "require_certificate true", "use_identity_as_username true",
        "use_username_as_clientid true", "allow_anonymous false", "set_tcp_nodelay true", "max_packet_size 1048576",
    ):  # fmt: skip
        assert line in lines
    assert "allow_anonymous true" in mosquitto_config(tmp_path, 1883).splitlines()


def test_a_device_may_act_as_itself_only() -> None:
    lines = acl_text(Clients(trainers=["host"], responders=["big"])).splitlines()
    assert "pattern write edged/v1/+/%u/up/#" in lines
    assert "pattern read edged/v1/+/%u/down/#" in lines
    before_users = lines[: lines.index("user host")]
    assert not any(line.startswith("topic") for line in before_users)  # a topic line there would be for nobody
    watching = acl_text(Clients(observers=["ops"])).splitlines()
    allowed = {line for line in watching[watching.index("user ops") :] if "write" in line}
    assert allowed == {"topic write edged/v1/+/+/down/infer/+", "topic write edged/v1/+/+/down/cmd/cancel/+"}
    assert "topic write edged/v1/_host/host/state" in lines[lines.index("user host") : lines.index("user big")]
