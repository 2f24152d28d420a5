"""docs/promises.md names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "promises.md"


def missing(text: str) -> list[str]:
    """Every test that a text names and that is not there."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        functions = ast.walk(ast.parse(file.read_text()))
        found[file.name] = {f.name for f in functions if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)}
    named = re.findall(r"`tests/(test_\w+\.py)::(\w+)`", text)
    return [f"{file}::{test}" for file, test in named if test not in found.get(file, set())]


def rows(text: str) -> list[str]:
    """The rows of all tables, without headings."""
    return [line for line in text.splitlines() if line.startswith("| ") and line != "| promise | test |"]


def test_every_test_exists() -> None:
    assert missing(PAGE.read_text()) == []


def test_every_promise_has_a_test() -> None:
    promises = rows(PAGE.read_text())
    assert len(promises) > 50
    assert [row for row in promises if "::" not in row] == []


def test_a_missing_test_is_noticed() -> None:
    assert missing("`tests/test_promises.py::test_gone` `tests/test_gone.py::test_x`") == [
        "test_promises.py::test_gone",
        "test_gone.py::test_x",
    ]
    assert rows("| promise | test |\n|---|---|\n| a | b |") == ["| a | b |"]
