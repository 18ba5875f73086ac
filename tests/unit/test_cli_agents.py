"""`edged agent`: what it prints, writes and exits with. With a daemon: tests/system/test_agents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edged.agents.feedback import Execution, Feedback, ModelStep
from edged.agents.models import Said
from edged.agents.recorded import StoreRecorder
from edged.cli import app
from edged.clock import SystemClock
from edged.engines.base import ChatMessage, Finished
from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import Store
from tests.support.device import toml


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A device that keeps three runs: one corrected, one without feedback, one that failed."""
    path = tmp_path / "edged.toml"
    path.write_text(toml({"device": {"id": "dev1", "state_dir": tmp_path / "state"}}))
    clock = SystemClock()
    store = Store(tmp_path / "state")
    recorder = StoreRecorder(store, clock, Outgoing("plant", "dev1", Stamp(clock)))
    ids = []
    for agent, summary, error in (("clerk", "Gray.", ""), ("clerk", "Green.", ""), ("cook", "", "it was cancelled")):
        said = Said(summary, Finished("stop", 3, 2, -0.1), "phi@1.0")
        asked = ModelStep((ChatMessage("user", "What colour?"),), None, said, stepwise=False)
        took_s = 1.26 if error else None
        run = Execution(agent, "What colour?", "", [], [], summary, error, asked=(asked,), seconds=took_s)
        ids.append(recorder.record(run))
    recorder.feedback(ids[0], Feedback(correction="Blue.", who="ann"))
    store.close()
    return path


def run(config: Path, *words: str, **more: Any) -> Result:
    return CliRunner().invoke(app, ["agent", *words, "--config", str(config)], **more)


def test_runs_are_listed_newest_first(config: Path) -> None:
    shown = run(config, "runs")
    lines = [line.split(maxsplit=1)[1] for line in shown.stdout.splitlines()]
    assert lines == [
        'error cook phi@1.0 0 steps, 1.3 s, no feedback  "What colour?"',
        'ok    clerk phi@1.0 0 steps, no feedback  "What colour?"',
        'ok    clerk phi@1.0 0 steps, 1 feedback  "What colour?"',
    ]  # fmt: skip
    one = json.loads(run(config, "runs", "clerk", "--limit", "1", "--json").stdout)
    assert [(row["agent"], row["record"]["summary"]) for row in one] == [("clerk", "Green.")]


def test_runs_are_exported_oldest_first(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset.jsonl"
    done = run(config, "export", str(out))
    assert done.stdout.endswith("2 runs; 1 have no response\n")
    assert [json.loads(line)["summary"] for line in out.read_text().splitlines()] == ["Blue.", "Green."]
    assert run(config, "export", "-", "--agent", "cook").stdout == ""
    assert run(config, "export", str(tmp_path / "no" / "where")).exit_code == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("run", "clerk"), 2, "give the request: --json"),
        (("run", "clerk", "--json", "{}", "--text", "x"), 2, "give the request"),
        (("run", "clerk", "--json", "{"), 2, "write JSON, or use --text"),
        (("run", "clerk", "--text", "x"), 3, "no edged runs here, or its configuration has no table agents.NAME: start"),
        (("list",), 3, "no edged runs here"),
        (("adapt", "clerk"), 3, "no edged runs here"),
        (("feedback", "r1", "--who", "ann", "--chosen", "x"), 2, "--chosen and --rejected belong together"),
        (("feedback", "r1", "--who", "ann", "--score", "1"), 3, "no edged runs here"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_says_why_and_exits_accordingly(
    config: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    done = run(config, *words)
    assert done.exit_code == status and said in done.stderr, done.output


def test_the_help_teaches(config: Path) -> None:
    for words in (("run",), ("feedback",)):
        shown = CliRunner().invoke(app, ["agent", *words, "--help"], env={"COLUMNS": "200"}).stdout
        assert "Examples:" in shown and f"edged agent {words[0]}" in shown
    assert "agents.NAME" in CliRunner().invoke(app, ["agent", "--help"]).stdout
