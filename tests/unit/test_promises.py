"""docs/development.md names the tests of each promise of the loop and of agents: they exist, and say which one they hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "development.md").read_text()
ROWS = [*(f"L{number}" for number in range(1, 19)), *(f"A{number}" for number in range(1, 13))]
ROWS += [f"P{number}" for number in range(1, 8)]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def table() -> dict[str, list[tuple[str, str]]]:
    """Row -> the tests that the table names, as (file, function)."""
    found = {}
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.match(r"\| [LAP]\d", line) and len(cells) == 3:
            found[cells[0]] = NAMED.findall(cells[2])
    return found


def names_row(row: str, file: str, function: str) -> bool:
    """Whether the test says in its name or its docstring that it is about this row."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            said = ast.get_docstring(node) or ""
            return f"_{row.lower()}_" in f"{function}_" or re.search(rf"\b{row}\b", said) is not None
    raise AssertionError(f"docs/development.md, {row}: {file} has no {function}")


def test_every_row_is_there_in_order() -> None:
    assert list(table()) == ROWS


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_tests_that_name_it(row: str) -> None:
    tests = table()[row]
    assert tests, f"docs/development.md names no test for {row}"
    silent = [f"{file}::{function}" for file, function in tests if not names_row(row, file, function)]
    assert not silent, f"these do not say in name or docstring that they hold {row}: {', '.join(silent)}"
