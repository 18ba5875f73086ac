"""The broker's configuration on a real Debian with systemd: as docs/operations.md says, for a broker elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.plant import Plant
from tests.system.nspawn import CannotBoot, Machine

PLACE = "/etc/mosquitto/edged"
# No second machine boots in the control group in which one of tests/system/test_booted.py runs.
pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    try:
        with Machine(tmp_path) as booted:
            yield booted
    except CannotBoot as error:
        pytest.skip(str(error))


def publish(machine: Machine, name: str, topic: str) -> subprocess.CompletedProcess[str]:
    """mosquitto_pub with the certificate of `name`."""
    files = ["--cafile", "/root/ca.crt", "--cert", f"/root/{name}.crt", "--key", f"/root/{name}.key"]
    return machine.run(
        "mosquitto_pub", "-h", "127.0.0.1", "-p", "8883", "-V", "mqttv5", "-q", "1", "-i", name, *files,
        "-t", topic, "-m", "x", check=False,
    )  # fmt: skip


def test_debians_own_service_runs_with_it_and_reads_its_lists_again(machine: Machine, tmp_path: Path) -> None:
    plant = Plant(tmp_path / "plant", ["cam1", "cam2"])
    made = tmp_path / "made"
    plant.trainer(
        "broker", "config", "--out", str(made), "--at", PLACE, "--listen", "127.0.0.1", "--port", "8883",
        "--user", "mosquitto",
    )  # fmt: skip
    inside = machine.root / PLACE.lstrip("/")
    shutil.copytree(made, inside)
    machine.run("chown", "-R", "mosquitto:", f"{PLACE}/state", f"{PLACE}/tls")
    machine.run("cp", "-r", f"{PLACE}/mosquitto.service.d", "/etc/systemd/system/")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "mosquitto")
    assert machine.show("mosquitto", "ActiveState") == "active"
    assert machine.show("mosquitto", "LimitNOFILE") == "26024"
    for name in ("cam1", "cam2"):
        for path in (plant.ca, *plant.certificate(name)):
            shutil.copy(path, machine.root / "root" / path.name)

    assert publish(machine, "cam1", "edged/v1/plant/cam1/up/event").returncode == 0
    assert "Not authorized" in publish(machine, "cam1", "edged/v1/plant/cam2/up/event").stderr
    pid = machine.show("mosquitto", "MainPID")
    plant.trainer("revoke", "cam1", "--wait", "0.1", ok=False)  # its broker is not reached from here: the list is
    shutil.copy(plant.folder / "ca" / "crl.pem", inside / "tls" / "crl.pem")
    machine.run("systemctl", "reload", "mosquitto")
    assert publish(machine, "cam1", "edged/v1/plant/cam1/up/event").returncode != 0
    assert publish(machine, "cam2", "edged/v1/plant/cam2/up/event").returncode == 0
    assert machine.show("mosquitto", "MainPID") == pid  # it was not restarted for that
