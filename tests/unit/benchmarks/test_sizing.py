"""What the sizing benchmark computes from its measurements."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.sizing.model import (
    Cost,
    Load,
    Unit,
    between,
    distinct,
    messages_per_s,
    rounded,
    sized,
    traffic,
)
from metadata_center.sharing.sync import MESSAGES_PER_S

NOTHING = Cost(0.0, 0.0, 0.0)
LOAD = Load(requests_per_s=100.0, round_trip_s=0.0005, answer_s=10.0, kv_tokens=400_000)


def unit(**changes: object) -> Unit:
    """Everything costs nothing but what is said."""
    free: dict[str, object] = {
        **dict.fromkeys(("in_bytes", "out_bytes", "redis_s", "send_s", "receive_s"), NOTHING),
        **dict.fromkeys(("delivery_s", "connection_bytes", "peer_row_bytes", "history_block_bytes"), 0.0),
        **dict.fromkeys(("announced_block_bytes", "announced_block_s"), 0.0),
        **{name: {1: 0} for name in ("compare_s", "reserve_s", "share_bytes")},
    }
    return Unit(**(free | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "pause_s"), [(10.0, 0.001), (300.0, 0.004), (5_000.0, 0.002)])
def test_messages_are_as_many_as_if_each_change_were_played(rate: float, pause_s: float) -> None:
    """The formula gives what changes at random moments make of the rule: at once, or after the pause."""
    rng = random.Random(1)
    change_s = sent_s = 0.0
    sent = 0
    while sent < 20_000:
        leaves_s = max(change_s, sent_s + pause_s)
        while change_s <= leaves_s:  # all of these go with it
            change_s += rng.expovariate(rate)
        sent, sent_s = sent + 1, leaves_s
    assert messages_per_s(rate, pause_s) == pytest.approx(sent / sent_s, rel=0.03)


def test_few_draws_hit_as_many_endpoints_and_many_hit_all() -> None:
    """One draw is one endpoint, two of two differ half of the time."""
    assert distinct(1.0, 1_000) == pytest.approx(1.0)
    assert distinct(2.0, 2) == pytest.approx(1.5)
    assert distinct(1e6, 10) == pytest.approx(10.0)


@given(st.integers(1, 64), st.floats(1.0, 10_000.0))
def test_what_a_member_receives_is_bounded(members: int, requests_per_s: float) -> None:
    """All members together send no more than a member may have to receive."""
    sent, rows, chains = traffic(Load(requests_per_s, 0.0, 10.0, 1), 100, members)
    assert sent * members <= MESSAGES_PER_S * (1 + 1e-9)
    assert 1.0 <= rows <= 100.0
    assert chains * sent == pytest.approx(requests_per_s)


def test_between_points_lies_on_their_line() -> None:
    """Below the first point its value holds, beyond the last one proportion."""
    points = {10: 100.0, 100: 190.0}
    assert [between(points, x) for x in (1, 10, 55, 100, 200)] == [100.0, 100.0, 145.0, 190.0, 380.0]


def test_a_message_costs_its_rows_and_its_chains() -> None:
    """The first row is part of the message, further ones and chains come on top."""
    assert Cost(10.0, 2.0, 5.0).of(3.0, 0.5) == 10.0 + 2 * 2.0 + 2.5


def test_every_member_hears_every_message() -> None:
    """Deliveries and Redis' output grow with the square of the members, its input with their number."""
    priced = unit(
        in_bytes=Cost(100.0, 0.0, 0.0), out_bytes=Cost(50.0, 0.0, 0.0), receive_s=Cost(1e-5, 0.0, 0.0)
    )
    slow = Load(1.0, 0.0005, 10.0, 400_000)  # so few changes that none waits for the next message
    one, four = sized(priced, slow, 100, 1), sized(priced, slow, 100, 4)
    assert four["messages_per_s"] == pytest.approx(4 * one["messages_per_s"], rel=0.01)
    assert four["redis_in_mbit_per_s"] == pytest.approx(4 * one["redis_in_mbit_per_s"], rel=0.01)
    assert four["redis_out_mbit_per_s"] == pytest.approx(16 * one["redis_out_mbit_per_s"], rel=0.01)
    assert four["gateway_receive_cpu_percent"] == pytest.approx(
        4 * one["gateway_receive_cpu_percent"], rel=0.01
    )


def test_memory_is_that_of_all_engines_caches() -> None:
    """25,000 blocks of 16 tokens on each of a hundred engines, and one of 512 bytes for 128 tokens."""
    found = sized(unit(announced_block_bytes=2**20 / 25_000, history_block_bytes=2**20 / 3_125), LOAD, 100, 1)
    assert found["cache_map_blocks"] == 2_500_000
    assert found["cache_map_mib"] == pytest.approx(100.0)
    assert found["history_mib"] == pytest.approx(100.0)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (1234.5, 1230.0), (0.012345, 0.0123)])
def test_figures_have_three_digits(value: float, expected: float) -> None:
    """No more than was measured."""
    assert rounded(value) == expected
