"""Which beginnings of prompts were sent before."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from metadata_center.history.seen_prefixes import BLOCKS_PER_MARK, SeenPrefixes


def test_a_longer_prompt_has_been_seen_as_far_as_the_shorter_one_went() -> None:
    """In whole marks: of ten blocks the first eight."""
    seen = SeenPrefixes()
    first = list(range(10))
    assert seen.see(first) == 0
    assert seen.see(first) == 8
    assert seen.see([*first, *range(100, 110)]) == 8
    assert seen.see([*first, *range(100, 110)]) == 20


def test_another_beginning_is_another_prompt() -> None:
    """Blocks are chained, so what differs early differs from there on; what is short has no mark."""
    seen = SeenPrefixes()
    seen.see(range(8))
    assert seen.see([*range(4), 90, 91, 92, 93]) == 4
    assert seen.see(range(3)) == 0
    assert seen.see([]) == 0


def test_what_is_asked_for_stays_and_what_is_not_goes() -> None:
    """Two generations of ten marks: a prompt that comes again is young again."""
    seen = SeenPrefixes(10)
    often, once = range(4), range(100, 104)
    seen.see(once)
    for number in range(1, 30):
        start = 1_000 * number
        seen.see(range(start, start + 4))
        assert seen.see(often) == (4 if number > 1 else 0)
    assert seen.see(once) == 0


@given(st.integers(1, 20), st.integers(0, 1 << 32))
def test_it_keeps_no_more_than_two_generations(max_marks: int, number: int) -> None:
    """Whatever is sent, a prompt of more marks than a generation has included."""
    rng, seen = random.Random(number), SeenPrefixes(max_marks)
    for _ in range(50):
        blocks = [rng.randrange(200) for _ in range(rng.randrange(BLOCKS_PER_MARK * 30))]
        assert 0 <= seen.see(blocks) <= len(blocks)
        assert len(seen) <= 2 * max_marks
