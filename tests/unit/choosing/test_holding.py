"""The hold queue: which goes, which waits, in which order, and for how long at most."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.completion import Cost, Costs
from extproc.choosing.holding import (
    LONG_LAST,
    MEAN_OF,
    REGRET,
    REGRET_S,
    SHORT_FIRST,
    STRETCH,
    HoldAnswer,
    HoldQueue,
    Place,
    Send,
    TurnAway,
    Wait,
    times_of,
)
from extproc.values.decisions import WorkCount

OPEN_S = 0.1


def cost(wait_s: float, work_s: float = 0.5, room_s: float = 0.0) -> Cost:
    """Of an endpoint, decoding and others left out."""
    return Cost(wait_s, room_s, work_s, 0.0, 0.0)


def place(
    queue: HoldQueue,
    arrived_s: float,
    work_s: float,
    *,
    wait_s: float = 0.0,
    now_s: float = 0.0,
    limit_s: float = 5.0,
    before: Wait | None = None,
    priority: int = 0,
    elsewhere_s: float = 0.0,
) -> Place:
    """Where one stands that can go to one endpoint."""
    costs = Costs([wait_s], [0.0], [work_s], [0.0], [0.0], [0.0], [])
    return queue.place(arrived_s, now_s, costs, limit_s, before, priority, elsewhere_s=elsewhere_s)


def decide(
    queue: HoldQueue,
    request_id: int,
    costs: list[Cost],
    *,
    row: int = 0,
    arrived_s: float = 0.0,
    now_s: float = 0.0,
    limit_s: float | None = None,
    place: Place | None = None,
    before: Wait | None = None,
) -> HoldAnswer:
    """The queue's verdict, all endpoints open below `OPEN_S`."""
    opens_s = [OPEN_S] * len(costs)
    return queue.decide(request_id, arrived_s, now_s, costs, opens_s, row, limit_s, place, before)


def test_an_open_endpoint_takes_a_request_at_once() -> None:
    """Below the knee nothing is ever held."""
    queue = HoldQueue()
    assert decide(queue, 1, [cost(0.09)]) == Send(0)
    assert len(queue) == 0


def test_a_full_endpoint_lets_it_wait() -> None:
    """Until the end of the longest hold, at a place by arrival and work."""
    queue = HoldQueue(max_hold_s=30.0)
    verdict = decide(queue, 1, [cost(20.0, 0.5), cost(30.0, 0.7)], arrived_s=5.0, now_s=6.0)
    once = WorkCount(1.0, 0.5, 0.0, 0.5, are_turns=False)
    assert verdict == Wait(
        until_s=35.0,
        rank=5.5,
        row=0,
        closed=True,
        counted=once,
        at_once_s=21.5,
        bound_s=REGRET * 21.5 + REGRET_S + STRETCH * 0.5,
        work_s=0.5,
        least_s=0.5,
    )
    assert queue.least_s == pytest.approx(0.5)


def test_no_room_in_the_cache_is_full() -> None:
    """An endpoint without prefill ahead, but without room either, would only queue it itself."""
    verdict = decide(HoldQueue(), 1, [cost(0.0, room_s=1.0)])
    assert isinstance(verdict, Wait)
    assert not verdict.closed


def test_others_are_asked_while_some_endpoint_is_open() -> None:
    """A request that waits for a full endpoint does not stop those that an open one suits."""
    verdict = decide(HoldQueue(), 1, [cost(1.0), cost(0.0)])
    assert isinstance(verdict, Wait)
    assert not verdict.closed


def test_a_request_that_waits_for_a_sequence_to_end_is_ahead_by_the_time_between_ends() -> None:
    """Little work, but the next sequence ends only after it, and no other ends before."""
    queue = HoldQueue()
    full = Cost(0.0, 0.3, 0.02, 0.0, 0.0, turn_s=0.15)
    verdict = decide(queue, 1, [full])
    assert isinstance(verdict, Wait)
    assert verdict.closed
    assert queue.ahead_s(2, 100.0, 1) == [pytest.approx(0.15)]


def test_shorter_work_is_ahead() -> None:
    """Of two that came together the shorter counts as prefill ahead of the longer, not the other way."""
    queue = HoldQueue()
    decide(queue, 1, [cost(1.0, 0.2)])
    decide(queue, 2, [cost(1.0, 0.9)])
    short, long = place(queue, 0.0, 0.2).rank, place(queue, 0.0, 0.9).rank
    assert queue.ahead_s(2, long, 1) == [pytest.approx(0.2)]
    assert queue.ahead_s(1, short, 1) == [0.0]


def test_no_request_is_overtaken_for_ever() -> None:
    """One that comes later than its own work takes goes behind, however short."""
    queue = HoldQueue()
    long = place(queue, 0.0, 1.0).rank
    assert place(queue, 0.9, 0.0).rank < long < place(queue, 1.1, 0.0).rank


def test_only_those_for_the_same_endpoint_are_ahead() -> None:
    """Waiting elsewhere delays no request here; rows that are gone are passed over."""
    queue = HoldQueue()
    decide(queue, 1, [cost(1.0), cost(1.0, 0.3), cost(1.0)], row=1)
    decide(queue, 2, [cost(1.0), cost(1.0), cost(1.0)], row=2)
    assert queue.ahead_s(3, 100.0, 2) == [0.0, pytest.approx(0.3)]


def test_what_is_sent_is_in_no_others_way() -> None:
    """Nothing is left of a request that was held and then sent."""
    queue = HoldQueue()
    decide(queue, 1, [cost(1.0)])
    assert decide(queue, 1, [cost(0.0)], now_s=1.0) == Send(0)
    assert (len(queue), queue.least_s, queue.ahead_s(2, 100.0, 1)) == (0, 0.0, [0.0])


def test_what_left_is_forgotten() -> None:
    """A client that goes frees its place; to forget it twice is nothing."""
    queue = HoldQueue()
    decide(queue, 1, [cost(1.0)])
    queue.forget(1)
    queue.forget(1)
    assert (len(queue), queue.least_s) == (0, 0.0)


def test_one_too_many_is_refused() -> None:
    """The bound holds, those already held may go on waiting."""
    queue = HoldQueue(max_held=2, refuses=True)
    for request_id in (1, 2):
        assert isinstance(decide(queue, request_id, [cost(1.0)]), Wait)
    assert isinstance(decide(queue, 3, [cost(1.0)]), TurnAway)
    assert isinstance(decide(queue, 1, [cost(1.0)]), Wait)


@pytest.mark.parametrize(
    ("costs", "ahead_s", "again_s"),
    [
        ([cost(7.0 + OPEN_S)], 0.0, 7.0),  # the endpoint's own backlog has to go
        ([cost(7.0 + OPEN_S)], 4.0, 3.0),  # but not what waits here: the first of that makes the place
        ([cost(7.0, room_s=9.0)], 7.0, 9.0),  # a sequence has to end
        ([cost(7.0 + OPEN_S), cost(0.5 + OPEN_S)], 0.0, 7.0),  # nobody waits for the second
    ],
)
def test_one_too_many_is_told_when_a_place_should_be_free(
    costs: list[Cost], ahead_s: float, again_s: float
) -> None:
    """Its wait would fit the bound; there is a place when the first that waits is sent."""
    queue = HoldQueue(max_held=1, refuses=True)
    assert isinstance(decide(queue, 1, [cost(1.0, ahead_s), *costs[1:]]), Wait)
    counted = WorkCount(1.0, 0.0, 0.0, 0.0, False)
    verdict = decide(queue, 2, costs, row=len(costs) - 1, place=Place(100.0, counted))
    assert isinstance(verdict, TurnAway)
    assert verdict.foreseen_s < verdict.most_s
    assert verdict.retry_after_s == pytest.approx(again_s)


def test_a_hopeless_wait_is_refused_at_once() -> None:
    """40 s ahead with 30 s to wait: come back when the rest is done."""
    verdict = decide(HoldQueue(max_hold_s=30.0, refuses=True), 1, [cost(40.0 + OPEN_S)])
    assert isinstance(verdict, TurnAway)
    assert verdict.retry_after_s == pytest.approx(10.0)


def test_no_request_waits_beyond_the_bound() -> None:
    """At the end of the hold it is sent, or refused and told when there should be room."""
    assert decide(HoldQueue(max_hold_s=30.0), 1, [cost(0.2)], now_s=30.0) == Send(0)
    refusing = HoldQueue(max_hold_s=30.0, refuses=True)
    assert decide(refusing, 1, [cost(0.2)], now_s=30.0) == TurnAway(
        retry_after_s=30.0 + 0.2 - OPEN_S - 30.0, foreseen_s=30.0 + 0.2 - OPEN_S, most_s=30.0
    )


def test_a_requests_own_limit_comes_first() -> None:
    """2 s to the first token, 0.5 s of them work: it can wait for 1.5 s and no longer."""
    verdict = decide(HoldQueue(refuses=True), 1, [cost(1.0)], limit_s=2.0)
    assert isinstance(verdict, Wait)
    assert verdict.until_s == pytest.approx(1.5)
    assert isinstance(decide(HoldQueue(refuses=True), 1, [cost(1.7)], limit_s=2.0), TurnAway)


def test_one_too_many_is_sent_where_no_request_is_refused() -> None:
    """As the immediate rule would send it; those held already go on waiting."""
    queue = HoldQueue(max_held=1)
    assert isinstance(decide(queue, 1, [cost(1.0)]), Wait)
    assert decide(queue, 2, [cost(1.0)]) == Send(0)
    assert len(queue) == 1


def test_in_a_crowd_the_first_in_line_is_sent_and_none_overtakes_it() -> None:
    """Of 20 places the last two are for those that come while others leave; the order is that of arrival."""
    queue, sent = HoldQueue(max_held=20), list[int]()
    for request_id in range(18):
        assert isinstance(decide(queue, request_id, [cost(1.0)], arrived_s=request_id * 1e-3), Wait)
    assert isinstance(decide(queue, 1, [cost(1.0)], arrived_s=1e-3), Wait)
    for request_id in (18, 19):
        assert isinstance(decide(queue, request_id, [cost(1.0)], arrived_s=request_id * 1e-3), Wait)
    assert decide(queue, 20, [cost(1.0)], arrived_s=20e-3) == Send(0)  # there is no place left
    for request_id in range(20):  # a round asks in their order
        if decide(queue, request_id, [cost(1.0)], arrived_s=request_id * 1e-3) == Send(0):
            sent.append(request_id)
    assert sent == [0, 1]
    refusing = HoldQueue(max_held=20, refuses=True)
    for request_id in range(20):
        assert isinstance(decide(refusing, request_id, [cost(1.0)], arrived_s=request_id * 1e-3), Wait)
    assert isinstance(decide(refusing, 0, [cost(1.0)]), Wait)


def test_what_cannot_be_in_time_waits_its_turn_and_is_sent_then() -> None:
    """40 s ahead with 30 s to wait: sent at once it would overtake those that wait, and there is hope."""
    queue = HoldQueue(max_hold_s=30.0)
    waits = decide(queue, 1, [cost(40.0)])
    assert isinstance(waits, Wait)
    assert waits.until_s == 30.0
    hurried = decide(queue, 2, [cost(1.7)], limit_s=2.0)
    assert isinstance(hurried, Wait)
    assert hurried.until_s == pytest.approx(1.7)  # 2.2 s were foreseen, half a second of them work
    assert decide(queue, 2, [cost(1.7)], now_s=1.71, limit_s=2.0, before=hurried) == Send(0)
    assert decide(queue, 1, [cost(40.0)], now_s=30.0, before=waits) == Send(0)


@pytest.mark.parametrize("limit_s", [1e-9, 0.001, 0.5, 4.0, 20.4])
def test_a_limit_that_cannot_be_kept_is_no_way_to_the_front(limit_s: float) -> None:
    """20 s ahead: whoever says that it bears less waits for its turn as foreseen, and is sent only then."""
    queue = HoldQueue()
    hurried = decide(queue, 1, [cost(20.0)], limit_s=limit_s)
    assert isinstance(hurried, Wait)
    assert hurried.until_s == pytest.approx(20.0)
    again = decide(queue, 1, [cost(20.0)], now_s=19.9, limit_s=limit_s, before=hurried)
    assert isinstance(again, Wait)
    assert again.until_s == pytest.approx(20.0)
    assert decide(queue, 1, [cost(20.0)], now_s=20.01, limit_s=limit_s, before=again) == Send(0)


def test_a_limit_that_cannot_be_kept_yields_as_much_as_none() -> None:
    """30 s of work wait for one endpoint: who says a millisecond stands no nearer than who says nothing."""
    queue = HoldQueue()
    for request_id in range(60):
        assert isinstance(decide(queue, request_id, [cost(1.0)]), Wait)
    usual = place(queue, 0.0, 0.5, wait_s=30.0)
    hurried = place(queue, 0.0, 0.5, wait_s=30.0, limit_s=0.001)
    assert usual.yields_s == hurried.yields_s == 5.0
    assert place(queue, 0.0, 0.5, wait_s=30.0, limit_s=8.0).yields_s == 8.0


def test_no_wait_is_longer_than_the_immediate_rule_promised_by_more_than_its_bound() -> None:
    """Foreseen 1.5 s, 0.1 of it work; after eight it goes as at once, though nothing is open."""
    queue = HoldQueue()
    first = decide(queue, 1, [cost(1.4, 0.1)])
    assert isinstance(first, Wait)
    assert first.until_s == first.bound_s == pytest.approx(REGRET * 1.5 + REGRET_S + STRETCH * 0.1) == 8.0
    again = decide(queue, 1, [cost(9.0, 0.5)], now_s=7.9, before=first)
    assert isinstance(again, Wait)
    assert (again.at_once_s, again.bound_s, again.until_s) == (first.at_once_s, first.bound_s, first.until_s)
    assert decide(queue, 1, [cost(9.0, 0.5)], now_s=8.0, before=again) == Send(0)
    assert len(queue) == 0


def test_long_work_may_wait_longer_than_short() -> None:
    """As much more as `STRETCH` times what it has more to do, until no request waits."""
    short, long = (decide(HoldQueue(), 1, [cost(1.0, work_s)]) for work_s in (0.1, 0.3))
    assert isinstance(short, Wait)
    assert isinstance(long, Wait)
    assert long.until_s - short.until_s == pytest.approx((REGRET + STRETCH) * 0.2)


def test_while_more_waits_than_can_be_in_time_what_is_too_late_goes_behind() -> None:
    """Later by its limit, once; and what can still be in time keeps its place."""
    queue = HoldQueue()
    for request_id in range(6):
        decide(queue, request_id, [cost(1.0, 1.0)])
    assert queue.least_s == pytest.approx(6.0)
    in_time_s = 1.0 + SHORT_FIRST * 6.0 * (1.0 + LONG_LAST)
    counted = WorkCount(in_time_s, 1.0, 6.0, 1.0, are_turns=False)
    assert place(queue, 0.0, 1.0, wait_s=3.0, now_s=0.5) == Place(in_time_s, counted)
    late = place(queue, 0.0, 1.0, wait_s=4.0, now_s=0.5)
    assert late == Place(in_time_s + 5.0, counted, 5.0)
    waits = decide(queue, 9, [cost(4.0, 1.0)], now_s=0.5, place=late)
    assert isinstance(waits, Wait)
    assert place(queue, 0.0, 1.0, wait_s=4.0, now_s=1.0, before=waits) == late


def test_who_waits_for_a_sequence_to_end_is_no_backlog_of_prefill() -> None:
    """It is ahead at its own endpoint; elsewhere there is time, and prefill there delays nobody."""
    queue = HoldQueue()
    full = Cost(0.0, 0.8, 0.5, 0.0, 0.0, turn_s=0.2)
    waits = decide(queue, 1, [full, cost(9.0, 2.0)])
    assert isinstance(waits, Wait)
    assert waits.rank == 0.5
    assert (len(queue), queue.least_s) == (1, 0.0)
    assert queue.ahead_s(2, 1.0, 2) == [0.5, 0.0]
    decide(queue, 1, [cost(9.0, 0.5), cost(9.0, 2.0)], before=waits)
    assert queue.least_s == pytest.approx(0.5)


def test_below_that_no_request_yields() -> None:
    """The others are in time as well: order is by arrival and work alone."""
    queue = HoldQueue()
    for request_id in range(5):
        decide(queue, request_id, [cost(1.0, 1.0)])
    assert place(queue, 0.0, 1.0, wait_s=9.0, now_s=0.5).yields_s == 0.0


def test_the_longer_all_wait_the_more_short_work_goes_first() -> None:
    """With a second of work for each endpoint four times; what waits at other gateways counts as well."""
    queue = HoldQueue()
    assert place(queue, 7.0, 1.0).rank == 8.0
    decide(queue, 1, [cost(9.0, 1.0)])
    more = SHORT_FIRST * (1.0 + LONG_LAST)
    assert place(queue, 7.0, 1.0).rank == 7.0 + 1.0 + more
    assert place(queue, 7.0, 1.0, elsewhere_s=2.0).rank == 7.0 + 1.0 + 3.0 * more
    many = Costs([0.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4, [])
    assert queue.place(7.0, 0.0, many, 5.0, None).rank == 7.0 + 1.0 + more / 4


def test_the_longest_wait_for_the_many() -> None:
    """Work counts more by the square of how often it is the mean of those that came, the latest the most."""
    queue = HoldQueue()
    decide(queue, 0, [cost(9.0, 1.0)])
    for _ in range(MEAN_OF):
        place(queue, 0.0, 1.0)
    long = place(queue, 0.0, 10.0).counted
    assert long.mean_s == pytest.approx(1.0 + 9.0 / MEAN_OF)
    length = 10.0 / long.mean_s
    assert long.times == 1.0 + SHORT_FIRST * (1.0 + LONG_LAST * length * length)
    for _ in range(10 * MEAN_OF):
        place(queue, 0.0, 10.0)
    assert place(queue, 0.0, 10.0).counted.times == pytest.approx(
        1.0 + SHORT_FIRST * (1.0 + LONG_LAST), rel=1e-3
    )


def test_a_request_is_compared_with_those_that_came_when_it_did() -> None:
    """Its place does not move for what comes later, longer or shorter."""
    queue = HoldQueue()
    waits = decide(queue, 1, [cost(9.0, 1.0)], place=place(queue, 0.0, 1.0))
    assert isinstance(waits, Wait)
    for _ in range(9):
        place(queue, 0.0, 0.1)
    assert place(queue, 0.0, 1.0, before=waits).counted.mean_s == waits.counted.mean_s == 1.0


def test_no_work_counts_more_than_the_most() -> None:
    """However long, and however much waits: two priorities stay apart."""
    assert times_of(1e6, 1e3, 1e-3, are_turns=False) == times_of(1e3, 1.0, 0.0, are_turns=False) == 100.0


def test_no_request_falls_back_for_what_waits_later() -> None:
    """It keeps its place while more comes, and gains when less waits."""
    queue = HoldQueue()
    waits = decide(queue, 1, [cost(9.0, 1.0)], place=place(queue, 0.0, 1.0))
    assert isinstance(waits, Wait)
    decide(queue, 2, [cost(9.0, 1.0)])
    queue.forget(1)
    kept = place(queue, 0.0, 1.0, before=waits)
    assert kept.rank == waits.rank == 1.0
    assert kept.counted == waits.counted == WorkCount(1.0, 1.0, 0.0, 1.0, are_turns=False)
    late = decide(queue, 3, [cost(9.0, 1.0)], place=place(queue, 0.0, 1.0))
    assert isinstance(late, Wait)
    times = 1.0 + SHORT_FIRST * (1.0 + LONG_LAST)
    assert late.rank == times
    assert late.counted == WorkCount(times, 1.0, 1.0, 1.0, are_turns=False)
    queue.forget(3)
    queue.forget(2)
    assert place(queue, 0.0, 1.0, before=late) == kept


def test_while_ids_take_turns_work_counts_once() -> None:
    """Or one with long prompts would have less than its share of what is done."""
    queue = HoldQueue()
    full = cost(9.0, 5.0)
    queue.decide(1, 0.0, 0.0, [full], [OPEN_S], 0, fairness_id="a")
    turned = place(queue, 1.0, 0.5, now_s=1.0)
    assert turned.rank == 1.5 + queue.shares.lag_s(None, 1.0)
    assert turned.counted == WorkCount(1.0, 0.5, 5.0, turned.counted.mean_s, are_turns=True)
    queue.forget(1)
    queue.decide(2, 6.0, 6.0, [full], [OPEN_S], 0)
    assert place(queue, 6.0, 0.5, now_s=6.0).rank > 6.0 + 0.5 * (1.0 + 5.0 * SHORT_FIRST)  # turns are over


def test_however_much_waits_priorities_stay_apart() -> None:
    """An hour for each endpoint, a minute's work: what is more important goes first all the same."""
    more = place(HoldQueue(), 0.0, 60.0, priority=1, elsewhere_s=3_600.0)
    assert more.rank < place(HoldQueue(), -3_600.0, 0.001, elsewhere_s=3_600.0).rank


def test_one_that_fell_behind_does_not_end_the_round() -> None:
    """It counts as ahead what is still to be asked for; endpoints would stand idle."""
    queue = HoldQueue()
    before = decide(queue, 1, [cost(1.0)])
    assert isinstance(before, Wait)
    assert before.closed
    late = Place(before.rank + 5.0, before.counted, 5.0)
    behind = decide(queue, 1, [cost(1.0)], place=late, before=before)
    assert isinstance(behind, Wait)
    assert not behind.closed


def test_other_bounds_are_in_force_at_once() -> None:
    """Of a queue in which some wait already: a reload reaches it."""
    queue = HoldQueue(max_held=1, max_hold_s=30.0)
    assert isinstance(decide(queue, 1, [cost(1.0)]), Wait)
    queue.bound(2, 1.5, refuses=False)
    verdict = decide(queue, 2, [cost(1.0)])
    assert isinstance(verdict, Wait)
    assert verdict.until_s == 1.5


@pytest.mark.parametrize(("held", "hold_s"), [(0, 1.0), (1, 0.0), (1, -1.0)])
def test_bounds_must_be_positive(held: int, hold_s: float) -> None:
    """A queue without room is a mistake of the configuration."""
    with pytest.raises(ValueError):
        HoldQueue(max_held=held, max_hold_s=hold_s)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.0, 60.0), st.floats(0.001, 5.0)), max_size=60))
def test_the_sums_of_the_queue_add_up(asked: list[tuple[int, float, float]]) -> None:
    """Never more than the bound, and the work that waits is the sum over those that wait."""
    queue, waiting = HoldQueue(max_held=5), dict[int, float]()
    for request_id, wait_s, work_s in asked:
        waiting.pop(request_id, None)
        if isinstance(decide(queue, request_id, [cost(wait_s, work_s)]), Wait):
            waiting[request_id] = work_s
        assert len(queue) == len(waiting) <= 5
        assert queue.least_s == pytest.approx(sum(waiting.values()), abs=1e-9)
        assert queue.ahead_s(-1, float("inf"), 1)[0] == pytest.approx(sum(waiting.values()), abs=1e-9)
