"""What members may rely on wherever they meet, and that all rendezvous give the same answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.kinds import Amounts
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.http_server import HttpServer
from metadata_center.sharing.http_transport import HttpTransport
from metadata_center.sharing.messages import (
    RESPONSES_MARK,
    Candidate,
    Chain,
    Line,
    MemberId,
    Reservation,
    Reserved,
    Row,
    Update,
    member_id,
)
from metadata_center.sharing.peers import Peers
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.transport import Transport
from metadata_center.types import EndpointKey
from testbed.redis_server import running

DEADLINE_S = 20.0
LEASE_S = 60.0
ENDPOINTS = tuple(EndpointKey(f"10.0.0.{number}:8000") for number in range(5))
MEMBERS = tuple(member_id(f"gw{number}", 0, "x") for number in range(3))
A, B = ENDPOINTS[:2]
ONE, TWO = MEMBERS[:2]


@asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[Callable[[], Transport]]:
    """Transports to a real redis-server."""
    with running(folder) as server:
        url = parse_url(server.url)
        yield lambda: RedisTransport(url)


@asynccontextmanager
async def http(_: Path) -> AsyncIterator[Callable[[], Transport]]:
    """Transports to our own service."""
    server = HttpServer(Limits())
    await server.start("127.0.0.1", 0)
    try:
        yield lambda: HttpTransport(f"http://127.0.0.1:{server.port}")
    finally:
        await server.stop()


@pytest.fixture(params=[redis, http])
async def transport(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Transport]:
    """A way to a rendezvous of its own."""
    async with request.param(tmp_path) as make:
        transport = make()
        yield transport
        await transport.close()


async def heard(stream: AsyncIterator[Update], number: int) -> list[Update]:
    """The next messages."""
    async with asyncio.timeout(DEADLINE_S):
        return [await anext(stream) for _ in range(number)]


async def totals(transport: Transport) -> Mapping[EndpointKey, Amounts]:
    """What a newcomer knows after the snapshot."""
    peers = Peers()
    for update in await transport.snapshot():
        assert 0.0 < update.lease_s <= LEASE_S
        peers.apply(update, 0.0)
    return dict(peers.totals)


def reservation(*candidates: tuple[EndpointKey, int]) -> Reservation:
    """A request of 10 prefill and 20 context tokens anywhere."""
    return Reservation(tuple(Candidate(endpoint, believed, 10, 20) for endpoint, believed in candidates))


async def test_a_message_comes_back_as_it_was_sent(transport: Transport) -> None:
    """To its sender too, blocks and who waits included, in order."""
    updates = [
        Update(ONE, 1, (Row(A, 1, 2, 3, 4, 5), Row(B, 2**53 - 1)), full=True, lease_s=LEASE_S),
        Update(ONE, 2, (Row(A),), lease_s=LEASE_S, blocks=(Chain.of(A, [0, 2**64 - 1]),)),
        Update(ONE, 3, lease_s=LEASE_S, line=(Line(A, bytes(range(16))), Line(B, bytes(32)))),
        Update(ONE, 4, lease_s=LEASE_S, line=()),
        Update(ONE, 5, leaving=True, lease_s=LEASE_S),
    ]
    async with transport.subscribe() as stream:
        for update in updates:
            await transport.publish(update)
        assert await heard(stream, 5) == updates
    assert await transport.snapshot() == []


async def test_where_responses_live_is_sent_to_all(transport: Transport) -> None:
    """Over any rendezvous, beside prompts' blocks and apart from them; the teller hears nothing new."""
    known: dict[MemberId, list[tuple[EndpointKey, list[int]]]] = {ONE: [], TWO: []}

    def hear(member: MemberId, endpoint: EndpointKey, chain: Sequence[int]) -> None:
        known[member].append((endpoint, list(chain)))

    stores = [
        SharedStore(member, Counters(capacity=8), PrefixIndex(10, 10), on_responses=partial(hear, member))
        for member in (ONE, TWO)
    ]
    for store in stores:
        store.load.retain(frozenset(ENDPOINTS))
    stores[0].share(A, [RESPONSES_MARK, 1, 2**64 - 2])
    stores[0].share(A, [5, 6])
    outgoing = stores[0].outgoing(0.0)
    assert outgoing is not None
    async with transport.subscribe() as stream:
        await transport.publish(outgoing.update)
        (update,) = await heard(stream, 1)
    for store in stores:
        store.incoming(update, 0.0)
    assert known == {ONE: [], TWO: [(A, [RESPONSES_MARK, 1, 2**64 - 2])]}


async def test_a_late_row_changes_nothing(transport: Transport) -> None:
    """It applies to the endpoints alone of which nothing newer was said."""
    await transport.publish(Update(ONE, 2, (Row(A, 2),), full=True, lease_s=LEASE_S))
    await transport.publish(Update(ONE, 5, (Row(A, 5),), lease_s=LEASE_S))
    await transport.publish(Update(ONE, 4, (Row(A, 4), Row(B, 4)), lease_s=LEASE_S))
    await transport.publish(Update(ONE, 1, (Row(A, 1),), full=True, lease_s=LEASE_S))
    assert await totals(transport) == {A: (5, 0, 0, 0, 0), B: (4, 0, 0, 0, 0)}
    await transport.publish(Update(ONE, 6, full=True, lease_s=LEASE_S))
    assert await totals(transport) == {}


async def test_a_lease_ends_at_the_rendezvous(transport: Transport) -> None:
    """Snapshots and reservations count the dead no more."""
    await transport.publish(Update(ONE, 1, (Row(A, 9),), full=True, lease_s=0.2))
    async with asyncio.timeout(DEADLINE_S):
        while await transport.snapshot():  # noqa: ASYNC110 - a lease ends in silence
            await asyncio.sleep(0.02)
    (place,) = await transport.reserve(Update(TWO, 1, lease_s=LEASE_S), [reservation((A, 0), (B, 0))])
    assert place == Reserved(0, (0, 0))


async def test_a_place_is_the_first_that_holds_what_was_believed(transport: Transport) -> None:
    """Else the least exceeded; each request sees those placed before it, and all get the rows."""
    await transport.publish(Update(TWO, 1, (Row(A, 4), Row(B, 1)), full=True, lease_s=LEASE_S))
    async with transport.subscribe() as stream:
        places = await transport.reserve(
            Update(ONE, 1, (Row(A, 1, 1, 5, 6, 7),), full=True, lease_s=LEASE_S),
            [reservation((A, 5), (B, 0)), reservation((A, 5), (B, 0)), reservation((A, 5), (B, 2))],
        )
        (update,) = await heard(stream, 1)
    assert places == [Reserved(0, (5, 1)), Reserved(0, (6, 1)), Reserved(1, (7, 1))]
    assert {row.endpoint: row for row in update.rows} == {
        A: Row(A, 3, 3, 25, 46, 7),
        B: Row(B, 1, 1, 10, 20, 0),
    }
    assert await totals(transport) == {A: (7, 3, 25, 46, 7), B: (2, 1, 10, 20, 0)}


async def test_cancelled_calls_leave_a_usable_transport(transport: Transport) -> None:
    """At whatever step."""
    for sequence in range(1, 30):
        call = asyncio.create_task(transport.publish(Update(ONE, sequence, lease_s=LEASE_S)))
        for _ in range(sequence % 12):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await transport.publish(Update(ONE, 100, (Row(A, 1),), full=True, lease_s=LEASE_S))
    assert await totals(transport) == {A: (1, 0, 0, 0, 0)}


@pytest.mark.parametrize("seed", range(3))
async def test_all_rendezvous_give_the_same_answers(tmp_path: Path, seed: int) -> None:
    """Random updates, some late, and reservations: the same places, messages and snapshots everywhere."""
    async with AsyncExitStack() as stack:
        pair, streams = [], []
        for rendezvous in (redis, http):
            transport = (await stack.enter_async_context(rendezvous(tmp_path)))()
            stack.push_async_callback(transport.close)
            pair.append(transport)
            streams.append(await stack.enter_async_context(transport.subscribe()))
        rng = random.Random(seed)
        for step in range(1, 121):
            late = rng.choice((0, 0, 0, 1, 5))
            update = _update(rng, rng.choice(MEMBERS), 1_000 * max(0, step - late) + step)
            if not late and rng.random() < 0.6:
                asked = [_asked(rng) for _ in range(rng.randrange(1, 4))]
                places = [await transport.reserve(update, asked) for transport in pair]
                assert places[0] == places[1], (step, update, asked)
            else:
                for transport in pair:
                    await transport.publish(update)
            assert await totals(pair[0]) == await totals(pair[1]), (step, update)
        known = [list(map(_content, await heard(stream, 120))) for stream in streams]
    assert known[0] == known[1]


def _update(rng: random.Random, member: MemberId, sequence: int) -> Update:
    endpoints = rng.sample(ENDPOINTS, rng.randrange(4))
    rows = tuple(Row(endpoint, *(rng.randrange(9) for _ in range(5))) for endpoint in endpoints)
    return Update(member, sequence, rows, full=rng.random() < 0.2, lease_s=LEASE_S)


def _asked(rng: random.Random) -> Reservation:
    return reservation(
        *((endpoint, rng.randrange(20)) for endpoint in rng.sample(ENDPOINTS, rng.randrange(1, 4)))
    )


def _content(update: Update) -> tuple[MemberId, int, bool, frozenset[Row]]:
    return update.member, update.sequence, update.full, frozenset(update.rows)
