"""`edged requests`: what people and scripts see of the language requests that a device kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edged.cli import app
from edged.store import LanguageRequest, Store

DAY_S = 86400.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A device that kept three whole answers, one a day from the epoch on, and one that was cut off."""
    store = Store(tmp_path / "state")
    for day, pipeline in enumerate(("chat", "other", "chat")):
        store.record_request(
            LanguageRequest(
                f"r{day}", pipeline, day * DAY_S, prompt=f"question {day}", answer=f"answer {day}", confidence=0.5,
                finish_reason="stop", prompt_tokens=3, answer_tokens=2, release="p@1.0",
            )
        )  # fmt: skip
    store.record_request(LanguageRequest("r3", "chat", 3 * DAY_S, prompt="late", outcome="deadline"))
    store.close()
    path = tmp_path / "edged.toml"
    path.write_text(f'[device]\nid = "dev1"\nstate_dir = "{tmp_path / "state"}"\n')
    return path


@pytest.fixture
def abroad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's clock is not on UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def edged(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["requests", *arguments, "--config", str(config)])


def goals(text: str) -> list[str]:
    return [json.loads(line)["goal"] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("options", "days"),
    [
        ([], [0, 1, 2]), (["--pipeline", "chat"], [0, 2]), (["--pipeline", "none"], []),
        (["--since", "1970-01-02"], [1, 2]), (["--since", "1970-01-02T00:00:01Z"], [2]),
        (["--since", "1970-01-02T00:00:01"], [2]),
        (["--since", "1970-01-02T01:00:00+01:00"], [1, 2]), (["--since", "2199-01-01"], []),
    ],
)  # fmt: skip
def test_the_whole_answers_are_exported_oldest_first(
    config: Path, abroad: None, options: list[str], days: list[int]
) -> None:
    done = edged(config, "export", "-", *options)
    assert (done.exit_code, goals(done.stdout)) == (0, [f"question {day}" for day in days])


def test_a_file_is_replaced_and_the_summary_says_what_was_left_out(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "dataset.jsonl"
    file.write_text("old")
    done = edged(config, "export", str(file), "--json")
    assert json.loads(done.stdout) == {"file": str(file), "written": 3, "left_out": 1}
    assert goals(file.read_text()) == ["question 0", "question 1", "question 2"]
    assert "3 examples; 1 requests have no whole answer" in edged(config, "export", str(file)).stdout


def test_people_see_the_newest_first_with_what_became_of_them(config: Path) -> None:
    lines = edged(config, "list", "--limit", "2").stdout.splitlines()
    assert lines[0].split() == ["r3", "deadline", "chat", "-", "p=-", "0+0", "tokens", '"late"']
    assert lines[1].startswith("r2  ok        chat p@1.0 p=0.50 3+2 tokens")
    rows = json.loads(edged(config, "list", "--json", "--pipeline", "other").stdout)
    assert [(row["id"], row["answer"]) for row in rows] == [("r1", "answer 1")]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["export", "-", "--since", "yesterday"], 2, "'yesterday': no ISO 8601 time"),
        (["export", "/proc/none/dataset.jsonl"], 1, "nothing was written"),
    ],
)
def test_what_cannot_be_done_is_said(config: Path, arguments: list[str], status: int, reason: str) -> None:
    done = edged(config, *arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    assert reason in done.stderr
