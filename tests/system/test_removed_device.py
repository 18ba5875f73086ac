"""A device that is taken out for good at a real broker: nothing of it is retained."""

from __future__ import annotations

from pathlib import Path

import pytest

from edged.link import Inbound, Link, LinkOptions
from tests.system.broker import Broker
from tests.system.test_trainer_serve import SITE, Device, Trainer, until


def retained(broker: Broker) -> set[str]:
    """Whatever the broker tells a newcomer of these devices."""
    link = Link(LinkOptions(broker.host, broker.port, "looker"), [f"edged/v1/{SITE}/#"])
    link.start()
    found: set[str] = set()

    def all_of_d2() -> bool:
        while not link.inbox.empty():
            event = link.inbox.get()
            if isinstance(event, Inbound):
                link.acknowledge(event)
                found.add(event.topic.partition(f"{SITE}/")[2])
        return {"d2/up/reported", "d2/up/state"} <= found

    until("what is retained", all_of_d2)  # the broker tells them together, in the order of their names
    link.stop()
    return {topic for topic in found if topic.startswith("d1/")}


@pytest.mark.timeout(120)
def test_a_removed_device_leaves_nothing_at_the_broker(tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        trainer = Trainer(tmp_path / "trainer", broker)
        trainer.register("digits@1.0", b"first")
        trainer.start()
        try:
            devices = [Device(broker, name) for name in ("d1", "d2")]
            until("they are known", lambda: len(trainer.call("fleet", "status")) == 2)
            trainer.call("fleet", "set", "d1", "--model", "digits@1.0")
            until("it is told", lambda: devices[0].desired)
            assert retained(broker) == {"d1/down/desired", "d1/up/reported", "d1/up/state"}
            devices[0].stop()
            trainer.call("fleet", "remove", "d1", "--yes")
            until("the broker has forgotten it", lambda: retained(broker) == set())
            assert [row["device"] for row in trainer.call("fleet", "status")] == ["d2"]
            devices[1].stop()
        except BaseException:
            print(trainer.log()[-4000:])
            raise
        finally:
            trainer.stop()
