"""Imports that leave out the docstrings of functions: nothing reads them in a process that serves.

Rules:
    1. They alone go, and 2.3 MiB with them: `python -OO` would take assertions as well. Docstrings of modules
       and classes stay, for some are read while importing.
    2. A code object keeps its first constant if any instruction loads it. One that is a string and that
       nothing loads is a docstring.
    3. Bytecode that is kept in files is what it ever is.
"""

from __future__ import annotations

import opcode
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from types import CodeType
from typing import Final

_LOADING: Final = bytes(code for code in opcode.hasconst if code < 256)
_LOADS_FIRST: Final = re.compile(rb"(?s)(?:..)*?[" + re.escape(_LOADING) + rb"]\x00").match
"""Instructions are pairs of bytes, what to do and with which constant."""


def stripped(code: CodeType) -> CodeType:
    """The same code without docstrings of functions, all that is nested in it included."""
    consts = code.co_consts
    first = consts[:1]
    if first and type(first[0]) is str and not _LOADS_FIRST(code.co_code):
        first = (None,)
    kept = tuple(stripped(each) if type(each) is CodeType else each for each in (*first, *consts[1:]))
    if all(new is old for new, old in zip(kept, consts, strict=True)):
        return code
    return code.replace(co_consts=kept)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        """See `importlib.abc.InspectLoader`."""
        code = super().get_code(fullname)
        return None if code is None else stripped(code)


@contextmanager
def without_docstrings() -> Iterator[None]:
    """What is imported within has none; 0.1 s for all that a gateway imports."""
    loaders = (
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (_Loader, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )
    hook = FileFinder.path_hook(*loaders)
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    try:
        yield
    finally:
        sys.path_hooks.remove(hook)
        sys.path_importer_cache.clear()
