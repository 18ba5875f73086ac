"""The small durable facts: counters, update records, bad releases, seen message ids, language requests, values."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from edged.store.agents import insert_run
from edged.store.database import Database, Row
from edged.store.records import AgentRun, Json, KnownBad, LanguageRequest, StoreLimits

if TYPE_CHECKING:
    from sqlite_utils import Database as Tables

_REMEMBER = (
    'INSERT INTO bad_release (sha256, "release", reason, at) VALUES (?, ?, ?, ?)'
    " ON CONFLICT (sha256) DO UPDATE SET reason = excluded.reason, at = excluded.at"
)
_REQUEST_COLUMNS = ", ".join(f'"{field.name}"' for field in fields(LanguageRequest))
_REQUEST_TEXTS = ("prompt", "messages", "options", "answer", "reason")


class Ledger:
    """Facts by key. Everything is durable when the call returns, except counters and seen ids (see there)."""

    def __init__(self, db: Database, limits: StoreLimits) -> None:
        self._db = db
        self._limits = limits
        self._counting = threading.Lock()
        self._pending: Counter[str] = Counter()

    def limit(self, limits: StoreLimits) -> None:
        """These limits hold from now on."""
        self._limits = limits

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter in memory; `flush_counters` keeps it."""
        if n:
            with self._counting:
                self._pending[name] += n

    def flush_counters(self) -> None:
        """Write what was counted since the last call; call it about once a second."""
        with self._counting:
            pending, self._pending = self._pending, Counter()
        if not pending:
            return
        try:
            with self._db.write(durable=False) as tables:
                tables.conn.executemany(
                    "INSERT INTO counter VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n",
                    list(pending.items()),
                )
        except Exception:
            with self._counting:
                self._pending.update(pending)
            raise

    def counters(self) -> dict[str, int]:
        """Every counter since this store was made, with what is not yet flushed."""
        with self._counting:
            pending = dict(self._pending)
        totals = {row["name"]: row["n"] for row in self._db.read("SELECT name, n FROM counter ORDER BY name")}
        for name, n in pending.items():
            totals[name] = totals.get(name, 0) + n
        return totals

    def save_update(self, target: str, record: Json, bad: KnownBad | None = None) -> None:
        """Keep the state of the update of one slot; save it before acting on it. `bad`: in the same transaction, never to be
        installed again."""
        with self._db.write() as tables:
            if bad is not None:
                tables.execute(_REMEMBER, (bad.sha256, bad.release, bad.reason, bad.at))
            tables.execute(
                "INSERT INTO model_update VALUES (?, ?) ON CONFLICT (target) DO UPDATE SET record = excluded.record",
                (target, json.dumps(record)),
            )

    def updates(self) -> dict[str, Json]:
        """target -> its last saved record."""
        rows = self._db.read("SELECT target, record FROM model_update ORDER BY target")
        return {row["target"]: json.loads(row["record"]) for row in rows}

    def remember_bad(self, release: str, sha256: str, reason: str, now: float) -> None:
        """Never install these bytes again."""
        with self._db.write() as tables:
            tables.execute(_REMEMBER, (sha256, release, reason, now))

    def known_bad(self, limit: int) -> list[KnownBad]:
        """What must not run here, the newest first."""
        sql = 'SELECT "release", sha256, reason, at FROM bad_release ORDER BY at DESC, sha256 LIMIT ?'
        return [KnownBad(**dict(row)) for row in self._db.read(sql, (limit,))]

    def bad(self, sha256: str) -> str | None:
        """Why the release with this SHA-256 must not run here; None when nothing is known against it."""
        rows = self._db.read("SELECT reason FROM bad_release WHERE sha256 = ?", (sha256,))
        return rows[0]["reason"] if rows else None

    def forget_bad(self, sha256: str) -> bool:
        """Allow the release again, on an operator's word; false when it was not remembered."""
        with self._db.write() as tables:
            return tables.execute("DELETE FROM bad_release WHERE sha256 = ?", (sha256,)).rowcount > 0

    def seen(self, message_id: str, now: float, *, record: bool = True) -> bool:
        """Whether this message was recorded before; records it unless told not to.

        Where a message must not be lost, ask with `record=False`, act, then record: recorded first, a crash before the
        act makes its repetition look like a duplicate. The newest `seen_max` ids are kept.
        """
        if self._db.read("SELECT 1 FROM seen WHERE id = ?", (message_id,)):
            return True
        if not record:
            return False
        # Not durable: forgotten by a power cut, it is merely handled again.
        with self._db.write(durable=False) as tables:
            sql = "INSERT INTO seen (id, at) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
            added = tables.execute(sql, (message_id, now)).rowcount
            tables.execute("DELETE FROM seen WHERE seq <= (SELECT max(seq) FROM seen) - ?", (self._limits.seen_max,))
        return added == 0

    def record_request(self, request: LanguageRequest) -> None:
        """Keep what became of a language request; the same id again replaces it. The newest are kept, up to
        `requests_max` and `requests_bytes_max`."""
        with self._db.write() as tables:
            self._insert_request(tables, request)

    def record_run(self, run: AgentRun, requests: Iterable[LanguageRequest]) -> None:
        """Keep a run of an agent and the language requests that it made, in one transaction. The newest runs are kept, up
        to `executions_max` and `executions_bytes_max`."""
        with self._db.write() as tables:
            for request in requests:
                self._insert_request(tables, request)
            insert_run(tables, self._limits, run)

    def _insert_request(self, tables: Tables, request: LanguageRequest) -> None:
        row = asdict(request) | {"messages": json.dumps(request.messages), "options": json.dumps(request.options)}
        row["bytes"] = sum(len(row[name].encode()) for name in _REQUEST_TEXTS)
        names, values = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        limits = self._limits
        tables.execute("DELETE FROM request WHERE id = ?", (request.id,))
        tables.execute(f"INSERT INTO request ({names}) VALUES ({values})", tuple(row.values()))
        while True:
            count, size = tables.execute("SELECT n, bytes FROM total WHERE name = 'request'").fetchone()
            if count <= limits.requests_max and size <= limits.requests_bytes_max:
                break
            tables.execute("DELETE FROM request WHERE seq = (SELECT min(seq) FROM request)")

    def requests(self, limit: int, *, since: float = 0.0, pipeline: str | None = None) -> list[LanguageRequest]:
        """The newest language requests answered from `since` on (of one pipeline), newest first."""
        sql = f"SELECT {_REQUEST_COLUMNS} FROM request WHERE ts >= ? AND (? IS NULL OR pipeline = ?)"
        return _requests(self._db.read(f"{sql} ORDER BY seq DESC LIMIT ?", (since, pipeline, pipeline, limit)))

    def request(self, request_id: str) -> LanguageRequest | None:
        """One language request; None when it is unknown, or was given up for newer ones."""
        found = _requests(self._db.read(f"SELECT {_REQUEST_COLUMNS} FROM request WHERE id = ?", (request_id,)))
        return found[0] if found else None

    def value(self, key: str) -> Any:
        """The JSON value kept under `key`; None when there is none."""
        rows = self._db.read("SELECT json FROM value WHERE key = ?", (key,))
        return json.loads(rows[0]["json"]) if rows else None

    def set_value(self, key: str, value: Any, *, durable: bool = True) -> None:
        """Keep a JSON value under `key`. Not `durable`: a power cut may undo it, but never without what is written after."""
        with self._db.write(durable) as tables:
            tables.execute(
                "INSERT INTO value VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET json = excluded.json",
                (key, json.dumps(value)),
            )


def _requests(rows: Iterable[Row]) -> list[LanguageRequest]:
    return [
        LanguageRequest(**{**dict(row), "messages": json.loads(row["messages"]), "options": json.loads(row["options"])})
        for row in rows
    ]
