"""Commands as a page writes them: found, and read by the real command line without being run."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer

PROGRAMS = ("edged", "trainer")
_SUDO = re.compile(r"^sudo (?:-u \S+ )?")
_LINE = re.compile(rf"(?:sudo (?:-u \S+ )?)?({'|'.join(PROGRAMS)}) [a-z]")


def commands(page: str) -> list[tuple[str, str]]:
    """(program, command line) for each command that stands in a line of its own, indented or in a block of code."""
    found, fenced, text = [], False, re.sub(r"\\\n\s*", " ", page)
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not (fenced or line.startswith("    ")):
            continue
        for part in line.split("&&"):
            if match := _LINE.match(part.strip()):
                found.append((match[1], part.strip()))
    return found


def read(app: typer.Typer, program: str, line: str) -> None:
    """Let the command line of `app` read a command. Raises AssertionError naming what it does not know."""
    words = _words(program, line)
    command: Any = typer.main.get_command(app)
    context, groups = None, 0
    while hasattr(command, "get_command"):  # typer has a click of its own: its groups are none of click's
        context = command.context_class(command, info_name=program, parent=context)
        found = command.get_command(context, words[0]) if words else None
        assert found is not None, f"{line}: there is no {words[:1]}; there are {', '.join(command.commands)}"
        command, words, groups = found, words[1:], groups + 1
    assert groups, f"{program} has no commands at all"
    try:
        command.make_context(command.name, words, parent=context)
    except Exception as error:
        if hasattr(error, "format_message"):  # a UsageError of that other click
            raise AssertionError(f"{line}: {error.format_message()}") from None
        raise


def _words(program: str, line: str) -> list[str]:
    """What is typed: without the notes behind it, and with what is optional."""
    typed = re.split(r"\s{2,}(?![-\s])|\s#\s|\s[|>]\s", line)[0].replace("...", "")
    while (less := re.sub(r"\[(-[^\[\]]*)\]", r"\1", typed)) != typed:
        typed = less
    words = shlex.split(_SUDO.sub("", typed), comments=True)
    assert words[0] == program, line
    return words[1:]
