"""The MQTT connection: the only file of the project that imports paho.

Law of this file: a callback only puts into the inbox. It decides nothing, blocks on nothing and raises nothing, because
an exception in a paho callback kills the network thread while the client still claims to be connected, and a callback
that takes longer than 1.5 keepalives gets the same message again for ever. What was received is acknowledged by its
owner after he has committed it: a crash before that means that it comes again, never that it is lost.
"""

from __future__ import annotations

import functools
import logging
import queue
import random
import socket
import ssl
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edged.wire.topics import Address

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 16  # on reconnect paho sends all it holds, ignoring both windows: it never holds more than this
UNWRITTEN_MAX = 16  # QoS 0 messages handed to paho that are not on the wire yet: it would queue them without end
RECEIVE_MAX = 64  # QoS 1 messages the broker may send before we acknowledge one
INBOX_MAX = 4096  # beyond this, QoS 0 messages are dropped and counted
PACKET_OVERHEAD = 1024  # topic, properties and header, on the safe side


def _properties(packet: int) -> Properties:
    return Properties(packet)  # type: ignore[no-untyped-call]  # paho leaves this constructor untyped


class _OfPublish:
    """The properties of a PUBLISH that we use, for paho to pack. Its own class takes thirty times as long for them."""

    def __init__(self, expiry_s: int | None, correlation: bytes | None) -> None:
        # MQTT 5, section 2.2.2.2: 2 is the Message Expiry Interval, 9 the Correlation Data.
        packed = b"" if expiry_s is None else struct.pack("!BI", 2, expiry_s)
        if correlation is not None:
            packed += struct.pack("!BH", 9, len(correlation)) + correlation
        self._packed = bytes(VariableByteIntegers.encode(len(packed)) + packed)  # type: ignore[no-untyped-call]

    def pack(self) -> bytes:
        return self._packed


class TooLarge(ValueError):
    """A payload that the broker would refuse for ever; the message names both sizes, in bytes."""

    def __init__(self, topic: str, size: int, size_max: int) -> None:
        super().__init__(f"{topic}: {size} bytes do not fit the broker's max_packet_size {size_max}")
        self.size, self.size_max = size, size_max


class BadCredentials(ValueError):
    """The CA, certificate or key cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Where the broker is and who we are to it. Without `ca` the connection is plain TCP (loopback only, please)."""

    host: str
    port: int
    client_id: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    keepalive_s: int = 30
    session_expiry_s: int = 0
    reconnect_s_max: int = 60


@dataclass(frozen=True, slots=True)
class Inbound:
    """A message received. `token` acknowledges it."""

    topic: str
    payload: bytes
    retain: bool
    token: tuple[int, int, int]  # (message id, QoS, connection)


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us; `session` tells whether it still had ours."""

    session: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection ended, or could not be made: why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Published:
    """The broker answered a QoS 1 publish. `error` is empty when it took the message."""

    ref: Any
    error: str


def _counted(callback: Callable[..., None]) -> Callable[..., None]:
    """A callback whose exception is logged and counted as a fault instead of reaching paho."""

    @functools.wraps(callback)
    def run(self: Link, *values: Any) -> None:
        try:
            callback(self, *values)
        except Exception:
            self.faults += 1
            log.exception("%s failed", callback.__name__)

    return run


LinkEvent = Inbound | Connected | Disconnected | Published


class Link:
    """One MQTT 5 connection that reconnects for ever. Everything that happens arrives in `inbox`, in order."""

    def __init__(
        self,
        options: LinkOptions,
        subscriptions: Sequence[str],
        *,
        will: tuple[Address, bytes] | None = None,
        will_delay_s: int = 30,
        inbox: queue.Queue[Any] | None = None,
    ) -> None:
        """`inbox`: the owner's own queue, when he wants everything that happens to him in one order."""
        self.options = options
        self.inbox: queue.Queue[Any] = queue.Queue() if inbox is None else inbox
        self.connected = False
        self.dropped = 0  # QoS 0 messages that found the inbox full
        self.faults = 0  # exceptions in callbacks: ours to fix
        self.refused: set[str] = set()  # subscriptions that the broker did not grant
        self._subscriptions = list(subscriptions)
        self._asked: deque[list[str]] = deque()  # subscriptions that the broker has not answered, oldest first
        # Never held while paho is called: paho calls back with its own locks held.
        self._lock = threading.Lock()
        self._flying: dict[int, tuple[int, Any]] = {}  # message id -> (QoS, caller's reference)
        self._early: dict[int, str] = {}  # answers that came before publish() returned their id
        self._window = IN_FLIGHT_MAX
        self._packet_max = 0
        self._connection = 0  # changes with every connect and disconnect
        self._started = False
        self._client = self._make_client(will, will_delay_s)

    def _make_client(self, will: tuple[Address, bytes] | None, will_delay_s: int) -> mqtt.Client:
        o = self.options
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=o.client_id, protocol=mqtt.MQTTv5, manual_ack=True)
        client.max_inflight_messages_set(IN_FLIGHT_MAX)
        # Random first delay: a thousand devices that lost one broker must not come back in the same second.
        client.reconnect_delay_set(min_delay=min(random.randint(1, 3), o.reconnect_s_max), max_delay=o.reconnect_s_max)
        if o.ca is not None:
            try:
                client.tls_set(
                    ca_certs=str(o.ca),
                    certfile=str(o.certificate) if o.certificate else None,
                    keyfile=str(o.key) if o.key else None,
                    tls_version=ssl.PROTOCOL_TLS_CLIENT,
                )
            except (OSError, ssl.SSLError) as error:
                raise BadCredentials(
                    f"TLS files ca={o.ca} certificate={o.certificate} key={o.key}: {error}; "
                    "all three must exist, be readable PEM and belong together"
                ) from None
        if will is not None:
            properties = _properties(PacketTypes.WILLMESSAGE)
            properties.WillDelayInterval = will_delay_s
            client.will_set(will[0].topic, will[1], will[0].qos, will[0].retain, properties)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    def start(self, *, resume: bool = False) -> None:
        """Connect in the background and keep trying; returns at once. `resume`: take up the session that the broker has,
        even where ours is to end with the connection."""
        self._aim(resume=resume)
        self._client.loop_start()

    def _aim(self, *, resume: bool = False) -> None:
        self._started = True
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self.options.session_expiry_s
        properties.ReceiveMaximum = RECEIVE_MAX
        self._client.connect_async(
            self.options.host,
            self.options.port,
            keepalive=self.options.keepalive_s,
            clean_start=self.options.session_expiry_s == 0 and not resume,
            properties=properties,
        )

    def stop(self) -> None:
        """Disconnect and end the network thread. The Will is not sent: publish `offline` before."""
        self._started = False
        self._client.disconnect()
        self._client.loop_stop()
        self.connected = False

    def alive(self) -> bool:
        """Whether the network thread runs, or is not meant to."""
        thread = self._client._thread  # paho offers no public way to see that its thread is gone
        return not self._started or (thread is not None and thread.is_alive())

    def ensure_alive(self) -> bool:
        """Restart the network thread if it died; true when there was nothing to do. Call it regularly."""
        if self.alive():
            return True
        log.error("the MQTT network thread is gone: starting it again")
        self._client.loop_stop()
        self._lost("the network thread died")
        self.start()
        return False

    def subscribe(self, subscriptions: Sequence[str]) -> None:
        """Listen to exactly these topics from now on, on this connection and every later one."""
        if list(subscriptions) == self._subscriptions:
            return
        new = [topic for topic in subscriptions if topic not in self._subscriptions]
        gone = [topic for topic in self._subscriptions if topic not in subscriptions]
        self._subscriptions = list(subscriptions)
        self.refused -= set(gone)
        if self.connected:
            if new:
                self._subscribe(new)
            if gone:
                self._client.unsubscribe(gone)

    def keep_session(self, seconds: int) -> None:
        """The broker keeps our session for `seconds` without us. Only a new connection can tell it so: what is under way
        is sent again on it."""
        if seconds == self.options.session_expiry_s:
            return
        self.options = replace(self.options, session_expiry_s=seconds)
        if self._started:
            self.stop()
            self.start(resume=True)

    def _subscribe(self, topics: list[str]) -> None:
        self._asked.append(topics)
        self._client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])

    def room(self) -> int:
        """How many more QoS 1 messages may be handed over now."""
        with self._lock:
            flying = sum(qos for qos, _ in self._flying.values())
            return max(0, self._window - flying) if self.connected else 0

    def _unwritten(self) -> int:
        with self._lock:
            return sum(1 for qos, _ in self._flying.values() if qos == 0)

    def publish(self, address: Address, payload: bytes, ref: Any = None, *, correlation: bytes | None = None) -> bool:
        """Hand a message over; false when there is no room (nothing was done: keep it and try later).

        A QoS 1 message is answered by a `Published` with this `ref`; only the owner of the inbox sends such. QoS 0 may be
        sent from any thread. Raises TooLarge.
        """
        if self._packet_max and len(payload) + PACKET_OVERHEAD > self._packet_max:
            raise TooLarge(address.topic, len(payload), self._packet_max)
        if self.room() == 0 or (address.qos == 0 and self._unwritten() >= UNWRITTEN_MAX):
            return False
        properties = _OfPublish(address.expiry_s, correlation)
        info = self._client.publish(
            address.topic, payload, address.qos, address.retain, properties  # type: ignore[arg-type]
        )  # fmt: skip
        if info.rc not in (mqtt.MQTT_ERR_SUCCESS, mqtt.MQTT_ERR_NO_CONN):
            return False
        with self._lock:
            early = self._early.pop(info.mid, None)
            if early is None:
                self._flying[info.mid] = (address.qos, ref)
        if early is not None and ref is not None:
            self.inbox.put(Published(ref, early))
        return True

    def acknowledge(self, message: Inbound) -> None:
        """Tell the broker that `message` is safe with us. Of an earlier connection: nothing, it comes again."""
        mid, qos, connection = message.token
        if qos and connection == self._connection:
            self._client.ack(mid, qos)

    # Callbacks, all on paho's thread.

    @_counted
    def _on_socket_open(self, _client: mqtt.Client, _userdata: Any, sock: Any) -> None:
        # Without TCP_NODELAY a 1 KB round trip takes 40 ms longer on each side.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @_counted
    def _on_connect(
        self,
        _client: mqtt.Client,
        _userdata: Any,
        flags: mqtt.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self.inbox.put(Disconnected(f"the broker refused the connection: {reason}"))
            return
        receive_max = getattr(properties, "ReceiveMaximum", None) or 65535
        with self._lock:
            self._connection += 1
            self._packet_max = getattr(properties, "MaximumPacketSize", None) or 0
            self._window = min(IN_FLIGHT_MAX, receive_max)
            self.connected = True
        self._asked.clear()
        self.refused.clear()
        if self._subscriptions:
            self._subscribe(list(self._subscriptions))
        self.inbox.put(Connected(session=flags.session_present))

    @_counted
    def _on_connect_fail(self, _client: mqtt.Client, _userdata: Any) -> None:
        # paho calls this while it handles the exception, and is the only one who knows it: a refused certificate, a name
        # that does not resolve.
        why = sys.exception() or "no answer"
        self.inbox.put(Disconnected(f"no connection to {self.options.host}:{self.options.port}: {why}"))

    @_counted
    def _on_disconnect(
        self, _client: mqtt.Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._lost(str(reason))

    def _lost(self, reason: str) -> None:
        with self._lock:
            self.connected = False
            # What the old connection brought must not be acknowledged on the next one: it has its own message ids.
            self._connection += 1
            # paho sends QoS 1 again after the next connect; what was QoS 0 is gone. `_early` stays: publish() is about
            # to ask for it, and a message id that it did not find there would fill the window for ever.
            self._flying = {mid: entry for mid, entry in self._flying.items() if entry[0]}
        self.inbox.put(Disconnected(reason))

    @_counted
    def _on_subscribe(
        self, _client: mqtt.Client, _userdata: Any, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        # The broker answers requests in their order, and names no topic: the answers are in the order of the request's.
        topics = self._asked.popleft() if self._asked else []
        if len(reasons) != len(topics):
            return  # of a connection before this one
        refused = {topic for topic, reason in zip(topics, reasons, strict=True) if reason.is_failure}
        self.refused = (self.refused - set(topics)) | refused
        if refused:
            log.error("the broker refuses to send %s to this client: check its rights", ", ".join(sorted(refused)))

    @_counted
    def _on_message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        if message.qos == 0 and self.inbox.qsize() >= INBOX_MAX:
            self.dropped += 1
            return
        token = (message.mid, message.qos, self._connection)
        self.inbox.put(Inbound(message.topic, bytes(message.payload), message.retain, token))

    @_counted
    def _on_publish(
        self, _client: mqtt.Client, _userdata: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        # Also called for NotAuthorized and QuotaExceeded: only the caller may decide what that means.
        error = str(reason) if reason.is_failure else ""
        with self._lock:
            flying = self._flying.pop(mid, None)
            if flying is None:
                self._early[mid] = error
        if flying is not None and flying[1] is not None:
            self.inbox.put(Published(flying[1], error))
