"""Tests that only the pure build can pass."""

from __future__ import annotations

from typing import Final

import pytest

from extproc.build_kind import BuildKind, build_kind

_IS_COMPILED: Final = build_kind() is BuildKind.COMPILED

replaces_code: Final = pytest.mark.skipif(
    _IS_COMPILED, reason="replaces a method, function or constant, which compiled code does not look up"
)
pickles: Final = pytest.mark.skipif(_IS_COMPILED, reason="pickles a native class, which nothing else does")
