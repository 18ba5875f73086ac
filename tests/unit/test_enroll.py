"""`edged enroll` on bundles that are good, wrong, and meant to harm."""

from __future__ import annotations

import json
import os
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged import enroll
from edged.check_broker import certificates
from edged.config import load
from edged.findings import Look
from edged.wire.bundle import BUNDLE_BYTES_MAX, BadBundle, Bundle, decode, encode
from trainer.core.access import Identity
from trainer.database import Database
from trainer.enrolment import Enrolment, EnrolmentError, newest_root

ROOT = b'{"signed": {"_type": "root"}, "signatures": []}'
OPERATORS = '# Line 3, behind the press.\n[device]\nid = "unnamed"\n\n[slots.eye]\nthreads = 2  # measured\n'


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Enrolment:
    folder = tmp_path_factory.mktemp("host")
    made = Enrolment(folder / "ca", Database(folder / "trainer.sqlite"))
    made.create("test CA")
    return made


def bundle(host: Enrolment, name: str = "cam1", root: bytes | None = ROOT, **more: Any) -> Bundle:
    return host.bundle(Identity(name, "plant", "line-a"), ("mq.plant.example", 8883), root, **more)


def written(folder: Path, made: Bundle) -> Path:
    path = folder / "cam1.edged"
    path.write_bytes(encode(made))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "edged.toml"
    path.parent.mkdir()
    path.write_text(OPERATORS)
    path.chmod(0o640)
    return path


def test_the_configuration_names_the_new_identity_and_keeps_the_rest(
    host: Enrolment, config: Path, tmp_path: Path
) -> None:
    enroll.carry_out(enroll.plan(written(tmp_path, bundle(host)), config))
    settings = load(config)
    assert (settings.device.id, settings.device.site, settings.device.group) == ("cam1", "plant", "line-a")
    assert (settings.broker.host, settings.broker.port) == ("mq.plant.example", 8883)
    assert (settings.trust.root, settings.trust.unsigned) == (settings.broker.ca.with_name("root.json"), False)  # type: ignore[union-attr]
    assert settings.trust.root is not None and settings.trust.root.read_bytes() == ROOT
    for certificate, key in (
        (settings.broker.certificate, settings.broker.key),
        (settings.broker.bulk_certificate, settings.broker.bulk_key),
    ):
        context = ssl.create_default_context(cafile=settings.broker.ca)
        assert certificate is not None and key is not None
        context.load_cert_chain(certificate, key)
        assert key.stat().st_mode & 0o777 == 0o600
    text = config.read_text()
    assert "# Line 3, behind the press." in text and "threads = 2  # measured" in text
    assert config.stat().st_mode & 0o777 == 0o640


def test_a_second_time_nothing_changes_and_another_bundle_replaces_it(
    host: Enrolment, config: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, bundle(host))
    assert path.read_bytes() == encode(bundle(host))  # the same certificates again
    enroll.carry_out(enroll.plan(path, config))
    before = config.stat().st_mtime_ns, config.read_text()
    again = enroll.plan(path, config)
    assert again.changes() == []
    enroll.carry_out(again)
    assert (config.stat().st_mtime_ns, config.read_text()) == before

    path.write_bytes(encode(host.bundle(Identity("cam1", "plant"), ("10.0.0.1", 1884), None)))
    enroll.carry_out(enroll.plan(path, config, unsigned=True))
    settings = load(config)
    assert (settings.device.group, settings.broker.port, settings.trust.root) == (None, 1884, None)
    assert settings.trust.unsigned
    host.certify(Identity("cam1", "plant", "line-a"))


def test_check_looks_at_the_second_connections_certificate_too(host: Enrolment, config: Path, tmp_path: Path) -> None:
    made = enroll.plan(written(tmp_path, bundle(host)), config)
    enroll.carry_out(made)
    look = Look(load(config), time.time())
    found = list(certificates(look))
    assert {"CA certificate", "client certificate", "bulk certificate"} <= {each.name for each in found}
    assert {each.level for each in found} == {"ok"}
    (made.folder / "bulk.crt").write_bytes(made.files["own.crt"])
    wrong = [each.text for each in certificates(look) if each.level != "ok"]
    assert "the certificate is cam1's and the device is 'cam1~blk'" in wrong[0]
    assert "do not belong together" in wrong[1]


def test_nothing_is_written_by_looking(host: Enrolment, config: Path, tmp_path: Path) -> None:
    made = enroll.plan(written(tmp_path, bundle(host)), config)
    assert '+ id = "cam1"' in made.changes()
    assert not any("PRIVATE" in line for line in made.changes())
    assert config.read_text() == OPERATORS
    assert [each.name for each in config.parent.iterdir()] == ["edged.toml"]


def test_a_crash_at_any_write_leaves_the_old_identity_or_the_new_one(
    host: Enrolment, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written(tmp_path, bundle(host))
    enroll.carry_out(enroll.plan(written(tmp_path, bundle(host, "cam0")), config))
    old = config.read_text()
    made.write_bytes(encode(bundle(host)))
    real, outcomes = os.replace, []
    for crash_at in range(10):
        renames = 0

        def replace(source: Any, target: Any, crash_at: int = crash_at) -> None:
            nonlocal renames
            renames += 1
            if renames > crash_at:
                raise OSError("power cut")
            real(source, target)

        config.write_text(old)
        monkeypatch.setattr(os, "replace", replace)
        with suppress(OSError):
            enroll.carry_out(enroll.plan(made, config))
        monkeypatch.setattr(os, "replace", real)
        broker = load(config).broker
        context = ssl.create_default_context(cafile=broker.ca)
        assert broker.certificate is not None
        context.load_cert_chain(broker.certificate, broker.key)  # whichever it is, it is whole
        outcomes.append(load(config).device.id)
    assert outcomes == ["cam0"] * 7 + ["cam1"] * 3  # six files, then the configuration


def test_a_bundle_without_a_root_needs_to_be_asked_for(host: Enrolment, config: Path, tmp_path: Path) -> None:
    path = written(tmp_path, bundle(host, root=None))
    with pytest.raises(enroll.CannotEnroll, match=r"cam1\.edged has no TUF root.*--unsigned"):
        enroll.plan(path, config)
    with pytest.raises(enroll.CannotEnroll, match="its TUF root is none"):
        enroll.plan(written(tmp_path, bundle(host, root=b'{"signed": {"_type": "targets"}}')), config)


def test_parts_of_different_bundles_are_told_apart(host: Enrolment, config: Path, tmp_path: Path) -> None:
    stranger = Enrolment(tmp_path / "ca", Database(tmp_path / "other.sqlite"))
    stranger.create("other CA")
    own, other, foreign = bundle(host), bundle(host, "cam2"), bundle(stranger)
    swapped = own.own.model_copy(update={"key": other.own.key})
    for change, why in (
        ({"device": "cam2"}, "is for cam2 and its certificates are cam1's and cam1~blk's"),
        ({"bulk": own.own}, "certificates are cam1's and cam1's, which should be cam1's and cam1~blk's"),
        ({"own": other.own}, "certificates are cam2's"),
        ({"own": swapped}, "do not belong together: .*KEY_VALUES_MISMATCH"),
        ({"ca": foreign.ca}, "a certificate in it: "),
        ({"own": foreign.own}, "a certificate in it: "),
        ({"bulk": foreign.bulk}, "a certificate in it: "),
        ({"ca": "nonsense"}, "do not belong together"),
        ({"ca": own.own.certificate}, "a certificate in it: "),
    ):
        with pytest.raises(enroll.CannotEnroll, match=why):
            enroll.plan(written(tmp_path, own.model_copy(update=change)), config)
    assert config.read_text() == OPERATORS


def test_a_configuration_that_would_not_load_is_not_written(host: Enrolment, config: Path, tmp_path: Path) -> None:
    config.write_text(OPERATORS + "[pipelines.p]\nslot = 'nowhere'\nsource = { type = 'mqtt' }\n")
    with pytest.raises(enroll.CannotEnroll, match=rf"with this bundle: {config}: .*slot='nowhere': no such slot"):
        enroll.plan(written(tmp_path, bundle(host)), config)
    config.write_text("nonsense")
    with pytest.raises(enroll.CannotEnroll, match=r"edged\.toml: "):
        enroll.plan(written(tmp_path, bundle(host)), config)


def test_who_is_enrolled_as_something_else_is_refused(host: Enrolment) -> None:
    host.certify(Identity("mq1", "plant", roles=("broker",)))
    with pytest.raises(EnrolmentError, match="mq1 is enrolled as broker and not as device"):
        bundle(host, "mq1")


def test_the_newest_root_by_number_is_taken(tmp_path: Path) -> None:
    with pytest.raises(EnrolmentError, match=r"holds no root.*`trainer keys init`.*--unsigned"):
        newest_root(tmp_path)
    (tmp_path / "metadata").mkdir()
    for number in (1, 2, 10):
        (tmp_path / "metadata" / f"{number}.root.json").write_text(str(number))
    assert newest_root(tmp_path) == b"10"


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b" " * (BUNDLE_BYTES_MAX + 1), b"null"])
def test_what_is_no_bundle_is_said_so(data: bytes) -> None:
    with pytest.raises(BadBundle):
        decode(data)


def planned(path: Path, config: Path) -> enroll.Plan | None:
    """The plan, or None where there is a message, which never shows a key."""
    message = ""
    try:
        return enroll.plan(path, config)
    except enroll.CannotEnroll as error:
        message = str(error)
    assert message and "PRIVATE KEY" not in message
    return None


hostile = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["../../etc/passwd", "a\nb", 'x"\n[trust]\nunsigned = true\n#', "cam1~blk", "\0", "-", ""]),
    st.none(), st.integers(), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*Bundle.model_fields, "more"]), hostile, min_size=1, max_size=3))
def test_hostile_values_end_in_a_message_and_touch_nothing(
    host: Enrolment, tmp_path: Path, changes: dict[str, Any]
) -> None:
    document = bundle(host).model_dump() | changes
    config = tmp_path / "edged.toml"
    config.write_text(OPERATORS)
    path = tmp_path / "hostile.edged"
    path.write_bytes(json.dumps(document).encode())
    made = planned(path, config)
    assert config.read_text() == OPERATORS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["edged.toml", "hostile.edged"]
    if made is None:
        return
    # What passes has changed nothing but what is the bundle's to say.
    assert set(changes) <= {"group", "site", "broker_host", "broker_port", "v"}
    assert made.folder.parent == tmp_path / "identity"
    assert all("/" not in name for name in made.files)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.integers(0, 1 << 16), st.binary(max_size=40), st.integers(0, 60))
def test_damaged_bytes_end_in_a_message(host: Enrolment, tmp_path: Path, at: int, put: bytes, cut: int) -> None:
    data = encode(bundle(host))
    at %= len(data)
    damaged = data[:at] + put + data[at + cut :]
    config = tmp_path / "edged.toml"
    config.write_text(OPERATORS)
    (tmp_path / "damaged.edged").write_bytes(damaged)
    planned(tmp_path / "damaged.edged", config)
    assert config.read_text() == OPERATORS
