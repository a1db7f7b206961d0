"""Pauses of the machine, by made-up clocks, and how the benchmark of stalls names what took long."""

from __future__ import annotations

import asyncio
from itertools import accumulate

import pytest

from benchmarks import stalls
from benchmarks.pauses import figures, pauses


def test_pauses_are_steps_of_the_processor_clock() -> None:
    """What takes 5 ms or less is none; what others had the processor for is none either."""
    cpu_s = accumulate([1.0, 1e-4, 0.006, 1e-4, 0.03, 0.005, 0.0039, 1e-4])
    wall_s = iter([10.0, 10.1, 10.2, 10.3, 10.4, 14.0, 14.9, 15.0, 15.1])

    found_s, looked_s = pauses(5.0, lambda: next(wall_s), lambda: next(cpu_s))

    assert found_s == pytest.approx([0.006, 0.03])
    assert looked_s == pytest.approx(0.0451)


def test_pauses_are_counted_beyond_each_bound() -> None:
    """Also where there are none."""
    expected = {"over 5 ms": 3, "over 10 ms": 2, "over 25 ms": 1, "over 50 ms": 0, "longest_ms": 30.1}
    assert figures([0.006, 0.0301, 0.011], 7.04) == {"cpu_s": 7.0, **expected}
    assert figures([], 0.0) == {"cpu_s": 0.0, **dict.fromkeys(expected, 0)}


class _Body:
    """What a callback gets: nobody may write it out."""

    def __repr__(self) -> str:
        raise AssertionError("3 MB were to be written")


async def _reads(body: asyncio.Future[_Body]) -> None:
    await body


async def test_what_took_long_is_named_without_what_it_gets() -> None:
    """A task by its coroutine, a call by its function."""
    loop = asyncio.get_running_loop()
    body: asyncio.Future[_Body] = loop.create_future()
    body.set_result(_Body())
    task = asyncio.create_task(_reads(body))
    wakes = asyncio.Handle(getattr(task, "_Task__wakeup", task.cancel), (body,), loop)
    calls = asyncio.Handle(pauses, (_Body(),), loop)
    await task

    assert stalls._named(wakes) == "task _reads"
    assert stalls._named(calls) == "pauses"
    calls.cancel()
    assert stalls._named(calls) == "cancelled meanwhile"
