"""What devices say in their windows is what canaries are judged by, under the names that they say it with (L12)."""

from __future__ import annotations

from pathlib import Path

from edged.wire import messages, topics
from edged.wire.messages import Machine, Metrics
from tests.unit.test_rollouts import NEW, WINDOW_S, World
from trainer import fleet
from trainer.observed import Period, tallies


def test_l12_latency_memory_and_temperature_of_a_window_reach_the_judgement(tmp_path: Path) -> None:
    world = World(tmp_path, devices=1)
    for number, (latency, memory, heat) in enumerate([(50.0, 200.0, 45.0), (80.0, 260.0, 51.5)]):
        start = world.clock + number * WINDOW_S
        said = Metrics(
            **world.host.envelope(), start=start, end=start + WINDOW_S, pipeline="line", release=NEW, items=10,
            accepted=7, escalated=2, errors=1, latency_ms_p50=20.0, latency_ms_p95=latency,
            machine=Machine(memory_mib_max=memory, temperature_c_max=heat),
        )  # fmt: skip
        # As it comes from the wire, whatever the names there are.
        _, _, heard = messages.decode(topics.METRICS(site="s", dev="d00").topic, messages.encode(said))
        assert isinstance(heard, Metrics)
        with world.host.database.write() as connection:
            fleet.take_metrics(connection, "d00", heard)
    with world.host.database.read() as connection:
        tally = tallies(connection, ["d00"], Period("digits", world.clock))["d00"]
    assert (sorted(tally.latency_ms), sorted(tally.memory_mib)) == ([50.0, 80.0], [200.0, 260.0])
    assert sorted(tally.temperature_c) == [45.0, 51.5]
    assert (tally.items, tally.escalated, tally.errors) == (20, 4, 2)
