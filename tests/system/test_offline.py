"""An hour without a broker, then a broker that dies hard: in the end every escalation is labelled, once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.clock import FastClock
from edged.config import load
from edged.daemon import Daemon
from edged.wire.messages import Escalation, SampleEntry
from tests.support.device import Bus, Device, responder_tables, tables, toml, until
from tests.support.models import STRANGE, make_release, put_pictures
from tests.system.broker import Broker

HOUR_S = 3600.0
SPEED = 400.0  # an hour passes in nine seconds


@contextmanager
def running(folder: Path, config: dict[str, Any], clock: FastClock) -> Iterator[Daemon]:
    """A daemon of this process, so that it can be given a clock."""
    (folder / "dev1.toml").write_text(toml(config))
    daemon = Daemon(load(folder / "dev1.toml"), clock)
    thread = threading.Thread(target=daemon.run, name="daemon")
    thread.start()
    try:
        until("the model is loaded", lambda: daemon.slots["eye"].live)
        yield daemon
    finally:
        daemon.stop()
        thread.join(timeout=30)
        assert not thread.is_alive(), "the daemon does not stop"


def test_every_escalation_of_an_hour_without_a_broker_is_labelled_once(
    tmp_path: Path, toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker(tmp_path / "broker")  # knows its port, and does not run yet
    make_release(tmp_path / "teacher", "teacher@3.0", 2)
    config = tables(tmp_path, "dev1", broker, toy, delivery={"retry_s": 20.0, "retry_s_max": 900.0, "window_s": 600.0})
    inbox = tmp_path / "dev1-in"
    clock = FastClock(SPEED)
    began = clock.now()

    def escalate(prefix: str, count: int) -> None:
        nonlocal total
        total += count
        put_pictures(inbox, [f"{prefix}{n:02}.png" for n in range(count)], STRANGE)
        until("all kept", lambda: sum(daemon.store.counts().values()) == total)

    def labelled() -> int:
        return daemon.store.counts().get("labelled", 0)

    total = 0
    with running(tmp_path, config, clock) as daemon:
        escalate("first", 15)
        until("half an hour", lambda: clock.now() - began > HOUR_S / 2)
        escalate("second", 15)
        until("an hour", lambda: clock.now() - began > HOUR_S)
        assert daemon.store.counts() == {"escalated": 30}
        assert "no connection to" in daemon.status()["broker"]

        broker.start()
        try:
            bus = Bus(broker)
            with Device(tmp_path, responder_tables(tmp_path, "big1", broker, tmp_path / "teacher")):
                until("all of the hour labelled", lambda: labelled() == 30)
                until("all announced", lambda: len({entry.sample for entry in bus.of(SampleEntry)}) == 30)
                announced = {entry.id: entry.sample for entry in bus.of(SampleEntry)}
                assert set(Counter(announced.values()).values()) == {1}, "each was announced by one message"
                assert len({question.sample for question in bus.of(Escalation)}) == 30

                # Once more, with questions and answers in flight when the broker dies.
                escalate("third", 40)
                until("some of them labelled", lambda: labelled() >= 33)
                broker.kill9()
                escalate("fourth", 10)
                broker.start()
                until("everything labelled", lambda: labelled() == 80, 60)
                until("the catalogue is out", lambda: daemon.store.depth()[0] == 0, 60)
            bus.close()
        finally:
            broker.stop()

        counts, counters = daemon.store.counts(), daemon.store.counters()
        assert counts == {"labelled": 80}
        assert counters["verdicts"] == 80, "each was moved by exactly one verdict"
        labels = daemon.store.samples("labelled", 100)
        assert {sample.item for sample in labels} == {
            f"{prefix}{n:02}.png" for prefix, count in (("first", 15), ("second", 15), ("third", 40), ("fourth", 10))
            for n in range(count)
        }  # fmt: skip
        assert {sample.label[0]["label"] for sample in labels} == {"owl"}
        assert {(sample.provenance or {})["who"] for sample in labels} == {"big1"}
        assert not {"control_faults", "pipeline_faults", "store_errors", "samples_not_kept"} & counters.keys()
    assert not [record for record in caplog.records if record.exc_info]


def test_a_verdict_that_never_comes_leaves_the_sample_unresolved_at_its_deadline(tmp_path: Path, toy: Path) -> None:
    broker = Broker(tmp_path / "broker")
    config = tables(tmp_path, "dev1", broker, toy, pipelines={"line": {"label_by_s": 600.0}})
    with running(tmp_path, config, FastClock(SPEED)) as daemon:
        put_pictures(tmp_path / "dev1-in", ["a.png", "b.png"], STRANGE)
        until("both asked", lambda: daemon.store.counts() == {"escalated": 2})
        until("both given up", lambda: daemon.store.counts() == {"unresolved": 2})
        assert all(sample.label_reason == "no verdict in time" for sample in daemon.store.samples())
        until("no question is left", lambda: not [r for r in daemon.store.due(1e12, 99) if r.message.keep == "verdict"])
