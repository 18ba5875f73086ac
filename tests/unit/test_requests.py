"""Language requests as the store keeps them, on real SQLite files: what became of them, limits, an older database."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from edged.store import LanguageRequest, Store, StoreLimits
from edged.store.schema import _FIRST, MIGRATIONS

CHAT = LanguageRequest(
    id="r9", pipeline="chat", ts=9.0, messages=[{"role": "user", "content": "größer?"}],
    options={"seed": 7, "stop": ["\n"], "schema": {"type": "object"}}, answer="{", confidence=0.5, outcome="truncated",
    finish_reason="truncated", prompt_tokens=12, answer_tokens=3, latency_ms=1.5, release="p@1.0", adapter="p-terse@1.1",
)  # fmt: skip


def request(number: int, **changes: object) -> LanguageRequest:
    plain = LanguageRequest(f"r{number}", "chat", float(number), prompt=f"q{number}", answer="a", release="p@1.0")
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_what_became_of_a_request_is_kept_to_the_last_field(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record_request(request(1))
    store.record_request(CHAT)
    store.close()
    store = Store(tmp_path)
    assert store.requests(9) == [CHAT, request(1)], "newest first, across a restart"
    store.close()


def test_the_same_request_again_replaces_what_became_of_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record_request(request(1, answer="half", outcome="error", reason="crashed"))
    store.record_request(request(2))
    store.record_request(request(1, answer="whole"))
    assert store.requests(9) == [request(1, answer="whole"), request(2)]
    store.close()


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (StoreLimits(requests_max=3), ["r9", "r8", "r7"]),
        (StoreLimits(requests_bytes_max=520), ["r9", "r8", "r7", "r6", "r5"]),
    ],
    ids=["rows", "bytes"],
)
def test_the_newest_requests_are_kept_up_to_both_limits(tmp_path: Path, limits: StoreLimits, kept: list[str]) -> None:
    store = Store(tmp_path, limits)
    for number in range(10):
        store.record_request(request(number, answer="ä" * 49))  # 98 bytes, with the rest 104
        store.record_request(request(number, answer="ä" * 49))
    assert [found.id for found in store.requests(99)] == kept
    store.close()


def test_requests_are_found_by_time_and_pipeline(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(4):
        store.record_request(request(number, pipeline="chat" if number % 2 else "other"))
    assert [found.id for found in store.requests(9, since=1.0)] == ["r3", "r2", "r1"]
    assert [found.id for found in store.requests(9, pipeline="chat")] == ["r3", "r1"]
    assert [found.id for found in store.requests(1, pipeline="other")] == ["r2"]
    store.close()


def test_requests_of_a_device_before_this_version_are_still_there(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "edged.db")
    connection.executescript(_FIRST)
    connection.execute("CREATE TABLE _sqlite_migrations (migration_set TEXT, name TEXT, applied_at TEXT)")
    connection.execute("INSERT INTO _sqlite_migrations VALUES ('edged', ?, '2026-01-01')", (MIGRATIONS[0].__name__,))
    connection.execute(
        'INSERT INTO request (id, pipeline, "release", adapter, prompt, answer, confidence, outcome, ts)'
        " VALUES ('r1', 'chat', 'p@1.0', '', 'q1', 'a', NULL, 'ok', 1.0)"
    )
    connection.commit()
    connection.close()
    store = Store(tmp_path, StoreLimits(requests_max=2))
    assert store.requests(9) == [request(1)]
    for number in (2, 3):
        store.record_request(request(number))
    assert [found.id for found in store.requests(9)] == ["r3", "r2"]
    store.close()
