"""A conversation that cannot be read costs the agent whose it is, and nobody else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from edged.agents.hosted import NoAgent
from tests.unit.test_agent_hosted import Site

SCRIPTED = {"factory": "scripted"}


@pytest.mark.parametrize("damaged", ["no JSON", '{"role": "martian", "content": "", "message_id": "1"}', '["a list"]'])
def test_an_agent_whose_conversation_is_damaged_is_not_made_and_the_others_run(tmp_path: Path, damaged: str) -> None:
    site = Site(tmp_path, "one", clerk=SCRIPTED, sorter=SCRIPTED)
    try:
        site.hosted.submit("one-clerk", "a part").future.result(10)
    finally:
        site.close()
    with sqlite3.connect(tmp_path / "one" / "edged.db") as connection:
        assert connection.execute("UPDATE agent_message SET message = ?", (damaged,)).rowcount > 0
    connection.close()

    site = Site(tmp_path, "one", clerk=SCRIPTED, sorter=SCRIPTED)
    try:
        answer, _ = site.hosted.submit("one-sorter", "a part").future.result(10)
        assert answer.content == {"verdict": "reject"}
        with pytest.raises(NoAgent, match=r"agents\.one-clerk: its conversation cannot be read"):
            site.hosted.submit("one-clerk", "a part")
        assert [each for each in site.events if "one-clerk" in each and "remember = false" in each]
        assert site.counted("agents_not_made") == 1
    finally:
        site.close()
