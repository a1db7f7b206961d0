"""What is put back after each test here."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A configuration sets the level of all loggers of the product."""
    logger = logging.getLogger("tokenway")
    before = logger.level
    yield
    logger.setLevel(before)
