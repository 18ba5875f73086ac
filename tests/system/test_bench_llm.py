"""`bench llm`: what it measures of agents is what agents do."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.llm import SMALL, _engine, agent_conversation, make_model


def test_an_agents_memory_lets_the_engine_reuse_what_it_has_read(tmp_path: Path) -> None:
    with _engine(make_model(tmp_path / "small", SMALL)) as engine:
        cold, warm = agent_conversation(engine, 4, True), agent_conversation(engine, 4, False)
    assert len(cold.first_s) == len(warm.first_s) == 4
    assert [end.reused_tokens for end in cold.ends] == [0] * 4
    # What is read in one piece and what is read in several differ in rounding, so an answer may be a word longer.
    assert [end.prompt_tokens for end in warm.ends] == pytest.approx([end.prompt_tokens for end in cold.ends], rel=0.01)
    assert warm.ends[0].reused_tokens == 0
    for before, end in zip(warm.ends, warm.ends[1:], strict=False):
        assert end.prompt_tokens > before.prompt_tokens > 1000
        assert end.reused_tokens > 0.95 * before.prompt_tokens, "all but the mark of the answer's turn"
