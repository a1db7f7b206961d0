"""The least completion: what costs what, and what follows from it."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.completion import (
    DECODE_TOKENS,
    TPOT_LIMIT_S,
    Costs,
    cost_columns,
    decode_price,
    room_wait_s,
)
from extproc.choosing.policies.least_completion import choose_least
from extproc.choosing.replay import ReplayRng
from extproc.predicting.traffic import MEMORY_S, MOST_BUSY, Traffic
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Rng

NO_DRAWS = ReplayRng([])


def costs(
    times_s: Sequence[tuple[float, float]],
    rooms_s: Sequence[float],
    steps_s: Sequence[float],
    followers_per_s: float,
    pace_price: float = DECODE_TOKENS,
    held_s: float = 0.0,
) -> Costs:
    """Costs by prefill ahead and own prefill of each endpoint."""
    waits_s = [wait_s for wait_s, _ in times_s]
    works_s = [work_s for _, work_s in times_s]
    return cost_columns(waits_s, works_s, rooms_s, steps_s, followers_per_s, pace_price, held_s)


def least(found: Costs, rng: Rng) -> int:
    """The row that is chosen."""
    return choose_least(found, LoadBalancing(fallbacks=0), rng).order[0]


def test_followers_are_rate_over_idle_share() -> None:
    """Steady traffic of 4 requests of 0.1 s a second on two endpoints: 2 per second, 80 % idle."""
    traffic = Traffic()
    for index in range(4 * 600):
        traffic.placed(index / 4, 0.1, 0.02)
    assert traffic.followers_per_s(600.0, 2) == pytest.approx(2.0 / 0.8, rel=0.02)


def test_traffic_is_forgotten() -> None:
    """After one time constant of silence 1/e of it is left, and none in the end."""
    traffic = Traffic()
    traffic.placed(0.0, 0.0, 0.0)
    assert traffic.followers_per_s(MEMORY_S, 1) == pytest.approx(0.3679 / MEMORY_S, rel=1e-3)
    assert traffic.followers_per_s(1e6, 1) == pytest.approx(0.0, abs=1e-12)


def test_an_overloaded_fleet_does_not_divide_by_nothing() -> None:
    """Utilisation beyond 1 counts as `MOST_BUSY`; time running back changes nothing."""
    traffic = Traffic()
    for _ in range(100):
        traffic.placed(5.0, 100.0, 0.0)
    expected = 100 / MEMORY_S / (1.0 - MOST_BUSY)
    assert traffic.followers_per_s(5.0, 1) == pytest.approx(expected)
    assert traffic.followers_per_s(4.0, 1) == pytest.approx(expected)


def test_room_is_waited_for_only_where_there_is_none() -> None:
    """A tenth of what is held must end; answers are 200 tokens of 0.02 s."""
    assert room_wait_s(1000, 9000, 10_000, 200, 0.02) == 0.0
    assert room_wait_s(1900, 9000, 10_000, 200, 0.02) == pytest.approx(0.1 * 200 * 0.02)
    assert room_wait_s(50_000, 0.0, 10_000, 200, 0.02) == 0.0


def test_an_idle_fleet_goes_by_the_own_time_alone() -> None:
    """With no request behind, 0.3 s of wait for the cache is worse than 0.25 s more work elsewhere."""
    found = costs([(0.3, 0.05), (0.0, 0.30)], [0.0, 0.0], [0.0, 0.0], 0.0)
    assert least(found, NO_DRAWS) == 1


def test_a_full_fleet_goes_by_work() -> None:
    """The same endpoints with many behind: recomputing would delay them all."""
    found = costs([(0.3, 0.05), (0.0, 0.30)], [0.0, 0.0], [0.0, 0.0], 20.0)
    assert least(found, NO_DRAWS) == 0


def test_a_hot_prefix_spreads() -> None:
    """Even then the holder is left once its queue costs more than recomputing."""
    found = costs([(9.0, 0.05), (0.0, 0.30)], [0.0, 0.0], [0.0, 0.0], 5.0)
    assert least(found, NO_DRAWS) == 1


def test_a_queue_for_one_endpoint_alone_makes_work_elsewhere_no_dearer() -> None:
    """Later requests go to the emptier half; it is what they find there that they wait for."""
    alike, zeros = [(0.1, 0.2)] * 4, [0.0] * 4
    level = costs(alike, zeros, zeros, 5.0)
    queue = costs(alike, [0.0, 0.0, 0.0, 90.0], zeros, 5.0)
    assert queue[0].others_s == pytest.approx(level[0].others_s)
    most = costs(alike, [0.0, 90.0, 90.0, 90.0], zeros, 5.0)
    assert most[0].others_s > level[0].others_s


def test_of_two_endpoints_both_count() -> None:
    """The next request takes the idle one; those after it wait for either."""
    idle = costs([(0.0, 0.2), (0.0, 0.2)], [0.0, 0.0], [0.0, 0.0], 5.0)
    one = costs([(2.0, 0.2), (0.0, 0.2)], [0.0, 0.0], [0.0, 0.0], 5.0)
    assert one[1].others_s - idle[1].others_s == pytest.approx(5.0 * 0.2 * 1.0)


def test_what_is_held_counts_as_backlog() -> None:
    """Work that waits at the gateway is served by the same endpoints."""
    (without,) = costs([(0.0, 1.0)], [0.0], [0.0], 2.0)
    (held,) = costs([(0.0, 1.0)], [0.0], [0.0], 2.0, held_s=3.0)
    assert held.others_s - without.others_s == pytest.approx(2.0 * 3.0)


def test_a_pace_far_from_its_limit_is_worth_little() -> None:
    """The slope of a parabola: a quarter of its most at a quarter of the limit, and no more beyond it."""
    assert decode_price(DECODE_TOKENS, TPOT_LIMIT_S, [0.02, 0.03]) == pytest.approx(12.5)
    assert decode_price(DECODE_TOKENS, TPOT_LIMIT_S, [0.1]) == pytest.approx(50.0)
    assert decode_price(DECODE_TOKENS, TPOT_LIMIT_S, [0.3]) == pytest.approx(50.0)


def test_prefill_is_paid_for_by_what_it_stalls() -> None:
    """3 seconds are lost to others by each second of own prefill, at both endpoints."""
    found = cost_columns([0.0, 0.0], [0.2, 0.4], [0.0, 0.0], [0.02, 0.02], 0.0, 50.0, 0.0, (), [3.0, 3.0])
    assert found.stalls_s == pytest.approx([0.6, 1.2])
    assert found.totals_s == pytest.approx([0.2 + 0.6 + 1.0, 0.4 + 1.2 + 1.0])
    behind = found.behind([1.0, 0.0])
    assert (behind[0].stall_s, behind.totals_s[0]) == pytest.approx((0.6, 2.8))


def test_cost_by_hand() -> None:
    """Two endpoints, 1 s of backlog and 1 s of room wait in all: 1 s each; k = 3 followers per second."""
    found = costs([(1.0, 0.2), (0.0, 0.4)], [0.0, 1.0], [0.02, 0.03], 3.0, 50.0)
    first = found[0]
    assert first.others_s == pytest.approx(3.0 * 0.2 * (1.0 + 0.2 / 4))
    assert found.totals_s[0] == pytest.approx(1.0 + 0.2 + first.others_s + 1.0)
    assert found.totals_s[1] == pytest.approx(1.0 + 0.4 + 3.0 * 0.4 * (1.0 + 0.4 / 4) + 1.5)


def test_slower_decoding_is_avoided() -> None:
    """All else equal, the endpoint with the quicker tokens."""
    found = costs([(0.0, 0.1), (0.0, 0.1)], [0.0, 0.0], [0.03, 0.02], 1.0)
    assert least(found, NO_DRAWS) == 1


def test_ties_are_drawn() -> None:
    """One draw among equals; the lowest row for a low draw, the highest for a high one."""
    found = costs([(0.0, 0.1)] * 3, [0.0] * 3, [0.01] * 3, 1.0)
    assert least(found, ReplayRng([0.0])) == 0
    assert least(found, ReplayRng([0.99])) == 2


def test_nothing_to_choose_from_is_an_error() -> None:
    """No row is no choice."""
    with pytest.raises(ValueError):
        choose_least(costs([], [], [], 0.0), LoadBalancing(), NO_DRAWS)


SECONDS = st.floats(0.0, 1e4)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6), SECONDS, SECONDS)
def test_cost_never_falls_with_more_to_do(
    times_s: list[tuple[float, float]], followers: float, more_s: float
) -> None:
    """More work or a longer queue on an endpoint never makes it look better."""
    zeros = [0.0] * len(times_s)
    before = costs(times_s, zeros, zeros, followers).totals_s[0]
    (wait_s, work_s), *rest = times_s
    assert costs([(wait_s, work_s + more_s), *rest], zeros, zeros, followers).totals_s[0] >= before
    assert costs([(wait_s + more_s, work_s), *rest], zeros, zeros, followers).totals_s[0] >= before
