"""Whose turn it is in a thread: the smallest first, with a room for small ones; work keeps its room."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from extproc.server.bodies.turns import LEAST_SWEPT, Turns

SMALL = 10


class Works:
    """Work that is done when it is told to be.

    Attributes:
        begun: Names, in the order in which threads began.
    """

    def __init__(self) -> None:
        self.turns = Turns((None, SMALL), "test")
        self.begun: list[str] = []
        self._may_end: dict[str, threading.Event] = {}

    def ask(self, name: str, num_bytes: int) -> asyncio.Task[str]:
        """Ask for work of so many bytes."""
        self._may_end[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            self._may_end[name].wait(30.0)
            return name

        return asyncio.ensure_future(self.turns.work(num_bytes, work))

    def end(self, name: str) -> None:
        """Let it end."""
        self._may_end[name].set()

    async def have(self, *names: str) -> None:
        """Wait until these have begun, in this order, and no others."""
        for _ in range(3_000):
            if len(self.begun) >= len(names):
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        assert self.begun == list(names)

    def close(self) -> None:
        """Let all end."""
        for event in self._may_end.values():
            event.set()
        self.turns.close()


@pytest.fixture
async def works() -> AsyncIterator[Works]:
    """Two rooms, one of them for small work."""
    made = Works()
    yield made
    made.close()


async def test_the_smallest_goes_first_and_of_equals_the_older(works: Works) -> None:
    """What came before it waits, if it is larger."""
    first = works.ask("first", 500)
    await works.have("first")
    tasks = [works.ask("large", 900), works.ask("less", 300), works.ask("as much", 300)]
    for ended, begun in (("first", "less"), ("less", "as much"), ("as much", "large")):
        works.end(ended)
        await works.have(*works.begun, begun)
    works.end("large")
    assert await asyncio.gather(first, *tasks) == ["first", "large", "less", "as much"]


async def test_large_work_never_takes_the_room_of_the_small(works: Works) -> None:
    """However much of it waits, small work begins at once; of two small ones the second waits."""
    for number in range(3):
        works.ask(f"large {number}", 500)
    await works.have("large 0")
    works.ask("small", SMALL)
    await works.have("large 0", "small")
    works.ask("another", 1)
    await works.have("large 0", "small")
    works.end("small")
    await works.have("large 0", "small", "another")


async def test_who_leaves_before_its_turn_gives_it_away(works: Works) -> None:
    """Also in the very moment in which it was given."""
    works.ask("first", 500)
    await works.have("first")
    gone, given = works.ask("gone", 200), works.ask("given", 300)
    works.ask("next", 400)
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0)
    works.turns._leave(0)  # the turn is given, and its owner has not heard of it yet
    given.cancel()
    await works.have("first", "next")


async def test_a_room_is_busy_until_its_work_ends_whoever_left(works: Works) -> None:
    """A thread cannot be stopped."""
    left = works.ask("left", 500)
    await works.have("left")
    left.cancel()
    works.ask("next", 600)
    await asyncio.sleep(0.05)
    await works.have("left")
    works.end("left")
    await works.have("left", "next")


async def test_those_who_left_take_no_room_for_good(works: Works) -> None:
    """Large ones behind which smaller ones always come are never at the head of the line."""
    works.ask("first", 500)
    await works.have("first")
    waiting = works.ask("waiting", 600)
    for number in range(500):
        left = works.ask(f"left {number}", 700)
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        assert len(works.turns) <= LEAST_SWEPT + 4
    works.end("first")
    await works.have("first", "waiting")
    works.end("waiting")
    assert await waiting == "waiting"


async def test_what_work_raises_is_raised(works: Works) -> None:
    """And its room is free."""
    with pytest.raises(ZeroDivisionError):
        await works.turns.work(500, lambda: 1 // 0)
    works.ask("next", 500)
    await works.have("next")
