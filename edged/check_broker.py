"""What `edged check` finds out about the way to the broker: certificates, TCP, TLS, MQTT, and the rights there."""

from __future__ import annotations

import queue
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from edged import connection
from edged.config import Broker
from edged.findings import Finding, Level, Look
from edged.link import Connected, Disconnected, Link, LinkOptions
from edged.wire.bundle import BULK

CONNECT_S = 5.0
ALERT_S = 0.3  # with TLS 1.3 a broker refuses our certificate only after the handshake
DAYS_LEFT_MIN = 30  # a certificate that ends sooner is a warning
DAY_S = 86400.0


def certificates(look: Look) -> Iterator[Finding]:
    """The three TLS files: there, readable by the right people, valid now and for a while, belonging together."""
    broker = look.settings.broker
    if broker.ca is None:
        yield Finding("certificates", "ok", f"none: {broker.host} is this machine, the connection is not encrypted")
        return
    whole = True
    for what, path in (("ca", broker.ca), ("certificate", broker.certificate), ("key", broker.key)):
        for finding in _readable(what, path):
            whole = False
            yield finding
    if not whole or broker.certificate is None or broker.key is None:
        return
    yield from _key(broker.key)
    for name, document in _parsed(broker.ca, broker.certificate):
        if isinstance(document, Finding):
            whole = False
            yield document
        else:
            yield validity(name, document, look.now)
            if name == "client certificate":
                yield from _subject(document, look.settings.device.id)
    if whole:
        yield _pair(broker)
    if broker.bulk_certificate is not None and broker.bulk_key is not None:
        yield from _bulk(look, broker.bulk_certificate, broker.bulk_key)


def _bulk(look: Look, certificate: Path, key: Path) -> Iterator[Finding]:
    """The second connection's certificate and key, as the first one's."""
    broken = [*_readable("bulk_certificate", certificate), *_readable("bulk_key", key)]
    yield from broken
    if broken:
        return
    yield from _key(key)
    try:
        document = decoded(certificate)
    except (OSError, ssl.SSLError) as error:
        text = f"broker.bulk_certificate={certificate} is none: {error}"
        yield Finding("certificates", "error", text, "copy the file again: it must be PEM text")
        return
    yield validity("bulk certificate", document, look.now)
    yield from _subject(document, look.settings.device.id + BULK)
    yield _pair(look.settings.broker.model_copy(update={"certificate": certificate, "key": key}))


def _readable(what: str, path: Path | None) -> Iterator[Finding]:
    if path is None:
        fix = f"set `{what}` in [broker]: each device has a certificate of its own, from the broker's authority"
        yield Finding("certificates", "warning", f"`ca` is set and `{what}` is not: brokers of a fleet ask for it", fix)
        return
    try:
        path.read_bytes()
    except OSError as error:
        fix = "copy it to the device, and let the user that runs edged read it"
        yield Finding("certificates", "error", f"broker.{what}={path}: {error.strerror}", fix)


def _key(key: Path) -> Iterator[Finding]:
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        text = f"{key} (mode {mode:04o}) is open to every user of this machine"
        yield Finding("private key", "error", text, f"chmod 600 {key}, and issue a new one if others were here")


def _parsed(ca: Path, certificate: Path) -> Iterator[tuple[str, dict[str, Any] | Finding]]:
    """Every certificate of the CA file, and ours, as `ssl` shows them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(str(ca))
        for document in context.get_ca_certs():
            yield "CA certificate", dict(document)
        if not context.get_ca_certs():
            text = f"{ca} holds no certificate of an authority"
            yield "", Finding("certificates", "error", text, "use the CA certificate that signed the broker's")
    except (OSError, ssl.SSLError) as error:
        fix = "copy the file again: it must be PEM text"
        yield "", Finding("certificates", "error", f"broker.ca={ca} is no certificate: {error}", fix)
    try:
        yield "client certificate", decoded(certificate)
    except (OSError, ssl.SSLError) as error:
        fix = "copy the file again: it must be PEM text"
        yield "", Finding("certificates", "error", f"broker.certificate={certificate} is none: {error}", fix)


def decoded(certificate: Path) -> dict[str, Any]:
    """Subject, issuer and dates of the first certificate in a file, in the words of `SSLSocket.getpeercert`."""
    # The standard library shows certificates of a peer only; this is how its own tests show those of a file.
    found: dict[str, Any] = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
    return found


def validity(name: str, document: dict[str, Any], now: float) -> Finding:
    """Whether a certificate is valid at `now`, and for how long."""
    start, end = (ssl.cert_time_to_seconds(document[key]) for key in ("notBefore", "notAfter"))
    who, days = common_name(document), (end - now) / DAY_S
    if now < start:
        fix = "set the clock of this device; if it is right, issue the certificate again"
        return Finding(name, "error", f"{who} is valid from {document['notBefore']} on, which is not yet", fix)
    if days <= 0:
        fix = "issue a new one; if it should still be valid, set the clock of this device"
        return Finding(name, "error", f"{who} ended {-days:.0f} days ago ({document['notAfter']})", fix)
    level: Level = "warning" if days < DAYS_LEFT_MIN else "ok"
    fix = "issue a new one before it ends: the device cannot connect after that" if level == "warning" else ""
    return Finding(name, level, f"{who} is valid for {days:.0f} more days (to {document['notAfter']})", fix)


def common_name(document: dict[str, Any]) -> str:
    """Whom a certificate names."""
    fields: dict[str, str] = {key: value for part in document.get("subject", ()) for key, value in part}
    return fields.get("commonName", "a certificate without a common name")


def _subject(document: dict[str, Any], device: str) -> Iterator[Finding]:
    name = common_name(document)
    if name != device:
        text = f"the certificate is {name}'s and the device is {device!r}: a broker lets each write its own topics only"
        yield Finding("client certificate", "warning", text, "make device.id the common name of the certificate")


def _context(broker: Broker) -> ssl.SSLContext:
    """As the daemon's; a key with a pass phrase fails instead of asking a terminal."""
    context = ssl.create_default_context(cafile=str(broker.ca))
    if broker.certificate is not None:
        context.load_cert_chain(str(broker.certificate), str(broker.key) if broker.key else None, password=lambda: "")
    return context


def _pair(broker: Broker) -> Finding:
    try:
        _context(broker)
    except (OSError, ssl.SSLError) as error:
        text = f"certificate={broker.certificate} and key={broker.key} do not belong together: {error}"
        if "KEY_VALUES_MISMATCH" not in str(error):
            text = f"certificate={broker.certificate} key={broker.key}: {error}"
        return Finding("certificates", "error", text, "copy both again; the key must be PEM text without a pass phrase")
    return Finding("certificates", "ok", f"{broker.ca}, {broker.certificate} and {broker.key} load and belong together")


def broker(look: Look) -> Iterator[Finding]:
    """Whether the broker is there, is the right one, takes us, and lets us hear what is ours."""
    settings = look.settings.broker
    where = f"{settings.host}:{settings.port}"
    try:
        context = None if settings.ca is None else _context(settings)
    except (OSError, ssl.SSLError):
        text = f"{where} was not asked: the certificates cannot be used"
        yield Finding("broker", "error", text, "mend the certificates first")
        return
    try:
        with socket.create_connection((settings.host, settings.port), CONNECT_S) as plain:
            if context is not None:
                yield from _handshake(where, context, plain, settings.host, look.now)
    except socket.gaierror as error:
        fix = "correct broker.host, or the name servers of this device"
        yield Finding("broker", "error", f"{where}: the name has no address: {error.strerror}", fix)
    except ssl.SSLCertVerificationError as error:
        yield Finding("broker", "error", f"{where}: TLS: {error.verify_message}", _tls_fix(error, settings.host))
    except ssl.SSLError as error:
        fix = "is this the TLS port, and is the broker's CA the one that issued this device's certificate?"
        yield Finding("broker", "error", f"{where}: TLS: {error.reason or error}", fix)
    except OSError as error:
        fix = "start the broker, and open the port on the way to it"
        yield Finding("broker", "error", f"{where}: {error}", fix)
    else:
        yield from _session(look, where)


def _tls_fix(error: ssl.SSLCertVerificationError, host: str) -> str:
    if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
        return f"issue the broker a certificate with the name {host}, or write its name into broker.host"
    if "expired" in error.verify_message or "not yet valid" in error.verify_message:
        return "issue the broker a new certificate; if its dates are right, set the clock of this device"
    return "put the CA that signed the broker's certificate into broker.ca"


def _handshake(
    where: str, context: ssl.SSLContext, plain: socket.socket, host: str, now: float
) -> Iterator[Finding]:  # fmt: skip
    with context.wrap_socket(plain, server_hostname=host) as secure:
        document = dict(secure.getpeercert() or {})
        secure.settimeout(ALERT_S)
        with suppress(TimeoutError):
            secure.recv(1)  # nothing comes before our CONNECT, unless it is a refusal
        yield Finding("broker tls", "ok", f"{where}: {secure.version()}, the name and the CA are right")
    yield validity("broker certificate", document, now)


def _session(look: Look, where: str) -> Iterator[Finding]:
    if look.status is not None:  # a second connection with its name would end the daemon's
        state = str(look.status.get("broker"))
        if state == "connected":
            yield Finding("broker", "ok", f"{where}: the running edged is connected")
        else:
            yield Finding(
                "broker", "error", f"{where}: the running edged says: {state}", "see docs/observe.md, `broker`"
            )
        return
    yield from _Probe(look).findings(where)


class _Probe:
    """An MQTT connection as the daemon's, that takes nothing from it.

    With a certificate the broker may take the name in it for the client id, whatever we say. So we come as the device,
    keep its session as the daemon would, and acknowledge nothing: what waits for the daemon still waits afterwards. Where
    there was no session, none is left behind. Without a certificate we come under another name.
    """

    def __init__(self, look: Look) -> None:
        self._look, self._id = look, look.settings.device.id
        if look.settings.broker.certificate is None:
            self._id += "~check"

    def findings(self, where: str) -> Iterator[Finding]:
        """Connect and subscribe."""
        settings = self._look.settings
        known, session, refused = self._visit(connection.session_expiry_s(settings))
        if known:
            yield Finding("broker", "error", f"{where}: {known}", _mqtt_fix(known, self._id))
            return
        if session is False and connection.session_expiry_s(settings):
            self._visit(0)  # there was none before: none stays behind
        yield Finding("broker", "ok", f"{where} takes {self._id}")
        if refused:
            fix = f"allow {self._id} to read them in the broker's access list"
            yield Finding("broker rights", "error", f"the broker refuses to send {', '.join(sorted(refused))}", fix)
        else:
            yield Finding("broker rights", "ok", "every subscription of this device is granted")

    def _visit(self, expiry_s: int) -> tuple[str, bool, set[str]]:
        """Connect once: (why that failed, whether there was a session, refused subscriptions)."""
        broker = self._look.settings.broker
        options = LinkOptions(
            broker.host, broker.port, self._id, broker.ca, broker.certificate, broker.key, broker.keepalive_s, expiry_s
        )
        # Not the shared subscriptions: their questions would come to us, and wait until we are gone.
        listens = [topic for topic in connection.subscriptions(self._look.settings) if not topic.startswith("$share/")]
        link = _Answering(options, listens)
        link.start()
        try:
            deadline = time.monotonic() + CONNECT_S
            while True:
                event = link.inbox.get(timeout=max(0.0, deadline - time.monotonic()))
                if isinstance(event, Disconnected):
                    return event.reason, False, set()
                if isinstance(event, Connected):
                    answered = link.answered.wait(CONNECT_S)
                    return "" if answered else "it does not answer subscriptions", event.session, link.refused
        except queue.Empty:
            return f"no answer to CONNECT within {CONNECT_S:.0f} s", False, set()
        finally:
            link.stop()


class _Answering(Link):
    """A link that tells when its subscriptions were answered."""

    def __init__(self, options: LinkOptions, subscriptions: list[str]) -> None:
        self.answered = threading.Event()
        super().__init__(options, subscriptions)

    def _on_subscribe(self, *values: Any) -> None:
        super()._on_subscribe(*values)
        self.answered.set()


def _mqtt_fix(reason: str, client: str) -> str:
    low = reason.lower()
    if "authori" in low or "password" in low or "user name" in low:
        return f"let the broker take {client}: its certificate's common name, or its entry in the access list"
    if "identifier" in low:
        return "use a device.id that the broker takes"
    if "protocol" in low:
        return "use a broker that speaks MQTT 5, such as Mosquitto 2"
    return "look into the broker's log: it says why it ended the connection"
