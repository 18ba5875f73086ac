"""The devices of the benchmark `delivery`: delivery_side.py PORT FOLDER RELEASE SHA256 NAME..., with the device's python.

Each NAME is the daemon's own delivery over MQTT (the second connection, the carrier, the files), in a thread. Every block
that comes is a line of `FOLDER/NAME.received` before it is looked at, so that a kill loses no count. They begin when the
file `FOLDER/go` is there. With the word `echo` for a release: the control connections of devices, which answer every
command at once; with `ping`: who sends them, and times the answers.
"""

from __future__ import annotations

import itertools
import os
import queue
import sys
import threading
import time
from pathlib import Path

from edged.bulk import Bulk
from edged.clock import SystemClock
from edged.config_host import Host
from edged.delivery import Delivery
from edged.fetch import FetchError
from edged.link import Inbound, Link, LinkOptions
from edged.mqtt_carrier import MqttCarrier
from edged.releases import Releases
from edged.stamp import Stamp
from edged.wire import topics
from edged.wire.manifest import ReleaseRef

SITE = "bench"
PING_S, ANSWER_S_MAX = 0.05, 5.0


def fetch(port: int, folder: Path, name: str, ref: ReleaseRef) -> None:
    """Fetch the release, trying again as the daemon does, and write `NAME.done`."""
    received = os.open(folder / f"{name}.received", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def count(counter: str, n: int) -> None:
        if counter == "block_bytes_received":
            os.write(received, b"%d\n" % n)
        elif counter in ("blocks_wrong", "carrier_failures"):
            print(f"{name}: {counter} {n}", file=sys.stderr, flush=True)

    clock = SystemClock()
    releases = Releases(folder / name)
    bulk = Bulk(LinkOptions("127.0.0.1", port, f"{name}~blk", reconnect_s_max=1), count)
    mqtt = MqttCarrier(bulk, SITE, name, Stamp(clock), clock, count, lambda: True, dict)
    delivery = Delivery({"mqtt": mqtt}, lambda: Host(carrier="mqtt"), releases, clock, count, lambda: None)
    while True:
        try:
            delivery.fetch(ref, releases.folder(ref), lambda: False)
            break
        except FetchError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    (folder / f"{name}.done").touch()
    bulk.close()


def echo(port: int, name: str) -> None:
    """Answer commands for ever."""
    link = Link(LinkOptions("127.0.0.1", port, name, reconnect_s_max=1), [topics.COMMAND.filter(site=SITE, dev=name)])
    link.start()
    while True:
        try:
            event = link.inbox.get(timeout=1.0)
        except queue.Empty:
            continue
        if isinstance(event, Inbound):
            fields = topics.COMMAND.match(event.topic)
            assert fields is not None
            link.publish(topics.COMMAND_STATE(**fields), event.payload)
            link.acknowledge(event)


def ping(port: int, path: Path, names: list[str]) -> None:
    """Send a command to one after the other, and write when each was sent and the seconds until its answer."""
    answers = topics.COMMAND_STATE.filter(site=SITE)
    link = Link(LinkOptions("127.0.0.1", port, "operator", reconnect_s_max=1), [answers])
    link.start()
    for number, name in enumerate(itertools.cycle(names)):
        time.sleep(PING_S)
        address = topics.COMMAND(site=SITE, dev=name, type="samples", id=f"c{number}")
        at, begun = time.time(), time.perf_counter()
        if not link.publish(address, b"%d" % number):
            continue
        while (left := begun + ANSWER_S_MAX - time.perf_counter()) > 0:
            try:
                event = link.inbox.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(event, Inbound):
                link.acknowledge(event)
                if event.payload == b"%d" % number:
                    break
        with path.open("a") as file:
            file.write(f"{at} {time.perf_counter() - begun}\n")


def main() -> None:
    """Run the devices named on the command line until they are done."""
    port, folder, release, sha256, *names = sys.argv[1:]
    if release == "echo":
        threads = [threading.Thread(target=echo, args=(int(port), name), daemon=True) for name in names]
    elif release == "ping":
        threads = [threading.Thread(target=ping, args=(int(port), Path(folder) / "commands", names), daemon=True)]
    else:
        ref = ReleaseRef(release=release, sha256=sha256)
        (Path(folder) / f"{names[0]}.ready").touch()
        while not (Path(folder) / "go").exists():
            time.sleep(0.01)
        threads = [threading.Thread(target=fetch, args=(int(port), Path(folder), name, ref)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
