"""A broker for 10 000 devices: its rights are written at once, it starts with them, and one of them can be thrown out."""

from __future__ import annotations

from pathlib import Path

from edged.link import LinkOptions
from tests.support.device import SITE, until
from tests.support.plant import Client
from tests.system.broker import Broker
from trainer.broker_control import command
from trainer.core.access import Identity
from trainer.core.dynsec import dismissals, tolerated

DEVICES = 10_000


def test_ten_thousand_devices_have_their_own_rights_at_one_broker(tmp_path: Path) -> None:
    fleet = [Identity(f"cam{number:05}", SITE, f"line{number % 50}") for number in range(DEVICES)]
    with Broker(tmp_path, tls=True, clients=[*fleet, Identity("edged-admin", SITE, roles=("admin",))]) as broker:
        with Client(broker, "cam09999", f"edged/v1/{SITE}/_g/line49/down/desired") as device:
            assert device.say(f"edged/v1/{SITE}/cam09999/up/state") == ""
            assert device.say(f"edged/v1/{SITE}/cam09998/up/state") == "Not authorized"
            assert device.link.refused == set()
            certificate, key = broker.certificate("edged-admin")
            admin = LinkOptions(broker.host, broker.port, "edged-admin", broker.ca, certificate, key)
            assert all(map(tolerated, command(admin, dismissals(fleet[-1]), 60.0)))
            until("it is thrown out", lambda: device.poll() or device.reasons)
        with Client(broker, "cam00000") as other:
            assert other.say(f"edged/v1/{SITE}/cam00000/up/state") == ""
