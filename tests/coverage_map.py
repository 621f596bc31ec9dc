"""What docs/coverage.md promises against what there is: node ids in a page, tests in files, tests that ran. Values to values."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

# A test is named by a whole code span; a span with a space is a command.
NODE_ID = re.compile(r"`(tests/[^\s`:]+\.py(?:::\w+)*)(?:\[[^`]*\])?`")


def named_tests(page: str) -> list[str]:
    """Node ids (parameters cut off) in the code spans of a Markdown page, in order, once each."""
    return list(dict.fromkeys(NODE_ID.findall(page)))


def nodes_in(source: str, path: str) -> set[str]:
    """Node ids that pytest would find in one test file: the file, its test classes, its test functions."""
    found = {path}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            found.add(f"{path}::{node.name}")
            found |= {f"{path}::{node.name}::{name}" for name in function_names(node.body)}
    return found | {f"{path}::{name}" for name in function_names(ast.parse(source).body)}


def function_names(body: Iterable[ast.stmt]) -> list[str]:
    """Names of the test functions among some statements."""
    return [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")]


def existing_tests(root: Path) -> set[str]:
    """Node ids of every test file under `root`/tests."""
    found: set[str] = set()
    for file in sorted((root / "tests").rglob("test_*.py")):
        found |= nodes_in(file.read_text(encoding="utf-8"), file.relative_to(root).as_posix())
    return found


def not_run(named: Iterable[str], ran: Iterable[str]) -> list[str]:
    """Named tests of which nothing ran: neither the test itself, nor one of its parameters, nor a test of that file or class."""
    covered: set[str] = set()
    for node_id in ran:
        parts = node_id.split("[", 1)[0].split("::")
        covered |= {"::".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return [name for name in named if name not in covered]
