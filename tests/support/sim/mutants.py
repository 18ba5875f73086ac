"""Every fsync of the product, found in its source, and a way to run the product without one of them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parents[3]
CALLED = {"sync", "sync_folder"}  # the product's own words for it
FULL = "synchronous = FULL"  # as it is written in a PRAGMA, with or without the spaces


def sites(*parts: str) -> list[str]:
    """`file:line:column` of every fsync in these folders of the repository."""
    files = [file for part in parts for file in sorted((ROOT / part).rglob("*.py"))]
    return [
        f"{file.relative_to(ROOT)}:{node.lineno}:{node.col_offset}" for file in files for node in _found(_tree(file))
    ]


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def _found(tree: ast.AST) -> Iterator[ast.expr]:
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in CALLED:
                yield node
            case ast.Attribute(attr="fsync" | "fdatasync"):
                yield node
            case ast.Constant(value=value) if _pragma(value) and id(node) not in docstrings:
                yield node
            case ast.JoinedStr() if "synchronous=" in ast.unparse(node):
                yield from (part for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value == "FULL")


def _pragma(value: object) -> bool:
    return isinstance(value, str) and FULL.replace(" ", "") in value.replace(" ", "")


class _Without(ast.NodeTransformer):
    def __init__(self, node: ast.expr) -> None:
        self._node = node

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(_less(node), node) if node is self._node else self.generic_visit(node)


def _less(node: ast.AST) -> ast.expr:
    """The same, and nothing becomes durable by it."""
    if isinstance(node, ast.Call):
        return ast.Constant(None)
    if isinstance(node, ast.Attribute):
        return ast.parse("(lambda _descriptor: None)", mode="eval").body
    assert isinstance(node, ast.Constant) and isinstance(node.value, str)
    return ast.Constant(node.value.replace("FULL", "OFF") if _pragma(node.value) else "NORMAL")


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, line: int, column: int) -> None:
        super().__init__(name, path)
        self._at = line, column

    def get_code(self, fullname: str) -> CodeType:
        tree = _tree(Path(self.path))
        (node,) = [node for node in _found(tree) if (node.lineno, node.col_offset) == self._at]
        return compile(ast.fix_missing_locations(_Without(node).visit(tree)), self.path, "exec")


class Without(MetaPathFinder):
    """Imports the product without the fsync at `site`: put it first in `sys.meta_path` before anything is imported."""

    def __init__(self, site: str) -> None:
        name, line, column = site.split(":")
        self._file, self._at = str(ROOT / name), (int(line), int(column))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin == self._file:
            spec.loader = _Loader(fullname, self._file, *self._at)
        return spec

    def install(self) -> None:
        """From now on."""
        sys.meta_path.insert(0, self)
