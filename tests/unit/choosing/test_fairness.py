"""Fairness ids: whose turn it is among requests that wait."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extproc.choosing.completion import Cost
from extproc.choosing.fairness import FairShares
from extproc.choosing.holding import HoldQueue, Wait
from metadata_center.types import EndpointKey, Waiter

WORKS = st.floats(0.01, 5.0)

Asked = list[tuple[float, str | None, float]]
"""Requests: when each comes, its id, and its work, in seconds."""


def waits(
    queue: HoldQueue, ticket: int, fairness_id: str | None, work_s: float = 1.0, arrived_s: float = 0.0
) -> Wait:
    """One that finds its only endpoint full, and begins to wait."""
    full = Cost(20.0, 0.0, work_s, 0.0, 0.0)
    verdict = queue.decide(ticket, arrived_s, arrived_s, [full], [0.1], 0, fairness_id=fairness_id)
    assert isinstance(verdict, Wait)
    return verdict


def served(asked: Sequence[tuple[float, str | None, float]]) -> list[tuple[str | None, float, float]]:
    """What one endpoint does, first in line first and one at a time.

    Args:
        asked: When each request comes, its id, and its work, all in seconds.

    Returns:
        Of each, as they are done: its id, its work, and how long after its arrival it began.
    """
    queue, done = HoldQueue(), []
    waiting: list[tuple[float, int, float, str | None, float, Wait]] = []
    left, free_s = sorted(asked, key=lambda each: each[0]), 0.0
    while left or waiting:
        while left and (not waiting or left[0][0] <= free_s):
            arrived_s, name, work_s = left.pop(0)
            free_s = free_s if waiting else max(free_s, arrived_s)
            wait = waits(queue, -len(left), name, work_s, arrived_s)
            waiting.append((wait.rank, -len(left), arrived_s, name, work_s, wait))
        first = min(waiting)
        waiting.remove(first)
        _, ticket, arrived_s, name, work_s, wait = first
        queue.forget(ticket)
        queue.sent(arrived_s, wait, 0)
        done.append((name, work_s, free_s - arrived_s))
        free_s += work_s
    return done


def every(period_s: float, name: str | None, work_s: float, until_s: float, since_s: float = 0.0) -> Asked:
    """Requests of one id, one after the other."""
    count = int((until_s - since_s) / period_s)
    return [(since_s + number * period_s, name, work_s) for number in range(count)]


def longest_s(done: Sequence[tuple[str | None, float, float]], name: str | None) -> float:
    """How long one of that id waited."""
    return max(waited_s for each, _, waited_s in done if each == name)


@pytest.mark.parametrize("flood", ["flood", None])
@pytest.mark.parametrize("period_s", [0.4, 0.52, 0.6])
def test_one_that_asks_for_little_is_not_behind_one_that_asks_for_much(
    flood: str | None, period_s: float
) -> None:
    """Ten minutes of more than there is time for, by the one alone or by both: it waits for one or two."""
    light = every(4.0, "light", 0.5, 600.0, since_s=2.0)
    done = served([*every(period_s, flood, 0.5, 600.0), *light])
    assert longest_s(done, "light") <= 1.0 + 1e-6
    if period_s < 0.55:
        assert longest_s(done, flood) > 10.0


def test_one_that_comes_late_is_not_behind_what_others_had_wait() -> None:
    """Two had as much wait as takes minutes; it has its turn at once, and then as they have."""
    done = served(
        [*every(0.001, "a", 1.0, 0.2), *every(0.001, "b", 1.0, 0.2), *every(1.0, "c", 1.0, 90.0, 60.0)]
    )
    waited = [waited_s for name, _, waited_s in done if name == "c"]
    assert waited[0] <= 2.0
    began = [name for name, *_ in done[64:124]]
    assert 19 <= began.count("c") <= 21
    assert abs(began.count("a") - began.count("b")) <= 1


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
    for ticket in (*range(5), 10):
        queue.forget(ticket)
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


def test_time_is_each_prioritys_own() -> None:
    """What waits for those of higher priority is not behind its own id's, nor is what comes to it later."""
    queue = HoldQueue()
    full = Cost(20.0, 0.0, 1.0, 0.0, 0.0)
    for ticket in range(3):
        waits(queue, ticket, "low")
    for ticket, arrived_s in ((10, 0.0), (11, 8.0)):
        wait = queue.decide(ticket, arrived_s, arrived_s, [full], [0.1], 0, priority=1, fairness_id="high")
        assert isinstance(wait, Wait)
        queue.forget(ticket)
        queue.sent(arrived_s, wait, 1)
    assert waits(queue, 20, "late", arrived_s=9.0).rank == 1.0


def test_one_that_comes_here_is_not_behind_what_others_have_wait_elsewhere() -> None:
    """Nobody waits here: its turn is where the line of another gateway begins, of its own priority."""
    for line, lag_s in (([3.0, 4.0], -7.0), ([-1e6 + 2.0, 30.0], 0.0), ([], 0.0)):
        queue = HoldQueue()
        waiters = [Waiter(EndpointKey("e"), rank, 1.0, 1.0) for rank in line]
        queue.others.hear("other", waiters, 10.0)
        assert waits(queue, 1, "here", arrived_s=10.0).lag_s == lag_s
        assert waits(HoldQueue(others=queue.others), 1, None, arrived_s=10.0).lag_s == 0.0


@given(st.lists(st.tuples(st.floats(0.0, 100.0), WORKS, st.booleans()), max_size=40))
def test_without_ids_all_is_as_it_was(asked: list[tuple[float, float, bool]]) -> None:
    """To the bit: arrival plus work, whatever was sent."""
    queue = HoldQueue()
    for ticket, (arrived_s, work_s, is_sent) in enumerate(asked):
        wait = waits(queue, ticket, None, work_s, arrived_s)
        assert (wait.rank, wait.lag_s) == (arrived_s + work_s, 0.0)
        if is_sent:
            queue.forget(ticket)
            queue.sent(arrived_s, wait, 0)


def test_those_without_an_id_are_one_while_others_wait() -> None:
    """A flood of them does not keep back one that has an id."""
    queue = HoldQueue()
    waits(queue, 0, "light", 10.0)
    flood = [waits(queue, 1 + ticket, None).lag_s for ticket in range(5)]
    assert flood == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert waits(queue, 100, "light", arrived_s=11.0).rank == 11.0
    for ticket in (*range(6), 100):
        queue.forget(ticket)
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
        self.others_s = -inf
        self.now_s = 0.0
        self.waiting: list[tuple[float, float]] = []
        self.reached_s: float | None = None

    @rule(by_s=st.floats(0.0, 20.0))
    def time_passes(self, by_s: float) -> None:
        """Clocks that it overtakes may be dropped."""
        self.now_s += by_s

    @rule(name=st.none() | st.sampled_from("abcdefgh"), work_s=WORKS)
    def one_begins_to_wait(self, name: str | None, work_s: float) -> None:
        """Its place is that of its own clock, or of the one of those that have none, or virtual time."""
        if not self.waiting:
            self.shares.rest(0, inf)
            self.reached_s = None
        virtual_s = self.now_s if self.reached_s is None else min(self.now_s, self.reached_s)
        alive = {each for each, clock_s in self.clocks.items() if clock_s > virtual_s}
        lag_s = self.shares.lag_s(name, self.now_s)
        self.shares.waits(name, self.now_s, lag_s, work_s)
        self.waiting.append((self.now_s, lag_s))
        if self.reached_s is None:
            self.reached_s = self.now_s
        if name is not None and (name in alive or len(alive) < self.MOST):
            assert lag_s == max(virtual_s, self.clocks.get(name, virtual_s)) - self.now_s
            self.clocks[name] = self.now_s + lag_s + work_s
        else:
            assert lag_s == (max(virtual_s, self.others_s) - self.now_s if alive else 0.0)
            self.others_s = self.now_s + lag_s + work_s

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), is_sent=st.booleans())
    def one_waits_no_more(self, data: st.DataObject, is_sent: bool) -> None:
        """It is sent, or its client left."""
        arrived_s, lag_s = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        if is_sent:
            self.shares.sent(arrived_s, lag_s)
            assert self.reached_s is not None
            self.reached_s = max(self.reached_s, arrived_s + lag_s)

    @invariant()
    def there_are_no_more_than_the_most(self) -> None:
        """However many ids there are."""
        assert len(self.shares) <= self.MOST


TestClocks = Clocks.TestCase
