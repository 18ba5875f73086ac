"""Messages that must reach the broker, in the order they were made, until something settles them.

Law of this file: what goes in is durable; progress (handed over, acknowledged, refused) may be forgotten by a crash or a
power cut, and then a message goes out again. At least once, never lost; receivers drop duplicates by id.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from edged.store.database import Row
from edged.store.ledger import Ledger
from edged.store.records import DeadLetter, OutboxFull, OutboxMessage, OutboxRow, StoreLimits

if TYPE_CHECKING:
    from sqlite_utils import Database as Tables

DEAD_LETTERS_MAX = 200
DEAD_LETTER_BYTES_MAX = 64 << 10  # of one payload
_SENT = "UPDATE outbox SET due = ?, attempts = attempts + 1 WHERE id = ?"
_SETTLED = "DELETE FROM outbox WHERE id = ? AND keep = 'ack'"
_ACKED = "UPDATE outbox SET due = ?, error = '' WHERE id = ?"
QUESTIONS_SHARE = 0.8  # of the outbox's limits, for what waits for a verdict


def insert_message(tables: Tables, limits: StoreLimits, message: OutboxMessage, now: float) -> None:
    """Add a message to the transaction that is open; raises OutboxFull. An id that is there already stays as it is."""
    row = tables.execute("SELECT n, bytes FROM total WHERE name = 'outbox'").fetchone()
    size = len(message.payload)
    # Questions may wait for days: they leave room for everything that is on its way today.
    share = QUESTIONS_SHARE if message.keep == "verdict" else 1.0
    rows_max, bytes_max = math.ceil(share * limits.outbox_rows_max), math.ceil(share * limits.outbox_bytes_max)
    if row["n"] + 1 > rows_max or row["bytes"] + size > bytes_max:
        raise OutboxFull(
            f"{message.topic}: the outbox holds {row['n']} messages of {row['bytes']} bytes; the limits are "
            f"outbox_rows_max={limits.outbox_rows_max} and outbox_bytes_max={limits.outbox_bytes_max}"
        )
    tables.execute(
        "INSERT INTO outbox (id, topic, qos, retain, expires, payload, keep, sample, correlation, bytes, enqueued, due)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        (
            message.id, message.topic, message.qos, int(message.retain), message.expires, message.payload, message.keep,
            message.sample, message.correlation, size, now, now,
        ),
    )  # fmt: skip


def _row(row: Row) -> OutboxRow:
    message = OutboxMessage(
        row["id"], row["topic"], row["qos"], bool(row["retain"]), row["expires"], row["payload"], row["keep"],
        row["sample"], row["correlation"],
    )  # fmt: skip
    return OutboxRow(message, row["seq"], row["enqueued"], row["due"], row["attempts"], row["error"])


class Outbox(Ledger):
    """The outbox of the store."""

    def enqueue(self, message: OutboxMessage, now: float) -> None:
        """Keep a message until the broker has it; raises OutboxFull."""
        self.enqueue_many([message], now)

    def enqueue_many(self, messages: Iterable[OutboxMessage], now: float) -> None:
        """The same for several messages in one transaction: all of them, or OutboxFull and none."""
        with self._db.write() as tables:
            for message in messages:
                insert_message(tables, self._limits, message, now)

    def due(self, now: float, limit: int, but: Iterable[str] = ()) -> list[OutboxRow]:
        """Messages to hand over now, by due time, then by age; not those that wait for an answer or a retry, nor `but`."""
        sql = (
            "SELECT * FROM outbox WHERE due <= ? AND (expires IS NULL OR expires > ?)"
            " AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY due, seq LIMIT ?"
        )
        return [_row(row) for row in self._db.read(sql, (now, now, json.dumps(list(but)), limit))]

    def sent(self, message_id: str, now: float, retry_at: float) -> None:
        """Handed to the link at `now`; due again at `retry_at` unless it is settled before."""
        self.sent_many([message_id], now, retry_at)

    def sent_many(self, message_ids: Iterable[str], now: float, retry_at: float) -> None:
        """The same for several messages in one transaction."""
        self.progress(now, dict.fromkeys(message_ids, retry_at), {})

    def acked(self, message_id: str, now: float, retry_at: float) -> None:
        """The broker has it: settled, or, where only the verdict settles it, due again at `retry_at`."""
        self.acked_many([message_id], now, retry_at)

    def acked_many(self, message_ids: Iterable[str], now: float, retry_at: float) -> None:
        """The same for several messages in one transaction."""
        self.progress(now, {}, dict.fromkeys(message_ids, retry_at))

    def progress(self, now: float, sent: Mapping[str, float], acked: Mapping[str, float]) -> None:
        """`sent_many` and `acked_many` (message id -> retry at), in one transaction."""
        with self._db.write(durable=False) as tables:
            tables.conn.executemany(_SENT, [(max(now, at), message_id) for message_id, at in sent.items()])
            tables.conn.executemany(_SETTLED, [(message_id,) for message_id in acked])
            tables.conn.executemany(_ACKED, [(max(now, at), message_id) for message_id, at in acked.items()])

    def refused(self, message_id: str, reason: str, retry_at: float) -> None:
        """The broker said no: keep the reason and try again at `retry_at`."""
        with self._db.write(durable=False) as tables:
            tables.execute("UPDATE outbox SET due = ?, error = ? WHERE id = ?", (retry_at, reason, message_id))

    def bury(self, message_id: str, reason: str, instead: OutboxMessage | None = None, now: float = 0.0) -> None:
        """Give a message up for good: it moves to the dead letters, of which the newest are kept, and is counted. `instead`
        goes into the outbox at `now`, in the same transaction."""
        with self._db.write() as tables:
            moved = tables.execute(
                "INSERT INTO dead_letter (id, topic, sample, payload, bytes, reason, enqueued)"
                " SELECT id, topic, sample, substr(payload, 1, ?), bytes, ?, enqueued FROM outbox WHERE id = ?",
                (DEAD_LETTER_BYTES_MAX, reason, message_id),
            ).rowcount
            tables.execute("DELETE FROM outbox WHERE id = ?", (message_id,))
            if instead is not None:
                insert_message(tables, self._limits, instead, now)
            tables.execute(
                "DELETE FROM dead_letter WHERE seq <= (SELECT max(seq) FROM dead_letter) - ?", (DEAD_LETTERS_MAX,)
            )
        self.count("outbox_buried", moved)

    def dead_letters(self, limit: int = DEAD_LETTERS_MAX) -> list[DeadLetter]:
        """The newest messages that were given up, newest first."""
        sql = "SELECT id, topic, sample, payload, bytes, reason, enqueued FROM dead_letter ORDER BY seq DESC LIMIT ?"
        return [DeadLetter(**dict(row)) for row in self._db.read(sql, (limit,))]

    def drop_expired(self, now: float) -> int:
        """Delete and count the messages that nobody wants any more; how many."""
        if not self._db.read("SELECT 1 FROM outbox WHERE expires <= ? LIMIT 1", (now,)):
            return 0
        with self._db.write(durable=False) as tables:
            dropped = tables.execute("DELETE FROM outbox WHERE expires <= ?", (now,)).rowcount
        self.count("outbox_expired", dropped)
        return dropped

    def depth(self) -> tuple[int, int]:
        """How many messages and payload bytes wait."""
        row = self._db.read("SELECT n, bytes FROM total WHERE name = 'outbox'")[0]
        return row["n"], row["bytes"]

    def rows_free(self) -> int:
        """How many more messages fit that wait for no verdict, as far as their number goes."""
        return max(0, self._limits.outbox_rows_max - self.depth()[0])

    def resend_all(self, now: float) -> None:
        """Everything unsettled is due now: after a start, and after a reconnect that found no session.

        Also repairs due times that a wrong clock put far into the future.
        """
        with self._db.write(durable=False) as tables:
            tables.execute("UPDATE outbox SET due = ? WHERE due > ?", (now, now))
