"""What docstrings name is there, and what they call the product's equals it."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
from functools import reduce
from pathlib import Path

import pytest

from extproc.config.loading import json_schema
from tests.setting_names import is_setting
from tests.source_tree import ROOT

ROOTS = ("extproc", "metadata_center", "tokenway", "benchmarks", "testbed", "compiling", "tests")
NO_MODULES = frozenset({"tokenway.request"})
"""Names with a dot that are neither modules nor settings: the logger of requests."""

_NAMED = re.compile(rf"`((?:{'|'.join(ROOTS)})(?:\.\w+)+)`")
_THE_PRODUCTS = re.compile(r"The product's `(extproc[\w.]+)\.(\w+)`\.")


def found(name: str) -> object:
    """What a dotted name leads to.

    Raises:
        LookupError: There is no such module, or it has no such name.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            return reduce(getattr, parts[length:], module)
        except AttributeError:
            break
    raise LookupError(name)


def modules(root: str) -> list[Path]:
    """All modules below a folder."""
    return sorted((ROOT / root).rglob("*.py"))


@pytest.mark.parametrize("root", ROOTS)
def test_names_in_docstrings_are_there(root: str) -> None:
    """A dotted name that begins with a package of ours is a module, something in one, or a setting."""
    schema = json_schema()
    named = {name for path in modules(root) for name in _NAMED.findall(path.read_text(encoding="utf-8"))}
    missing = set()
    for name in named - NO_MODULES:
        try:
            found(name)
        except LookupError:
            if not is_setting(schema, schema, name.split(".")):
                missing.add(name)
    assert missing == set()


def test_constants_of_the_product_are_the_products() -> None:
    """The replayer may not import the request path; what it repeats of it is the same."""
    repeated = {}
    for path in modules("tokenway"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for constant, docstring in itertools.pairwise(body):
            match docstring:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    named = _THE_PRODUCTS.fullmatch(text)
                case _:
                    named = None
            if named is not None and isinstance(constant, ast.Assign | ast.AnnAssign):
                assert constant.value is not None
                repeated[f"{named[1]}.{named[2]}"] = ast.literal_eval(constant.value)
    assert len(repeated) >= 4
    assert {name: found(name) for name in repeated} == repeated
