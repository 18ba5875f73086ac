"""`dataset.jsonl`: which answers are examples, what their lines hold, and that nobody reads half a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged import dataset
from edged.store import LanguageRequest, Sample

PLAIN = LanguageRequest(
    "r1", "chat", 9.0, prompt="What to do?", options={"tokens_max": 8}, answer="accept", confidence=0.75,
    finish_reason="stop", prompt_tokens=4, answer_tokens=1, latency_ms=2.5, release="p@1.0", adapter="p-terse@1.1",
)  # fmt: skip
TURNS = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "A seven?"},
    {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"},
]  # fmt: skip


def nobody(_sample: str) -> None:
    """Nobody else was asked."""


def test_a_line_holds_the_five_fields_and_where_they_come_from() -> None:
    assert dataset.example(PLAIN) == {
        "goal": "What to do?",
        "context_summary": "",
        "plan": [{"tool": "generate", "arguments": {"pipeline": "chat", "tokens_max": 8}}],
        "execution": [
            {
                "tool": "generate", "status": "success", "output": "accept", "request": "r1", "release": "p@1.0",
                "adapter": "p-terse@1.1", "confidence": 0.75, "finish_reason": "stop", "prompt_tokens": 4,
                "answer_tokens": 1, "latency_ms": 2.5, "ts": 9.0,
            }
        ],
        "summary": "accept",
    }  # fmt: skip


def test_of_a_conversation_the_last_question_is_the_goal_and_the_rest_its_context() -> None:
    row = dataset.example(replace(PLAIN, prompt="", messages=TURNS))
    assert row is not None
    assert row["goal"] == "And now?"
    assert row["context_summary"] == "system: Be brief.\nuser: A seven?\nassistant: Yes."
    assert row["plan"][0]["arguments"]["messages"] == TURNS


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "truncated", "finish_reason": "truncated"}, {"outcome": "cancelled", "finish_reason": "cancelled"},
        {"outcome": "error", "finish_reason": ""}, {"finish_reason": "length"}, {"answer": " \n"}, {"prompt": ""},
        {"prompt": "", "messages": TURNS[:1]},
    ],
)  # fmt: skip
def test_what_has_no_whole_answer_is_no_example(changes: dict[str, object]) -> None:
    assert dataset.lines([replace(PLAIN, **changes)], nobody) == []  # type: ignore[arg-type]
    assert len(dataset.lines([replace(PLAIN, **changes), PLAIN], nobody)) == 1  # type: ignore[arg-type]


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_text_comes_back_from_one_line(goal: str, answer: str) -> None:
    text = "".join(dataset.lines([replace(PLAIN, prompt=goal + "x", answer=answer + "x")] * 2, nobody))
    assert len(text.splitlines()) == 2
    for line in text.splitlines():
        row = json.loads(line)
        assert (row["goal"], row["summary"]) == (goal + "x", answer + "x")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "dataset.jsonl"
    dataset.write(file, ["old\n"])

    def broken() -> Iterator[str]:
        yield "new\n"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        dataset.write(file, broken())
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.jsonl"]
    assert file.read_text() == "old\n"
    dataset.write(file, ["new\n"])
    assert file.read_text() == "new\n"


def labelled(text: str, state: str = "labelled") -> Sample:
    label = [{"text": text}] if text else []
    return Sample(
        "r1", "chat", "generate", "tongue", "p@1.0", state, "unsure", "escalate", 0.3, 1.0, "0" * 64, 9,
        [{"text": "accept"}], "r1", 1.0, None, 9.0, label, 0.9, {"kind": "model", "who": "big1", "release": "large@1.0"},
        "", 5.0, "", "", [], {},
    )  # fmt: skip


def test_what_a_larger_model_said_otherwise_is_what_there_is_to_learn() -> None:
    row = dataset.example(PLAIN, labelled("reject"))
    assert row is not None
    assert row["summary"] == "reject"
    local, said = row["execution"]
    assert (local["status"], local["output"], said["status"], said["output"]) == (
        "failure",
        "accept",
        "success",
        "reject",
    )
    assert (said["tool"], said["kind"], said["who"], said["release"], said["confidence"], said["reason"]) == (
        "escalate", "model", "big1", "large@1.0", 0.9, "unsure"
    )  # fmt: skip
    assert [step["tool"] for step in row["plan"]] == ["generate", "escalate"]


@pytest.mark.parametrize(
    ("sample", "steps"),
    [
        (labelled(" accept\n"), ["success", "success"]),
        (labelled("reject", "unresolved"), ["success"]),
        (labelled("reject", "rejected"), ["success"]),
        (labelled(""), ["success"]),
        (labelled("reject", "used"), ["failure", "success"]),
    ],
    ids=["the same words", "nobody knew", "taken back", "no words", "trained already"],
)
def test_only_an_answer_in_other_words_makes_the_local_one_a_failure(sample: Sample, steps: list[str]) -> None:
    row = dataset.example(PLAIN, sample)
    assert row is not None
    assert [step["status"] for step in row["execution"]] == steps
