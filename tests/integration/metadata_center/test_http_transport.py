"""Members meet at a real metadata-center service, and what becomes of them when it misbehaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from metadata_center.service import followers as followers_module
from metadata_center.service import http_server
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.http_server import HttpServer
from metadata_center.sharing import http_transport
from metadata_center.sharing.http_messages import (
    EVENTS_PATH,
    FRAMES_TYPE,
    KEEP_ALIVE,
    MESSAGE_TYPE,
    RESERVE_PATH,
    SHARES_PATH,
    encode_reserve,
    frame,
)
from metadata_center.sharing.http_transport import HttpTransport
from metadata_center.sharing.messages import (
    MAX_MESSAGE_BYTES,
    MAX_SHARED_BLOCKS,
    Candidate,
    Chain,
    Reservation,
    Reserved,
    Row,
    Update,
    encode,
    member_id,
)
from metadata_center.sharing.sync import SyncSettings
from metadata_center.sharing.transport import TransportError
from metadata_center.types import Charge, EndpointKey, RequestId
from tests.contract.stores import joined
from tests.waiting import until

DEADLINE_S = 10.0
A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
ONE, TWO = member_id("gw1", 0, "a"), member_id("gw2", 0, "a")
STATS = "/v1/load/stats"


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    """A service on a port of its own."""
    server = HttpServer(Limits())
    await server.start("127.0.0.1", 0)
    yield server
    await server.stop()


@pytest.fixture
async def transport(server: HttpServer) -> AsyncIterator[HttpTransport]:
    """A member's way to it."""
    transport = HttpTransport(f"http://127.0.0.1:{server.port}")
    yield transport
    await transport.close()


@asynccontextmanager
async def stub(
    *routes: tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]],
) -> AsyncIterator[HttpTransport]:
    """A transport to a service that answers as given."""
    app = web.Application()
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    transport = HttpTransport(f"http://127.0.0.1:{runner.addresses[0][1]}", timeout_s=DEADLINE_S)
    yield transport
    await transport.close()
    await runner.cleanup()


def answering(body: bytes, status: int = 200, content_type: str = FRAMES_TYPE) -> Any:
    """A handler that always answers this."""

    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=body, status=status, content_type=content_type)

    return handle


async def following(stream: AsyncIterator[Update], number: int) -> list[Update]:
    """The next messages."""
    async with asyncio.timeout(DEADLINE_S):
        return [await anext(stream) for _ in range(number)]


def candidate(endpoint: EndpointKey, believed: int = 0) -> Candidate:
    """An endpoint that is believed to have so many requests."""
    return Candidate(endpoint, believed, 10, 20)


async def test_everybody_hears_everything_in_one_order(server: HttpServer) -> None:
    """Four members publish at once; each of them, the publisher included, gets the same sequence."""
    members = [member_id(f"gw{number}", 0, "a") for number in range(4)]
    async with AsyncExitStack() as stack:
        transports = [HttpTransport(f"http://127.0.0.1:{server.port}") for _ in members]
        for transport in transports:
            stack.push_async_callback(transport.close)
        streams = [await stack.enter_async_context(transport.subscribe()) for transport in transports]

        async def say(member: int) -> None:
            for sequence in range(1, 26):
                rows = (Row(A, sequence),)
                await transports[member].publish(Update(members[member], sequence, rows))

        await asyncio.gather(*map(say, range(4)))
        heard = [[(update.member, update.sequence) for update in await following(s, 100)] for s in streams]
    assert len(set(map(tuple, heard))) == 1
    assert set(heard[0]) == {(member, sequence) for member in members for sequence in range(1, 26)}


async def test_a_message_arrives_as_it_was_sent(transport: HttpTransport) -> None:
    """Blocks, leases and leaving too, up to the largest."""
    blocks = list(range(2**64 - MAX_SHARED_BLOCKS, 2**64))
    updates = [
        Update(ONE, 1, (Row(A, 1, 2, 3, 4, 5), Row(B, 2**53 - 1)), full=True, lease_s=7.5),
        Update(ONE, 2, blocks=(Chain.of(A, blocks),)),
        Update(ONE, 3, leaving=True),
    ]
    async with transport.subscribe() as stream:
        for update in updates:
            await transport.publish(update)
        assert await following(stream, 3) == updates


async def test_a_snapshot_holds_the_live_shares(transport: HttpTransport) -> None:
    """With what is left of each lease; those that left are not in it."""
    await transport.publish(Update(ONE, 1, (Row(A, 3),), full=True, lease_s=60.0))
    await transport.publish(Update(ONE, 2, (Row(B, 1),), lease_s=60.0))
    await transport.publish(Update(TWO, 1, (Row(B, 9),), full=True))
    await transport.publish(Update(TWO, 2, leaving=True))
    full, later = await transport.snapshot()
    assert (full.member, full.sequence, full.rows, full.full) == (ONE, 1, (Row(A, 3),), True)
    assert (later.sequence, later.rows, later.full) == (2, (Row(B, 1),), False)
    assert 50.0 < full.lease_s <= 60.0


async def test_a_silent_member_loses_its_share(transport: HttpTransport) -> None:
    """The service's own clock ends its lease; no member has to say so."""
    await transport.publish(Update(ONE, 1, (Row(A, 3),), full=True, lease_s=0.05))
    async with asyncio.timeout(DEADLINE_S):
        while await transport.snapshot():  # noqa: ASYNC110 - a lease ends in silence
            await asyncio.sleep(0.01)


async def test_a_reservation_goes_where_the_truth_is_least(transport: HttpTransport) -> None:
    """The first candidate that holds what was believed, else the least exceeded; and all get it."""
    await transport.publish(Update(TWO, 1, (Row(A, 5), Row(B, 1)), full=True))
    asked = [
        Reservation((candidate(A, believed=7), candidate(B))),
        Reservation((candidate(A), candidate(B))),
        Reservation((candidate(A), candidate(B))),
    ]
    async with transport.subscribe() as stream:
        found = await transport.reserve(Update(ONE, 1, (Row(A, 2),), full=True), asked)
        (update,) = await following(stream, 1)
    assert found == [Reserved(0, (7, 1)), Reserved(1, (8, 1)), Reserved(1, (8, 2))]
    rows = {row.endpoint: row for row in update.rows}
    assert sum(row.requests for row in rows.values()) == 2 + 3
    shown = [update for update in await transport.snapshot() if update.member == ONE]
    assert {row.endpoint: row for update in shown for row in update.rows} == rows


async def test_reservations_at_the_same_instant_spread(server: HttpServer) -> None:
    """64 of four members over eight empty endpoints: eight on each, as one gateway would."""
    endpoints = [EndpointKey(f"10.0.0.{number}:8000") for number in range(8)]
    places: list[EndpointKey] = []
    async with AsyncExitStack() as stack:

        async def place(number: int) -> None:
            transport = HttpTransport(f"http://127.0.0.1:{server.port}")
            stack.push_async_callback(transport.close)
            for sequence in range(1, 17):
                asked = Reservation(tuple(map(candidate, endpoints)))
                update = Update(member_id(f"gw{number}", 0, "a"), sequence)
                (found,) = await transport.reserve(update, [asked])
                places.append(endpoints[found.index])

        await asyncio.gather(*map(place, range(4)))
    assert [places.count(endpoint) for endpoint in endpoints] == [8] * 8


async def test_load_of_aigw_reaches_members_and_theirs_reaches_it(
    server: HttpServer, transport: HttpTransport
) -> None:
    """A post is a row of one more member on the endpoint at that address, and a query counts both."""
    url = f"http://127.0.0.1:{server.port}{STATS}"
    async with aiohttp.ClientSession() as aigw, transport.subscribe() as stream:
        await transport.publish(Update(ONE, 1, (Row(A, 2, 1, 100, 300, 7),), full=True))
        body = {"cluster": "c", "request_id": "r", "ip": "10.0.0.1", "prompt_length": 400}
        await aigw.post(url, data=orjson.dumps(body))
        _, update = await following(stream, 2)
        assert update.rows == (Row(A, 1, 1, 100, 100, 0),)
        assert update.rows == next(u for u in await transport.snapshot() if u.member == update.member).rows
        async with aigw.get(url, params={"cluster": "c"}) as response:
            (load,) = (await response.json())["data"]
        assert (load["ip"], load["queued_req_num"], load["prompt_length"]) == ("10.0.0.1", 3, 800)
        (found,) = await transport.reserve(Update(ONE, 2), [Reservation((candidate(A), candidate(B)))])
        assert found == Reserved(1, (3, 0))
        await aigw.delete(url, data=orjson.dumps({"request_id": "r"}))
        _, update = await following(stream, 2)
        assert update.rows == (Row(A),)


async def test_the_share_of_aigw_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In full, as long as an engine is known from it, so that its lease does not end."""
    monkeypatch.setattr(http_server, "_EXPIRE_INTERVAL_S", 0.01)
    server = HttpServer(Limits())
    await server.start("127.0.0.1", 0)
    server.state.loads.add(RequestId("r"), "c", A, 40, time.monotonic())
    transport = HttpTransport(f"http://127.0.0.1:{server.port}")
    async with transport.subscribe() as stream:
        updates = await following(stream, 3)
    await transport.close()
    await server.stop()
    assert updates[-1].full
    assert updates[-1].rows == (Row(A, 1, 1, 10, 10),)
    assert len({update.sequence for update in updates}) == 3


async def test_waiting_may_be_cancelled_at_any_time(transport: HttpTransport) -> None:
    """A cancelled wait loses no message, at whatever step of its arrival it is cancelled."""
    heard: list[Update] = []
    async with transport.subscribe() as stream:

        async def hear() -> None:
            heard.append(await anext(stream))

        for sequence in range(1, 61):
            waiting = asyncio.create_task(hear())
            publishing = asyncio.create_task(transport.publish(Update(ONE, sequence)))
            for _ in range(sequence % 20):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await publishing
        heard += await following(stream, 60 - len(heard))
    assert [update.sequence for update in heard] == list(range(1, 61))


async def test_a_cancelled_call_leaves_the_transport_usable(transport: HttpTransport) -> None:
    """Whether it was accepted or not."""
    for sequence in range(1, 20):
        call = asyncio.create_task(transport.publish(Update(ONE, sequence, (Row(A, sequence),))))
        for _ in range(sequence):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await transport.publish(Update(ONE, 100, (Row(A, 1),), full=True))
    assert [update.rows for update in await transport.snapshot()] == [(Row(A, 1),)]


async def test_a_subscription_ends_with_the_service(server: HttpServer, transport: HttpTransport) -> None:
    """The stream says so, and so does every later call; stopping does not wait for it."""
    async with transport.subscribe() as stream:
        stopping = asyncio.create_task(server.stop())
        with pytest.raises(TransportError, match="ended the stream"):
            await following(stream, 1)
        async with asyncio.timeout(http_server._STOP_S / 2):
            await stopping
    for call in (transport.publish(Update(ONE, 1)), transport.snapshot()):
        with pytest.raises(TransportError, match="cannot be reached"):
            await call
    with pytest.raises(TransportError, match="cannot be reached"):
        async with transport.subscribe():
            pytest.fail("it stands")


async def test_a_service_started_again_is_used_on(server: HttpServer) -> None:
    """It starts empty; the same transport fills it."""
    port = server.port
    transport = HttpTransport(f"http://127.0.0.1:{port}")
    await transport.publish(Update(ONE, 1, (Row(A, 1),), full=True))
    await server.stop()
    again = HttpServer(Limits())
    await again.start("127.0.0.1", port)
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    assert await transport.snapshot() == []
                except TransportError:  # a connection of before
                    continue
                break
        await transport.publish(Update(ONE, 2, (Row(A, 1),), full=True))
        assert len(await transport.snapshot()) == 1
    finally:
        await transport.close()
        await again.stop()


async def test_gateways_agree_again_after_the_service_was_restarted() -> None:
    """What ended and began while it was away is in both views soon after it is back, and all ends at zero."""
    server = HttpServer(Limits())
    await server.start("127.0.0.1", 0)
    port = server.port
    transports = [HttpTransport(f"http://127.0.0.1:{port}") for _ in range(2)]
    async with joined(*transports, settings=SyncSettings(backoff_s=0.05)) as pair:
        loads = [store.load for store in pair.stores]
        now_s = time.monotonic()
        loads[0].charge(Charge(RequestId("1"), A, 1, 1), now_s, None)
        loads[1].charge(Charge(RequestId("2"), A, 1, 1), now_s, None)
        await pair.settled([A, B], [2, 0])
        await server.stop()
        loads[0].release(RequestId("1"), now_s)
        loads[1].charge(Charge(RequestId("3"), B, 1, 1), now_s, None)
        await until(lambda: not any(sync.stats.connected for sync in pair.syncs))
        server = HttpServer(Limits())
        await server.start("127.0.0.1", port)
        await pair.settled([A, B], [1, 1])
        loads[1].release(RequestId("2"), now_s)
        loads[1].release(RequestId("3"), now_s)
        await pair.settled([A, B], [0, 0])
    await server.stop()


async def test_gateways_count_what_aigw_does(server: HttpServer) -> None:
    """A request that an AIGW posts by address alone is in both gateways' views until it deletes it."""
    url = f"http://127.0.0.1:{server.port}"
    async with (
        joined(HttpTransport(url), HttpTransport(url)) as pair,
        aiohttp.ClientSession(url) as aigw,
    ):
        pair.stores[0].load.charge(Charge(RequestId("1"), A, 1, 1), time.monotonic(), None)
        body = {"cluster": "c", "request_id": "r", "ip": "10.0.0.1", "prompt_length": 400}
        await aigw.post(STATS, data=orjson.dumps(body))
        await pair.settled([A, B], [2, 0])
        await aigw.delete(STATS, data=orjson.dumps({"request_id": "r"}))
        await pair.settled([A, B], [1, 0])


async def test_a_follower_that_does_not_read_is_cut_off(
    server: HttpServer, transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has not taken is bounded; the others go on."""
    monkeypatch.setattr(followers_module, "MAX_PENDING_BYTES", 100_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
    writer.write(f"GET {EVENTS_PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await until(lambda: len(server.followers) == 1)
    blocks = (Chain.of(A, list(range(10_000))),)
    async with transport.subscribe() as stream:
        sequence = 0
        async with asyncio.timeout(DEADLINE_S):
            while server.followers.cut_off == 0:
                sequence += 1
                await transport.publish(Update(ONE, sequence, blocks=blocks))
                await following(stream, 1)
        await until(lambda: len(server.followers) == 1)
        await transport.publish(Update(ONE, sequence + 1))
        assert [update.sequence for update in await following(stream, 1)] == [sequence + 1]
    writer.close()
    del reader


async def test_a_follower_that_takes_nothing_for_long_is_cut_off(
    server: HttpServer, transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its full socket alone does it, before its bound is reached."""
    monkeypatch.setattr(followers_module, "WRITE_TIMEOUT_S", 0.05)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
    writer.write(f"GET {EVENTS_PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await until(lambda: len(server.followers) == 1)
    sequence = 0
    async with asyncio.timeout(DEADLINE_S):
        while server.followers.cut_off == 0:
            sequence += 1
            blocks = (Chain.of(A, list(range(MAX_SHARED_BLOCKS))),)
            await transport.publish(Update(ONE, sequence, blocks=blocks))
    await until(lambda: len(server.followers) == 0)
    writer.close()


async def test_followers_are_bounded_and_leave(
    server: HttpServer, transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One too many is refused; the place of one that left is free."""
    monkeypatch.setattr(http_server, "MAX_FOLLOWERS", 1)
    monkeypatch.setattr(followers_module, "KEEP_ALIVE_S", 0.01)
    async with transport.subscribe():
        with pytest.raises(TransportError, match="HTTP 429"):
            async with transport.subscribe():
                pytest.fail("it stands")
    await until(lambda: len(server.followers) == 0)
    async with transport.subscribe():
        pass


async def test_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without even keep-alives ends, as one does whose network is gone."""
    monkeypatch.setattr(http_transport, "_SILENCE_S", 0.05)
    released = asyncio.Event()

    async def hang(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": FRAMES_TYPE})
        await response.prepare(http)
        await response.write(KEEP_ALIVE)
        await released.wait()
        return response

    async with stub(("GET", EVENTS_PATH, hang)) as transport:
        async with transport.subscribe() as stream:
            with pytest.raises(TransportError, match="SocketTimeoutError"):
                await following(stream, 1)
        released.set()


async def test_a_quiet_stream_has_keep_alives(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty frames: one at once, then whenever nothing was sent for a while."""
    monkeypatch.setattr(followers_module, "KEEP_ALIVE_S", 0.01)
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as follower,
        follower.get(EVENTS_PATH, timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as response,
    ):
        assert await response.content.readexactly(5 * len(KEEP_ALIVE)) == 5 * KEEP_ALIVE


async def test_what_is_no_message_is_skipped_and_counted() -> None:
    """One of another version in between does not end the stream."""
    good = encode(Update(ONE, 1))
    body = KEEP_ALIVE + frame(b"\x91\x07") + frame(good)
    async with stub(
        ("GET", EVENTS_PATH, answering(body)), ("GET", SHARES_PATH, answering(body))
    ) as transport:
        async with transport.subscribe() as stream:
            assert [update.sequence for update in await following(stream, 1)] == [1]
        assert [update.sequence for update in await transport.snapshot()] == [1]
        assert transport.refused == 2


@pytest.mark.parametrize(
    "bad",
    [
        b"\x91\x07",
        b"junk",
        b"\xc1",
        b"\x9a" * 3000,
        bytes(MAX_MESSAGE_BYTES + 1),
        encode(Update(ONE, 1)).replace(b"gw1", b"g w"),
        encode(Update(ONE, 1)).replace(b"\x01\xa7", b"\x02\xa7", 1),
    ],
    ids=["version", "junk", "never_used", "deep", "huge", "name", "later_version"],
)
async def test_a_share_that_is_none_does_not_spoil_a_snapshot(bad: bytes) -> None:
    """It is left out and counted, whatever its size; those before and behind it count."""
    body = frame(encode(Update(ONE, 1))) + frame(bad) + frame(encode(Update(ONE, 2)))
    async with stub(("GET", SHARES_PATH, answering(body))) as transport:
        assert [update.sequence for update in await transport.snapshot()] == [1, 2]
        assert transport.refused == 1


@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (200, "text/html", b"<html>"),
        (200, FRAMES_TYPE, b"\xff\xff\xff\xff"),
        (302, FRAMES_TYPE, b""),
        (404, "application/json", b"{}"),
        (500, "text/plain", b""),
    ],
)
async def test_a_service_that_is_none_is_an_error(status: int, content_type: str, body: bytes) -> None:
    """Whatever it answers."""
    handler = answering(body, status, content_type)
    async with stub(*((method, path, handler) for method, path in CALLS)) as transport:
        with pytest.raises(TransportError):
            async with transport.subscribe() as stream:
                await following(stream, 1)
        with pytest.raises(TransportError):
            await transport.reserve(Update(ONE, 1), [Reservation((candidate(A),))])
        if status != 200 or content_type == FRAMES_TYPE:
            with pytest.raises(TransportError):
                await transport.snapshot()


CALLS = [("GET", SHARES_PATH), ("POST", SHARES_PATH), ("POST", RESERVE_PATH), ("GET", EVENTS_PATH)]


@pytest.mark.parametrize(
    "data",
    [None, [], [{"index": 1, "totals": [0]}], [{"index": 0, "totals": []}], [{"index": -1, "totals": [0]}]],
)
async def test_places_that_were_not_asked_for_are_an_error(data: object) -> None:
    """A decision never uses a row it does not have."""
    body = orjson.dumps({"status": "OK", "error": None, "data": data, "trace_id": "t"})
    async with stub(("POST", RESERVE_PATH, answering(body))) as transport:
        with pytest.raises(TransportError, match="places"):
            await transport.reserve(Update(ONE, 1), [Reservation((candidate(A),))])


async def test_an_answer_too_large_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not held in memory."""
    monkeypatch.setattr(http_transport, "MAX_SNAPSHOT_BYTES", 1_000)
    body = frame(encode(Update(ONE, 1, blocks=(Chain.of(A, list(range(500))),))))
    async with stub(("GET", SHARES_PATH, answering(body))) as transport:
        with pytest.raises(TransportError, match="over 1000 bytes"):
            await transport.snapshot()


async def test_a_call_takes_no_longer_than_its_timeout() -> None:
    """Connected or not."""
    released = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.Response()

    async with stub(*((method, path, hang) for method, path in CALLS)) as good:
        transport = HttpTransport(good._url, timeout_s=0.05)
        for call in (transport.publish(Update(ONE, 1)), transport.snapshot()):
            with pytest.raises(TransportError, match="TimeoutError"):
                await call
        with pytest.raises(TransportError, match="TimeoutError"):
            async with transport.subscribe():
                pytest.fail("it stands")
        await transport.close()
        released.set()


async def test_the_token_opens_the_service_and_is_never_shown() -> None:
    """Without it, or with another, members are refused."""
    server = HttpServer(Limits(), token="secret-1")
    await server.start("127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.port}"
    for token in (None, "secret-2"):
        transport = HttpTransport(url, token=token)
        with pytest.raises(TransportError, match="HTTP 401") as caught:
            await transport.publish(Update(ONE, 1))
        assert "secret" not in str(caught.value)
        with pytest.raises(TransportError, match="HTTP 401"):
            async with transport.subscribe():
                pytest.fail("it stands")
        await transport.close()
    transport = HttpTransport(url, token="secret-1")
    async with transport.subscribe() as stream:
        await transport.publish(Update(ONE, 1))
        await following(stream, 1)
    await transport.close()
    await server.stop()


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8080", "ftp://x", "http://", "http://user:pw@host:1", "http://x:0", "http://x:y"),
        *("http://x:1?a=b", "http://x:1#f", "http://[::1"),
    ],
)
def test_a_url_that_will_not_do_is_refused(url: str) -> None:
    """Without being quoted: it may hold a password."""
    with pytest.raises(TransportError, match="should be http://host:port") as caught:
        HttpTransport(url)
    assert "pw" not in str(caught.value)


async def test_calls_share_connections(server: HttpServer, transport: HttpTransport) -> None:
    """A hundred updates one after the other take one."""
    for sequence in range(1, 101):
        await transport.publish(Update(ONE, sequence))
    assert transport._session is not None
    connector = transport._session.connector
    assert isinstance(connector, aiohttp.TCPConnector)
    assert sum(map(len, connector._conns.values())) == 1


async def test_a_refused_update_reaches_no_follower(server: HttpServer, transport: HttpTransport) -> None:
    """Bytes that are none, and a member that calls itself the service's own, are 400."""
    url = f"http://127.0.0.1:{server.port}"
    headers = {"Content-Type": MESSAGE_TYPE}
    bodies = [b"", b"x", encode(Update(member_id("aigw-clients", 0, "x"), 1))]
    reserves = [
        b"",
        frame(b"x"),
        frame(encode(Update(ONE, 1))),
        frame(encode(Update(ONE, 1))) + b"\x90",
        encode_reserve(Update(ONE, 1, leaving=True), [Reservation((candidate(A),))]),
        encode_reserve(Update(ONE, 1), [Reservation((candidate(A), candidate(A)))]),
    ]
    async with aiohttp.ClientSession(url, headers=headers) as caller, transport.subscribe() as stream:
        for path, body in [*((SHARES_PATH, b) for b in bodies), *((RESERVE_PATH, b) for b in reserves)]:
            async with caller.post(path, data=body) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (400, 40001400)
        await transport.publish(Update(ONE, 1))
        assert [update.member for update in await following(stream, 1)] == [ONE]
