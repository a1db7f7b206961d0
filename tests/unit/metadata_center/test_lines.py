"""Who waits elsewhere: how it is told, how long it counts, and that all that wait are in one order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.holding import POLL_S
from extproc.choosing.lines import LINE_S, MAX_LINES, OtherLines
from extproc.observing.explain import render, to_json, verdict
from extproc.routing.telling import TELL_S, LineTeller
from metadata_center.sharing.lines import MAX_WAITERS, heard, told
from metadata_center.sharing.messages import Line, MessageError
from metadata_center.types import EndpointKey, Waiter
from tests.conftest import THREE, VirtualLoop
from tests.unit.held import Held

A, B, C = (EndpointKey(f"10.0.0.{number}:8000") for number in range(3))

waiters = st.builds(
    Waiter,
    st.sampled_from([A, B]),
    st.floats(-1e9, 1e9),
    st.floats(0.0, 3600.0, width=32),
    st.floats(0.0, 3600.0, width=32),
)


def line(*ranks: float, endpoint: EndpointKey = A) -> list[Waiter]:
    """Those that wait for one endpoint, 2 s of work each, half of it in the backlog."""
    return [Waiter(endpoint, rank, 2.0, 1.0) for rank in ranks]


@given(st.lists(waiters, max_size=MAX_WAITERS))
def test_a_line_is_heard_as_it_was_told(those: list[Waiter]) -> None:
    """Its order and its work; its ranks on the clock of who hears it."""
    those.sort(key=lambda each: each.rank)
    found = heard(told(those, 100.0), 7.0)
    assert [each.rank for each in found] == pytest.approx([each.rank - 93.0 for each in those], abs=1e-5)
    works = sorted((each.endpoint, each.work_s, each.least_s) for each in those)
    assert sorted((each.endpoint, each.work_s, each.least_s) for each in found) == works


def test_only_the_first_are_told() -> None:
    """Those behind them have long to wait."""
    found = heard(told(line(*map(float, range(MAX_WAITERS + 9))), 0.0), 0.0)
    assert [each.rank for each in found] == list(map(float, range(MAX_WAITERS)))


@pytest.mark.parametrize(
    "packed",
    [
        bytes(15),
        told(line(1.0), 0.0)[0].packed * (MAX_WAITERS + 1),
        b"\xff" * 16,
        told([Waiter(A, float("-inf"), 1.0, 1.0)], 0.0)[0].packed,
        told([Waiter(A, 0.0, -1.0, 1.0)], 0.0)[0].packed,
        told([Waiter(A, 0.0, 1.0, float("nan"))], 0.0)[0].packed,
    ],
)
def test_what_is_no_line_is_refused(packed: bytes) -> None:
    """Cut short, too long, no time, work below zero."""
    with pytest.raises(MessageError):
        heard([Line(A, packed)], 0.0)


def test_those_that_go_before_are_ahead_at_their_endpoint() -> None:
    """And the work of all of them is backlog of the pool that has the endpoint, of no other."""
    others = OtherLines()
    assert not others.hear("gw2", line(1.0, 5.0), 0.0)
    others.hear("gw3", line(2.0, endpoint=B), 0.0)
    assert others.ahead_s(4.0, [B, A, C]) == [2.0, 2.0, 0.0]
    assert others.ahead_s(5.0, [A]) == [2.0]
    assert others.ahead_s(6.0, [A]) == [4.0]
    assert others.least_s([A]) == 2.0
    assert others.least_s([C, B, A]) == 3.0
    assert others.least_s([C]) == 0.0


def test_a_line_is_replaced_and_a_shorter_one_is_news_for_those_that_wait() -> None:
    """Whoever was in front of them may have gone."""
    others = OtherLines()
    assert not others.hear("gw2", line(1.0, 5.0), 0.0)
    assert not others.hear("gw2", line(3.0, 5.0), 0.0)
    assert others.ahead_s(4.0, [A]) == [2.0]
    assert others.hear("gw2", line(5.0), 0.0)
    assert others.hear("gw2", [], 0.0)
    assert not others.hear("gw2", [], 0.0)
    assert not others


def test_a_silent_process_counts_for_its_time_and_no_longer() -> None:
    """Each by its own last word."""
    others = OtherLines()
    others.hear("gw2", line(1.0), 0.0)
    others.hear("gw3", line(2.0), 0.5 * LINE_S)
    others.advance(0.99 * LINE_S)
    assert others.ahead_s(9.0, [A]) == [4.0]
    others.advance(LINE_S)
    assert others.ahead_s(9.0, [A]) == [2.0]
    others.advance(1.5 * LINE_S)
    assert not others
    assert others.least_s([A]) == 0.0


def test_lines_are_bounded() -> None:
    """What finds no room is not believed, until something else is forgotten."""
    others = OtherLines()
    for number in range(MAX_LINES + 1):
        others.hear(f"gw{number}", line(1.0), 0.0)
    assert others.least_s([A]) == MAX_LINES
    others.hear("late", line(1.0), LINE_S)
    assert others.least_s([A]) == 1.0


class Told:
    """A teller in virtual time."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.waiting: list[Waiter] = []
        self.lines: list[tuple[float, list[float]]] = []
        self.teller = LineTeller(
            lambda: self.waiting,
            lambda those: self.lines.append((self.loop.clock(), [each.rank for each in those])),
            lambda: self.loop,
            self.loop.clock,
        )

    def is_now(self, *ranks: float) -> None:
        """Those wait now."""
        self.waiting = line(*ranks)
        self.teller.changed()


def test_a_change_is_told_at_once_and_those_right_behind_it_together() -> None:
    """In order, the first in line first."""
    told = Told()
    began_s = told.loop.clock()
    told.is_now(5.0)
    told.loop.run()
    told.is_now(5.0, 4.0)
    told.is_now(5.0, 4.0, 6.0)
    told.loop.run(2 * TELL_S)
    assert [ranks for _, ranks in told.lines] == [[5.0], [4.0, 5.0, 6.0]]
    assert [at_s - began_s for at_s, _ in told.lines] == pytest.approx([0.0, TELL_S])


def test_a_line_is_told_again_while_any_waits_and_its_end_once() -> None:
    """So that others forget it neither while it is there nor keep it when it is not."""
    told = Told()
    told.is_now(5.0)
    told.loop.run(LINE_S)
    gaps = [after - before for (before, _), (after, _) in zip(told.lines, told.lines[1:], strict=False)]
    assert gaps == pytest.approx([POLL_S] * int(LINE_S / POLL_S))
    assert max(gaps) < LINE_S / 2
    told.lines.clear()
    told.teller.changed()
    told.loop.run(TELL_S)
    told.is_now()
    told.loop.run(5 * LINE_S)
    assert [ranks for _, ranks in told.lines][-1] == []
    assert sum(not ranks for _, ranks in told.lines) == 1


def test_a_request_lets_one_go_first_that_waits_elsewhere() -> None:
    """It goes when that one has gone, or its process has been silent for long enough."""
    held = Held()
    held.ask("a")
    lines, now_s = held.rig.scheduling.lines, held.loop.clock()
    lines.hear("gw2", [Waiter(THREE[0].key, now_s - 1.0, 0.5, 0.5)], now_s)
    waiting = held.hold("b")
    held.first_token("a")
    assert not waiting.done()
    held.loop.run(LINE_S - POLL_S)
    assert not waiting.done()
    held.loop.run(2 * POLL_S)
    assert waiting.done()
    record = held.rig.record("b")
    assert record.hold is not None
    assert record.hold.elsewhere_s == pytest.approx(0.5)
    json = to_json(record)
    assert verdict(json) == "recomputed: same choice, same place in line"
    assert json["hold"]["elsewhere_s"] == pytest.approx(0.5)
    assert "behind 500.0 ms of work that waited at other gateways or workers" in render(json)


def test_a_request_goes_before_one_that_waits_elsewhere_and_came_later() -> None:
    """That one is nothing to it: it goes with the news of room."""
    held = Held()
    held.ask("a")
    waiting = held.hold("b")
    now_s = held.loop.clock()
    held.rig.scheduling.lines.hear("gw2", [Waiter(THREE[0].key, now_s + 5.0, 0.5, 0.5)], now_s)
    held.first_token("a")
    assert waiting.done()
    record = held.rig.record("b")
    assert record.hold is not None
    assert record.hold.elsewhere_s == 0.0


def test_one_that_comes_sees_those_that_wait_elsewhere_though_none_waits_here() -> None:
    """The endpoint is idle, but another gateway's request is on its way there."""
    held = Held()
    now_s = held.loop.clock()
    held.rig.scheduling.lines.hear("gw2", [Waiter(THREE[0].key, now_s - 1.0, 0.5, 0.5)], now_s)
    waiting = held.hold("a")
    held.loop.run(LINE_S + POLL_S)
    assert waiting.done()
