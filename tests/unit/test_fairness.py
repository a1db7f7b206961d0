"""Fairness ids: whose turn it is among requests that wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from extproc.choosing.completion import Cost
from extproc.choosing.fairness import FairShares
from extproc.choosing.holding import HoldQueue, Wait

WORKS = st.floats(0.01, 5.0)


def waits(
    queue: HoldQueue, ticket: int, fairness_id: str | None, work_s: float = 1.0, arrived_s: float = 0.0
) -> Wait:
    """One that finds its only endpoint full, and begins to wait."""
    full = Cost(20.0, 0.0, work_s, 0.0, 0.0)
    verdict = queue.decide(ticket, arrived_s, arrived_s, [full], [0.1], 0, fairness_id=fairness_id)
    assert isinstance(verdict, Wait)
    return verdict


def test_one_that_asks_for_little_is_not_behind_one_that_asks_for_much() -> None:
    """Twenty of one id wait; one of another goes before all but what had its turn by then."""
    queue = HoldQueue()
    flood = [waits(queue, ticket, "flood").rank for ticket in range(20)]
    late = waits(queue, 100, "light", arrived_s=3.5)
    assert flood == [float(place) for place in range(1, 21)]
    assert late.lag_s == 0.0
    assert [rank for rank in flood if rank < late.rank] == [1.0, 2.0, 3.0, 4.0]


def test_two_that_ask_for_too_much_take_turns() -> None:
    """Though all of the one came first."""
    queue = HoldQueue()
    places = [(waits(queue, ticket, "a").rank, ticket, "a") for ticket in range(4)]
    places += [(waits(queue, 10 + ticket, "b").rank, 10 + ticket, "b") for ticket in range(4)]
    assert [name for *_, name in sorted(places)] == ["a", "b"] * 4


def test_many_endpoints_do_more_in_the_time() -> None:
    """A clock goes by what all of them do together."""
    queue = HoldQueue()
    full = [Cost(20.0, 0.0, 1.0, 0.0, 0.0)] * 4
    lags = []
    for ticket in range(3):
        verdict = queue.decide(ticket, 0.0, 0.0, full, [0.1] * 4, 0, fairness_id="a")
        assert isinstance(verdict, Wait)
        lags.append(verdict.lag_s)
    assert lags == [0.0, 0.25, 0.5]


def test_a_place_never_changes() -> None:
    """Nor is a request that is asked for again counted twice."""
    queue = HoldQueue()
    waits(queue, 1, "a")
    second = waits(queue, 2, "a")
    full = Cost(20.0, 0.0, 1.0, 0.0, 0.0)
    again = queue.decide(2, 0.0, 0.5, [full], [0.1], 0, before=second, fairness_id="a")
    assert isinstance(again, Wait)
    assert waits(queue, 3, "a").lag_s == 2.0


def test_a_clock_that_time_has_overtaken_says_nothing() -> None:
    """Whoever asked for much long ago is as good as any."""
    queue = HoldQueue()
    for ticket in range(5):
        waits(queue, ticket, "a")
    assert waits(queue, 10, "a", arrived_s=4.5).lag_s == 0.5
    assert waits(queue, 11, "a", arrived_s=60.0).lag_s == 0.0


def test_priorities_go_before_turns() -> None:
    """A flood of higher priority is before a light one of lower."""
    queue = HoldQueue()
    full = Cost(20.0, 0.0, 1.0, 0.0, 0.0)
    ranks = []
    for ticket in range(50):
        verdict = queue.decide(ticket, 0.0, 0.0, [full], [0.1], 0, priority=1, fairness_id="flood")
        assert isinstance(verdict, Wait)
        ranks.append(verdict.rank)
    assert max(ranks) < waits(queue, 100, "light").rank


@given(st.lists(st.tuples(st.floats(0.0, 100.0), WORKS), max_size=40))
def test_without_ids_all_is_as_it_was(asked: list[tuple[float, float]]) -> None:
    """To the bit: arrival plus work."""
    queue = HoldQueue()
    for ticket, (arrived_s, work_s) in enumerate(asked):
        wait = waits(queue, ticket, None, work_s, arrived_s)
        assert (wait.rank, wait.lag_s) == (arrived_s + work_s, 0.0)


def test_those_without_an_id_are_one_while_others_wait() -> None:
    """A flood of them does not keep back one that has an id."""
    queue = HoldQueue()
    waits(queue, 0, "light", 10.0)
    flood = [waits(queue, 1 + ticket, None).lag_s for ticket in range(5)]
    assert flood == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert waits(queue, 100, "light", arrived_s=11.0).lag_s == 0.0
    assert waits(queue, 101, None, arrived_s=60.0).lag_s == 0.0


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(WORKS, min_size=1, max_size=12), min_size=2))
def test_what_is_done_for_each_differs_by_one_request(asked: dict[str, list[float]]) -> None:
    """While all still have some that wait, whatever the size and number of their requests."""
    queue = HoldQueue()
    places = []
    for number, (name, works) in enumerate(asked.items()):
        for at, work_s in enumerate(works):
            wait = waits(queue, number * 100 + at, name, work_s)
            places.append((wait.rank, number * 100 + at, name, work_s))
    done, left = dict.fromkeys(asked, 0.0), {name: len(works) for name, works in asked.items()}
    longest_s = max(work_s for *_, work_s in places)
    for *_, name, work_s in sorted(places):
        done[name] += work_s
        left[name] -= 1
        if not all(left.values()):
            break
        assert max(done.values()) - min(done.values()) <= longest_s + 1e-9


def test_bounds_must_be_positive() -> None:
    """No clock at all is no fairness."""
    with pytest.raises(ValueError, match="positive"):
        FairShares(0)


class Clocks(RuleBasedStateMachine):
    """Against clocks that are never dropped."""

    MOST = 4

    def __init__(self) -> None:
        super().__init__()
        self.shares = FairShares(self.MOST)
        self.clocks: dict[str, float] = {}
        self.others_s = 0.0
        self.now_s = 0.0

    @rule(by_s=st.floats(0.0, 20.0))
    def time_passes(self, by_s: float) -> None:
        """Clocks that it overtakes may be dropped."""
        self.now_s += by_s

    @rule(name=st.none() | st.sampled_from("abcdefgh"), work_s=WORKS)
    def one_begins_to_wait(self, name: str | None, work_s: float) -> None:
        """Its lag is that of its own clock, or of the one of those that have none."""
        alive = {each for each, clock_s in self.clocks.items() if clock_s > self.now_s}
        lag_s = self.shares.lag_s(name, self.now_s)
        self.shares.waits(name, self.now_s, lag_s, work_s)
        if name is not None and (name in alive or len(alive) < self.MOST):
            assert lag_s == max(0.0, self.clocks.get(name, 0.0) - self.now_s)
            self.clocks[name] = self.now_s + lag_s + work_s
        elif alive:
            assert lag_s == max(0.0, self.others_s - self.now_s)
            self.others_s = self.now_s + lag_s + work_s
        else:
            assert lag_s == 0.0

    @invariant()
    def there_are_no_more_than_the_most(self) -> None:
        """However many ids there are."""
        assert len(self.shares) <= self.MOST


TestClocks = Clocks.TestCase
