"""Set keys in the text of a TOML file and leave the rest as a person wrote it, comments and all.

Law: what was not asked for does not change. The new text is read again and compared; a file that is laid out in a way that
this module does not understand is refused, never half understood.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

Value = str | int | bool | None  # None: the key is removed
Keys = Mapping[tuple[str, str], Value]  # (table, key) -> value

_HEADER = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?")
_ARRAY = re.compile(r"\s*\[\[")
_KEY = re.compile(r"\s*([\w\-.\"' \t]+?)\s*=")
_SIMPLE = re.compile(r"""(\s*(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^#"'\[{\s][^#]*?))(\s*(?:#.*)?)""")


class Unwritable(ValueError):
    """The file is laid out in a way that cannot be changed safely; the message has the keys to write by hand."""


def with_keys(text: str, keys: Keys) -> str:
    """`text` with these keys set. Raises Unwritable, and tomllib.TOMLDecodeError for what is no TOML."""
    wanted = tomllib.loads(text)
    _lay(wanted, keys)
    lines = text.removesuffix("\n").split("\n") if text else []  # not splitlines: it knows more line ends than TOML
    try:
        for (table, key), value in keys.items():
            _set(lines, table, key, value)
        new = "\n".join(lines) + "\n"
        if tomllib.loads(new) == wanted:
            return new
    except ValueError:  # TOMLDecodeError among them
        pass
    by_hand = "\n".join(
        f"  {table}.{key} = {render(value)}" for (table, key), value in keys.items() if value is not None
    )
    raise Unwritable(f"its tables are laid out in a way that is not changed by program; write into it:\n{by_hand}")


def render(value: str | int | bool) -> str:
    """A value as TOML writes it."""
    return json.dumps(value, ensure_ascii=False)  # JSON's strings, numbers and booleans are TOML's


def _lay(document: dict[str, Any], keys: Keys) -> None:
    for (table, key), value in keys.items():
        if value is None:
            inner = document.get(table)
            if isinstance(inner, dict):
                inner.pop(key, None)
        else:
            inner = document.setdefault(table, {})
            if isinstance(inner, dict):
                inner[key] = value


def _set(lines: list[str], table: str, key: str, value: Value) -> None:
    """Change one line, add one, or take one away; raises ValueError where that cannot be done."""
    header, last, dotted = _survey(lines, table)
    found = dotted.get(key)
    if found is not None:
        if value is None:
            del lines[found]
            return
        before, _, after = lines[found].partition("=")
        simple = _SIMPLE.fullmatch(after)
        if simple is None:
            raise ValueError(f"{table}.{key} is no plain value")
        lines[found] = f"{before}= {render(value)}{simple[2]}"
    elif value is not None and header is not None:
        lines.insert(last + 1, f"{key} = {render(value)}")
    elif value is not None and dotted:
        lines.insert(last + 1, f"{table}.{key} = {render(value)}")
    elif value is not None:
        lines += [*([""] if lines else []), f"[{table}]", f"{key} = {render(value)}"]


def _survey(lines: list[str], table: str) -> tuple[int | None, int, dict[str, int]]:
    """Where a table's header is (None: it has none), its last line, and the line of each of its keys."""
    header, last, current = None, -1, ""
    found: dict[str, int] = {}
    for number, line in enumerate(lines):
        if _ARRAY.match(line):
            current = "[["
        elif head := _HEADER.fullmatch(line):
            current = _plain(head[1])
            if current == table:
                header = last = number
        elif key := _KEY.match(line):
            path = f"{current}.{_plain(key[1])}" if current else _plain(key[1])
            outer, _, name = path.partition(".")
            if outer == table and name:
                found[name], last = number, number
    return header, last, found


def _plain(path: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in path.split("."))
