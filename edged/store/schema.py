"""The tables, as migrations: each is applied in one transaction with the record that it was. Append, never edit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edged.core.retention import classes, worth
from edged.store.records import LABELLED, Json

if TYPE_CHECKING:
    from sqlite_utils import Database

# `total` is kept by triggers, so that the limits cost one look-up instead of a scan and cannot drift from the rows.
_FIRST = """
CREATE TABLE sample (
    id TEXT PRIMARY KEY, pipeline TEXT NOT NULL, task TEXT NOT NULL, model TEXT NOT NULL, "release" TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL, decision TEXT NOT NULL, confidence REAL NOT NULL,
    inclusion_probability REAL NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, prediction TEXT NOT NULL,
    item TEXT NOT NULL, captured REAL NOT NULL, answer_by REAL, label_by REAL,
    label TEXT NOT NULL DEFAULT '[]', label_confidence REAL NOT NULL DEFAULT 0, provenance TEXT,
    label_reason TEXT NOT NULL DEFAULT '', labelled REAL, job TEXT NOT NULL DEFAULT '', used_by TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX sample_state ON sample (state, captured, id);
CREATE INDEX sample_captured ON sample (captured, id);
CREATE INDEX sample_sha256 ON sample (sha256);
CREATE INDEX sample_label_by ON sample (label_by) WHERE state = 'escalated';

CREATE TABLE blob (sha256 TEXT PRIMARY KEY, bytes INTEGER NOT NULL) STRICT;

CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, topic TEXT NOT NULL, qos INTEGER NOT NULL,
    retain INTEGER NOT NULL, expires REAL, payload BLOB NOT NULL, keep TEXT NOT NULL, sample TEXT,
    correlation BLOB, bytes INTEGER NOT NULL, enqueued REAL NOT NULL, due REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX outbox_due ON outbox (due, seq);
CREATE INDEX outbox_sample ON outbox (sample) WHERE sample IS NOT NULL;
CREATE INDEX outbox_expires ON outbox (expires) WHERE expires IS NOT NULL;

CREATE TABLE dead_letter (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, topic TEXT NOT NULL, sample TEXT, payload BLOB NOT NULL,
    bytes INTEGER NOT NULL, reason TEXT NOT NULL, enqueued REAL NOT NULL
) STRICT;

CREATE TABLE total (name TEXT PRIMARY KEY, n INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
INSERT INTO total VALUES ('blob', 0, 0), ('outbox', 0, 0);
CREATE TRIGGER blob_added AFTER INSERT ON blob BEGIN
    UPDATE total SET n = n + 1, bytes = bytes + NEW.bytes WHERE name = 'blob';
END;
CREATE TRIGGER blob_removed AFTER DELETE ON blob BEGIN
    UPDATE total SET n = n - 1, bytes = bytes - OLD.bytes WHERE name = 'blob';
END;
CREATE TRIGGER outbox_added AFTER INSERT ON outbox BEGIN
    UPDATE total SET n = n + 1, bytes = bytes + NEW.bytes WHERE name = 'outbox';
END;
CREATE TRIGGER outbox_removed AFTER DELETE ON outbox BEGIN
    UPDATE total SET n = n - 1, bytes = bytes - OLD.bytes WHERE name = 'outbox';
END;

CREATE TABLE counter (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT;
CREATE TABLE model_update (target TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE bad_release (
    sha256 TEXT PRIMARY KEY, "release" TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL
) STRICT;
CREATE TABLE seen (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, at REAL NOT NULL) STRICT;
CREATE TABLE request (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, pipeline TEXT NOT NULL, "release" TEXT NOT NULL,
    adapter TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL, confidence REAL, outcome TEXT NOT NULL,
    ts REAL NOT NULL
) STRICT;
CREATE TABLE value (key TEXT PRIMARY KEY, json TEXT NOT NULL) STRICT;
"""


def m001_first_tables(db: Database) -> None:
    """Samples, blobs, outbox, dead letters, counters, updates, seen ids, language requests, values."""
    db.executescript(_FIRST)


# What became of a request, and the bytes of its texts: the number of rows alone bounds no disk.
_REQUESTS = """
ALTER TABLE request ADD COLUMN messages TEXT NOT NULL DEFAULT '[]';
ALTER TABLE request ADD COLUMN options TEXT NOT NULL DEFAULT '{}';
ALTER TABLE request ADD COLUMN reason TEXT NOT NULL DEFAULT '';
ALTER TABLE request ADD COLUMN finish_reason TEXT NOT NULL DEFAULT '';
ALTER TABLE request ADD COLUMN prompt_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE request ADD COLUMN answer_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE request ADD COLUMN latency_ms REAL NOT NULL DEFAULT 0;
ALTER TABLE request ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
INSERT INTO total SELECT 'request', count(*), 0 FROM request;
CREATE TRIGGER request_added AFTER INSERT ON request BEGIN
    UPDATE total SET n = n + 1, bytes = bytes + NEW.bytes WHERE name = 'request';
END;
CREATE TRIGGER request_removed AFTER DELETE ON request BEGIN
    UPDATE total SET n = n - 1, bytes = bytes - OLD.bytes WHERE name = 'request';
END;
"""


def m002_requests(db: Database) -> None:
    """Language requests: conversations, options, what became of them, their tokens and time."""
    db.executescript(_REQUESTS)


def m003_opinions(db: Database) -> None:
    """Who said what of a sample."""
    db.execute("ALTER TABLE sample ADD COLUMN opinions TEXT NOT NULL DEFAULT '[]'")


def m004_evidence(db: Database) -> None:
    """What the decision about each sample was made of."""
    db.execute("ALTER TABLE sample ADD COLUMN evidence TEXT NOT NULL DEFAULT '{}'")


# What the order of giving up needs, so that no pass parses JSON. `rowid` ends each index: of equals the older goes first.
_RETENTION = """
CREATE INDEX sample_worth ON sample (state, worth, captured);
CREATE INDEX sample_classes ON sample (state, classes, worth, captured);
"""


def m005_retention(db: Database) -> None:
    """What each sample shows and what it is worth for another training."""
    db.execute("ALTER TABLE sample ADD COLUMN classes TEXT NOT NULL DEFAULT ''")
    db.execute("ALTER TABLE sample ADD COLUMN worth INTEGER NOT NULL DEFAULT 0")
    rows = db.execute("SELECT rowid, state, decision, prediction, label FROM sample")
    db.conn.executemany(
        "UPDATE sample SET classes = ?, worth = ? WHERE rowid = ?",
        [(*rank(row[1], row[2], json.loads(row[3]), json.loads(row[4])), row[0]) for row in rows],
    )
    db.executescript(_RETENTION)


def rank(state: str, decision: str, prediction: Sequence[Json], label: Sequence[Json]) -> tuple[str, int]:
    """The columns `classes` and `worth` of a sample: by its label where it has one, else by what the model said."""
    known = label if state in LABELLED else None
    return classes(prediction if known is None else known), worth(decision, prediction, known)


_AGENTS = """
CREATE TABLE agent_message (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, agent TEXT NOT NULL, id TEXT NOT NULL, message TEXT NOT NULL, UNIQUE (agent, id)
) STRICT;
CREATE INDEX agent_message_agent ON agent_message (agent, seq);
CREATE TABLE agent_conversation (agent TEXT PRIMARY KEY, hidden INTEGER NOT NULL) STRICT;
"""


def m006_agents(db: Database) -> None:
    """Conversations of agents."""
    db.executescript(_AGENTS)


# `record` is the JSON of an execution, `feedback` of what people said of it, the oldest first.
_EXECUTIONS = """
CREATE TABLE agent_execution (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, agent TEXT NOT NULL, ts REAL NOT NULL,
    record TEXT NOT NULL, feedback TEXT NOT NULL DEFAULT '[]', bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX agent_execution_agent ON agent_execution (agent, seq);
INSERT INTO total VALUES ('execution', 0, 0);
CREATE TRIGGER execution_added AFTER INSERT ON agent_execution BEGIN
    UPDATE total SET n = n + 1, bytes = bytes + NEW.bytes WHERE name = 'execution';
END;
CREATE TRIGGER execution_removed AFTER DELETE ON agent_execution BEGIN
    UPDATE total SET n = n - 1, bytes = bytes - OLD.bytes WHERE name = 'execution';
END;
"""


def m007_executions(db: Database) -> None:
    """Runs of agents."""
    db.executescript(_EXECUTIONS)


MIGRATIONS = (
    m001_first_tables, m002_requests, m003_opinions, m004_evidence, m005_retention, m006_agents, m007_executions,
)  # fmt: skip


def migrate(db: Database) -> None:
    """Apply what is missing, in the transaction that the caller opened."""
    from sqlite_utils import Migrations

    migrations = Migrations("edged")
    for migration in MIGRATIONS:
        migrations()(migration)
    migrations.apply(db)
