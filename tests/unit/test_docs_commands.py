"""Every command of `trainer` in the documentation is one that exists, with options that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from trainer.cli import app

DOCS = Path(__file__).parents[2] / "docs"
LINES = [
    (page.name, line.strip())
    for page in sorted(DOCS.glob("*.md"))
    for line in page.read_text().splitlines()
    if re.match(r" {4}(sudo .*)?trainer [a-z]", line)
]


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda text: text[:60])
def test_a_command_is_typed_as_it_is_written(page: str, line: str) -> None:
    words = shlex.split(line.replace("...", ""), comments=True)
    words = words[words.index("trainer") + 1 :]
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command, info_name="trainer")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, f"{page}: {line}: there is no {words[0]!r}; there are {', '.join(command.commands)}"
        command, words = found, words[1:]
    try:
        command.make_context(command.name, words, parent=context)
    except click.UsageError as error:
        raise AssertionError(f"{page}: {line}: {error.message}") from None


def test_there_are_some() -> None:
    assert any(page == "operations.md" for page, _ in LINES)
