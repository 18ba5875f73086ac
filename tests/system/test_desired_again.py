"""A broker that keeps nothing is restarted: the trainer publishes every retained desired state again, by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.broker import Broker
from tests.system.test_trainer_serve import Device, Trainer, until


@pytest.mark.timeout(180)
def test_desired_states_are_published_again_after_a_restart_of_a_broker_without_persistence(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker")
    kept = broker._config.read_text()
    assert "persistence true" in kept
    broker._config.write_text(kept.replace("persistence true", "persistence false"))
    with broker:
        trainer = Trainer(tmp_path / "trainer", broker)
        trainer.register("digits@1.0", b"first")
        trainer.start()
        try:
            names = ["d1", "d2", "d3"]
            devices = [Device(broker, name) for name in names]
            until("they are known", lambda: len(trainer.call("fleet", "status")) == 3)
            for name in names[:2]:
                trainer.call("fleet", "set", name, "--model", "digits@1.0")
            until("two are told", lambda: all(device.desired == {"digits": "digits@1.0"} for device in devices[:2]))
            revs = [device.rev for device in devices]
            for device in devices:  # nobody is there to ask for it
                device.stop()
            broker.kill9()
            broker.start()
            until("the trainer is back", lambda: trainer.log().count("broker: connected") >= 2)
            devices = [Device(broker, name) for name in names]
            try:
                until("they are told again", lambda: all(d.desired == {"digits": "digits@1.0"} for d in devices[:2]))
                assert [device.rev for device in devices] == revs  # the same word, not a new one
                assert devices[2].desired == {}
            finally:
                for device in devices:
                    device.stop()
        except BaseException:
            print(trainer.log()[-4000:])
            raise
        finally:
            trainer.stop()
