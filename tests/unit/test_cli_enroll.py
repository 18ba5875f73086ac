"""`trainer ca`, `enroll` and `broker config` as an operator gives them, without a broker."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
from sqlalchemy import insert
from typer.testing import CliRunner, Result

from edged.wire.bundle import decode
from trainer.broker import PLUGIN, find_plugin
from trainer.cli import app
from trainer.core.presence import ALWAYS
from trainer.database import Database, devices
from trainer.status import fleet_status

SETTINGS = """
name = "host"
site = "plant"
data_dir = "data"
[enrolment]
broker = "mq.plant.example:8883"
broker_folder = "mosquitto"
broker_reload = "true"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trainer.toml").write_text(SETTINGS)
    return tmp_path


def trainer(folder: Path, *arguments: str, ok: bool = True) -> Result:
    done = CliRunner().invoke(app, [*arguments, "--config", str(folder / "trainer.toml")])
    assert (done.exit_code == 0) is ok, done.output
    return done


def test_a_bundle_says_where_the_broker_is_and_what_the_device_trusts(folder: Path) -> None:
    trainer(folder, "ca", "init")
    wrong = trainer(folder, "enroll", "cam1", ok=False)
    assert "trust/metadata holds no root: make one with `trainer keys init`" in wrong.output
    metadata = folder / "trust" / "metadata"
    metadata.mkdir(parents=True)
    (metadata / "9.root.json").write_text("nine")
    (metadata / "10.root.json").write_text("ten")
    trainer(folder, "enroll", "cam1", "--group", "line-a", "--out", str(folder))
    path = folder / "cam1.edged"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    bundle = decode(path.read_bytes())
    assert (bundle.device, bundle.site, bundle.group) == ("cam1", "plant", "line-a")
    assert (bundle.broker_host, bundle.broker_port, bundle.root) == ("mq.plant.example", 8883, "ten")


def test_the_same_again_is_the_same_and_renewed_is_another(folder: Path) -> None:
    trainer(folder, "ca", "init")
    out = ("--unsigned", "--out", str(folder))
    path = folder / "cam1.edged"
    trainer(folder, "enroll", "cam1", *out)
    first = path.read_bytes()
    trainer(folder, "ca", "init")
    trainer(folder, "enroll", "cam1", *out)
    assert path.read_bytes() == first
    trainer(folder, "enroll", "cam1", "--group", "line-b", *out)
    moved, before = decode(path.read_bytes()), decode(first)
    assert (moved.own, moved.bulk, moved.group) == (before.own, before.bulk, "line-b")
    trainer(folder, "enroll", "cam1", "--renew", *out)
    renewed = decode(path.read_bytes())
    assert renewed.own != before.own and renewed.bulk != before.bulk and renewed.ca == before.ca


def test_many_devices_at_once(folder: Path) -> None:
    trainer(folder, "ca", "init")
    (folder / "names").write_text("# hall 2\ncam1\n\n cam2 \n")
    done = trainer(folder, "enroll", "--from", str(folder / "names"), "--unsigned", "--out", str(folder / "bundles"))
    assert sorted(path.name for path in (folder / "bundles").iterdir()) == ["cam1.edged", "cam2.edged"]
    assert "`edged enroll FILE`" in done.output
    (folder / "names").write_text("cam3\na/b\n")
    wrong = trainer(folder, "enroll", "--from", str(folder / "names"), "--unsigned", "--out", str(folder), ok=False)
    assert "name 'a/b': use up to 60 letters" in wrong.output
    assert not (folder / "cam3.edged").exists()  # one wrong name: none is enrolled
    assert "give one DEVICE, or --from FILE" in trainer(folder, "enroll", ok=False).output


def test_the_authority_shows_who_has_certificates_and_who_lost_them(folder: Path) -> None:
    trainer(folder, "ca", "init", "--name", "Plant CA")
    trainer(folder, "ca", "issue", "mq", "--role", "broker", "--host", "mq.plant.example")
    trainer(folder, "enroll", "cam1", "--unsigned", "--out", str(folder))
    trainer(folder, "revoke", "cam1", "--reason", "stolen", "--wait", "0.1", ok=False)  # no broker runs
    rows = {row["name"]: row for row in json.loads(trainer(folder, "ca", "show", "--json").stdout)}
    assert rows.keys() == {"cam1", "edged-admin", "mq"}
    assert (rows["cam1"]["reason"], bool(rows["cam1"]["revoked"]), rows["mq"]["revoked"]) == ("stolen", True, "")
    assert 800 < rows["mq"]["days"] < 826

    database = Database(folder / "data" / "trainer.sqlite")
    with database.write() as connection:
        for name in ("cam1", "cam2"):
            connection.execute(insert(devices).values(device=name, online=True, seen_at=time.time()))
    with database.read() as connection:
        rows = fleet_status(connection, ALWAYS)
    assert {row["device"]: row["revoked"] for row in rows} == {"cam1": "stolen", "cam2": None}
    shown = trainer(folder, "fleet", "status").stdout.splitlines()
    assert [line.split()[:2] for line in shown[1:]] == [["cam1", "revoked"], ["cam2", "True"]]


def test_a_revoked_certificate_is_not_handed_out_again_by_a_host_that_has_lost_its_record(folder: Path) -> None:
    trainer(folder, "ca", "init")
    for name in ("cam1", "cam2"):
        trainer(folder, "enroll", name, "--unsigned", "--out", str(folder))
    before = decode((folder / "cam2.edged").read_bytes())
    trainer(folder, "revoke", "cam1", "--wait", "0.1", ok=False)
    shutil.rmtree(folder / "data")
    wrong = trainer(folder, "enroll", "cam1", "--unsigned", "--out", str(folder), ok=False)
    assert "the certificate of cam1 is revoked: --renew gives cam1 new ones" in wrong.output
    trainer(folder, "enroll", "cam1", "--unsigned", "--renew", "--out", str(folder))
    trainer(folder, "enroll", "cam2", "--unsigned", "--out", str(folder))
    assert decode((folder / "cam2.edged").read_bytes()) == before


def test_a_bundle_that_leads_to_the_device_itself_is_remarked_on(folder: Path) -> None:
    trainer(folder, "ca", "init")
    (folder / "trainer.toml").write_text(SETTINGS.replace("mq.plant.example", "127.0.0.1"))
    done = trainer(folder, "enroll", "cam1", "--unsigned", "--out", str(folder))
    assert "127.0.0.1:8883" in done.stderr and "enrolment.broker" in done.stderr


def test_a_revoked_admin_is_made_anew(folder: Path) -> None:
    trainer(folder, "ca", "init")
    certificate = folder / "ca" / "issued" / "edged-admin.crt"
    before = certificate.read_bytes()
    trainer(folder, "revoke", "edged-admin", "--wait", "0.1", ok=False)
    trainer(folder, "ca", "init")
    assert certificate.read_bytes() != before
    (row,) = json.loads(trainer(folder, "ca", "show", "--json").stdout)
    assert row["revoked"] == ""


def test_a_passphrase_opens_the_authoritys_key(folder: Path) -> None:
    secret = folder / "secret"
    secret.write_text("correct horse\n")
    trainer(folder, "ca", "init", "--passphrase-file", str(secret))
    assert "ENCRYPTED" in (folder / "ca" / "ca.key").read_text()
    wrong = trainer(folder, "enroll", "cam1", "--unsigned", "--out", str(folder), ok=False)
    assert "ca.key cannot be read with this passphrase" in wrong.output
    trainer(folder, "enroll", "cam1", "--unsigned", "--out", str(folder), "--passphrase-file", str(secret))


def test_the_brokers_configuration_is_whole_and_the_same_every_time(folder: Path) -> None:
    config = ("broker", "config", "--user", "root")
    trainer(folder, "ca", "init")
    assert "`trainer ca issue broker --role broker --host NAME`" in trainer(folder, *config, ok=False).output
    assert (
        "--host broker.plant.example" in trainer(folder, "ca", "issue", "broker", "--role", "broker", ok=False).output
    )
    trainer(folder, "ca", "issue", "broker", "--role", "broker", "--host", "mq.plant.example")
    for name in ("cam2", "cam1"):
        trainer(folder, "enroll", name, "--unsigned", "--out", str(folder))
    trainer(folder, *config)
    made = {path: path.read_bytes() for path in (folder / "mosquitto").rglob("*") if path.is_file()}
    lines = made[folder / "mosquitto" / "mosquitto.conf"].decode().splitlines()
    for line in (
        "listener 8883 0.0.0.0", "require_certificate true", "use_identity_as_username true",
        "use_username_as_clientid true", "allow_anonymous false", f"crlfile {folder}/mosquitto/tls/crl.pem",
        f"plugin {find_plugin()}", "max_keepalive 3600", "persistence true",
    ):  # fmt: skip
        assert line in lines
    secrets = {path.name for path in made if stat.S_IMODE(path.stat().st_mode) == 0o600}
    assert secrets == {"broker.key", "dynamic-security.json"}
    assert b"-----BEGIN PRIVATE KEY" not in b"".join(data for path, data in made.items() if path.name != "broker.key")
    drop_in = made[folder / "mosquitto" / "mosquitto.service.d" / "edged.conf"].decode()
    assert f"-c {folder}/mosquitto/mosquitto.conf" in drop_in and "kill -HUP $MAINPID" in drop_in

    trainer(folder, *config)
    assert {path: path.read_bytes() for path in made} == made
    if os.geteuid() == 0:  # nobody else can give files away
        wrong = trainer(folder, "broker", "config", "--user", "nobody-here", ok=False)
        assert "there is no user 'nobody-here'" in wrong.output


def test_a_plugin_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("trainer.broker._PLUGIN_FOLDERS", (str(folder),))
    trainer(folder, "ca", "init")
    trainer(folder, "ca", "issue", "broker", "--role", "broker", "--host", "mq.plant.example")
    wrong = trainer(folder, "broker", "config", "--user", "root", ok=False)
    assert f"{PLUGIN} is in none of" in wrong.output and "--plugin" in wrong.output


@pytest.mark.parametrize("role", ["device", "admin", "king"])
def test_certificates_of_devices_come_in_bundles(folder: Path, role: str) -> None:
    trainer(folder, "ca", "init")
    wrong = trainer(folder, "ca", "issue", "cam1", "--role", role, ok=False)
    assert f"--role {role}: trainer, broker or observer" in wrong.output


def test_nothing_is_issued_before_there_is_an_authority(folder: Path) -> None:
    wrong = trainer(folder, "enroll", "cam1", "--unsigned", ok=False)
    assert "holds no authority: make one with `trainer ca init`" in wrong.output
    assert not (folder / "ca").exists()
