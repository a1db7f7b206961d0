"""Gateways that share their load through a real Redis, while things break."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.sharing.messages import Candidate, Reservation, Reserved, Row, Update, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.store_watch import EMPTIED_S
from metadata_center.sharing.sync import Sync, SyncSettings
from metadata_center.sharing.transport import TransportError
from metadata_center.types import Charge, EndpointKey, RequestId
from testbed.redis_server import RedisServer, running
from tests.contract.stores import DEADLINE_S, Pair, joined
from tests.waiting import until

A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")
BOTH = (A, B)
PATIENT = SyncSettings(timeout_s=1.0, reserve_timeout_s=DEADLINE_S, backoff_s=0.2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """One for each test: most of them break it."""
    with running(tmp_path) as server:
        yield server


@asynccontextmanager
async def gateways(server: RedisServer) -> AsyncIterator[Pair]:
    """Two gateways that meet there."""
    transports = [RedisTransport(parse_url(server.url)) for _ in range(2)]
    async with joined(*transports, settings=PATIENT) as pair:
        for store in pair.stores:
            store.load.retain(frozenset(BOTH))
        yield pair


def charge(pair: Pair, index: int, request_id: str, endpoint: EndpointKey) -> None:
    """A decision of one of them."""
    assert pair.stores[index].load.charge(
        Charge(RequestId(request_id), endpoint, 10, 20), time.monotonic(), None
    )


def release_all(pair: Pair, *request_ids: str) -> None:
    """The end of these requests, whichever member decided them."""
    for request_id in request_ids:
        for store in pair.stores:
            store.load.release(RequestId(request_id), time.monotonic())


def _reconnected(sync: Sync, before: int) -> bool:
    return sync.stats.reconnects > before


def _failed(sync: Sync, count: int) -> bool:
    return sync.stats.failures >= count


def _is_unwritable(sync: Sync) -> bool:
    return not sync.stats.writable


def _is_connected(sync: Sync) -> bool:
    return sync.stats.connected


def views(pair: Pair) -> list[list[int]]:
    """Requests on A and B as each of them counts."""
    found = []
    for store in pair.stores:
        store.load.advance(time.monotonic())
        found.append(list(store.load.view(store.load.slots(BOTH)).requests))
    return found


async def test_redis_restarted_with_empty_data(server: RedisServer) -> None:
    """Deciding goes on without it; when it is back every view is exact again, also of what came between."""
    async with gateways(server) as pair:
        charge(pair, 0, "1", A)
        await pair.settled(BOTH, [1, 0])
        server.kill()
        charge(pair, 0, "2", B)
        charge(pair, 1, "3", B)
        await until(lambda: all(sync.stats.failures > 1 for sync in pair.syncs))
        assert not any(sync.stats.connected for sync in pair.syncs)
        release_all(pair, "1")
        server.start()
        await pair.settled(BOTH, [0, 2])
        release_all(pair, "2", "3")
        await pair.settled(BOTH, [0, 0])
        assert all(sync.stats.reconnects >= 1 for sync in pair.syncs)


async def test_redis_that_loses_its_data_is_told_all_at_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With the next message of whatever, not with a heartbeat; and it is said, once."""
    transport = RedisTransport(parse_url(server.url))
    store = SharedStore(member_id("one", 0, "x"), Counters(), PrefixIndex(9, 9), share_lease_s=3000.0)
    sync = Sync(store, transport, time.monotonic, random.Random(1), PATIENT)
    sync.start()
    share = "{tokenway}:share:" + store.member
    store.load.charge(Charge(RequestId("1"), A, 1, 1), 0.0, None)
    await until(lambda: A.encode() in server.command("HKEYS", share))
    assert sync.store_status(time.monotonic()).reason is None
    for name in "23":
        server.command("FLUSHALL")
        store.load.charge(Charge(RequestId(name), B, 1, 1), 0.0, None)
        await until(lambda: B.encode() in server.command("HKEYS", share))
        if name == "2":
            await until(lambda: A.encode() in server.command("HKEYS", share))
    await until(lambda: sync.stats.emptied == 2)
    assert sync.stats.reconnects == 0
    status = sync.store_status(time.monotonic())
    assert status.state == "emptied"
    assert sync.store_status(time.monotonic() + EMPTIED_S).reason is None
    await sync.stop()
    assert [record.message for record in caplog.records].count("the metadata center has lost its data") == 1


async def test_redis_that_hangs(server: RedisServer) -> None:
    """A hanging server delays no request; shares end with their leases, and are back after it wakes up."""
    async with gateways(server) as pair:
        charge(pair, 0, "1", A)
        charge(pair, 1, "2", B)
        await pair.settled(BOTH, [1, 1])
        server.pause()
        charge(pair, 0, "3", A)
        await until(lambda: views(pair) == [[2, 0], [0, 1]])
        server.resume()
        await pair.settled(BOTH, [2, 1])
        release_all(pair, "1", "2", "3")
        await pair.settled(BOTH, [0, 0])


async def test_a_killed_gateway_is_forgotten_by_everybody(server: RedisServer) -> None:
    """Its load leaves the others' views and Redis within its lease, and no key stays."""
    async with gateways(server) as pair:
        doomed = SharedStore(member_id("doomed", 0, "x"), Counters(), PrefixIndex(9, 9), share_lease_s=0.5)
        doomed.load.charge(Charge(RequestId("9"), A, 1, 1), 0.0, None)
        outgoing = doomed.outgoing(0.0)
        assert outgoing is not None
        transport = RedisTransport(parse_url(server.url))
        await transport.publish(outgoing.update)
        await transport.close()
        for store in pair.stores:
            assert isinstance(store, SharedStore)
            await until(partial(store.peers._members.__contains__, doomed.member))
        await until(lambda: views(pair) == [[0, 0], [0, 0]])
        await until(lambda: b"doomed" not in server.command("KEYS", "*"))
        await until(lambda: b"doomed" not in server.command("ZRANGE", "{tokenway}:members", "0", "-1"))


async def test_a_gateway_that_stops_says_goodbye(server: RedisServer) -> None:
    """Its share is gone at once, not with its lease."""
    async with gateways(server) as pair:
        transport = RedisTransport(parse_url(server.url))
        store = SharedStore(member_id("third", 0, "x"), Counters(), PrefixIndex(9, 9), share_lease_s=3000.0)
        sync = Sync(store, transport, time.monotonic, random.Random(1))
        sync.start()
        store.load.charge(Charge(RequestId("9"), A, 1, 1), 0.0, None)
        await pair.settled(BOTH, [1, 0])
        await sync.stop()
        await pair.settled(BOTH, [0, 0])
        assert b"third" not in server.command("KEYS", "*")


async def test_connections_cut_by_the_server_are_made_again(server: RedisServer) -> None:
    """What was said meanwhile is caught up with."""
    async with gateways(server) as pair:
        for round_ in range(3):
            before = [sync.stats.reconnects for sync in pair.syncs]
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
            server.command("CLIENT", "KILL", "TYPE", "normal")
            charge(pair, 0, f"{round_}", A)
            charge(pair, 1, f"{round_} too", B)
            await pair.settled(BOTH, [round_ + 1, round_ + 1])
            for sync, count in zip(pair.syncs, before, strict=True):
                await until(partial(_reconnected, sync, count))
        release_all(pair, *(f"{round_}{too}" for round_ in range(3) for too in ("", " too")))
        await pair.settled(BOTH, [0, 0])


async def test_a_gateway_that_loses_its_rights_catches_up(server: RedisServer) -> None:
    """Refused everywhere it goes on by itself; allowed again it knows what it missed."""
    async with gateways(server) as pair:
        before = pair.syncs[0].stats.reconnects
        server.command("ACL", "SETUSER", "default", "resetchannels")  # kills subscribers, refuses new ones
        charge(pair, 1, "1", B)
        await until(lambda: views(pair)[0] == [0, 0] and not pair.syncs[0].stats.connected)
        server.command("ACL", "SETUSER", "default", "allchannels")
        await pair.settled(BOTH, [0, 1])
        assert pair.syncs[0].stats.reconnects > before


UNWRITABLE = {
    "replica": (["REPLICAOF 127.0.0.1 1"], ["REPLICAOF NO ONE"]),
    "rights": (["ACL SETUSER default -hset"], ["ACL SETUSER default +hset"]),
    "no_publish": (["ACL SETUSER default -publish"], ["ACL SETUSER default +publish"]),
    "disk": (
        ["CONFIG SET save 3600 1000000", "CONFIG SET dir FOLDER/gone", "RMDIR", "BGSAVE"],
        ["CONFIG SET stop-writes-on-bgsave-error no"],
    ),
    "replicas": (["CONFIG SET min-replicas-to-write 1"], ["CONFIG SET min-replicas-to-write 0"]),
}
"""What makes a server that can be read and not written, and what ends it: it follows a master that is away,
its user may not write or not publish, it cannot save, or it has too few replicas."""


def run_commands(server: RedisServer, folder: Path, commands: Sequence[str]) -> None:
    """Send these."""
    for command in commands:
        if command == "RMDIR":
            (folder / "gone").rmdir()
            continue
        words = command.replace("FOLDER", str(folder)).split(" ")
        if words[:3] == ["CONFIG", "SET", "save"]:
            words[3:] = [" ".join(words[3:])]
        assert not server.command(*words).startswith(b"-ERR")


@pytest.mark.parametrize("kind", UNWRITABLE)
async def test_redis_that_can_be_read_and_not_written(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Decisions go on by the local ledger, each reason is one line; then all is exact again."""
    begin, end = UNWRITABLE[kind]
    (tmp_path / "gone").mkdir()
    caplog.set_level("INFO", "tokenway.sharing")
    async with gateways(server) as pair:
        charge(pair, 0, "1", A)
        await pair.settled(BOTH, [1, 0])
        await until(lambda: all(sync.stats.writable for sync in pair.syncs))
        caplog.clear()
        failures = [sync.stats.failures for sync in pair.syncs]
        run_commands(server, tmp_path, begin)
        charge(pair, 0, "2", B)
        charge(pair, 1, "3", B)
        for sync, before in zip(pair.syncs, failures, strict=True):
            await until(partial(_failed, sync, before + 8))
            await until(partial(_is_unwritable, sync))
        candidates = [Candidate(A, 0, 10, 20)]
        charge(pair, 0, "4", A)
        assert await pair.syncs[0].reserve(RequestId("4"), candidates) is None
        assert not any(sync.stats.connected for sync in pair.syncs)
        lost = [record for record in caplog.records if record.message == "metadata center lost"]
        assert 2 <= len(lost) <= 4
        assert not [record for record in caplog.records if record.message == "metadata center joined"]
        run_commands(server, tmp_path, end)
        await pair.settled(BOTH, [2, 2])
        assert all(sync.stats.writable and sync.stats.connected for sync in pair.syncs)
        joined_again = [record for record in caplog.records if record.message == "metadata center joined"]
        assert len(joined_again) == 2
        release_all(pair, "1", "2", "3", "4")
        await pair.settled(BOTH, [0, 0])


async def test_redis_without_memory(server: RedisServer) -> None:
    """Above its limit and with nothing to evict it either takes our few bytes or heals when it has memory."""
    async with gateways(server) as pair:
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        server.command("CONFIG", "SET", "maxmemory", "1")
        for number in range(5):
            charge(pair, 0, str(number), A)
        await asyncio.sleep(0.2)
        server.command("CONFIG", "SET", "maxmemory", "0")
        await pair.settled(BOTH, [5, 0])
        release_all(pair, *map(str, range(5)))
        await pair.settled(BOTH, [0, 0])


async def test_a_password_that_changes_later(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A member cut off and refused is one line, not one each attempt; the old password again heals it."""
    async with gateways(server) as pair:
        charge(pair, 0, "1", A)
        await pair.settled(BOTH, [1, 0])
        caplog.clear()
        failures = [sync.stats.failures for sync in pair.syncs]
        server.command("ACL", "SETUSER", "default", "resetpass", ">another")
        with socket.create_connection(("127.0.0.1", server.port), 5.0) as connection:
            connection.sendall(b"AUTH another\r\nCLIENT KILL TYPE pubsub\r\nCLIENT KILL TYPE normal\r\n")
            connection.recv(1024)
            charge(pair, 1, "2", B)
            for sync, before in zip(pair.syncs, failures, strict=True):
                await until(partial(_failed, sync, before + 6))
            lost = [record for record in caplog.records if record.message == "metadata center lost"]
            assert 2 <= len(lost) <= 6
            assert "another" not in caplog.text
            connection.sendall(b"ACL SETUSER default nopass\r\n")
            await pair.settled(BOTH, [1, 1])
        release_all(pair, "1", "2")
        await pair.settled(BOTH, [0, 0])


async def test_reservations_while_redis_is_away(server: RedisServer) -> None:
    """They stay where they were charged, counted; afterwards they are counted everywhere, once."""
    async with gateways(server) as pair:
        server.kill()
        await until(lambda: not any(sync.stats.connected for sync in pair.syncs))
        candidates = [Candidate(A, 0, 10, 20), Candidate(B, 0, 10, 20)]
        for number in range(20):
            charge(pair, 0, str(number), A)
            assert await pair.syncs[0].reserve(RequestId(str(number)), candidates) is None
        assert pair.syncs[0].stats.reserve_timeouts == 20
        server.start()
        await pair.settled(BOTH, [20, 0])
        release_all(pair, *map(str, range(20)))
        await pair.settled(BOTH, [0, 0])


async def test_a_burst_of_reservations_is_counted_where_it_was_placed(server: RedisServer) -> None:
    """Two gateways that each place 32 requests at once: every view has each one where its decision put it."""
    async with gateways(server) as pair:
        places: list[EndpointKey] = []

        async def decide(index: int, number: int) -> None:
            store, name = pair.stores[index], RequestId(f"{index}-{number}")
            believed = store.load.view(store.load.slots(BOTH)).requests
            order = sorted((0, 1), key=lambda row: believed[row])
            charge(pair, index, name, BOTH[order[0]])
            candidates = [Candidate(BOTH[row], believed[row], 10, 20) for row in order]
            place = await pair.syncs[index].reserve(name, candidates)
            assert place is not None
            places.append(place)

        await asyncio.gather(*(decide(index, number) for index in (0, 1) for number in range(32)))
        await pair.settled(BOTH, [places.count(A), places.count(B)])
        assert len(places) == 64
        assert sum(sync.stats.reserved for sync in pair.syncs) == 64
        release_all(pair, *(f"{who}-{number}" for who in (0, 1) for number in range(32)))
        await pair.settled(BOTH, [0, 0])


class _Stub:
    """A transport whose every answer the test decides."""

    def __init__(self) -> None:
        self.refused = 0
        self.had_share = True
        self.answers: asyncio.Queue[list[Reserved] | Exception] = asyncio.Queue()
        self.heard: asyncio.Queue[Update | Exception] = asyncio.Queue()
        self.published: list[Update] = []

    async def publish(self, update: Update) -> None:
        """Accept, and let the member hear itself."""
        self.published.append(update)
        self.heard.put_nowait(update)

    async def reserve(self, update: Update, reservations: Sequence[Reservation]) -> list[Reserved]:
        """What the test says."""
        self.published.append(update)
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def snapshot(self) -> list[Update]:
        """No server is there."""
        return []

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[AsyncIterator[Update]]:
        """What is put into `heard`."""

        async def messages() -> AsyncIterator[Update]:
            while True:
                item = await self.heard.get()
                if isinstance(item, Exception):
                    raise item
                yield item

        yield messages()

    async def close(self) -> None:
        """Nothing is open."""


@asynccontextmanager
async def stubbed(
    settings: SyncSettings, lease_s: float = 60.0
) -> AsyncIterator[tuple[SharedStore, Sync, _Stub]]:
    """A member on a stub, connected."""
    stub = _Stub()
    store = SharedStore(member_id("gw", 0, "x"), Counters(), PrefixIndex(9, 9), share_lease_s=lease_s)
    sync = Sync(store, stub, time.monotonic, random.Random(1), settings)
    sync.start()
    await until(lambda: sync.stats.connected)
    await until(lambda: bool(stub.published))
    yield store, sync, stub
    await sync.stop()
    assert stub.published[-1].leaving


@pytest.mark.parametrize(
    "answer", [TransportError("no"), [], [Reserved(0, (0,))] * 2], ids=["error", "short", "long"]
)
async def test_an_answer_that_is_none_leaves_the_charge_local(answer: list[Reserved] | Exception) -> None:
    """A failed reservation is said again as a plain row of a full update."""
    async with stubbed(PATIENT) as (store, sync, stub):
        store.load.charge(Charge(RequestId("1"), A, 10, 20), 0.0, None)
        stub.answers.put_nowait(answer)
        assert await sync.reserve(RequestId("1"), [Candidate(A, 0, 10, 20)]) is None
        await until(lambda: stub.published[-1].rows == (Row(A, 1, 1, 10, 20),))
        assert stub.published[-1].full
        assert sync.stats.reserve_timeouts == sync.stats.failures == 1


async def test_a_reservation_waits_no_longer_than_its_bound() -> None:
    """And while that answer is still out, others do not wait at all."""
    settings = SyncSettings(timeout_s=DEADLINE_S, reserve_timeout_s=0.01)
    async with stubbed(settings) as (store, sync, stub):
        for name in "12":
            store.load.charge(Charge(RequestId(name), A, 10, 20), 0.0, None)
            assert (
                await sync.reserve(RequestId(name), [Candidate(A, 0, 10, 20), Candidate(B, 0, 1, 1)]) is None
            )
        assert len(stub.published) == 2
        stub.answers.put_nowait([Reserved(1, (1, 0))])
        await until(lambda: len(stub.published) == 3)
        assert set(stub.published[2].rows) == {Row(A, 2, 2, 20, 40), Row(B)}


async def test_a_member_that_does_not_hear_itself_reconnects() -> None:
    """A lease without its own echo means that the subscription is dead."""
    async with stubbed(SyncSettings(backoff_s=0.05), lease_s=0.3) as (_, sync, stub):
        stub.heard = asyncio.Queue()  # the subscription that stands goes on listening to the old one
        await until(lambda: sync.stats.reconnects >= 1)
        assert sync.stats.failures >= 1


async def test_a_stop_that_meets_a_fault_is_still_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks as it is cancelled: the error is raised, the cancellation is not."""
    async with stubbed(PATIENT) as (store, sync, stub):
        under_way = asyncio.Event()

        async def publish(update: Update) -> None:
            stub.published.append(update)
            if update.leaving:
                return
            under_way.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise TransportError("it broke") from None

        monkeypatch.setattr(stub, "publish", publish)
        store.load.charge(Charge(RequestId("1"), A, 10, 20), 0.0, None)
        await under_way.wait()
        async with asyncio.timeout(DEADLINE_S):
            await sync.stop()


async def test_a_fault_of_ours_does_not_end_the_sharing() -> None:
    """An unexpected exception is logged, and the member comes back."""
    async with stubbed(SyncSettings(backoff_s=0.05)) as (_, sync, stub):
        stub.heard.put_nowait(ZeroDivisionError())
        await until(lambda: sync.stats.reconnects == 1)
        assert sync.stats.connected


async def test_stopping_under_traffic_ends(server: RedisServer) -> None:
    """A stop that meets the end of a send is still a stop, however often it is tried."""
    for attempt in range(30):
        store = SharedStore(member_id("third", 0, f"x{attempt}"), Counters(), PrefixIndex(9, 9))
        sync = Sync(store, RedisTransport(parse_url(server.url)), time.monotonic, random.Random(attempt))
        sync.start()
        await until(partial(_is_connected, sync))
        for number in range(attempt % 7 + 1):
            store.load.charge(Charge(RequestId(f"{number}"), A, 1, 1), time.monotonic(), None)
            await asyncio.sleep(0)
        async with asyncio.timeout(20.0):
            await sync.stop()
