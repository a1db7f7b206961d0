"""Floods end, busy peers go on."""

from __future__ import annotations

import pytest

from extproc.transport.http2.budgets import Budget
from extproc.transport.http2.faults import ConnectionFault, ErrorCode, FaultReason


def budget() -> Budget:
    """Ten at once, two a second, half a one with each call."""
    return Budget(FaultReason.PING_FLOOD, 10, 2.0, 0.5, now_s=100.0)


def spent(bucket: Budget, count: int, now_s: float, served: int = 0) -> int:
    """How many of `count` frames were allowed."""
    for number in range(count):
        try:
            bucket.spend(now_s, served)
        except ConnectionFault:
            return number
    return count


def test_a_burst_and_no_more() -> None:
    """The eleventh frame at once is one too many, and says what it was."""
    bucket = budget()
    assert spent(bucket, 20, 100.0) == 10
    with pytest.raises(ConnectionFault) as raised:
        bucket.spend(100.0, 0)
    assert (raised.value.reason, raised.value.code) == (FaultReason.PING_FLOOD, ErrorCode.ENHANCE_YOUR_CALM)


@pytest.mark.parametrize(("now_s", "served", "allowed"), [(102.0, 0, 4), (100.0, 6, 3), (1e6, 0, 10)])
def test_what_comes_back(now_s: float, served: int, allowed: int) -> None:
    """By time and by calls that were served, up to the burst."""
    bucket = budget()
    spent(bucket, 10, 100.0)
    assert spent(bucket, 50, now_s, served) == allowed


def test_a_steady_rate_within_the_bounds_never_ends() -> None:
    """Two a second for an hour."""
    bucket = budget()
    for second in range(3_600):
        bucket.spend(100.0 + second, 0)
        bucket.spend(100.5 + second, 0)
