"""The least completion: what costs what, what is learned, and what follows from it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.completion import (
    MEMORY_S,
    MOST_BUSY,
    STEP_TOKENS,
    Backlog,
    PrefillModel,
    Traffic,
    costs,
    least,
    room_wait_s,
)
from extproc.choosing.replay import ReplayRng

IDLE = Backlog(0, 0, 0, 0, 0.0)
NO_DRAWS = ReplayRng([])


def test_an_idle_endpoint_makes_nobody_wait() -> None:
    """Nothing ahead is no time; the own prefill is tokens, pairs and a constant."""
    wait_s, work_s = PrefillModel().times_s(IDLE, 2000, 1000)
    assert wait_s == 0.0
    assert work_s == pytest.approx(0.010 + 2 * 0.022 + 2000 * (1000 + 1000) * 0.0013e-6)


def test_what_is_ahead_waits_by_its_tokens_and_pairs() -> None:
    """Two prompts of 4,000 tokens, half of each cached, as if each were computed by itself."""
    wait_s, _ = PrefillModel().times_s(Backlog(2, 4000, 8000, 0, 0.0), 100, 0)
    assert wait_s == pytest.approx(4 * 0.022 + 2 * 2000 * (2000 + 1000) * 0.0013e-6)


def test_decodes_slow_prefill_down() -> None:
    """Each step carries the decodes' sequences and context, and has less room for prompts."""
    model = PrefillModel()
    _, alone_s = model.times_s(IDLE, 8192, 0)
    _, beside_s = model.times_s(Backlog(0, 0, 0, 48, 200_000.0), 8192, 0)
    steps = 8192 / (STEP_TOKENS - 48)
    assert beside_s - alone_s == pytest.approx(steps * (48 * 0.00001 + 200 * 0.00006))


def test_more_decodes_than_a_step_holds_leave_some_room() -> None:
    """Times stay finite and positive whatever the books say."""
    _, work_s = PrefillModel().times_s(Backlog(0, 0, 0, 10_000, 1e9), 1000, 0)
    assert 0.0 < work_s < float("inf")


def test_a_slower_group_is_learned() -> None:
    """Prices follow what is observed, for prompts of other lengths too."""
    model, truth, rng = PrefillModel(), PrefillModel(), random.Random(1)
    for _ in range(300):
        backlog = Backlog(1, rng.randint(0, 8000), 9000, rng.randint(0, 40), rng.random() * 3e5)
        uncached = rng.randint(1, 6000)
        decodes_s = backlog.decoding * 0.00001 + backlog.context_tokens * 0.00006e-3
        model.learn(backlog, uncached, 500, 3.0 * (sum(truth.times_s(backlog, uncached, 500)) + decodes_s))
    _, work_s = model.times_s(IDLE, 20_000, 0)
    assert work_s == pytest.approx(3.0 * truth.times_s(IDLE, 20_000, 0)[1], rel=0.05)
    assert model.step_s(IDLE) == pytest.approx(3.0 * truth.step_s(IDLE), rel=0.05)


@pytest.mark.parametrize("ttft_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_time_teaches_nothing(ttft_s: float) -> None:
    """What is not a duration leaves the prices as they are."""
    model = PrefillModel()
    before = model.prices_s
    model.learn(IDLE, 100, 0, ttft_s)
    assert model.prices_s == before


def test_followers_are_rate_over_idle_share() -> None:
    """Steady traffic of 4 requests of 0.1 s a second on two endpoints: 2 per second, 80 % idle."""
    traffic = Traffic()
    for index in range(4 * 600):
        traffic.placed(index / 4, 0.1)
    assert traffic.followers_per_s(600.0, 2) == pytest.approx(2.0 / 0.8, rel=0.02)


def test_traffic_is_forgotten() -> None:
    """After one time constant of silence 1/e of it is left, and none in the end."""
    traffic = Traffic()
    traffic.placed(0.0, 0.0)
    assert traffic.followers_per_s(MEMORY_S, 1) == pytest.approx(0.3679 / MEMORY_S, rel=1e-3)
    assert traffic.followers_per_s(1e6, 1) == pytest.approx(0.0, abs=1e-12)


def test_an_overloaded_fleet_does_not_divide_by_nothing() -> None:
    """Utilisation beyond 1 counts as `MOST_BUSY`; time running back changes nothing."""
    traffic = Traffic()
    for _ in range(100):
        traffic.placed(5.0, 100.0)
    expected = 100 / MEMORY_S / (1.0 - MOST_BUSY)
    assert traffic.followers_per_s(5.0, 1) == pytest.approx(expected)
    assert traffic.followers_per_s(4.0, 1) == pytest.approx(expected)


def test_room_is_waited_for_only_where_there_is_none() -> None:
    """A tenth of what is held must end; answers are 200 tokens of 0.02 s."""
    assert room_wait_s(1000, 9000, 10_000, 200, 0.02) == 0.0
    assert room_wait_s(1900, 9000, 10_000, 200, 0.02) == pytest.approx(0.1 * 200 * 0.02)
    assert room_wait_s(50_000, 0.0, 10_000, 200, 0.02) == 0.0


def test_an_idle_fleet_goes_by_the_own_time_alone() -> None:
    """With nobody behind, 0.3 s of wait for the cache is worse than 0.25 s more work elsewhere."""
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


def test_cost_by_hand() -> None:
    """Two endpoints, 1 s of backlog and 1 s of room wait in all: 1 s each; k = 3 followers per second."""
    first, second = costs([(1.0, 0.2), (0.0, 0.4)], [0.0, 1.0], [0.02, 0.03], 3.0, 50.0)
    assert first.others_s == pytest.approx(3.0 * 0.2 * (1.0 + 0.2 / 4))
    assert first.total_s == pytest.approx(1.0 + 0.2 + first.others_s + 1.0)
    assert second.total_s == pytest.approx(1.0 + 0.4 + 3.0 * 0.4 * (1.0 + 0.4 / 4) + 1.5)


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
        least(costs([], [], [], 0.0), NO_DRAWS)


SECONDS = st.floats(0.0, 1e4)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6), SECONDS, SECONDS)
def test_cost_never_falls_with_more_to_do(
    times_s: list[tuple[float, float]], followers: float, more_s: float
) -> None:
    """More work or a longer queue on an endpoint never makes it look better."""
    zeros = [0.0] * len(times_s)
    before = costs(times_s, zeros, zeros, followers)[0].total_s
    (wait_s, work_s), *rest = times_s
    assert costs([(wait_s, work_s + more_s), *rest], zeros, zeros, followers)[0].total_s >= before
    assert costs([(wait_s + more_s, work_s), *rest], zeros, zeros, followers)[0].total_s >= before
