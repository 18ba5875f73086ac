"""Pulls: pixels of chosen samples come from the devices into the pool, without a training.

    open -> done

A pull claims its samples as a training job does, so that no device loses them meanwhile; what has arrived is checked and
put into the pool with its label; then the devices may do with the samples what they did before. What is done follows from
rows alone: a trainer that was killed goes on, and a pull whose time is over gives back what did not come.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, insert, select, update

from trainer.claims import by_device, end_claims, forget_pixels, give_back, refused
from trainer.core.labels import Row, Task, best
from trainer.database import parts, pulls, samples
from trainer.exchange import KINDS, Source, record_of
from trainer.formats.base import Asked, Example, Problem, examine
from trainer.host import Host, new_id
from trainer.pool import Pool, PoolError, Record
from trainer.removed import GONE, removed_names

log = logging.getLogger(__name__)

OPEN, DONE = "open", "done"
SAMPLES_MAX = 5000  # of one pull
KEPT_A_TICK_MAX = 32  # pixels that are put into the pool before the coordinator looks at anything else
PULL_S_MAX = 7 * 86400.0


class Collect:
    """Drives every pull; `tick` is called about once a second by the coordinator's thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pool = Pool(host.database, host.config.pool)
        self._said: dict[str, str] = {}  # pull -> why it does not go on; said once

    def start(self, ids: Sequence[str], seconds: float) -> dict[str, Any]:
        """Begin a pull of these samples, which ends after `seconds` at the latest; the answer to show, or an `error`."""
        wanted = list(dict.fromkeys(ids))
        if not 0 < len(wanted) <= SAMPLES_MAX:
            return {"error": f"{len(wanted)} samples: name between 1 and {SAMPLES_MAX} in one pull"}
        if not 0 < seconds <= PULL_S_MAX:
            return {"error": f"{seconds} s: give more than 0 and at most {PULL_S_MAX:.0f}"}
        host, now, pull = self._host, self._host.now(), f"pull-{new_id()}"
        with host.database.write() as connection:
            rows = _rows(connection, wanted)
            missing = {each: "no device has told of it" for each in wanted if each not in rows}
            claimed, out = [], removed_names(connection)
            for row in rows.values():
                if self._pool.path(row.sha256).is_file():
                    continue  # its pixels are here; only what is said of them is to be kept
                if row.device in out:
                    missing[row.id] = GONE
                    continue
                if row.state != "labelled" or row.job is not None:
                    missing[row.id] = f"it is {row.state}" + (f", in {row.job}" if row.job else "")
                else:
                    claimed.append(row)
            for part in parts([row.id for row in claimed]):
                connection.execute(update(samples).where(samples.c.id.in_(part)).values(job=pull))
            for device, names in by_device(claimed):
                host.command_samples(connection, device, "claim", names, job=pull)
            values = {"id": pull, "state": OPEN, "samples": wanted, "here": [], "missing": missing}
            connection.execute(insert(pulls).values(**values, created=now, until=now + seconds))
            host.announce(connection, "pull_started", f"{pull}: {len(wanted) - len(missing)} samples", pull=pull)
        return {"pull": pull, "samples": len(wanted), "refused": missing}

    def tick(self) -> None:
        """Keep what has arrived, and end what is complete or too old."""
        with self._host.database.read() as connection:
            rows = connection.execute(select(pulls).where(pulls.c.state == OPEN).order_by(pulls.c.created)).all()
        for row in rows:
            self._go_on(row)

    def _go_on(self, row: Any) -> None:
        host = self._host
        here, missing = list(row.here), dict(row.missing)
        with host.database.read() as connection:
            known = _rows(connection, [each for each in row.samples if each not in missing and each not in set(here)])
            told = refused(connection, row.id)
        late = host.now() >= row.until
        kept = 0
        for key, sample in known.items():
            if kept >= KEPT_A_TICK_MAX:
                break
            try:
                outcome = self._keep(row.id, sample)
            except OSError as error:  # the disk is full: what is here stays, the rest is tried again
                self._complain(row.id, f"{error.filename or self._pool.objects}: {error.strerror}")
                outcome = None
            if outcome is None and (key in told or late):
                outcome = told.get(key, "it did not come in time")
            if outcome == "":
                here.append(key)
                kept += 1
            elif outcome is not None:
                missing[key] = outcome
        if len(here) != len(row.here) or len(missing) != len(row.missing):
            with host.database.write() as connection:
                connection.execute(update(pulls).where(pulls.c.id == row.id).values(here=here, missing=missing))
        if len(here) + len(missing) >= len(row.samples):
            self._end(row, here, missing)

    def _keep(self, pull: str, sample: Any) -> str | None:
        """Put a sample into the pool: `` when it is there, why it never will be, or None while its pixels are awaited."""
        uploaded = self._host.config.samples / sample.sha256
        if self._pool.path(sample.sha256).is_file():
            try:
                data = self._pool.read(sample.sha256)
            except PoolError as error:
                return str(error)
        elif sample.job != pull:
            return f"it was taken from this pull: it is {sample.state}" + (f", in {sample.job}" if sample.job else "")
        elif uploaded.is_file():
            data = uploaded.read_bytes()
            if sha256(data).hexdigest() != sample.sha256:
                uploaded.unlink(missing_ok=True)
                log.error("sample %s: %s is damaged; it is asked for again", sample.id, uploaded)
                with self._host.database.write() as connection:
                    self._host.command_samples(connection, sample.device, "claim", [sample.id], job=pull)
                return None
        else:
            return None
        kind = getattr(self._host.config.models.get(sample.model), "kind", "detect")
        record = record_of_sample(sample, data, kind)
        if isinstance(record, str):
            return record
        self._pool.add([(record, data)], self._host.now())
        return ""

    def _end(self, row: Any, here: list[str], missing: dict[str, str]) -> None:
        """The devices may do with the samples what they did before."""
        host = self._host
        with host.database.write() as connection:
            query = select(samples.c.id, samples.c.device, samples.c.sha256).where(samples.c.job == row.id)
            held = connection.execute(query).all()
            end_claims(connection, row.id)
            give_back(host, connection, row.id, held, tried=0)
            connection.execute(update(pulls).where(pulls.c.id == row.id).values(state=DONE))
            text = f"{row.id}: {len(here)} of {len(row.samples)} samples are in the pool"
            host.announce(connection, "pull_done", text, pull=row.id, missing=len(missing))
            forget_pixels(connection, host.config.samples, [each.sha256 for each in held])
        self._said.pop(row.id, None)

    def _complain(self, pull: str, text: str) -> None:
        if self._said.get(pull) != text:
            self._said[pull] = text
            log.error("%s waits: %s; make room", pull, text)


def claims(connection: Connection, digest: str) -> bool:
    """Whether an open pull waits for pixels with this hash."""
    query = (
        select(samples.c.id)
        .join(pulls, pulls.c.id == samples.c.job)
        .where(samples.c.sha256 == digest, pulls.c.state == OPEN)
    )
    return connection.execute(query.limit(1)).first() is not None


def record_of_sample(sample: Any, data: bytes, kind: str) -> Record | str:
    """What the pool keeps of a device's sample (a row of `samples`) of a model of this kind, or why it cannot be."""
    task, rows = _label(sample.label, kind)
    said = sample.provenance or {}
    place = f"device {sample.device}, sample {sample.id}"
    example: Example | None = None
    reason, asked = "", Asked(task, None, {})
    for item in examine(data, task, rows, asked, place, "box", captured=sample.captured, device=sample.device):
        if isinstance(item, Problem):
            log.warning("%s: %s", item.place, item.reason)
            reason = reason or item.reason
        else:
            example = item
    if example is None:
        return reason
    known = said.get("kind") in KINDS and bool(said.get("who"))
    who = said if known else {"kind": "model", "who": sample.device, "release": sample.release}
    source = Source(sample.model, who["kind"], who["who"], who.get("release") or "", sample.label_confidence)
    return record_of(example, source)


def _label(label: Sequence[Row], kind: str) -> tuple[Task, list[Row]]:
    """The task of a label as devices have it, and its rows as the pool has them."""
    if any("text" in row for row in label) or kind == "llm":
        return "text", [{"text": row.get("text")} for row in label]
    if kind == "classify":  # boxes around the whole picture, the best is meant
        return "classify", [{key: row[key] for key in ("label", "score") if key in row} for row in best(label)]
    if kind == "segment" and label and all("polygons" in row for row in label):
        return "segment", [dict(row) for row in label]
    return "detect", [{key: row[key] for key in ("label", "box", "score") if key in row} for row in label]


def _rows(connection: Connection, ids: Sequence[str]) -> dict[str, Any]:
    found = {}
    for part in parts(ids):
        for row in connection.execute(select(samples).where(samples.c.id.in_(part)).order_by(samples.c.id)):
            found[row.id] = row
    return found
