"""Turns of the event loop that take long are told, with what took most of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from extproc.observing.metrics.collector import Metrics
from extproc.observing.metrics.process import StallCause
from extproc.server.process.loop_turns import STALL_S, WatchedSelector
from tests.conftest import ManualClock

Told = list[tuple[float, float, StallCause]]


class Processor:
    """The clock on the wall, and the processor time that the loop's thread got of it."""

    def __init__(self) -> None:
        self.clock, self.cpu = ManualClock(), ManualClock()

    def work(self, seconds: float) -> None:
        """The thread works."""
        self.clock.advance(seconds)
        self.cpu.advance(seconds)

    def wait(self, seconds: float) -> None:
        """The thread would work, and another one does."""
        self.clock.advance(seconds)


def run_turns(*turns: Callable[[Processor], None]) -> Told:
    """What is told of a loop whose turns do this."""
    told: Told = []
    processor = Processor()
    selector = WatchedSelector(lambda *each: told.append(each), processor.clock, processor.cpu)
    loop = asyncio.SelectorEventLoop(selector)

    async def run() -> None:
        for turn in turns:
            turn(processor)
            await asyncio.sleep(0)

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return told


def test_a_long_turn_is_told_and_a_short_one_is_not() -> None:
    """By the clock, from waking to the next wait."""
    told = run_turns(
        lambda processor: processor.work(STALL_S),
        lambda processor: processor.work(0.02),
        lambda processor: processor.work(0.001),
    )
    assert [(round(took_s, 6), cause) for took_s, _, cause in told] == [(0.02, StallCause.OTHER)]


def test_a_turn_that_waited_for_its_processor_is_told_apart() -> None:
    """By processor time: what would have been short is the machine's, what would have been long is ours."""

    def both(processor: Processor, waits_s: float, works_s: float) -> None:
        processor.wait(waits_s)
        processor.work(works_s)

    told = run_turns(
        lambda processor: both(processor, 0.5, 0.004),
        lambda processor: both(processor, 0.5, 0.02),
    )
    assert [cause for _, _, cause in told] == [StallCause.WAITING, StallCause.OTHER]
    took_s, own_s, _ = told[1]
    assert (round(took_s, 6), round(own_s, 6)) == (0.52, 0.02)


def test_processor_time_is_read_seldom_and_short_turns_are_not_counted_for_a_long_one() -> None:
    """Between two readings there is half a millisecond at most."""
    times_s = iter([0.0, *(turn * 0.0001 for turn in range(1, 200) for _ in "be")])
    readings: list[float] = []

    def cpu() -> float:
        readings.append(0.0)
        return 0.0

    selector = WatchedSelector(lambda *_: None, lambda: next(times_s), cpu)
    try:
        for _ in range(100):
            selector.select(0)
    finally:
        selector.close()
    assert 10 <= len(readings) <= 25


def test_time_that_is_waited_is_no_part_of_a_turn() -> None:
    """Nothing to do is no stall."""
    told: Told = []
    times_s = iter((0.0, 0.001, 10.0, 10.001, 20.0, 20.5, 30.0))
    selector = WatchedSelector(lambda *each: told.append(each), lambda: next(times_s), lambda: 0.0)
    try:
        for _ in range(4):
            selector.select(0)
    finally:
        selector.close()
    assert told == [(0.5, 0.0, StallCause.WAITING)]


def test_a_collection_is_named() -> None:
    """The larger part of the turn is the cause."""

    def collecting(processor: Processor, collection_s: float, other_s: float) -> None:
        def during(phase: str, _info: object) -> None:
            if phase == "start":
                processor.work(collection_s)

        gc.callbacks.append(during)  # after the selector's own, which has looked at the clock
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(during)
        processor.work(other_s)

    gc.disable()
    try:
        told = run_turns(
            lambda processor: collecting(processor, 0.02, 0.01),
            lambda processor: collecting(processor, 0.01, 0.02),
        )
    finally:
        gc.enable()
    assert [cause for _, _, cause in told] == [StallCause.GC, StallCause.OTHER]


def test_a_closed_loop_listens_to_no_collection() -> None:
    """What is over is let go."""
    before = list(gc.callbacks)
    run_turns()
    assert gc.callbacks == before


def test_the_longest_is_kept(registry: CollectorRegistry) -> None:
    """A histogram of all, and the longest by cause."""
    metrics = Metrics(registry, "test")
    for took_s in (0.02, 0.3, 0.1):
        metrics.stalled(took_s, took_s / 2, StallCause.OTHER)
    metrics.stalled(0.4, 0.001, StallCause.WAITING)
    other = {"cause": "other"}
    assert registry.get_sample_value("tokenway_loop_stall_seconds_count", other) == 3.0
    assert registry.get_sample_value("tokenway_loop_stall_cpu_seconds_sum", other) == pytest.approx(0.21)
    assert registry.get_sample_value("tokenway_loop_stall_seconds_count", {"cause": "waiting"}) == 1.0
    assert registry.get_sample_value("tokenway_loop_stall_cpu_seconds_count", {"cause": "waiting"}) is None
    assert registry.get_sample_value("tokenway_loop_longest_stall_seconds", other) == 0.3
    assert registry.get_sample_value("tokenway_loop_longest_stall_seconds", {"cause": "gc"}) == 0.0
