"""The extension modules of a compiled wheel, for `setup.py`.

A copy of the packages is made under build/, the listed modules with their constructors written out, and mypyc
makes C of it. Whatever it does not take fails the build: a wheel that was asked for as compiled is compiled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from compiling.constructors import expanded

MODULES: Final = Path(__file__).with_name("modules.txt")
PACKAGES: Final = ("extproc", "metadata_center")
GROUP: Final = "tokenway"
"""What the one library that holds all of it is called: `tokenway__mypyc`."""

FLAGS: Final = ("-ffp-contract=off",)
"""For the C compiler, beside mypyc's: a product and a sum are rounded one by one, as the interpreter does.
From `-O2` on gcc takes one instruction for both where all processors have it (aarch64): other last digits."""


def listed() -> list[str]:
    """Paths of the modules that are compiled."""
    lines = MODULES.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def extensions(root: Path) -> list[Any]:
    """For setuptools.

    Args:
        root: Of the source tree.

    Raises:
        CannotExpandError: See `compiling.constructors`.
        SystemExit: mypyc does not take the code.
    """
    from mypyc.build import mypycify

    copy, made = root / "build" / "expanded", root / "build" / "c"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(made, ignore_errors=True)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "shipped")
        shutil.copytree(root / package, copy / package, ignore=ignored)
    shutil.copy(root / "pyproject.toml", copy)
    for path in listed():
        (copy / path).write_text(expanded((root / path).read_text()))
    with _working_in(copy):
        found: list[Any] = mypycify(
            listed(), opt_level=os.environ.get("TOKENWAY_COMPILE_LEVEL", "1"), debug_level="0",
            group_name=GROUP, target_dir=str(made),
        )  # fmt: skip
    for each in found:
        each.extra_compile_args = [*each.extra_compile_args, *FLAGS]
    return found


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
