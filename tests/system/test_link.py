"""The link against a real mosquitto: what arrives, what is said when it does not, and what a dead broker changes."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edged.link import (
    IN_FLIGHT_MAX,
    UNWRITTEN_MAX,
    BadCredentials,
    Connected,
    Disconnected,
    Inbound,
    Link,
    LinkEvent,
    LinkOptions,
    Published,
    TooLarge,
)
from edged.wire import topics
from tests.support.ports import free_port
from tests.system.broker import Broker
from trainer.core.access import Identity

WAIT_S_MAX = 30.0
Event = TypeVar("Event", Inbound, Connected, Disconnected, Published)

Opener = Callable[..., Link]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def opened() -> Iterator[list[Link]]:
    links: list[Link] = []
    yield links
    for link in links:
        link.stop()


@pytest.fixture
def connect(broker: Broker, opened: list[Link]) -> Opener:
    def open_link(client_id: str, *subscriptions: str, session_s: int = 0) -> Link:
        options = LinkOptions(broker.host, broker.port, client_id, session_expiry_s=session_s, reconnect_s_max=1)
        link = Link(options, subscriptions)
        opened.append(link)
        link.start()
        wait_for(link, Connected)
        return link

    return open_link


def wait_for(link: Link, kind: type[Event], accept: Callable[[Event], bool] = lambda _: True) -> Event:
    """The next event of this kind that is accepted; what comes before it is skipped."""
    deadline = time.monotonic() + WAIT_S_MAX
    while True:
        event = link.inbox.get(timeout=max(0.01, deadline - time.monotonic()))
        if isinstance(event, kind) and accept(event):
            return event


def drain(link: Link, kind: type[Event], count: int) -> list[Event]:
    return [wait_for(link, kind) for _ in range(count)]


def metrics(dev: str = "dev1") -> topics.Address:
    return topics.METRICS(site="s", dev=dev)


def subscribed(link: Link, topic: topics.Address) -> None:
    """Until the broker has our subscription: what we send ourselves comes back."""
    link.publish(topic, b"probe", "probe")
    link.acknowledge(wait_for(link, Inbound, lambda message: message.payload == b"probe"))


def test_a_message_arrives_and_its_sender_is_told(connect: Opener) -> None:
    receiver, sender = connect("a", metrics().topic), connect("b")
    subscribed(receiver, metrics())
    assert sender.publish(metrics(), b"hello", "ref", correlation=b"c")
    assert wait_for(sender, Published) == Published("ref", "")
    message = wait_for(receiver, Inbound)
    assert (message.topic, message.payload, message.retain) == (metrics().topic, b"hello", False)


@pytest.mark.parametrize("correlation", [None, b"c", b"long" * 60])
@pytest.mark.parametrize("expiry_s", [None, 90, 7 * topics.DAY_S])
def test_a_message_carries_its_expiry_and_its_correlation(
    broker: Broker, connect: Opener, expiry_s: int | None, correlation: bytes | None
) -> None:
    came: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
    ready = threading.Event()
    other = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="other", protocol=mqtt.MQTTv5)
    other.on_message = lambda _client, _userdata, message: came.put(message)
    other.on_subscribe = lambda *_: ready.set()
    other.on_connect = lambda client, *_: client.subscribe(metrics().topic, qos=1)
    other.connect(broker.host, broker.port)
    other.loop_start()
    try:
        assert ready.wait(WAIT_S_MAX)
        assert connect("b").publish(replace(metrics(), expiry_s=expiry_s), b"hello", "ref", correlation=correlation)
        message = came.get(timeout=WAIT_S_MAX)
    finally:
        other.disconnect()
        other.loop_stop()
    left = getattr(message.properties, "MessageExpiryInterval", None)
    # The broker takes off the seconds that it kept it.
    assert left is None if expiry_s is None else left is not None and 0 <= expiry_s - left <= WAIT_S_MAX
    assert (message.payload, getattr(message.properties, "CorrelationData", None)) == (b"hello", correlation)


def test_a_retained_message_waits_for_whoever_comes_later(connect: Opener) -> None:
    desired = topics.DESIRED(site="s", dev="dev1")
    sender = connect("a")
    sender.publish(desired, b"{}", 1)
    wait_for(sender, Published)
    assert wait_for(connect("b", desired.topic), Inbound).retain


def test_what_was_not_acknowledged_comes_again_and_what_was_does_not(connect: Opener) -> None:
    device = connect("dev1", metrics().topic, session_s=60)
    subscribed(device, metrics())
    sender = connect("b")
    for payload in (b"kept", b"lost"):
        sender.publish(metrics(), payload, payload)
    first = drain(device, Inbound, 2)
    device.acknowledge(first[0])
    device.stop()  # before the second was safe
    again = connect("dev1", metrics().topic, session_s=60)
    repeated = wait_for(again, Inbound)
    assert repeated.payload == b"lost"
    again.acknowledge(repeated)
    again.stop()
    last = connect("dev1", metrics().topic, session_s=60)
    sender.publish(metrics(), b"next", 3)
    assert wait_for(last, Inbound).payload == b"next"


def test_an_acknowledgement_after_a_reconnect_does_not_count(connect: Opener, broker: Broker) -> None:
    device = connect("dev1", metrics().topic, session_s=60)
    subscribed(device, metrics())
    connect("b").publish(metrics(), b"work", 1)
    early = wait_for(device, Inbound)
    broker.stop()  # in order: it saves the session
    wait_for(device, Disconnected)
    device.acknowledge(early)
    broker.start()
    assert wait_for(device, Connected).session
    device.acknowledge(early)
    assert wait_for(device, Inbound).payload == b"work"
    device.stop()
    assert wait_for(connect("dev1", metrics().topic, session_s=60), Inbound).payload == b"work"


def test_nothing_more_is_taken_than_the_window_and_it_opens_again(connect: Opener, broker: Broker) -> None:
    sender = connect("a")
    assert sender.room() == IN_FLIGHT_MAX
    assert broker._process is not None
    os.kill(broker._process.pid, signal.SIGSTOP)
    taken = [sender.publish(metrics(), b"x", n) for n in range(IN_FLIGHT_MAX + 3)]
    os.kill(broker._process.pid, signal.SIGCONT)
    assert taken == [True] * IN_FLIGHT_MAX + [False] * 3
    assert [event.ref for event in drain(sender, Published, IN_FLIGHT_MAX)] == list(range(IN_FLIGHT_MAX))
    assert sender.room() == IN_FLIGHT_MAX


def test_a_killed_broker_is_found_again_and_what_flew_is_answered_once(connect: Opener, broker: Broker) -> None:
    receiver, sender = connect("a", metrics().topic, session_s=60), connect("b", session_s=60)
    assert broker._process is not None
    os.kill(broker._process.pid, signal.SIGSTOP)
    for n in range(5):
        assert sender.publish(metrics(), b"in flight", n)
    broker.kill9()
    wait_for(sender, Disconnected)
    assert (sender.connected, sender.room()) == (False, 0)
    assert not sender.publish(metrics(), b"while down", "refused")
    broker.start()
    assert wait_for(receiver, Connected).session is False  # so the daemon knows that everything must go out again
    answered = drain(sender, Published, 5)
    assert sorted(event.ref for event in answered) == [0, 1, 2, 3, 4]
    assert {event.error for event in answered} == {""}
    assert sender.room() == IN_FLIGHT_MAX
    subscribed(receiver, metrics())
    sender.publish(metrics(), b"after", "after")
    wait_for(receiver, Inbound, lambda message: message.payload == b"after")
    assert sender.faults == receiver.faults == 0


def test_a_broker_that_comes_late_is_found(tmp_path: Path, opened: list[Link]) -> None:
    broker = Broker(tmp_path / "late")
    link = Link(LinkOptions(broker.host, broker.port, "a", reconnect_s_max=1), [])
    opened.append(link)
    link.start()
    assert str(broker.port) in wait_for(link, Disconnected).reason
    with broker:
        wait_for(link, Connected)


def test_what_the_broker_forbids_is_reported_with_its_reason(tmp_path: Path, opened: list[Link]) -> None:
    with Broker(tmp_path / "tls", tls=True, clients=[Identity("dev1", "s")]) as broker:
        certificate, key = broker.certificate("dev1")
        link = Link(LinkOptions(broker.host, broker.port, "dev1", broker.ca, certificate, key, reconnect_s_max=1), [])
        opened.append(link)
        link.start()
        wait_for(link, Connected)
        assert link.publish(metrics("dev1"), b"mine", "mine")
        assert wait_for(link, Published) == Published("mine", "")
        assert link.publish(metrics("dev2"), b"not mine", "other")
        refused = wait_for(link, Published)
        assert (refused.ref, refused.error) == ("other", "Not authorized")
        assert link.room() == IN_FLIGHT_MAX


def test_a_broker_of_another_authority_is_refused(tmp_path: Path, opened: list[Link]) -> None:
    with Broker(tmp_path / "one", tls=True) as broker, Broker(tmp_path / "two", tls=True) as stranger:
        certificate, key = broker.certificate("dev1")
        options = LinkOptions(stranger.host, stranger.port, "dev1", broker.ca, certificate, key, reconnect_s_max=1)
        link = Link(options, [])
        opened.append(link)
        link.start()
        wait_for(link, Disconnected)
        assert not link.connected


def test_unusable_credentials_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(BadCredentials, match=r"ca\.pem"):
        Link(LinkOptions("127.0.0.1", free_port(), "a", ca=tmp_path / "ca.pem"), [])


def test_a_packet_over_the_brokers_limit_is_refused_here_and_nothing_breaks(connect: Opener) -> None:
    link = connect("a")
    with pytest.raises(TooLarge, match=r"1100000 bytes do not fit the broker's max_packet_size 1048576"):
        link.publish(metrics(), b"x" * 1_100_000, "big")
    assert link.publish(metrics(), b"x" * 1_000_000, "fits")
    assert wait_for(link, Published) == Published("fits", "")


def test_a_shared_subscription_gives_each_message_to_one_member(connect: Opener) -> None:
    shared = topics.ESCALATION.shared("responders", tier="2", task="digits")
    escalation = topics.ESCALATION(site="s", dev="dev1", tier="2", task="digits")
    first, second = connect("r1", shared, metrics("r1").topic), connect("r2", shared, metrics("r2").topic)
    subscribed(first, metrics("r1"))
    subscribed(second, metrics("r2"))
    sender = connect("a")
    for n in range(10):
        sender.publish(escalation, str(n).encode(), n)
    drain(sender, Published, 10)
    got: dict[Link, list[bytes]] = {first: [], second: []}
    deadline = time.monotonic() + WAIT_S_MAX
    while sum(map(len, got.values())) < 10 and time.monotonic() < deadline:
        for link, payloads in got.items():
            event = next_inbound(link)
            if event is not None:
                link.acknowledge(event)
                payloads.append(event.payload)
    assert sorted(got[first] + got[second]) == [str(n).encode() for n in range(10)]
    assert got[first]
    assert got[second]


def next_inbound(link: Link) -> Inbound | None:
    try:
        event: LinkEvent = link.inbox.get(timeout=0.05)
    except queue.Empty:
        return None
    return event if isinstance(event, Inbound) else None


def kill_thread(thread: threading.Thread) -> None:
    """Let the thread die of an exception, wherever it is."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    thread.join(WAIT_S_MAX)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is what this test does
def test_a_dead_network_thread_is_noticed_and_replaced(connect: Opener) -> None:
    link = connect("a", metrics().topic)
    assert link.ensure_alive()
    thread = link._client._thread
    assert thread is not None
    kill_thread(thread)
    assert not link.ensure_alive()
    wait_for(link, Disconnected)
    wait_for(link, Connected)
    subscribed(link, metrics())
    assert link.ensure_alive()


def test_a_stopped_link_stays_stopped(connect: Opener) -> None:
    link = connect("a")
    link.stop()
    assert link.ensure_alive()
    assert (link.connected, link._client._thread) == (False, None)


def test_an_exception_in_a_callback_is_counted_and_the_next_message_arrives(
    connect: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = connect("a", metrics().topic)
    subscribed(link, metrics())
    monkeypatch.setattr(link.inbox, "qsize", lambda: 1 / 0)
    link.publish(topics.Address(metrics().topic, 0, False, None), b"breaks")
    link.publish(metrics(), b"next", "next")
    assert wait_for(link, Inbound).payload == b"next"
    assert link.faults == 1
    assert link.ensure_alive()


def test_pieces_that_may_be_lost_do_not_pile_up_before_a_broker_that_stands_still(
    broker: Broker, connect: Opener
) -> None:
    link = connect("dev1")
    piece, payload = topics.PARTIAL(site="s", dev="dev1", id="r1"), b"x" * (256 << 10)
    process = broker._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        taken = sum(link.publish(piece, payload) for _ in range(400))
        assert UNWRITTEN_MAX <= taken < 200, "what the system's buffers hold, and a few more"
        assert link.room() == IN_FLIGHT_MAX, "they take no room from what must arrive"
    finally:
        process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + WAIT_S_MAX
    while not link.publish(piece, payload):
        assert time.monotonic() < deadline, "it never takes one again"
        time.sleep(0.01)
