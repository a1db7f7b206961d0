"""Whether the modules of the request path are machine code here, or interpreted as they are written."""

from __future__ import annotations

from enum import StrEnum
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from typing import Final

_A_LISTED_MODULE: Final = "extproc.listeners"
"""One of `compiling/modules.txt`: all of them are compiled, or none is."""


class BuildKind(StrEnum):
    """How this installation was built; a metric label."""

    COMPILED = "compiled"
    PURE = "pure"


def build_kind() -> BuildKind:
    """Which of them this installation is, by what would be imported."""
    found = find_spec(_A_LISTED_MODULE)
    is_compiled = found is not None and (found.origin or "").endswith(tuple(EXTENSION_SUFFIXES))
    return BuildKind.COMPILED if is_compiled else BuildKind.PURE
