"""Every fsync of the product, found in its source, and a way to run the product without one of them.

A site is `file:function:words`, as in `edged/releases.py:Releases.begin:sync(self.root)`, wherever its line is.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parents[3]
CALLED = {"sync", "sync_folder", "sync_tree"}  # the product's own words for it
FULL = "synchronous = FULL"  # as it is written in a PRAGMA, with or without the spaces


def sites(*parts: str) -> list[str]:
    """`file:function:words` of every fsync in these folders of the repository."""
    files = [file for part in parts for file in sorted((ROOT / part).rglob("*.py"))]
    return [f"{file.relative_to(ROOT)}:{name}" for file in files for name in _found(*_tree(file))]


def _tree(file: Path) -> tuple[str, ast.Module]:
    return (source := file.read_text()), ast.parse(source, str(file))


def _found(source: str, tree: ast.Module) -> dict[str, ast.expr]:
    """The fsyncs in a module: `function:words` -> what is to be left out."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found: dict[str, ast.expr] = {}
    for where, node in _within("", tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in CALLED:
                left_out: list[ast.expr] = [node]
            case ast.Call(args=[ast.Name(id=called), *_]) if called in CALLED:
                left_out = [node.args[0]]
            case ast.Attribute(attr="fsync" | "fdatasync"):
                left_out = [node]
            case ast.Constant(value=value) if _pragma(value) and id(node) not in docstrings:
                left_out = [node]
            case ast.JoinedStr() if "synchronous=" in ast.unparse(node):
                left_out = [part for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value == "FULL"]
            case _:
                continue
        for expression in left_out:
            name = f"{where}:{ast.get_source_segment(source, node)}"
            again = sum(other.partition("#")[0] == name for other in found)
            found[name + (f"#{again + 1}" if again else "")] = expression
    return found


def _within(where: str, parent: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every node below `parent`, with the function that it is in."""
    for node in ast.iter_child_nodes(parent):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        inside = f"{where}.{node.name}".lstrip(".") if named else where  # type: ignore[attr-defined]
        yield inside, node
        yield from _within(inside, node)


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
    if isinstance(node, ast.Attribute | ast.Name):
        return ast.parse("(lambda _descriptor: None)", mode="eval").body
    assert isinstance(node, ast.Constant) and isinstance(node.value, str)
    return ast.Constant(node.value.replace("FULL", "OFF") if _pragma(node.value) else "NORMAL")


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, less: str) -> None:
        super().__init__(name, path)
        self._less = less

    def get_code(self, fullname: str) -> CodeType:
        source, tree = _tree(Path(self.path))
        changed = _Without(_found(source, tree)[self._less]).visit(tree)
        return compile(ast.fix_missing_locations(changed), self.path, "exec")


class Without(MetaPathFinder):
    """Imports the product without the fsync at `site`: put it first in `sys.meta_path` before anything is imported."""

    def __init__(self, site: str) -> None:
        name, _, self._less = site.partition(":")
        self._file = str(ROOT / name)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin == self._file:
            spec.loader = _Loader(fullname, self._file, self._less)
        return spec

    def install(self) -> None:
        """From now on."""
        sys.meta_path.insert(0, self)
