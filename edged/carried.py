"""The parts that bring and take bytes, put together for the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edged.bulk import Bulk
from edged.carriers import Https
from edged.connection import bulk_options
from edged.delivery import Delivery
from edged.fetch import Fetcher, FetchOptions
from edged.mqtt_carrier import MqttCarrier
from edged.releases import Releases
from edged.uploads import Uploads

if TYPE_CHECKING:
    from edged.daemon import Daemon


def carried(daemon: Daemon, releases: Releases) -> tuple[Delivery, Uploads]:
    """Releases down and samples up. What the daemon has only later (its control loop, its newest settings) is looked up
    when it is needed."""
    settings, count, clock = daemon.settings, daemon.store.count, daemon.clock
    device, broker = settings.device, settings.broker
    fetcher = Fetcher(FetchOptions(broker.ca, broker.certificate, broker.key))
    bulk = Bulk(bulk_options(settings), count)

    def urls() -> list[str]:
        host, trainer = daemon.settings.host, daemon.control.trainer
        first = host.url or trainer.url
        return list(dict.fromkeys([*([first] if first else []), *host.urls, *trainer.mirrors]))

    mqtt = MqttCarrier(
        bulk, device.site, device.id, daemon.stamp, clock, count,
        lambda: daemon.control.trainer.blocks, lambda: daemon.control.trainer.metadata,
    )  # fmt: skip
    delivery = Delivery(
        {"mqtt": mqtt, "https": Https(fetcher, urls, count)}, lambda: daemon.settings.host, releases, clock, count,
        lambda: daemon.control.report(),
    )  # fmt: skip
    delivery.closing += [bulk.close, fetcher.close]
    return delivery, Uploads(fetcher, bulk, device.site, device.id, clock, count, delivery.pace)
