"""Blocks of requests in flight: counted exactly, matched as chains, bounded."""

from __future__ import annotations

import random

from metadata_center.history.radix_tree import Run
from metadata_center.history.running_blocks import RunningBlocks
from metadata_center.types import EndpointKey

A, B = EndpointKey("10.0.0.1:1"), EndpointKey("10.0.0.2:1")
KEYS = (A, B)


def added(running: RunningBlocks, endpoint: EndpointKey, blocks: list[int]) -> Run:
    """Add blocks that find room."""
    run = running.add(endpoint, blocks)
    assert run is not None
    return run


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
    shorter = added(running, A, [1, 2])
    longer = added(running, A, [1, 2, 3])
    running.remove(A, longer)
    assert running.match([1, 2, 3], KEYS) == [2, 0]
    running.remove(A, shorter)
    assert running.match([1, 2, 3], KEYS) == [0, 0]
    assert len(running) == 0


def test_what_does_not_fit_is_left_out_and_said_so() -> None:
    """The bound holds over all endpoints together."""
    running = RunningBlocks(max_blocks=3)
    run = added(running, A, [1, 2])
    assert running.add(B, [1, 2]) is None
    assert len(running) == 2
    running.remove(A, run)
    assert added(running, B, [1, 2, 3])


def test_any_order_of_endings_leaves_nothing(rng: random.Random) -> None:
    """A match is always the longest chain still in flight, and at the end nothing is counted."""
    running = RunningBlocks()
    chains = [list(range(head, head + rng.randrange(1, 20))) for head in (0, 100, 200) for _ in range(20)]
    alive: list[tuple[list[int], Run]] = []
    for chain in chains:
        alive.append((chain, added(running, A, chain)))
        if rng.random() < 0.4:
            running.remove(A, alive.pop(rng.randrange(len(alive)))[1])
        for head in (0, 100, 200):
            prompt = list(range(head, head + 25))
            longest = max((len(other) for other, _ in alive if other[0] == head), default=0)
            assert running.match(prompt, KEYS) == [longest, 0]
    for _, run in alive:
        running.remove(A, run)
    assert len(running) == 0


def test_a_prompt_without_blocks_is_not_counted() -> None:
    """Short prompts have none: nothing is added and nothing may be removed."""
    running = RunningBlocks()
    assert running.add(A, []) is None
    running.remove(A, added(running, A, [1]))
    assert len(running) == 0


def test_an_endpoint_that_left_gives_its_place_back_when_it_is_idle() -> None:
    """The bound on endpoints counts those that are there or still busy."""
    running = RunningBlocks(max_endpoints=1)
    run = added(running, A, [1])
    running.forget(A)
    assert running.add(B, [2]) is None
    running.remove(A, run)
    assert added(running, B, [2])
    assert running.match([2], KEYS) == [0, 1]


def test_shared_blocks_are_known_from_the_length_of_prompts() -> None:
    """Two prompts that share three of four blocks take five blocks of eight."""
    running = RunningBlocks()
    assert running.distinct_ratios([A]) == [1.0]
    first = added(running, A, [1, 2, 3, 4])
    assert running.distinct_ratios([A]) == [1.0]
    second = added(running, A, [1, 2, 3, 5])
    assert running.distinct_ratios([A]) == [5 / 8]
    running.remove(A, first)
    assert running.distinct_ratios([A]) == [1.0]
    running.remove(A, second)
    assert running.distinct_ratios([A]) == [1.0]


def test_a_column_of_many_endpoints_is_that_of_each(rng: random.Random) -> None:
    """What is kept of many endpoints follows each prompt that comes and goes, and who leaves."""
    running = RunningBlocks()
    keys = tuple(EndpointKey(f"10.0.0.1:{port}") for port in range(100))
    alive: list[tuple[EndpointKey, Run]] = []
    for _ in range(300):
        if alive and rng.random() < 0.4:
            running.remove(*alive.pop(rng.randrange(len(alive))))
        else:
            key, length = rng.choice(keys), rng.randrange(1, 9)
            alive.append((key, added(running, key, list(range(length)))))
        if rng.random() < 0.1:
            running.forget(rng.choice(keys))
        assert list(running.distinct_ratios(keys)) == [running.distinct_ratios([key])[0] for key in keys]
        assert len(running.distinct_ratios(keys[::-1])) == 100  # another column beside it


def test_endpoints_share_runs_and_count_apart(rng: random.Random) -> None:
    """However chains of several endpoints cut each other's runs, each endpoint counts its own."""
    running = RunningBlocks()
    paths = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in range(60)]
    chains = [[hash(tuple(path[: end + 1])) for end in range(len(path))] for path in paths]
    alive = [(key, chain, added(running, key, chain)) for key in KEYS for chain in chains]
    rng.shuffle(alive)
    while alive:
        key, _, run = alive.pop()
        running.remove(key, run)
        for other in KEYS:
            used = [chain for owner, chain, _ in alive if owner == other]
            distinct = len({block for chain in used for block in chain})
            expected = distinct / sum(map(len, used)) if used else 1.0
            assert running.distinct_ratios([other]) == [expected]
    assert len(running) == 0
    assert running.match(chains[0], KEYS) == [0, 0]
