"""Imports without docstrings of functions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tokenway.cli.lean_imports import without_docstrings

SOURCE = '''"""Of the module."""

def documented(x):
    """Of the function."""
    return x + 1

def same():
    """a"""
    return "a"

def kept():
    value = "first"
    return value

def checks():
    """Of what checks."""
    assert False

def outer():
    """Of the outer."""
    def inner():
        """Of the inner."""
        return ["x" for _ in range(2)], (lambda: "y")()
    return inner

class Some:
    """Of the class."""

    def method(self):
        """Of the method."""
        return "z"
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where modules are imported from."""
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))


def imported(folder: Path, name: str) -> ModuleType:
    """A new module of that name."""
    (folder / f"{name}.py").write_text(SOURCE)
    try:
        return importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)


def test_functions_lose_their_docstrings_and_nothing_else(folder: Path) -> None:
    """What they return and assert is the same, and modules and classes keep theirs."""
    with without_docstrings():
        lean = imported(folder, "lean_within")

    inner = lean.outer()
    functions = lean.documented, lean.checks, lean.outer, inner, lean.Some.method
    assert [function.__doc__ for function in functions] == [None] * 5
    assert "Of the" not in repr([function.__code__.co_consts for function in functions])
    assert (lean.documented(1), lean.same(), lean.kept(), inner(), lean.Some().method()) == (
        2,
        "a",
        "first",
        (["x", "x"], "y"),
        "z",
    )
    assert (lean.__doc__, lean.Some.__doc__) == ("Of the module.", "Of the class.")
    assert lean.documented.__code__.co_firstlineno == 3
    with pytest.raises(AssertionError):
        lean.checks()


def test_imports_behind_it_are_as_ever(folder: Path) -> None:
    """Also where the bytecode was kept by one within."""
    with without_docstrings():
        imported(folder, "lean_again")

    assert imported(folder, "lean_again").documented.__doc__ == "Of the function."
