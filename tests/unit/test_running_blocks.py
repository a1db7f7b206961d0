"""Blocks of requests in flight: counted exactly, matched as chains, bounded."""

from __future__ import annotations

import random

from metadata_center.history.running_blocks import RunningBlocks
from metadata_center.types import EndpointKey

A, B = EndpointKey("10.0.0.1:1"), EndpointKey("10.0.0.2:1")
KEYS = (A, B)


def test_a_running_chain_is_matched_as_far_as_it_is_shared() -> None:
    """The leading blocks that a request in flight has in common with the prompt."""
    running = RunningBlocks()
    running.add(A, [1, 2, 3])
    assert running.match([1, 2, 4], KEYS) == [2, 0]
    assert running.match([1, 2, 3, 4], KEYS) == [3, 0]
    assert running.match([9, 2], KEYS) == running.match([], KEYS) == [0, 0]


def test_an_endpoint_that_does_not_matter_is_left_out() -> None:
    """Only asked-for endpoints are matched."""
    running = RunningBlocks()
    running.add(A, [1])
    running.add(B, [1, 2])
    assert running.match([1, 2], (B,)) == [2]


def test_blocks_stay_until_the_last_request_that_uses_them_is_over() -> None:
    """Counts, not sets: two requests with one prompt are two."""
    running = RunningBlocks()
    running.add(A, [1, 2])
    running.add(A, [1, 2, 3])
    running.remove(A, [1, 2, 3])
    assert running.match([1, 2, 3], KEYS) == [2, 0]
    running.remove(A, [1, 2])
    assert running.match([1, 2, 3], KEYS) == [0, 0]
    assert len(running) == 0


def test_what_does_not_fit_is_left_out_and_said_so() -> None:
    """The bound holds over all endpoints together."""
    running = RunningBlocks(max_blocks=3)
    assert running.add(A, [1, 2])
    assert not running.add(B, [1, 2])
    assert len(running) == 2
    running.remove(A, [1, 2])
    assert running.add(B, [1, 2, 3])


def test_any_order_of_endings_leaves_nothing(rng: random.Random) -> None:
    """A match is always the longest chain still in flight, and at the end nothing is counted."""
    running = RunningBlocks()
    chains = [list(range(head, head + rng.randrange(1, 20))) for head in (0, 100, 200) for _ in range(20)]
    alive: list[list[int]] = []
    for chain in chains:
        running.add(A, chain)
        alive.append(chain)
        if rng.random() < 0.4:
            running.remove(A, alive.pop(rng.randrange(len(alive))))
        for head in (0, 100, 200):
            prompt = list(range(head, head + 25))
            longest = max((len(other) for other in alive if other[0] == head), default=0)
            assert running.match(prompt, KEYS) == [longest, 0]
    for chain in alive:
        running.remove(A, chain)
    assert len(running) == 0


def test_a_prompt_without_blocks_is_not_counted() -> None:
    """Short prompts have none: nothing is added and nothing may be removed."""
    running = RunningBlocks()
    assert not running.add(A, [])
    assert running.add(A, [1])
    running.remove(A, [1])
    assert len(running) == 0


def test_an_endpoint_that_left_gives_its_place_back_when_it_is_idle() -> None:
    """The bound on endpoints counts those that are there or still busy."""
    running = RunningBlocks(max_endpoints=1)
    assert running.add(A, [1])
    running.forget(A)
    assert not running.add(B, [2])
    running.remove(A, [1])
    assert running.add(B, [2])
    assert running.match([2], KEYS) == [0, 1]


def test_shared_blocks_are_told_from_the_length_of_prompts() -> None:
    """Two prompts that share three of four blocks take five blocks of eight."""
    running = RunningBlocks()
    assert running.distinct_ratio(A) == 1.0
    running.add(A, [1, 2, 3, 4])
    assert running.distinct_ratio(A) == 1.0
    running.add(A, [1, 2, 3, 5])
    assert running.distinct_ratio(A) == 5 / 8
    running.remove(A, [1, 2, 3, 4])
    assert running.distinct_ratio(A) == 1.0
    running.remove(A, [1, 2, 3, 5])
    assert running.distinct_ratio(A) == 1.0
