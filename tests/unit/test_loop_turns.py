"""Turns of the event loop that take long are told, with what took most of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from extproc.observing.metrics.collector import Metrics
from extproc.observing.metrics.process import StallCause
from extproc.server.loop_turns import STALL_S, WatchedSelector
from tests.conftest import ManualClock

Told = list[tuple[float, StallCause]]


def run_turns(*turns: Callable[[ManualClock], None]) -> Told:
    """What is told of a loop whose turns do this."""
    told: Told = []
    clock = ManualClock()
    loop = asyncio.SelectorEventLoop(WatchedSelector(lambda *each: told.append(each), clock))

    async def run() -> None:
        for turn in turns:
            turn(clock)
            await asyncio.sleep(0)

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return told


def test_a_long_turn_is_told_and_a_short_one_is_not() -> None:
    """By the clock, from waking to the next wait."""
    told = run_turns(
        lambda clock: clock.advance(STALL_S),
        lambda clock: clock.advance(0.02),
        lambda clock: clock.advance(0.001),
    )
    assert told == [(0.02, StallCause.OTHER)]


def test_time_that_is_waited_is_no_part_of_a_turn() -> None:
    """Nothing to do is no stall."""
    told: Told = []
    times_s = iter((0.0, 0.001, 10.0, 10.001, 20.0, 20.5, 30.0))
    selector = WatchedSelector(lambda *each: told.append(each), lambda: next(times_s))
    try:
        for _ in range(4):
            selector.select(0)
    finally:
        selector.close()
    assert told == [(0.5, StallCause.OTHER)]


def test_a_collection_is_named() -> None:
    """The larger part of the turn is the cause."""

    def collecting(clock: ManualClock, collection_s: float, other_s: float) -> None:
        def during(phase: str, _info: object) -> None:
            if phase == "start":
                clock.advance(collection_s)

        gc.callbacks.append(during)  # after the selector's own, which has looked at the clock
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(during)
        clock.advance(other_s)

    gc.disable()
    try:
        told = run_turns(
            lambda clock: collecting(clock, 0.02, 0.01), lambda clock: collecting(clock, 0.01, 0.02)
        )
    finally:
        gc.enable()
    assert [cause for _, cause in told] == [StallCause.GC, StallCause.OTHER]


def test_a_closed_loop_listens_to_no_collection() -> None:
    """What is over is let go."""
    before = list(gc.callbacks)
    run_turns()
    assert gc.callbacks == before


def test_the_longest_is_kept(registry: CollectorRegistry) -> None:
    """A histogram of all, and the longest by cause."""
    metrics = Metrics(registry, "test")
    for took_s in (0.02, 0.3, 0.1):
        metrics.stalled(took_s, StallCause.OTHER)
    other = {"cause": "other"}
    assert registry.get_sample_value("tokenway_loop_stall_seconds_count", other) == 3.0
    assert registry.get_sample_value("tokenway_loop_longest_stall_seconds", other) == 0.3
    assert registry.get_sample_value("tokenway_loop_longest_stall_seconds", {"cause": "gc"}) == 0.0
