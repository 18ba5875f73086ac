"""Looks for drift now and then, keeps what each look found with its figures, and announces what is new.

The look itself is `core.drift`; it takes seconds with a large fleet, so it has a thread of its own and the coordinator
goes on. What was found stays in the database: triggers and people read it there.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from edged.wire.manifest import ReleaseId
from trainer import live
from trainer.core.drift import Look, Rules, look
from trainer.core.streams import Block, Verdict
from trainer.database import Served, detections, looks, put
from trainer.host import Host, new_id
from trainer.inventory import chosen, known_labels
from trainer.releases import ReleaseError
from trainer.removed import removed_names

log = logging.getLogger(__name__)

FLEET = ""  # the scope of all devices; another scope is a selector
RETRY_S = 60.0  # after a look that failed
END_S_MAX = 10.0
COURSE_WINDOWS = 8  # that are looked at for changes; what is older is in the baseline or over
SHOWN_MAX = 50  # detections that are shown

Observe = Callable[..., list[Look]]


class _Stream(NamedTuple):
    """What a look takes of one release: hours of the baseline and the window, the course, verdicts."""

    counted: list[Block]
    course: list[Block]
    checked: list[Verdict]

    def only(self, devices: Collection[str] | None) -> _Stream:
        """The part of these devices; None: all of it."""
        if devices is None:
            return self
        return self._where(lambda device: device in devices)

    def without(self, devices: Collection[str]) -> _Stream:
        """All but the part of these devices."""
        return self._where(lambda device: device not in devices) if devices else self

    def _where(self, wanted: Callable[[str], bool]) -> _Stream:
        counted, course = ([b for b in part if wanted(live.device_of(b.place))] for part in self[:2])
        return _Stream(counted, course, [v for v in self.checked if wanted(live.device_of(v.place))])


class Drift:
    """`tick` is called again and again by the coordinator's thread; it starts a look when one is due."""

    def __init__(self, host: Host, observe: Observe = look) -> None:
        self._host, self._observe = host, observe
        self._thread: threading.Thread | None = None
        self._due: float | None = None
        self._looks = 0  # that the last check came to
        self.counters = {"drift_failed": 0}  # releases, and groups of one, that could not be looked at

    def tick(self) -> None:
        """Start a look when it is time, at most one at once."""
        if not self._host.config.drift.enabled or (self._thread is not None and self._thread.is_alive()):
            return
        now = self._host.now()
        if self._due is None:
            self._due = self._next(now)
        if self._due is not None and now >= self._due:
            self._due = None
            self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Wait for a look that is under way."""
        if self._thread is not None:
            self._thread.join(END_S_MAX)

    def _run(self) -> None:
        try:
            before, self._looks = self.counters["drift_failed"], 0
            self.check()
            config, nothing = self._host.config.drift, not self._looks and self.counters["drift_failed"] > before
            # What was looked at is not looked at again at once: more looks find more by chance.
            self._due = self._host.now() + (RETRY_S if nothing else config.check_s)
        except Exception:  # the fleet is served all the same; tried again soon
            log.exception("drift")
            self._due = self._host.now() + RETRY_S

    def _next(self, now: float) -> float | None:
        """When the next look is due: `check_s` after the last one, or after the first window that was ever taken in; None
        before any."""
        with self._host.database.read() as connection:
            due = next_look(connection, self._host.config.drift.check_s, now)
        # A clock that was set back must not put looks off for ever.
        return None if due is None else min(due, now + self._host.config.drift.check_s)

    def check(self) -> list[dict[str, Any]]:
        """Look at every release that answered within a window, as a whole fleet and group by group; what is new. One that
        cannot be looked at is counted and logged, and hides no other."""
        config, now = self._host.config.drift, self._host.now()
        with self._host.database.read() as connection:
            names = live.releases(connection, now - config.window_s)
            scopes = _scopes(live.groups(connection, self._host.config.site, config.group_by))
        found = []
        for release in names:
            with self._guarded(release):
                stream = self._stream(release, now)
                for scope, devices in scopes.items():
                    with self._guarded(f"{release}, {scope or 'the fleet'}"):
                        seen = self._look(release, scope, stream.only(devices), config.rules(len(scopes)), now)
                        found += self._keep(release, scope, seen, now)
                        self._looks += 1
        return found

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, Served):
            raise  # the database cannot be used: the whole look is tried again
        except Exception:
            self.counters["drift_failed"] += 1
            log.exception("drift of %s", what)

    def _stream(self, release: str, now: float) -> _Stream:
        config = self._host.config.drift
        floor = live.confidence_min(self._host.config, release)
        with self._host.database.read() as connection:
            stream = _Stream(
                live.compared(connection, release, config.baseline_s, now - config.window_s),
                live.course(connection, release, now - COURSE_WINDOWS * config.window_s),
                live.verdicts(connection, release, confidence_min=floor),
            )
            return stream.without(removed_names(connection))

    def _look(self, release: str, scope: str, stream: _Stream, rules: Rules, now: float) -> list[Look]:
        with self._host.database.read() as connection:
            query = select(looks.c.at).where(looks.c.release == release, looks.c.scope == scope)
            last = connection.execute(query.where(looks.c.at <= now)).scalar()
        carried = reference(self._host, release)
        return self._observe(stream.counted, stream.checked, carried, rules, now, last or 0.0, stream.course)

    def _keep(self, release: str, scope: str, seen: list[Look], now: float) -> list[dict[str, Any]]:
        """Store a look. What it found is a detection, once a window as long as it lasts; the first one is announced."""
        model, fresh = ReleaseId(release).name, []
        with self._host.database.write() as connection:
            told = {"model": model, "at": now, "found": [asdict(each) for each in seen]}
            put(connection, looks, {"release": release, "scope": scope}, told)
            for each in seen:
                if not each.found or _stands(
                    connection, release, scope, each.rule, now - self._host.config.drift.window_s, now
                ):
                    continue
                of = f"{release}, {scope}" if scope else release
                row: dict[str, Any] = {
                    "id": new_id(), "model": model, "release": release, "scope": scope, "rule": each.rule,
                    "text": f"{of}: {each.text}", "found_at": now, "evidence": each.evidence,
                }  # fmt: skip
                connection.execute(insert(detections).values(**row))
                self._host.announce(
                    connection, "drift", row["text"], model=model, release=release, scope=scope, rule=each.rule,
                    detection=row["id"], evidence=each.evidence,
                )  # fmt: skip
                fresh.append(row)
        return fresh


def _scopes(grouped: Mapping[str, Collection[str]]) -> dict[str, Collection[str] | None]:
    """What is looked at: the fleet, and the groups of every label that has more than one value."""
    keys = Counter(name.partition("=")[0] for name in grouped)
    return {FLEET: None} | {name: its for name, its in grouped.items() if keys[name.partition("=")[0]] > 1}


def _stands(connection: Connection, release: str, scope: str, rule: str, since: float, now: float) -> bool:
    """Whether the same was found since then; what a clock that was ahead found says nothing of now."""
    query = select(detections.c.id).where(
        detections.c.release == release, detections.c.scope == scope, detections.c.rule == rule,
        detections.c.found_at > since, detections.c.found_at <= now,
    )  # fmt: skip
    return connection.execute(query.limit(1)).first() is not None


def next_look(connection: Connection, check_s: float, now: float) -> float | None:
    """When the next look is due; None before any window was taken in. One in the future is from a clock that was ahead."""
    last = connection.execute(select(func.max(looks.c.at)).where(looks.c.at <= now)).scalar()
    if last is None and connection.execute(select(looks.c.at).limit(1)).first() is not None:
        return now
    if last is None:
        last = live.began(connection)
    return None if last is None else float(last) + check_s


def newest(connection: Connection, model: str, since: float = 0.0) -> dict[str, Any] | None:
    """The newest detection of a model that was made after `since`, for triggers; None without one."""
    query = select(detections).where(detections.c.model == model, detections.c.found_at > since)
    row = connection.execute(query.order_by(detections.c.found_at.desc(), detections.c.id.desc()).limit(1)).first()
    return dict(row._mapping) if row is not None else None


def reference(host: Host, release: str) -> list[int]:
    """The confidence histogram that a release carries; empty where it carries none or is not registered."""
    try:
        return host.registry.get(release).manifest.calibration.confidence_histogram
    except ReleaseError:
        return []


def report(host: Host, model: str = "", *, group_by: Sequence[str] | None = None, selector: str = "") -> dict[str, Any]:
    """What `trainer fleet drift` shows: live figures of the releases, the last looks, and what was found; JSON-able.

    `group_by`: labels that make groups, by default those of the configuration. `selector`: figures of these devices only.
    Raises BadSelector.
    """
    config, site, now = host.config.drift, host.config.site, host.now()
    keys = config.group_by if group_by is None else group_by
    with host.database.read() as connection:
        known_labels(connection, site, group_by or ())
        devices = set(chosen(connection, site, selector)) if selector else None
        grouped = live.groups(connection, site, keys)
        names = [
            each
            for each in live.releases(connection, now - config.window_s)
            if not model or ReleaseId(each).name == model
        ]
        since = now - config.window_s
        figures = [
            live.report(
                connection, each, since, live.confidence_min(host.config, each), grouped=grouped, devices=devices
            )
            for each in names
        ]
        last, found = select(looks).order_by(looks.c.release, looks.c.scope), select(detections)
        if model:
            last, found = last.where(looks.c.model == model), found.where(detections.c.model == model)
        found = found.order_by(detections.c.found_at.desc(), detections.c.id.desc()).limit(SHOWN_MAX)
        return {
            "next_look": next_look(connection, config.check_s, now) if config.enabled else None,
            "releases": figures,
            "looks": [dict(row._mapping) for row in connection.execute(last)],
            "detections": [dict(row._mapping) for row in connection.execute(found)],
        }
