"""`dataset.jsonl` as examples and as pairs: what is learned, what is left out and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.tuners.dpo.data import PAIRS_PER_GOAL_MAX, read_pairs
from trainer.tuners.dpo.data import read_labelled as labelled_pairs
from trainer.tuners.lora.data import LINE_BYTES_MAX, read_examples, read_labelled

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A seven?"}]


def request(
    goal: str = "What to do?", answer: str = "accept", messages: Any = None, context: str = ""
) -> dict[str, Any]:
    """A line as a device writes it of a request that its own model answered."""
    arguments = {"pipeline": "chat"} | ({"messages": messages} if messages else {})
    return {
        "goal": goal, "context_summary": context, "plan": [{"tool": "generate", "arguments": arguments}],
        "execution": [{"tool": "generate", "status": "success", "output": answer}], "summary": answer,
    }  # fmt: skip


def escalated(
    said: str, local: str = "accept", kind: str = "model", confidence: Any = 0.9, **of: Any
) -> dict[str, Any]:
    """The same where somebody else has answered too."""
    row = request(answer=local, **of)
    row["plan"].append({"tool": "escalate", "arguments": {"reason": "unsure"}})
    row["execution"][0]["status"] = "success" if said == local else "failure"
    row["execution"].append(
        {"tool": "escalate", "status": "success", "output": said, "kind": kind, "confidence": confidence}
    )
    return row | {"summary": said}


def task(
    summary: str, status: str = "success", goal: str = "Count the boxes", context: str = "line 1"
) -> dict[str, Any]:
    """A line as an agent writes it."""
    return {
        "goal": goal, "context_summary": context, "plan": [{"tool": "camera", "arguments": {}}],
        "execution": [{"tool": "camera", "status": status, "output": "3"}], "summary": summary,
    }  # fmt: skip


def written(path: Path, *rows: Any) -> Path:
    file = path / "dataset.jsonl"
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return file


def test_a_corrupt_line_is_told_with_its_number_and_the_others_are_read(tmp_path: Path) -> None:
    rows = [
        escalated("one"), b'{"goal": "half', b"", b"\xff\xfe", b"[1]", request() | {"goal": " "},
        {"goal": "x", "summary": 3}, escalated("two"), b'"' + b"x" * (LINE_BYTES_MAX + 9) + b'"', escalated("three"),
        request(messages=[{"role": "narrator", "content": "x"}]), b"[" * 100_000, task("3 boxes") | {"context_summary": 1},
        escalated("four"),
    ]  # fmt: skip
    for read in (read_examples, read_pairs):
        found, bad = read(written(tmp_path, *rows))
        assert [row.get("answer", row.get("chosen")) for row in found] == ["one", "two", "three", "four"]
        assert [number for number, _ in bad] == [2, 4, 5, 6, 7, 9, 11, 12, 13]
        reasons = dict(bad)
        assert "goal is missing" in reasons[6] and "summary" in reasons[7] and "narrator" not in reasons[11]
        assert str(LINE_BYTES_MAX) in reasons[9] and "role" in reasons[11]


def test_a_last_line_without_its_end_is_read(tmp_path: Path) -> None:
    file = tmp_path / "dataset.jsonl"
    file.write_bytes(json.dumps(escalated("one")).encode())
    assert len(read_examples(file)[0]) == 1
    file.write_bytes(b"")
    assert read_examples(file) == ([], [])


def test_a_bare_prompt_stays_one_and_a_conversation_keeps_its_turns(tmp_path: Path) -> None:
    rows = [
        escalated("reject", goal="What to do?\n"), escalated("reject", goal="A seven?", messages=TURNS, context="system: x"),
        task("3 boxes"), task("2 boxes", context=""),
    ]  # fmt: skip
    bare, talk, told, short = read_examples(written(tmp_path, *rows))[0]
    assert bare == {"prompt": "What to do?\n", "answer": "reject"}
    assert talk["messages"] == TURNS
    assert talk["prompt"] == "Be brief.\nInstruct: A seven?\nOutput:"
    assert told["messages"] == [{"role": "user", "content": "line 1\n\nCount the boxes"}]
    assert short["messages"] == [{"role": "user", "content": "Count the boxes"}]


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (request(), {}, "only the model's own answer"),
        (request(), {"own_answers": True}, ""),
        (escalated("accept"), {}, ""),
        (escalated("reject", confidence=0.4), {}, ""),
        (escalated("reject", confidence=0.4), {"confidence_min": 0.5}, "confidence 0.40 is below 0.50"),
        (escalated("reject", kind="person", confidence=0.0), {"confidence_min": 0.5}, ""),
        (escalated("reject", confidence=None), {"confidence_min": 0.5}, "confidence 0.00 is below 0.50"),
        (escalated("reject", confidence=None), {}, ""),
        (task("3 boxes"), {"confidence_min": 0.5}, ""),
        (task("it did not work", "error"), {}, "failed"),
        (task("it did not work", "failure"), {"own_answers": True}, "failed"),
        ({"goal": "a", "summary": "b"}, {}, ""),
        ({"goal": "a", "summary": "b", "plan": ["look"], "execution": "fine"}, {}, ""),
        ({"goal": "a", "summary": "b", "execution": [{"success": False}]}, {}, "failed"),
    ],
)
def test_what_is_an_example(tmp_path: Path, row: Any, options: dict[str, Any], reason: str) -> None:
    examples, bad = read_examples(written(tmp_path, row), **options)
    assert len(examples) == (0 if reason else 1)
    assert [number for number, _ in bad] == ([1] if reason else [])
    assert all(reason in text for _, text in bad)


def test_an_escalation_is_a_pair_of_the_better_and_the_local_answer(tmp_path: Path) -> None:
    rows = [
        escalated("reject"), escalated("accept"), request(), escalated("ask", kind="person", messages=TURNS),
        escalated("reject", confidence=0.1, goal="other"), escalated("reject"),
    ]  # fmt: skip
    pairs, bad = read_pairs(written(tmp_path, *rows), confidence_min=0.5)
    assert pairs == [
        {"prompt": "What to do?", "chosen": "reject", "rejected": "accept"},
        {
            "prompt": "Be brief.\nInstruct: A seven?\nOutput:",
            "chosen": "ask",
            "rejected": "accept",
            "messages": TURNS,
        },
    ]
    assert [number for number, _ in bad] == [3, 5]


def test_success_and_failure_of_the_same_goal_in_the_same_context_are_a_pair(tmp_path: Path) -> None:
    rows = [
        task("3 boxes"), task("no idea", "error"), task("3 boxes", context="line 2"), task("a cat", "failure", goal="Other"),
        task("3 boxes ", "error"),
    ]  # fmt: skip
    pairs, bad = read_pairs(written(tmp_path, *rows))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("3 boxes", "no idea")]
    assert pairs[0]["messages"] == [{"role": "user", "content": "line 1\n\nCount the boxes"}]
    assert bad == []


def test_what_makes_no_pair_is_counted(tmp_path: Path) -> None:
    rows = [
        task("3 boxes"), *(task(f"no idea {n}", "error") for n in range(PAIRS_PER_GOAL_MAX + 5)),
        task("x", goal="Other"), task("y", "error", goal="Third"), escalated("reject"), escalated("accept", goal="Fourth"),
    ]  # fmt: skip
    pairs, bad, left_out = labelled_pairs(written(tmp_path, *rows))
    assert (len(pairs), bad) == (PAIRS_PER_GOAL_MAX + 1, [])
    assert left_out == {"over_limit": 5, "no_partner": 3}


def test_one_goal_does_not_drown_the_others(tmp_path: Path) -> None:
    rows = [task(f"{n} boxes", "success" if n % 2 else "error") for n in range(40)]
    assert len(read_pairs(written(tmp_path, *rows))[0]) == PAIRS_PER_GOAL_MAX


def test_the_lines_that_a_device_writes_are_understood(tmp_path: Path) -> None:
    from edged import dataset
    from tests.unit.test_dataset import PLAIN, labelled

    lines = dataset.lines([PLAIN], lambda _: labelled("reject"))
    file = tmp_path / "dataset.jsonl"
    dataset.write(file, lines)
    assert read_examples(file) == ([{"prompt": "What to do?", "answer": "reject"}], [])
    assert read_pairs(file) == ([{"prompt": "What to do?", "chosen": "reject", "rejected": "accept"}], [])


def test_every_example_says_who_answered_and_which_device_had_asked_when(tmp_path: Path) -> None:
    from edged import dataset
    from tests.unit.test_dataset import PLAIN, labelled

    file = tmp_path / "dataset.jsonl"
    dataset.write(file, dataset.lines([PLAIN], lambda _: labelled("reject"), "dev7"))
    sample = labelled("reject")
    assert sample.provenance is not None
    expected = {
        **{name: sample.provenance[name] for name in ("kind", "who", "release")}, "confidence": sample.label_confidence,
        "device": "dev7", "captured": 9.0, "asked_by": "p-terse@1.1",
    }  # fmt: skip
    for read in (read_labelled, labelled_pairs):
        ((_, provenance),), *_ = read(file)
        assert provenance == expected
    rows = [escalated("reject", kind="person", confidence=0.2), task("3 boxes"), escalated("ask", confidence=None)]
    found, *_ = read_labelled(written(tmp_path, *rows))
    assert [provenance for _, provenance in found] == [{"kind": "person"}, {}, {"kind": "model", "confidence": 0.0}]
