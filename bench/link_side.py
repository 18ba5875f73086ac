"""The processes of the benchmark `link`: python link_side.py ROLE PORT CA CERTIFICATE KEY FOLDER, with the device's python.

`echo`: answers every question at once with a verdict. `edged`: the daemon's own store, control loop and link, from the
commit of a question to the commit of its verdict. `raw`: the same with paho and sqlite3 alone: from the bytes of an image to
its file and a row with the question on the disk (fsynced as the daemon's are), one QoS 1 publish, the verdict on the disk,
then its acknowledgement. Both sides build their message, write with one writer at a time, and commit the verdicts that wait
together; the daemon besides keeps a sample that can be looked up, and tells the broker of it once it is labelled.

Each says "ready" and then, for every line `flood N` or `ping N` that it reads, the seconds that it took and the processor
time that each question took: N questions as fast as they go, or one after the other (the median).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import random
import re
import socket
import sqlite3
import ssl
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

SITE, TIER, TASK = "bench", "big", "detect"
IMAGE_BYTES = 30_000  # of a picture of 640 px as JPEG, about
WAIT_S = 60.0
BOX = {"label": "cat", "box": [1.0, 2.0, 30.0, 40.0], "score": 0.4}


class Connection:
    """Where the broker is."""

    def __init__(self, port: str, ca: str, certificate: str, key: str) -> None:
        self.port, self.ca, self.certificate, self.key = int(port), Path(ca), Path(certificate), Path(key)

    def client(self, name: str) -> mqtt.Client:
        """A plain paho client, connected and looping; nothing about it is tuned but what every careful user sets."""
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
        client.tls_set(str(self.ca), str(self.certificate), str(self.key), tls_version=ssl.PROTOCOL_TLS_CLIENT)
        client.on_socket_open = _no_delay
        return client

    def connect(self, client: mqtt.Client, topic: str) -> None:
        """Connect, subscribe, and wait until both is granted."""
        granted = threading.Event()
        client.on_connect = lambda c, *_: c.subscribe(topic, qos=1)
        client.on_subscribe = lambda *_: granted.set()
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        if not granted.wait(WAIT_S):
            raise RuntimeError(f"no subscription to {topic} within {WAIT_S:.0f} s")


def _no_delay(_client: Any, _userdata: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _address(route: Any, device: str, **fields: str) -> str:
    topic: str = route(site=SITE, dev=device, **fields).topic
    return topic


def pictures(count: int) -> list[bytes]:
    """Bytes that differ and do not compress, as pictures are."""
    return [random.randbytes(IMAGE_BYTES) for _ in range(count)]


def echo(at: Connection) -> None:
    """The responder: as little work as an answer can be."""
    from edged.clock import SystemClock
    from edged.stamp import Stamp
    from edged.wire import messages, topics

    stamp = Stamp(SystemClock())
    named = re.compile(rb'"sample":"([^"]+)"')
    asked = topics.ESCALATION.filter(site=SITE, tier=TIER, task=TASK)
    at_device = asked.split("/").index("+")
    client = at.client("echo")

    def answer(client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        found = named.search(message.payload)
        assert found is not None
        verdict = messages.Verdict(
            **stamp(), sample=found[1].decode(), status="labelled", confidence=0.9,
            provenance=messages.Provenance(kind="model", who="echo", release="big@1"),
        )  # fmt: skip
        device = message.topic.split("/")[at_device]
        client.publish(_address(topics.VERDICT, device), messages.encode(verdict), qos=1)

    client.on_message = answer
    at.connect(client, asked)
    beat = messages.ResponderState(
        **stamp(), state="online", release="big@1", device="echo", every_s=300.0
    )  # fmt: skip
    address = topics.RESPONDER(tier=TIER, task=TASK, responder="echo.big")
    client.publish(address.topic, messages.encode(beat), qos=1, retain=True).wait_for_publish(WAIT_S)
    print("ready", flush=True)
    sys.stdin.read()


class Round:
    """Counts the verdicts of one measurement."""

    def __init__(self) -> None:
        self._left = 0
        self._done = threading.Condition()

    def expect(self, count: int) -> None:
        """So many verdicts will come."""
        with self._done:
            self._left = count

    def decided(self, count: int) -> None:
        """So many more verdicts are on the disk."""
        with self._done:
            self._left -= count
            self._done.notify_all()

    def wait(self) -> None:
        """Until all are."""
        with self._done:
            if not self._done.wait_for(lambda: self._left <= 0, WAIT_S):
                raise RuntimeError(f"{self._left} verdicts have not come within {WAIT_S:.0f} s")


def measure(ask: Callable[[int], list[Callable[[], None]]], verdicts: Round) -> None:
    """Do what stdin says. `ask(n)` prepares n questions; each is asked by calling it."""
    print("ready", flush=True)
    for line in sys.stdin:
        what, count = line.split()
        questions = ask(int(count))
        used = time.process_time()
        if what == "flood":
            verdicts.expect(len(questions))
            started = time.perf_counter()
            for question in questions:
                question()
            verdicts.wait()
            took = time.perf_counter() - started
        else:
            times = []
            for question in questions:
                verdicts.expect(1)
                started = time.perf_counter()
                question()
                verdicts.wait()
                times.append(time.perf_counter() - started)
            took = statistics.median(times)
        print(took, (time.process_time() - used) / len(questions), flush=True)


def edged(at: Connection, folder: Path) -> None:
    """The daemon without a model: questions enter where a pipeline commits them."""
    from edged.config import Settings
    from edged.daemon import Daemon
    from edged.outgoing import Outgoing
    from edged.store import NewSample

    tables: dict[str, Any] = {
        "device": {"id": "edged", "site": SITE, "state_dir": folder},
        "broker": {"host": "127.0.0.1", "port": at.port, "ca": at.ca, "certificate": at.certificate, "key": at.key},
        "slots": {"eye": {}},
        "pipelines": {"line": {"slot": "eye", "source": {"type": "mqtt"}, "escalate_to": TIER}},
    }
    settings = Settings(**tables)
    daemon, verdicts = Daemon(settings), Round()
    outgoing = Outgoing(SITE, "edged", daemon.stamp)
    store, label_many = daemon.store, daemon.store.label_many

    def labelled(*values: Any, **more: Any) -> Any:
        out = label_many(*values, **more)
        verdicts.decided(len(out))
        return out

    store.label_many = labelled  # type: ignore[method-assign]

    def prepare(count: int) -> list[Callable[[], None]]:
        return [partial(one, image) for image in pictures(count)]

    def one(image: bytes) -> None:
        stamp = daemon.stamp()
        key, now = stamp["id"], stamp["ts"]
        sample = NewSample(
            key, "line", TASK, "eye", "toy@1.0", "escalated", "unsure", "escalate", 0.4, 1.0,
            hashlib.sha256(image).hexdigest(), len(image), [BOX], "frame.jpg", now, None, now + 86400, {"p": 0.4},
        )  # fmt: skip
        store.capture(sample, image, outgoing.escalation(sample, image, TIER))
        daemon.control.wake()

    thread = threading.Thread(target=daemon.run, daemon=True)
    thread.start()
    while daemon.control.link_state != "connected":
        time.sleep(0.05)
    time.sleep(1.0)  # its subscriptions are granted, and the responder is heard
    measure(prepare, verdicts)
    daemon.stop()
    thread.join(WAIT_S)


def raw(at: Connection, folder: Path) -> None:
    """paho and sqlite3: the least that keeps a question until its verdict, and the verdict."""
    from edged.clock import SystemClock
    from edged.stamp import Stamp
    from edged.wire import topics

    stamp, client, verdicts = Stamp(SystemClock()), at.client("raw"), Round()
    client.manual_ack_set(True)
    came: queue.SimpleQueue[mqtt.MQTTMessage] = queue.SimpleQueue()
    client.on_message = lambda _c, _u, message: came.put(message)
    topic = _address(topics.ESCALATION, "raw", tier=TIER, task=TASK)
    blobs = folder / "blobs"
    blobs.mkdir(parents=True)
    writing = threading.Lock()  # as in the daemon: quicker than the sleeping retry of SQLite

    def connection() -> sqlite3.Connection:
        out = sqlite3.connect(folder / "raw.db", isolation_level=None, timeout=10)
        out.execute("PRAGMA journal_mode=WAL")
        out.execute("PRAGMA synchronous=FULL")
        return out

    mine = connection()
    mine.execute("CREATE TABLE question (id TEXT PRIMARY KEY, payload BLOB, verdict BLOB)")

    def decide() -> None:
        own = connection()
        while True:
            batch = [came.get()]
            while not came.empty():
                batch.append(came.get())
            rows = [(message.payload, json.loads(message.payload)["sample"]) for message in batch]
            with writing:
                own.execute("BEGIN IMMEDIATE")
                own.executemany("UPDATE question SET payload = NULL, verdict = ? WHERE id = ?", rows)
                own.execute("COMMIT")
            verdicts.decided(len(batch))
            for message in batch:
                client.ack(message.mid, message.qos)

    threading.Thread(target=decide, daemon=True).start()

    def prepare(count: int) -> list[Callable[[], None]]:
        return [partial(one, image) for image in pictures(count)]

    def one(image: bytes) -> None:
        envelope = stamp()
        key = envelope["id"]
        question = {
            **envelope, "v": 1, "sample": key, "pipeline": "line", "task": TASK, "release": "toy@1.0", "reason": "unsure",
            "confidence": 0.4, "image": base64.b64encode(image).decode(), "sha256": hashlib.sha256(image).hexdigest(),
            "prediction": [BOX], "label_by": envelope["ts"] + 86400, "origin": "raw", "hops": 0, "path": ["raw"],
        }  # fmt: skip
        payload = json.dumps(question, separators=(",", ":")).encode()
        keep(blobs, key, image)
        with writing:
            mine.execute("INSERT INTO question VALUES (?, ?, NULL)", (key, payload))
        client.publish(topic, payload, qos=1)

    at.connect(client, _address(topics.VERDICT, "raw"))
    measure(prepare, verdicts)


def keep(folder: Path, name: str, data: bytes) -> None:
    """A file that is whole, or not there: as durable as the daemon's images."""
    beside = folder / f".{name}"
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(folder / name)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    """Entry point of the process."""
    role, *where, folder = sys.argv[1:]
    at = Connection(*where)
    if role == "echo":
        echo(at)
    else:
        {"edged": edged, "raw": raw}[role](at, Path(folder))


if __name__ == "__main__":
    main()
