"""Events on their way to people: rows that are kept until every configured address has them, or it was tried enough.

Law of this file: addresses are secrets. They are in memory only; rows, logs and errors name an address by its place in the
configuration and its kind. A message is sent at least once: a kill between the sending and its row sends it again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from trainer.config import ConfigError
from trainer.config_fleet import Notify
from trainer.core.notices import HOUR_S, TITLE_MAX, Message, Waiting, level, pause_s, plan, wanted
from trainer.database import Database, Served, notices

log = logging.getLogger(__name__)

WAITING_MAX = 1000  # of one address; what is more is counted, and stands in the events only
TEXT_MAX = 2000
LOOK_S = 0.5
KEPT_S = 7 * 86400.0
STOP_S_MAX = 5.0
DEVICE = "device:"  # so begin the patterns in `kinds` for events of devices
LANE = "-devices"  # what rows call an address, for events of devices
Send = Callable[[Message], bool]


def target(url: str) -> str:
    """What rows call an address."""
    return sha256(url.encode()).hexdigest()[:16]


def note(connection: Connection, settings: Notify, event: dict[str, Any], *, of_device: bool = False) -> None:
    """Have people told of an event (`id`, `ts`, `kind`, `text`, `detail`, `source`), if they want to hear of its kind; part
    of the caller's transaction. One that is known already changes nothing.

    `of_device`: not the trainer but a device says so. Then only the kinds that are named `device:...` count, the device
    chooses neither title nor level, and the messages have a budget of their own.
    """
    if not settings.urls or not wanted(settings.kinds, DEVICE * of_device + event["kind"]):
        return
    detail = {} if of_device else event["detail"]
    title = str(detail.get("title") or f"{event['source']}: {event['kind'].replace('_', ' ')}")
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert
    for url in settings.urls:
        name = target(url.get_secret_value()) + LANE * of_device
        row = {
            "id": f"{event['id']}-{name}",
            "target": name,
            "title": title[:TITLE_MAX],
            "text": event["text"][:TEXT_MAX],
        }
        how = level(event["kind"], str(detail.get("level", "")))
        values = {**row, "level": how, "created": event["ts"], "due": 0.0, "state": "waiting"}
        connection.execute(insert(notices).values(**values).on_conflict_do_nothing(index_elements=["id"]))


class Notices:
    """Sends what waits, in a thread of its own: a slow or dead address never holds up the trainer."""

    def __init__(self, settings: Notify, database: Database, now: Callable[[], float]) -> None:
        """Raises ConfigError for an address that cannot be used."""
        self.counters = {"notices_sent": 0, "notices_failed": 0, "notices_given_up": 0, "notices_dropped": 0}
        self._settings, self._database, self._now = settings, database, now
        self._addresses: dict[
            str, tuple[str, Send, int]
        ] = {}  # each twice: for our own events, and for those of devices
        for url, name, send in _addresses(settings):
            self._addresses[target(url)] = (name, send, settings.per_hour)
            self._addresses[target(url) + LANE] = (f"{name} for devices", send, settings.devices_per_hour)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def start(self) -> None:
        """Begin; without addresses there is nothing to do."""
        if self._addresses:
            self._thread.start()

    def stop(self) -> None:
        """End; what waits is sent with the next start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S_MAX)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                self.tick()
            except Served:
                return  # the coordinator ends too
            except OperationalError as error:
                log.warning("notices wait, the database cannot be used: %s", error.orig)
            except Exception:  # what a message brings about must not end all later ones
                log.exception("notices")

    def tick(self) -> None:
        """Send what is due to every address."""
        self._tidy()
        for name, (shown, send, per_hour) in self._addresses.items():
            if self._stopping.is_set():
                return
            for message in self._due(name, per_hour):
                sent = _delivered(send, message)
                self._settle(name, shown, message, sent)
                if not sent:
                    break  # the address is out of order: the rest would fail too

    def _due(self, name: str, per_hour: int) -> list[Message]:
        now = self._now()
        with self._database.read() as connection:
            waits = (notices.c.target == name, notices.c.state == "waiting")
            rows = connection.execute(select(notices).where(*waits).order_by(notices.c.created, notices.c.id)).all()
            # One that waits for its next try holds up those behind it: they are for the same address.
            if any(row.due > now and row.due - now <= HOUR_S for row in rows):
                return []
            query = select(func.count()).where(notices.c.target == name, notices.c.state == "sent")
            sent = connection.execute(query.where(notices.c.due.between(now - HOUR_S, now))).scalar_one()
        waiting = [Waiting(row.id, row.title, row.text, row.level) for row in rows]
        return plan(waiting, int(sent), per_hour)

    def _settle(self, name: str, shown: str, message: Message, sent: bool) -> None:
        now, first = self._now(), message.ids[0]
        with self._database.write() as connection:
            if sent:
                self.counters["notices_sent"] += 1
                connection.execute(update(notices).where(notices.c.id.in_(message.ids)).values(state="summed", due=now))
                connection.execute(update(notices).where(notices.c.id == first).values(state="sent"))
                return
            self.counters["notices_failed"] += 1
            tries = connection.execute(select(notices.c.tries).where(notices.c.id == first)).scalar_one() + 1
            if tries >= self._settings.tries_max:
                self.counters["notices_given_up"] += 1
                changes: dict[str, Any] = {"state": "given_up", "tries": tries, "due": now}
                log.error("%s: not told after %d tries: %s; is the address right?", shown, tries, message.title)
            else:
                pause = pause_s(tries, self._settings.retry_s)
                changes = {"tries": tries, "due": now + pause}
                log.warning("%s: could not be told, again in %.0f s", shown, pause)
            connection.execute(update(notices).where(notices.c.id == first).values(**changes))

    def _tidy(self) -> None:
        """Forget what is old, what waits for an address that is gone, and what is too much."""
        with self._database.read() as connection:
            waiting = connection.execute(
                select(notices.c.target, func.count()).where(notices.c.state == "waiting").group_by(notices.c.target)
            ).all()
            old = connection.execute(
                select(notices.c.id).where(notices.c.state != "waiting", notices.c.due < self._now() - KEPT_S).limit(1)
            ).first()
        excess = {name: count - WAITING_MAX for name, count in waiting if count > WAITING_MAX}
        gone = [name for name, _ in waiting if name not in self._addresses]
        if not (excess or gone or old):
            return
        with self._database.write() as connection:
            connection.execute(
                delete(notices).where(notices.c.state != "waiting", notices.c.due < self._now() - KEPT_S)
            )
            connection.execute(delete(notices).where(notices.c.target.in_(gone)))
            for name, count in excess.items():
                waits = (notices.c.target == name, notices.c.state == "waiting")
                newest = select(notices.c.id).where(*waits).order_by(notices.c.created.desc()).limit(count)
                dropped = connection.execute(delete(notices).where(notices.c.id.in_(newest))).rowcount
                self.counters["notices_dropped"] += dropped
                log.warning("%d notices were dropped: %d wait already; the events have them", dropped, WAITING_MAX)


def _delivered(send: Send, message: Message) -> bool:
    try:
        return send(message)
    except Exception as error:  # an address's library may raise anything; its text may hold the address
        log.warning("a notice failed: %s", type(error).__name__)
        return False


def _addresses(settings: Notify) -> list[tuple[str, str, Send]]:
    """(address, what it is called for people, how to send there); imports apprise only when there is one."""
    if not settings.urls:
        return []
    import apprise

    for name in ("apprise", "requests", "urllib3"):  # what they log names addresses, with `serve --verbose` whole ones
        logging.getLogger(name).setLevel(logging.CRITICAL)
    types = {
        "info": apprise.NotifyType.INFO, "success": apprise.NotifyType.SUCCESS,
        "warning": apprise.NotifyType.WARNING, "failure": apprise.NotifyType.FAILURE,
    }  # fmt: skip
    found: list[tuple[str, str, Send]] = []
    for number, secret in enumerate(settings.urls):
        url = secret.get_secret_value()
        shown = f"notify.urls[{number}] ({url.partition(':')[0][:20]})"
        plugin = apprise.Apprise.instantiate(url, suppress_exceptions=True)
        if plugin is None:
            raise ConfigError(
                f"{shown}: apprise does not know such an address; use one as mailtos://user:password@host or "
                "jsons://host/path (its documentation lists them)"
            )

        found.append((url, shown, partial(_send, plugin, types)))
    return found


def _send(plugin: Any, types: dict[str, Any], message: Message) -> bool:
    return bool(plugin.notify(body=message.text, title=message.title, notify_type=types[message.level]))
