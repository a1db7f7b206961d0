"""Entries on their way to the replica that decided: each arrives once, or is dropped and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest

from extproc.server.exchanging import entry_relay
from extproc.server.exchanging.entry_relay import EVERYBODY, MAX_NAMES, EntryRelay
from extproc.values.endings import RequestAlive, RequestEvent
from metadata_center.sharing.transport import TransportError
from metadata_center.types import RequestId
from tests.waiting import until

pytestmark = pytest.mark.asyncio

A, B, C = "0.aaaa", "0.bbbb", "0.cccc"


class Center:
    """Where members meet: keeps nothing.

    Attributes:
        is_away: Every call fails.
        loses_answers: So many messages arrive, and their senders hear that they may not have.
    """

    def __init__(self) -> None:
        self.listeners: dict[str, list[asyncio.Queue[bytes]]] = {}
        self.is_away = False
        self.loses_answers = 0


class Way:
    """One member's way there."""

    def __init__(self, center: Center) -> None:
        self._center = center
        self.is_closed = False

    async def send_to(self, name: str, payload: bytes) -> bool:
        """See `DirectMessages`."""
        await asyncio.sleep(0)
        if self._center.is_away:
            raise TransportError("away")
        listeners = self._center.listeners.get(name, [])
        for each in listeners:
            each.put_nowait(payload)
        if self._center.loses_answers:
            self._center.loses_answers -= 1
            raise TransportError("no answer")
        return bool(listeners)

    @asynccontextmanager
    async def addressed_to(self, names: Iterable[str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """See `DirectMessages`."""
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        for name in names:
            self._center.listeners.setdefault(name, []).append(queue)

        async def received() -> AsyncIterator[bytes]:
            while True:
                yield await queue.get()

        yield received()

    async def close(self) -> None:
        """See `DirectMessages`."""
        self.is_closed = True


def entry(number: int, owner: str | None) -> RequestAlive:
    """One of a request."""
    return RequestAlive(RequestId(str(number)), owner)


class Replica:
    """A relay, and what it took in."""

    def __init__(self, center: Center, owner: str) -> None:
        self.taken: list[RequestEvent] = []
        self.way = Way(center)
        self.relay = EntryRelay(owner, self.way, self.taken.append)


@asynccontextmanager
async def replicas(center: Center, *owners: str) -> AsyncIterator[list[Replica]]:
    """Some that listen."""
    made = [Replica(center, owner) for owner in owners]
    for each in made:
        await each.relay.start()
    await asyncio.sleep(0.01)
    try:
        yield made
    finally:
        for each in made:
            await each.relay.stop()
            assert each.way.is_closed


async def test_each_arrives_once_and_in_order_at_the_worker_that_is_named() -> None:
    """Though the center loses answers, so that messages are sent again."""
    center = Center()
    async with replicas(center, A, B, C) as (one, two, three):
        center.loses_answers = 3
        for number in range(2000):
            assert one.relay.hand_over(B, entry(number, B))
        assert one.relay.hand_over(C, entry(0, C))
        await until(lambda: len(two.taken) >= 2000 and bool(three.taken))
        await asyncio.sleep(0.3)
        assert two.taken == [entry(number, B) for number in range(2000)]
        assert three.taken == [entry(0, C)]
        assert one.taken == []
        assert one.relay.dropped == 0


async def test_one_without_an_owner_goes_to_all_others() -> None:
    """And not back."""
    async with replicas(Center(), A, B, C) as (one, two, three):
        one.relay.broadcast(entry(1, None))
        await until(lambda: bool(two.taken and three.taken))
        assert (one.taken, two.taken, three.taken) == ([], [entry(1, None)], [entry(1, None)])


async def test_a_sibling_sends_on_what_is_for_another_replica() -> None:
    """What is its own, or nobody's, it takes."""
    async with replicas(Center(), A, B) as (one, two):
        for owner in (A, B, None):
            one.relay.take(entry(1, owner))
        await until(lambda: bool(two.taken))
        assert one.taken == [entry(1, A), entry(1, None)]
        assert two.taken == [entry(1, B)]


async def test_a_center_that_is_away_for_a_moment_loses_nothing() -> None:
    """What waits is sent when it is back."""
    center = Center()
    async with replicas(center, A, B) as (one, two):
        center.is_away = True
        one.relay.hand_over(B, entry(1, B))
        await asyncio.sleep(0.3)
        one.relay.hand_over(B, entry(2, B))
        assert two.taken == []
        center.is_away = False
        await until(lambda: len(two.taken) == 2)
        assert two.taken == [entry(1, B), entry(2, B)]


async def test_what_nobody_takes_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is gone: its requests' entries are kept for a while, and hold up no others."""
    monkeypatch.setattr(entry_relay, "KEPT_S", 0.3)
    async with replicas(Center(), A, B) as (one, two):
        one.relay.hand_over(C, entry(1, C))
        one.relay.hand_over(B, entry(2, B))
        await until(lambda: bool(two.taken))
        assert one.relay.dropped == 0
        await until(lambda: one.relay.dropped == 1)
        assert one.relay._queues == {}
        assert one.relay._queued == 0


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By entries and by names; what finds no room is refused and counted."""
    monkeypatch.setattr(entry_relay, "MAX_QUEUED", MAX_NAMES + 10)
    center = Center()
    center.is_away = True
    async with replicas(center, A) as (one,):
        took = [one.relay.hand_over(f"0.{name}", entry(1, None)) for name in range(MAX_NAMES + 5)]
        assert took == [True] * MAX_NAMES + [False] * 5
        took = [one.relay.hand_over("0.0", entry(1, None)) for _ in range(20)]
        assert took == [True] * 10 + [False] * 10
        assert one.relay.dropped == 15


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x90", b"\x94\xa1x\xa1x\x01\x91\x92\xa3end\x01", b"x" * 2_000_000]
)
async def test_what_is_no_message_is_passed_over(payload: bytes) -> None:
    """Others may write there as well."""
    center = Center()
    async with replicas(center, A, B) as (one, two):
        for name in (B, EVERYBODY):
            await one.way.send_to(name, payload)
        one.relay.hand_over(B, entry(1, B))
        await until(lambda: bool(two.taken))
        assert two.taken == [entry(1, B)]


async def test_an_entry_that_cannot_be_taken_in_loses_no_other() -> None:
    """A bug with one request is logged."""
    center, taken = Center(), list[RequestEvent]()

    def take(event: RequestEvent) -> None:
        if event == entry(1, B):
            raise RuntimeError("a bug")
        taken.append(event)

    async with replicas(center, A) as (one,):
        other = EntryRelay(B, Way(center), take)
        await other.start()
        await asyncio.sleep(0.01)
        for number in range(3):
            one.relay.hand_over(B, entry(number, B))
        await until(lambda: len(taken) == 2)
        await other.stop()
    assert taken == [entry(0, B), entry(2, B)]
