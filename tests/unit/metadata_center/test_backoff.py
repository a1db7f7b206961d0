"""Pauses between attempts."""

from __future__ import annotations

import random

from metadata_center.backoff import Backoff


class _No:
    """No jitter."""

    def random(self) -> float:
        return 0.0


def test_pauses_grow_to_their_limit_and_begin_anew_after_what_stood() -> None:
    """What was accepted for a moment only is a failed attempt like any other."""
    backoff = Backoff(_No(), first_s=0.05, most_s=1.0, steady_s=1.0)
    assert [backoff.after(stood_s) for stood_s in (0.0, 0.0, 0.9, 0.0, 0.0)] == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert [backoff.after(0.0) for _ in range(100)] == [1.0] * 100
    assert [backoff.after(stood_s) for stood_s in (1.0, 0.0)] == [0.05, 0.1]
    backoff.reset()
    assert backoff.after(0.0) == 0.05


def test_a_bound_below_the_first_pause_holds() -> None:
    """Whoever sets a small bound means it."""
    backoff = Backoff(_No(), first_s=0.05, most_s=0.01, steady_s=1.0)
    assert [backoff.after(0.0) for _ in range(2)] == [0.01] * 2


def test_jitter_shortens_by_up_to_half() -> None:
    """So that those who lost the same peer do not return at once, and the bound still holds."""
    backoff = Backoff(random.Random(3), first_s=8.0, most_s=8.0, steady_s=60.0)
    pauses = [backoff.after(0.0) for _ in range(1000)]
    assert all(4.0 < pause_s <= 8.0 for pause_s in pauses)
    assert min(pauses) < 4.5
    assert max(pauses) > 7.5
