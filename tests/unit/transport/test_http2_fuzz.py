"""Some thousands of mutated conversations; `make fuzz-transport` plays a million."""

from __future__ import annotations

from collections import Counter

from benchmarks.fuzz_transport import play


def test_mutated_conversations_end_in_a_fault_or_an_answer() -> None:
    """No input raises or breaks a bound, and the inputs are no monoculture."""
    endings = Counter(play(seed) for seed in range(4_000))
    assert len(endings) >= 6
    assert 400 < endings["answered"] < 3_600
