"""Istiods that tests share. Without istiod they are skipped: `make istiod`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import istiod


@pytest.fixture(scope="session", autouse=True)
def _istiod_is_built() -> None:
    if not istiod.is_available():
        pytest.skip("no istiod: run `make istiod`")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a test's own, with a short name."""
    made = Path(tempfile.mkdtemp(prefix="twi", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)
