"""What agents leave behind: conversations in the order in which they were kept, and runs with what was said of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from edged.store.database import Database, Row
from edged.store.records import AgentRun, Json, StoreLimits

if TYPE_CHECKING:
    from sqlite_utils import Database as Tables

FEEDBACK_MAX = 32  # of one run, the newest


class Conversations:
    """The conversations of all agents of a device, by the agents' names; `NAME:lessons` is what agent NAME was told of its
    runs. Each call is on the disk when it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def load(self, agent: str) -> tuple[list[Json], int]:
        """The messages of an agent, oldest first, and how many of the oldest its model is not shown."""
        rows = self._db.read("SELECT message FROM agent_message WHERE agent = ? ORDER BY seq", (agent,))
        hidden = self._db.read("SELECT hidden FROM agent_conversation WHERE agent = ?", (agent,))
        return [json.loads(row["message"]) for row in rows], hidden[0]["hidden"] if hidden else 0

    def append(self, agent: str, message: Json) -> None:
        """Keep a message; the same one again is kept once."""
        with self._db.write() as tables:
            tables.execute(
                "INSERT OR IGNORE INTO agent_message (agent, id, message) VALUES (?, ?, ?)",
                (agent, message["message_id"], json.dumps(message)),
            )

    def drop(self, agent: str, count: int, hidden: int) -> None:
        """Forget an agent's `count` oldest messages; of those that are left the `hidden` oldest are not shown."""
        with self._db.write() as tables:
            tables.execute(
                "DELETE FROM agent_message WHERE seq IN"
                " (SELECT seq FROM agent_message WHERE agent = ? ORDER BY seq LIMIT ?)",
                (agent, count),
            )
            tables.execute(
                "INSERT INTO agent_conversation VALUES (?, ?) ON CONFLICT (agent) DO UPDATE SET hidden = excluded.hidden",
                (agent, hidden),
            )

    def keep_only(self, agents: Collection[str]) -> list[str]:
        """Forget what all other agents have said and were told; answers who they are."""
        others = sorted(each for each in self.names() if each.partition(":")[0] not in agents)
        with self._db.write() as tables:
            for each in others:
                tables.execute("DELETE FROM agent_message WHERE agent = ?", (each,))
                tables.execute("DELETE FROM agent_conversation WHERE agent = ?", (each,))
        return others

    def names(self) -> list[str]:
        """Of whom there are messages."""
        return [row["agent"] for row in self._db.read("SELECT DISTINCT agent FROM agent_message ORDER BY agent")]


class Runs:
    """The runs of all agents of a device, newest first. `Store.record_run` adds them."""

    def __init__(self, database: Database, limits: StoreLimits) -> None:
        self._db, self._limits = database, limits

    def get(self, run_id: str) -> AgentRun | None:
        """One run; None when it is unknown, or was given up for newer ones."""
        rows = self._db.read("SELECT * FROM agent_execution WHERE id = ?", (run_id,))
        return _run(rows[0]) if rows else None

    def newest(self, limit: int, *, agent: str | None = None, since: float = 0.0) -> list[AgentRun]:
        """The newest runs that ended from `since` on (of one agent)."""
        sql = "SELECT * FROM agent_execution WHERE ts >= ? AND (? IS NULL OR agent = ?) ORDER BY seq DESC LIMIT ?"
        return [_run(row) for row in self._db.read(sql, (since, agent, agent, limit))]

    def add_feedback(self, run_id: str, feedback: Json) -> None:
        """Keep what somebody said of a run; the same again is kept once. It counts as the run does, and the oldest runs make
        room for it."""
        with self._db.write() as tables:
            sql = "SELECT feedback, bytes, length(record) FROM agent_execution WHERE id = ?"
            row = tables.execute(sql, (run_id,)).fetchone()
            said = json.loads(row[0]) if row else [feedback]
            if feedback in said:
                return
            kept = json.dumps([*said, feedback][-FEEDBACK_MAX:])
            size = row[2] + len(kept)
            tables.execute("UPDATE agent_execution SET feedback = ?, bytes = ? WHERE id = ?", (kept, size, run_id))
            tables.execute("UPDATE total SET bytes = bytes + ? WHERE name = 'execution'", (size - row[1],))
            _make_room(tables, self._limits)


def insert_run(tables: Tables, limits: StoreLimits, run: AgentRun) -> None:
    """Keep a run in the transaction that the caller opened; the same id again changes nothing. The oldest make room."""
    record = json.dumps(run.record)
    tables.execute(
        "INSERT OR IGNORE INTO agent_execution (id, agent, ts, record, bytes) VALUES (?, ?, ?, ?, ?)",
        (run.id, run.agent, run.ts, record, len(record)),
    )
    _make_room(tables, limits)


def _make_room(tables: Tables, limits: StoreLimits) -> None:
    """Give up the oldest runs until the others keep to the limits."""
    while True:
        count, size = tables.execute("SELECT n, bytes FROM total WHERE name = 'execution'").fetchone()
        if count <= limits.executions_max and size <= limits.executions_bytes_max:
            return
        tables.execute("DELETE FROM agent_execution WHERE seq = (SELECT min(seq) FROM agent_execution)")


def _run(row: Row) -> AgentRun:
    return AgentRun(row["id"], row["agent"], row["ts"], json.loads(row["record"]), json.loads(row["feedback"]))
