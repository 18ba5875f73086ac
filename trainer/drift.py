"""Looks for drift now and then, keeps what each look found with its figures, and announces what is new.

The look itself is `core.drift`; it takes seconds with a large fleet, so it has a thread of its own and the coordinator
goes on. What was found stays in the database: triggers and people read it there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, func, insert, select

from edged.wire.manifest import ReleaseId
from trainer import live
from trainer.core.drift import Look, Rules, look
from trainer.database import detections, looks, put
from trainer.host import Host, new_id
from trainer.releases import ReleaseError

log = logging.getLogger(__name__)

FLEET = ""  # the scope of all devices
RETRY_S = 60.0  # after a look that failed
END_S_MAX = 10.0
COURSE_WINDOWS = 8  # that are looked at for changes; what is older is in the baseline or over
SHOWN_MAX = 50  # detections that are shown

Observe = Callable[..., list[Look]]


class Drift:
    """`tick` is called again and again by the coordinator's thread; it starts a look when one is due."""

    def __init__(self, host: Host, observe: Observe = look) -> None:
        self._host, self._observe = host, observe
        self._thread: threading.Thread | None = None
        self._due: float | None = None

    def tick(self) -> None:
        """Start a look when it is time, at most one at once."""
        if not self._host.config.drift.enabled or (self._thread is not None and self._thread.is_alive()):
            return
        now = self._host.now()
        if self._due is None:
            self._due = self._next(now)
        if now >= self._due:
            self._due = None
            self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Wait for a look that is under way."""
        if self._thread is not None:
            self._thread.join(END_S_MAX)

    def _run(self) -> None:
        try:
            self.check()
            self._due = self._host.now() + self._host.config.drift.check_s
        except Exception:  # the fleet is served all the same; tried again soon
            log.exception("drift")
            self._due = self._host.now() + RETRY_S

    def _next(self, now: float) -> float:
        """When the next look is due: `check_s` after the last one, or after the first window that was ever taken in."""
        with self._host.database.read() as connection:
            due = next_look(connection, self._host.config.drift.check_s)
        # A clock that was set back must not put looks off for ever.
        return min(due, now + self._host.config.drift.check_s) if due is not None else now + RETRY_S

    def check(self) -> list[dict[str, Any]]:
        """Look at every release that answered within a window, as a whole fleet and group by group; what is new."""
        config, now = self._host.config.drift, self._host.now()
        with self._host.database.read() as connection:
            names = live.releases(connection, now - config.window_s)
            grouped = live.groups(connection)
        found = []
        for release in names:
            scopes: dict[str, list[str] | None] = {FLEET: None}
            if len(grouped) > 1:
                scopes |= dict(sorted(grouped.items()))
            for scope, devices in scopes.items():
                seen, at = self._look(release, scope, devices, config.rules(len(scopes)), now)
                found += self._keep(release, scope, seen, at)
        return found

    def _look(
        self, release: str, scope: str, devices: list[str] | None, rules: Rules, now: float
    ) -> tuple[list[Look], float]:
        with self._host.database.read() as connection:
            of = (looks.c.release == release, looks.c.scope == scope)
            last = connection.execute(select(looks.c.at).where(*of)).scalar()
            counted = live.compared(connection, release, rules.baseline_s, now - rules.window_s, group=scope)
            course = live.course(connection, release, now - COURSE_WINDOWS * rules.window_s, group=scope)
            floor = confidence_min(self._host, release)
            checked = live.verdicts(connection, release, devices=devices, confidence_min=floor)
        carried = reference(self._host, release)
        return self._observe(counted, checked, carried, rules, now, last or 0.0, course), now

    def _keep(self, release: str, scope: str, seen: list[Look], now: float) -> list[dict[str, Any]]:
        """Store a look. What it found is a detection, once a window as long as it lasts; the first one is announced."""
        model, fresh = ReleaseId(release).name, []
        with self._host.database.write() as connection:
            told = {"model": model, "at": now, "found": [asdict(each) for each in seen]}
            put(connection, looks, {"release": release, "scope": scope}, told)
            for each in seen:
                if not each.found or _stands(
                    connection, release, scope, each.rule, now - self._host.config.drift.window_s
                ):
                    continue
                of = f"{release}{f', group {scope}' if scope else ''}"
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


def _stands(connection: Connection, release: str, scope: str, rule: str, since: float) -> bool:
    """Whether the same was found since then."""
    query = select(detections.c.id).where(
        detections.c.release == release, detections.c.scope == scope, detections.c.rule == rule,
        detections.c.found_at > since,
    )  # fmt: skip
    return connection.execute(query.limit(1)).first() is not None


def next_look(connection: Connection, check_s: float) -> float | None:
    """When the next look is due; None before any window was taken in."""
    last = connection.execute(select(func.max(looks.c.at))).scalar()
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


def confidence_min(host: Host, release: str) -> float:
    """The least confidence of a label of this model that counts."""
    settings = host.config.models.get(ReleaseId(release).name)
    return float(getattr(settings, "label_confidence_min", 0.0)) if settings is not None else 0.0


def report(host: Host, model: str = "") -> dict[str, Any]:
    """What `trainer fleet drift` shows: live figures of the releases, the last looks, and what was found; JSON-able."""
    config, now = host.config.drift, host.now()
    with host.database.read() as connection:
        names = [
            each
            for each in live.releases(connection, now - config.window_s)
            if not model or ReleaseId(each).name == model
        ]
        figures = [live.report(connection, each, now - config.window_s, confidence_min(host, each)) for each in names]
        last, found = select(looks).order_by(looks.c.release, looks.c.scope), select(detections)
        if model:
            last, found = last.where(looks.c.model == model), found.where(detections.c.model == model)
        found = found.order_by(detections.c.found_at.desc(), detections.c.id.desc()).limit(SHOWN_MAX)
        return {
            "next_look": next_look(connection, config.check_s) if config.enabled else None,
            "releases": figures,
            "looks": [dict(row._mapping) for row in connection.execute(last)],
            "detections": [dict(row._mapping) for row in connection.execute(found)],
        }
