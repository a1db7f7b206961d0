"""What the gateway's log leaves out."""

from __future__ import annotations

import logging

import pytest

from tokenway.cli.serve import is_news


@pytest.mark.parametrize(
    ("name", "event", "expected"),
    [
        ("grpc._cython.cygrpc", "Exception not handled by _handle_exceptions in servicer method [%s]", False),
        ("grpc._cython.cygrpc", "Unexpected [%s] raised by servicer method [%s]", True),
        ("tokenway.worker", "Exception not handled by _handle_exceptions in servicer method [%s]", True),
    ],
)
def test_only_undelivered_answers_are_no_news(name: str, event: str, expected: bool) -> None:
    """What gRPC says of a peer that left is dropped; what it says of our bugs, and all of ours, is kept."""
    record = logging.LogRecord(name, logging.ERROR, "", 0, event, ("x", "y"), None)
    assert is_news(record) is expected
