"""What others compute anyway: counted from requests in flight, by hand and against a naive count."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from extproc.choosing.completion import cost_columns
from extproc.choosing.sunk import NOTHING_SUNK, crowded_ratios, sunk_ratios
from metadata_center.history.running_blocks import RunningBlocks, SharedRun
from metadata_center.types import EndpointKey

A, B, C, D = (EndpointKey(f"10.0.0.{number}:1") for number in range(1, 5))
KEYS = (A, B, C, D)


def test_a_crowded_prefix_by_hand() -> None:
    """Six at one endpoint where ten are usual: (6 - 1) / 10 of eight blocks in ten."""
    found = sunk_ratios([SharedRun(8, 6, 1), SharedRun(1, 1, 1)], 10.0, 10, 1_000, [0, 400, 800, 1_000])
    assert found == pytest.approx([0.4, 0.5 * 4 / 6, 0.0, 0.0])


def test_more_than_an_endpoints_load_is_sunk_in_whole() -> None:
    """A share is one at most, however few requests are usual."""
    assert sunk_ratios([SharedRun(10, 90, 1)], 40.0, 10, 1_000, [0, 500]) == [1.0, 1.0]
    assert sunk_ratios([SharedRun(10, 3, 1)], 0.25, 10, 1_000, [0]) == [1.0]


def test_a_prompt_that_is_alone_at_each_endpoint_pays_in_whole() -> None:
    """The turn before of a conversation, or one request at each of two endpoints, is no crowd."""
    assert sunk_ratios([SharedRun(8, 1, 1)], 1.0, 10, 1_000, [0, 800]) is NOTHING_SUNK
    assert sunk_ratios([SharedRun(8, 2, 2)], 1.0, 10, 1_000, [0, 800]) is NOTHING_SUNK
    assert sunk_ratios([], 1.0, 10, 1_000, [0]) is NOTHING_SUNK


def test_what_runs_is_counted_over_the_endpoints_that_may_serve() -> None:
    """Six share two blocks of three at A and four others run: 2.5 per endpoint, and five are twice that."""
    running = RunningBlocks()
    shared = [running.add(A, [1, 2, tail]) for tail in range(10, 16)]
    others = [running.add(key, [100 + row]) for row, key in enumerate(KEYS)]
    assert crowded_ratios(running, [1, 2, 3], [7, 1, 1, 1], 1, 300, [200, 100, 0, 0]) == pytest.approx(
        [0.0, 0.5, 2 / 3, 2 / 3]
    )
    assert crowded_ratios(running, [100, 7], [7, 1, 1, 1], 1, 200, [0] * 4) is NOTHING_SUNK
    many = crowded_ratios(running, [1, 2, 3], [60, 20, 20, 20], 3, 300, [0] * 4)
    assert many == pytest.approx([0.5 * 2 / 3] * 4)  # of 30 per endpoint a third is this process's
    for run in shared:
        assert run is not None
        running.remove(A, run)
    assert crowded_ratios(running, [1, 2, 3], [1, 1, 1, 1], 1, 300, [0] * 4) is NOTHING_SUNK
    assert all(others)


def test_a_sunk_share_is_no_price_of_others() -> None:
    """Own wait, work and pace stay; delay of others and stall lose the share."""
    whole = cost_columns([1.0, 0.0], [0.1, 0.4], [0.0, 0.0], [0.02, 0.02], 2.0, 25.0, 0.0, (), [3.0, 3.0])
    found = cost_columns(
        [1.0, 0.0], [0.1, 0.4], [0.0, 0.0], [0.02, 0.02], 2.0, 25.0, 0.0, (), [3.0, 3.0], [0.0, 0.75]
    )
    assert found[0] == whole[0]
    paid = replace(whole[1], others_s=whole[1].others_s / 4, stall_s=whole[1].stall_s / 4)
    assert (found[1].others_s, found[1].stall_s) == pytest.approx((paid.others_s, paid.stall_s))
    assert found.totals_s[1] == pytest.approx(0.4 + paid.others_s + paid.stall_s + 0.5)
    assert whole.totals_s[0] < whole.totals_s[1]
    assert found.totals_s[1] < found.totals_s[0]


def test_shared_runs_are_what_a_naive_count_says(rng: random.Random) -> None:
    """However chains cut each other: block by block, the requests that have it and where these run."""
    running = RunningBlocks()
    paths = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in range(80)]
    chains = [[hash((*path[: end + 1], "block")) for end in range(len(path))] for path in paths]
    alive = [(key, chain, running.add(key, chain)) for chain in chains for key in [rng.choice(KEYS)]]
    rng.shuffle(alive)
    while alive:
        key, _, last = alive.pop()
        assert last is not None
        running.remove(key, last)
        prompt = rng.choice(chains)
        found = [run for run in running.shared(prompt) for _ in range(run.blocks)]
        users = [[owner for owner, chain, _ in alive if block in chain] for block in prompt]
        expected = [(len(each), len(set(each))) for each in users if each]
        assert [(run.requests, run.endpoints) for run in found] == expected
