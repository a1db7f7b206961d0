"""What the priority of a request does where others wait: which goes first, and which waits for none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.choosing.completion import Cost
from extproc.choosing.holding import HoldQueue, Wait
from extproc.errors import Reason, RouterError
from extproc.observing.explain import render, to_json, verdict
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.deciding import Later
from extproc.values.placements import Decision
from extproc.values.standing import Standing
from tests.conftest import (
    BLOCK_BYTES,
    MODEL,
    THREE,
    Promise,
    VirtualLoop,
    build_rig,
    chat,
    decided,
    request_line,
)

LONG = "long prompt " * 8_000
"""More than two steps of the engine that prices begin from."""


class Busy:
    """One endpoint, and a request that fills it.

    Args:
        hold: Requests wait.
    """

    def __init__(self, hold: HoldSettings | None) -> None:
        self.loop = VirtualLoop()
        self.rig = build_rig(
            THREE[:1],
            load_balancing=LoadBalancing(algorithm=Algorithm.LEAST_COMPLETION, fallbacks=0),
            settings=RouterSettings(block_bytes=BLOCK_BYTES, hold=hold),
            loop=self.loop,
        )
        self.ask("first")

    def ask(
        self, request_id: str, priority: int | None = None, fairness_id: str | None = None
    ) -> Decision | Promise:
        """What comes of a request."""
        headers = request_line(request_id)
        if priority is not None or fairness_id is not None:
            headers = replace(headers, standing=Standing("x", priority or 0, fairness_id))
        deciding = self.rig.gateway.decide(headers, chat(f"{request_id} {LONG}", stream=True))
        return Promise(deciding.pending) if isinstance(deciding, Later) else decided(deciding)

    def prefilled(self, request_id: str) -> None:
        """Its first token came, and the loop takes a turn."""
        self.rig.gateway.first_token(request_id, late=False)
        self.loop.run()


def test_the_higher_one_goes_first_though_it_came_last() -> None:
    """Of equal ones the first that came, and none twice."""
    busy = Busy(HoldSettings())
    waits = {name: busy.ask(name, priority) for name, priority in (("a", None), ("b", 0), ("c", 5), ("d", 2))}
    order = []
    for last in ("first", "c", "d", "a"):
        busy.prefilled(last)
        gone = [name for name, promise in waits.items() if promise.done()]  # type: ignore[union-attr]
        order += [name for name in gone if name not in order]
    assert order == ["c", "d", "a", "b"]
    for name in order:
        record = busy.rig.record(name)
        assert record.hold is not None
        assert 0.0 < record.hold.place_s < 60.0
        assert verdict(to_json(record)) == "recomputed: same choice, same place in line"


@pytest.mark.parametrize(("is_fair", "expected"), [(True, "adbc"), (False, "abcd")])
def test_ids_take_turns(expected: str, *, is_fair: bool) -> None:
    """Three of one id came before one of another, which is the second to go; records say who gave way."""
    busy = Busy(HoldSettings(is_fair=is_fair))
    asked = (("a", "flood"), ("b", "flood"), ("c", "flood"), ("d", "light"))
    waits = {name: busy.ask(name, fairness_id=fairness_id) for name, fairness_id in asked}
    order: list[str] = []
    for last in ("first", *expected[:3]):
        busy.prefilled(last)
        gone = [name for name, promise in waits.items() if promise.done()]  # type: ignore[union-attr]
        order += [name for name in gone if name not in order]
    assert "".join(order) == expected
    lags = {}
    for name in waits:
        record = busy.rig.record(name)
        assert record.hold is not None
        lags[name] = record.hold.lag_s
        assert record.hold.counted.are_turns is (is_fair and name != "a")
        assert verdict(to_json(record)) == "recomputed: same choice, same place in line"
    assert [lags[name] > 0.0 for name in "abcd"] == [False, is_fair, is_fair, False]


def test_one_that_comes_late_is_not_behind_another_ids_flood() -> None:
    """What waited before it had its time; explain says that its place was sooner, and comes to the same."""
    busy = Busy(HoldSettings(is_fair=True))
    waits = {name: busy.ask(name, fairness_id="flood") for name in "abcd"}
    busy.prefilled("first")
    busy.rig.clock.advance(5.0)
    waits["late"] = busy.ask("late", fairness_id="light")
    busy.prefilled("a")
    gone = [name for name, promise in waits.items() if promise.done()]  # type: ignore[union-attr]
    assert gone == ["a", "late"]
    record = to_json(busy.rig.record("late"))
    assert record["hold"]["fairness_lag_s"] == -5.0
    page = render(record)
    assert "other fairness ids had more: 5000.0 ms sooner" in page
    assert " ms before its arrival   its work, " in page
    assert verdict(record) == "recomputed: same choice, same place in line"


@pytest.mark.parametrize("hold", [None, HoldSettings()])
def test_below_0_none_waits_and_none_is_waited_for(hold: HoldSettings | None) -> None:
    """Where all endpoints are full it is refused, whether others wait or not, and leaves nothing behind."""
    busy = Busy(hold)
    for number in range(3):
        with pytest.raises(RouterError) as refused:
            busy.ask(f"low {number}", -1)
        assert refused.value.reason is Reason.OVERLOADED
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s > 0
    assert busy.rig.scheduling.load.in_flight == 1
    later = busy.ask("normal", 0)
    assert isinstance(later, Decision) is (hold is None)
    if hold is not None:
        busy.prefilled("first")
        assert later.done()  # type: ignore[union-attr]
    else:
        busy.prefilled("first")
    busy.prefilled("normal")
    assert isinstance(busy.ask("low again", -1), Decision)


def test_those_refused_take_no_turns_of_their_id() -> None:
    """What an id had refused for its low priority does not set back what it asks for besides."""
    busy = Busy(HoldSettings(is_fair=True))
    for number in range(10):
        with pytest.raises(RouterError, match="priority of this request is too low") as refused:
            busy.ask(f"low {number}", -1, "tenant")
        busy.rig.gateway.rejected(request_line(f"low {number}"), refused.value)
        assert busy.rig.record(f"low {number}").model == MODEL
    asked = (("a", "tenant"), ("b", "other"))
    waits = {name: busy.ask(name, 0, fairness_id) for name, fairness_id in asked}
    busy.prefilled("first")
    assert [promise.done() for promise in waits.values()] == [True, False]  # type: ignore[union-attr]


def rank(priority: int, arrived_s: float = 0.0) -> float:
    """Of one that has to wait for a second of work."""
    full = Cost(5.0, 1.0, 0.02, 0.0, 0.0)
    wait = HoldQueue().decide(1, arrived_s, arrived_s, [full], [0.1], 0, priority=priority)
    assert isinstance(wait, Wait)
    return wait.rank


@pytest.mark.parametrize("higher", [1, 7, 1_000])
def test_no_wait_outweighs_a_priority(higher: int) -> None:
    """And within one a microsecond still counts, however large it is."""
    assert rank(higher, arrived_s=86_400.0) < rank(higher - 1)
    assert rank(higher, arrived_s=1e6) < rank(higher, arrived_s=1e6 + 1e-6)
    assert rank(2**31 - 1) == rank(1_000)


def test_a_refused_one_counts_as_no_work_that_waits() -> None:
    """Requests behind it are told of no longer wait."""
    busy = Busy(HoldSettings(max_requests=1, refuses=True))
    for number in range(3):
        with pytest.raises(RouterError, match="priority of this request is too low"):
            busy.ask(f"low {number}", -1)
    assert isinstance(busy.ask("waits", 0), Promise)
    with pytest.raises(RouterError, match="too many requests wait"):
        busy.ask("one too many", 0)
