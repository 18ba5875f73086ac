"""A person's word about a picture of the pool goes to the device that keeps its sample, as a verdict (down/verdict).

What is sent follows from rows alone: while the catalogue says something else than the last word of a person, the device is
told, again and again, and its next catalogue entry ends it. A sample that a training has claimed is told of afterwards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from sqlalchemy import Connection, select

from edged.link import TooLarge
from edged.wire import messages, topics
from edged.wire.messages import Provenance, Verdict
from trainer.core.labels import IMAGE_TASKS, Row, Task, canonical, check, last_word
from trainer.core.presence import Lately
from trainer.database import devices, samples
from trainer.database import pool as pool_table
from trainer.formats.base import size_of
from trainer.host import Host
from trainer.pool import Pool, PoolError, Record, record_of
from trainer.presence import there
from trainer.shapes import carried

log = logging.getLogger(__name__)

LOOK_S = 10.0  # between two looks at what people have said
A_LOOK_MAX = 64  # verdicts that are sent at one look
TRIES_MAX = 10  # of one correction, by one process: who does not take it says why in its own log
OPEN_STATES = ("labelled", "unresolved")  # in which a device takes a person's word

SIZES_MAX = 65536  # pictures whose size is remembered

Size = tuple[int, int]
Publish = Callable[[topics.Address, bytes], bool]


@dataclass(frozen=True, slots=True)
class Correction:
    """What a device is to be told of one of its samples."""

    device: str
    sample: str
    status: Literal["labelled", "rejected"]
    label: str  # as devices have it, JSON
    who: str


class Corrections:
    """Tells devices; `tick` is called by the coordinator's thread. `publish` sends, or says that it cannot now."""

    def __init__(self, host: Host, publish: Publish) -> None:
        self._host, self._publish = host, publish
        self._pool = Pool(host.database, host.config.pool)
        self._looked = -1e9
        self._sizes: dict[str, Size | None] = {}
        self._sent: dict[Correction, tuple[int, float]] = {}  # -> how often, and when last

    def tick(self) -> None:
        """Send what is due."""
        now = self._host.now()
        if 0 <= now - self._looked < LOOK_S:
            return
        self._looked = now
        with self._host.database.read() as connection:
            due = list(corrections(connection, self._size, self._host.lately()))
        self._sent = {each: self._sent[each] for each in due if each in self._sent}
        sent = 0
        for each in due:
            tries, last = self._sent.get(each, (0, -1e9))
            if sent >= A_LOOK_MAX or tries >= TRIES_MAX or 0 <= now - last < self._host.config.command_resend_s:
                continue
            address = topics.VERDICT(site=self._host.config.site, dev=each.device)
            try:
                if not self._publish(address, messages.encode(self._verdict(each))):
                    return
            except TooLarge as error:
                log.error("%s", error)
                tries = TRIES_MAX
            sent += 1
            self._sent[each] = (tries + 1, now)
            if tries + 1 == TRIES_MAX:
                log.error("%s does not take a person's word about its sample %s", each.device, each.sample)

    def _size(self, sha256: str) -> Size | None:
        if sha256 not in self._sizes:
            if len(self._sizes) >= SIZES_MAX:
                self._sizes.clear()
            try:
                self._sizes[sha256] = size_of(self._pool.read(sha256))
            except PoolError as error:
                log.error("a person's word about %s waits: %s", sha256[:12], error)
                self._sizes[sha256] = None  # until the next start
        return self._sizes[sha256]

    def _verdict(self, said: Correction) -> Verdict:
        return Verdict(
            **self._host.envelope(), sample=said.sample, status=said.status,
            label=messages.label_of(json.loads(said.label)),
            confidence=1.0, provenance=Provenance(kind="person", who=said.who), reason="review",
        )  # fmt: skip


def corrections(connection: Connection, size: Callable[[str], Size | None], heard: Lately) -> Iterator[Correction]:
    """What online devices do not say of their samples yet although a person did; `size` of the picture with this hash."""
    query = (
        select(samples, *(column.label(f"pool_{column.name}") for column in pool_table.c))
        .join(pool_table, (pool_table.c.sha256 == samples.c.sha256) & (pool_table.c.model == samples.c.model))
        .join(devices, devices.c.device == samples.c.device)
        .where(pool_table.c.kind == "person", samples.c.job.is_(None), samples.c.state.in_(OPEN_STATES))
        .where(there(heard))
        .order_by(samples.c.id, pool_table.c.id)
    )
    found: dict[str, tuple[Any, list[Record]]] = {}
    for row in connection.execute(query):
        said = SimpleNamespace(**{column.name: getattr(row, f"pool_{column.name}") for column in pool_table.c})
        found.setdefault(row.id, (row, []))[1].append(record_of(said))
    for sample, words in found.values():
        index = last_word(words)
        correction = _correction(sample, words[index], size) if index is not None else None
        if correction is not None:
            yield correction


def _correction(sample: Any, word: Record, size: Callable[[str], Size | None]) -> Correction | None:
    """What a sample's device is to be told; None when its catalogue says so already."""
    seen = size(word.sha256) if word.task in IMAGE_TASKS else (0, 0)
    if seen is None:
        return None
    task: Task = word.task if word.task in ("text", "segment") else "detect"
    # As it was taken into the pool: boxes end at the border of the picture.
    now = canonical(check(task, _plain(sample.label), seen, None).rows)
    label = _as_device_has_it(word, seen)
    if word.verdict == "rejected":
        # Nothing is wrong with another label, which the device may have by now.
        same = now == canonical(label)
        return Correction(sample.device, sample.id, "rejected", "[]", word.who) if same else None
    by_person = (sample.provenance or {}).get("kind") == "person"
    if now == canonical(label) and by_person and sample.state == "labelled":
        return None
    return Correction(sample.device, sample.id, "labelled", json.dumps(label), word.who)


def _as_device_has_it(word: Record, size: Size) -> list[Row]:
    if word.task == "classify":
        return [{"label": row["label"], "box": [0.0, 0.0, float(size[0]), float(size[1])]} for row in word.label]
    rows = [{**row, "polygons": carried(row.get("polygons", []))} for row in _plain(word.label)]
    # Of an outline so thin that no part of it is left, the box is told.
    return [{key: value for key, value in row.items() if key != "polygons" or value} for row in rows]


def _plain(label: Any) -> list[Row]:
    """A label's words, or its boxes and outlines: what devices keep of it."""
    return [{key: row[key] for key in ("text", "label", "box", "polygons") if key in row} for row in label]
