"""What a database holds, for support: counts, sizes and states; no payload, no image, no text of a person.

Law of this file: the database is only read, with or without a daemon that works in it; a broken one tells what it can.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

WAIT_S = 5.0  # for a lock of the daemon
ROWS_MAX = 200  # of each list

# Columns are named one by one: a column that is added later is not shown until somebody has thought about it.
_TABLES: dict[str, str] = {
    "samples": 'SELECT state, pipeline, "release", decision, reason, count(*) AS samples, sum(bytes) AS bytes,'
    " min(captured) AS oldest, max(captured) AS newest FROM sample GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3 LIMIT ?",
    "totals": "SELECT name, n, bytes FROM total LIMIT ?",
    "counters": "SELECT name, n FROM counter ORDER BY name LIMIT ?",
    "outbox": "SELECT topic, qos, keep, bytes, enqueued, due, expires, attempts, error FROM outbox ORDER BY seq LIMIT ?",
    "dead_letters": "SELECT topic, bytes, reason, enqueued FROM dead_letter ORDER BY seq DESC LIMIT ?",
    "updates": "SELECT target, record FROM model_update ORDER BY target LIMIT ?",
    "bad_releases": 'SELECT sha256, "release", reason, at FROM bad_release ORDER BY at DESC LIMIT ?',
    "requests": 'SELECT id, pipeline, ts, outcome, finish_reason, prompt_tokens, answer_tokens, latency_ms, "release",'
    " adapter, confidence, bytes FROM request ORDER BY seq DESC LIMIT ?",
    "values": "SELECT key, length(json) AS characters FROM value ORDER BY key LIMIT ?",
    "migrations": "SELECT name, applied_at FROM _sqlite_migrations ORDER BY applied_at LIMIT ?",
}


def survey(path: Path) -> dict[str, Any]:
    """What is in the database at `path`: a list of rows for each table, or why it cannot be read."""
    found: dict[str, Any] = {"quick_check": _checked(path)}
    for name, sql in _TABLES.items():
        try:
            with _reading(path) as connection:
                rows = [dict(row) for row in connection.execute(sql, (ROWS_MAX,))]
        except sqlite3.Error as error:
            found[name] = f"not readable: {error}"
            continue
        for row in rows:
            if name == "updates":
                row["record"] = json.loads(row["record"])
        found[name] = rows
    return found


def _checked(path: Path) -> list[str]:
    try:
        with _reading(path) as connection:
            return [str(row[0]) for row in connection.execute("PRAGMA quick_check(20)")]
    except sqlite3.Error as error:
        return [str(error)]


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    address = f"{path.resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=WAIT_S)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection
