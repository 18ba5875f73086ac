"""Every command of `edged` and `trainer` in the documentation is one that exists, with options that it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

import edged.cli
import trainer.cli
from tests.support.commands import commands, read

ROOT = Path(__file__).parents[2]
APPS: dict[str, typer.Typer] = {"edged": edged.cli.app, "trainer": trainer.cli.app}
LINES = [
    (page.name, program, line)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for program, line in commands(page.read_text())
]


@pytest.mark.parametrize(("page", "program", "line"), LINES, ids=lambda text: text[:60])
def test_a_command_is_typed_as_it_is_written(page: str, program: str, line: str) -> None:
    read(APPS[program], program, line)


def test_there_are_some_of_both_and_in_both_forms() -> None:
    assert {
        ("operations.md", "trainer"),
        ("agents.md", "edged"),
        ("agents-device.md", "edged"),
        ("README.md", "edged"),
    } <= {(page, program) for page, program, _ in LINES}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("edged agent feedback RUN --who ann --correct '{}'", "No such option: --correct"),
        ("edged agent feed RUN", "there is no"),
        ("edged agents list", "there is no"),
        ("sudo -u edged edged status now", "Got unexpected extra argument"),
        ("edged agent feedback --who ann", "Missing argument"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        read(edged.cli.app, "edged", line)
