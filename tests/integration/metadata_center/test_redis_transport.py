"""Messages through a real redis-server, Sentinel and Cluster, and what becomes of them when it misbehaves."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio.connection import Connection

from metadata_center.service.reservations import reserve
from metadata_center.sharing import redis_transport
from metadata_center.sharing.messages import (
    MAX_SHARED_BLOCKS,
    Candidate,
    Chain,
    MemberId,
    Reservation,
    Reserved,
    Row,
    Update,
    member_id,
)
from metadata_center.sharing.peers import Peers
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import UrlError, parse_url
from metadata_center.sharing.transport import TransportError
from metadata_center.types import EndpointKey
from testbed.redis_server import RedisServer, free_port, running
from tests.waiting import until

A, B, C = (EndpointKey(f"10.0.0.{host}:8000") for host in (1, 2, 3))
ONE, TWO = member_id("gw1", 0, "x"), member_id("gw2", 0, "x")
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for the tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def transport(server: RedisServer) -> AsyncIterator[RedisTransport]:
    """A way to it, over an empty database."""
    server.command("FLUSHALL")
    async with connected(server.url) as transport:
        yield transport


@asynccontextmanager
async def connected(url: str, **options: str) -> AsyncIterator[RedisTransport]:
    """A transport for the length of a block."""
    prefix = options.pop("prefix", "tokenway")
    transport = RedisTransport(parse_url(url, **options), prefix=prefix)
    try:
        yield transport
    finally:
        await transport.close()


async def totals(transport: RedisTransport) -> dict[EndpointKey, int]:
    """Requests per endpoint, by a snapshot."""
    peers = Peers()
    for update in await transport.snapshot():
        peers.apply(update, 0.0)
    return {key: total[0] for key, total in peers.totals.items()}


def update(
    sequence: int,
    *rows: Row,
    member: MemberId = ONE,
    full: bool = False,
    lease_s: float = 60.0,
    leaving: bool = False,
) -> Update:
    """An update without blocks."""
    return Update(member, sequence, rows, full, lease_s, (), leaving)


async def test_what_is_published_is_heard_by_all_and_kept(transport: RedisTransport) -> None:
    """Every subscriber, the sender included, gets the message; the snapshot has the share."""
    chain = Chain.of(A, [1, 2**64 - 1])
    message = Update(ONE, 1, (Row(A, 1, 2, 3, 4, 2**53 - 1),), True, 60.0, (chain,))
    async with transport.subscribe() as one, transport.subscribe() as two, asyncio.timeout(DEADLINE_S):
        await transport.publish(message)
        assert await anext(one) == await anext(two) == message
    (kept,) = await transport.snapshot()
    assert (kept.member, kept.sequence, kept.rows, kept.full) == (ONE, 1, message.rows, True)
    assert 0 < kept.lease_s <= 60.0


async def test_the_largest_message_passes(transport: RedisTransport) -> None:
    """All endpoints and all blocks in one message."""
    rows = [Row(EndpointKey(f"10.{n // 250}.{n % 250}.1:8000"), n, n, n, n, n) for n in range(4096)]
    blocks = (Chain.of(A, list(range(MAX_SHARED_BLOCKS))),)
    message = Update(ONE, 1, tuple(rows), True, 60.0, blocks)
    async with transport.subscribe() as messages, asyncio.timeout(DEADLINE_S):
        await transport.publish(message)
        assert await anext(messages) == message
    assert len((await transport.snapshot())[0].rows) == 4096


async def test_a_share_ends_with_its_lease_or_its_member(
    transport: RedisTransport, server: RedisServer
) -> None:
    """A killed member's share is gone when its lease is over; one that leaves takes it along."""
    await transport.publish(update(1, Row(A, 1), full=True, lease_s=0.05))
    await transport.publish(update(1, Row(A, 2), member=TWO, full=True))
    async with asyncio.timeout(DEADLINE_S):
        while await totals(transport) != {A: 2}:
            pass
    await transport.publish(update(2, member=TWO, leaving=True))
    assert await totals(transport) == {}
    await transport.publish(update(1, Row(A, 1), member=TWO, full=True))
    async with asyncio.timeout(DEADLINE_S):
        while server.command("KEYS", "*") != b"*0\r\n":  # the set may outlive the share by a millisecond
            await transport.publish(update(2, member=TWO, leaving=True))


_SET_BACK = """
for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local sign = name == '@clock' and -1 or 1
  redis.call('ZINCRBY', KEYS[1], sign * ARGV[2], name)
  local left_ms = redis.call('PTTL', ARGV[1] .. name)
  if left_ms > 0 then redis.call('PEXPIRE', ARGV[1] .. name, left_ms + ARGV[2]) end
end
"""
"""All times that Redis keeps are later by so many milliseconds, as its clock sees them that was set back."""


@pytest.mark.parametrize("seen_by", ["reservations", "snapshots"])
async def test_a_dead_member_counts_no_longer_for_a_clock_that_is_set_back(
    transport: RedisTransport, server: RedisServer, seen_by: str
) -> None:
    """By an hour: its share ends with its lease, and one that lives keeps its own."""
    dies = update(1, Row(A, 5), member=TWO, full=True, lease_s=0.2)
    await transport.publish(update(1, Row(A, 1), full=True))
    await transport.publish(dies)
    server.command("EVAL", _SET_BACK, "1", "{tokenway}:members", "{tokenway}:share:", str(3_600_000))

    async def seen() -> int:
        sequence = next(sequences)
        if seen_by == "snapshots":
            await transport.publish(update(sequence, Row(A, 1)))
            return (await totals(transport))[A]
        (place,) = await transport.reserve(
            update(sequence, Row(A, 1)), [Reservation((Candidate(A, 0, 1, 1),))]
        )
        return place.totals[0]

    sequences = itertools.count(2)
    assert await seen() == 6
    async with asyncio.timeout(DEADLINE_S):
        while await seen() != 1:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.02)
    leases_s = {one.member: one.lease_s for one in await transport.snapshot()}
    assert leases_s.keys() == {ONE}
    assert 30.0 < leases_s[ONE] <= 60.0


async def test_a_clock_that_goes_on_moves_no_lease(transport: RedisTransport) -> None:
    """Each end of a lease is as it was said last."""
    await transport.publish(update(1, Row(A, 1), full=True, lease_s=1000.0))
    for sequence in range(2, 50):
        await transport.publish(update(sequence, member=TWO, full=True))
    leases_s = {one.member: one.lease_s for one in await transport.snapshot()}
    assert leases_s[ONE] > 900.0
    assert 30.0 < leases_s[TWO] <= 60.0


@pytest.mark.parametrize("seed", range(8))
async def test_redis_keeps_what_the_model_keeps(transport: RedisTransport, seed: int) -> None:
    """Random updates and reservations, out of order and repeated, give what the service gives."""
    rng = random.Random(seed)
    model = Peers()
    said: list[Update] = []
    for sequence in range(1, 60):
        member = rng.choice([ONE, TWO])
        keys = rng.sample([A, B, C], rng.randint(0, 3))
        message = update(
            sequence,
            *(Row(key, *(rng.randint(0, 9) for _ in range(5))) for key in keys),
            member=member,
            full=rng.random() < 0.2,
        )
        said.append(message)
        if rng.random() < 0.5:
            message = rng.choice(said)
        # A member reserves in order: only its newest message carries reservations.
        newest = message is said[-1] and all(one.member != member for one in said[sequence:])
        if newest and rng.random() < 0.4:
            asked = [
                Reservation(
                    tuple(
                        Candidate(key, rng.randint(0, 12), rng.randint(0, 99), rng.randint(0, 99))
                        for key in rng.sample([A, B, C], rng.randint(1, 3))
                    )
                )
                for _ in range(rng.randint(1, 4))
            ]
            places, _ = reserve(model, message, asked, {}, 0.0)
            assert await transport.reserve(message, asked) == places
        else:
            model.apply(message, 0.0)
            await transport.publish(message)
        kept = Peers()
        for one in await transport.snapshot():
            kept.apply(one, 0.0)
        assert kept.totals == model.totals, sequence


async def test_a_reservation_takes_the_first_that_is_as_believed(transport: RedisTransport) -> None:
    """Else the one that exceeds least; each sees those before; subscribers get the rows so charged."""
    await transport.publish(update(1, Row(A, 5, 1, 1, 1, 1), Row(B, 3), member=TWO, full=True))
    async with transport.subscribe() as messages, asyncio.timeout(DEADLINE_S):
        asked = [
            Reservation((Candidate(A, 4, 10, 20), Candidate(B, 3, 5, 20))),
            Reservation((Candidate(A, 4, 10, 20), Candidate(B, 2, 5, 20))),
            Reservation((Candidate(C, 0, 1, 2),)),
        ]
        reserved = await transport.reserve(update(1, Row(A, 1, 1, 7, 7, 7), full=True), asked)
        assert reserved == [Reserved(1, (6, 3)), Reserved(0, (6, 4)), Reserved(0, (0,))]
        message = await anext(messages)
    assert (message.member, message.sequence, message.full) == (ONE, 1, True)
    assert set(message.rows) == {Row(A, 2, 2, 17, 27, 7), Row(B, 1, 1, 5, 20, 0), Row(C, 1, 1, 1, 2, 0)}
    assert await totals(transport) == {A: 7, B: 4, C: 1}


async def test_scripts_that_were_flushed_are_sent_again(
    transport: RedisTransport, server: RedisServer
) -> None:
    """No caller notices."""
    await transport.publish(update(1, Row(A, 1), full=True))
    server.command("SCRIPT", "FLUSH")
    await transport.publish(update(2, Row(A, 2)))
    server.command("SCRIPT", "FLUSH")
    assert await totals(transport) == {A: 2}


async def test_prefixes_do_not_meet(transport: RedisTransport, server: RedisServer) -> None:
    """Neither shares nor messages of one prefix are seen under another."""
    async with connected(server.url, prefix="other") as other, other.subscribe() as messages:
        await transport.publish(update(1, Row(A, 1), full=True))
        await other.publish(update(1, Row(B, 2), full=True))
        async with asyncio.timeout(DEADLINE_S):
            assert (await anext(messages)).rows == (Row(B, 2),)
        assert (await totals(transport), await totals(other)) == ({A: 1}, {B: 2})
    with pytest.raises(UrlError):
        RedisTransport(parse_url(server.url), prefix="{x}")


async def test_strangers_words_are_skipped(transport: RedisTransport, server: RedisServer) -> None:
    """Junk in the channel is counted and skipped."""
    async with transport.subscribe() as messages, asyncio.timeout(DEADLINE_S):
        server.command("PUBLISH", "{tokenway}:updates", "junk")
        await transport.publish(update(1, Row(A, 1), full=True))
        assert (await anext(messages)).sequence == 1
    assert transport.refused == 1


BAD = MemberId("other/0/b")


def write_share(server: RedisServer, *fields: str, member: str = BAD) -> None:
    """A live share as another program wrote it."""
    server.command("ZADD", "{tokenway}:members", "99999999999999", member)
    server.command("HSET", f"{{tokenway}}:share:{member}", *fields)
    server.command("PEXPIRE", f"{{tokenway}}:share:{member}", "600000")


@pytest.mark.parametrize(
    "fields",
    [
        (B, "junk"),
        (B, ""),
        (B, "1 2 3"),
        (B, "9 -1 0 0 0 0"),
        (B, "9 1.5 0 0 0 0"),
        (B, "9 9007199254740992 0 0 0 0"),
        (B, f"{'9' * 5000} 0 0 0 0 0"),
        (B, f"9 {'9' * 30} 0 0 0 0"),
        (B, f"{'9' * 30} 1 0 0 0 0"),
        ("@full", "9" * 30, B, "1 1 1 1 1 1"),
        (B, "9 " + "1 " * 200),
        (B, "nan inf 1 1 1 1"),
        ("", "1 1 1 1 1 1"),
        ("a key of words", "1 1 1 1 1 1"),
        ("\x00", "1 1 1 1 1 1"),
        ("k" * 5000, "1 1 1 1 1 1"),
        ("@full", "soon", B, "1 1 1 1 1 1"),
        ("@full", "-1", B, "1 1 1 1 1 1"),
        tuple(word for number in range(4200) for word in (f"10.9.0.{number}:1", "1 1 1 1 1 1")),
    ],
    ids=lambda fields: "_".join(fields)[:20],
)
async def test_a_share_of_another_form_keeps_no_member_out(
    transport: RedisTransport, server: RedisServer, fields: tuple[str, ...]
) -> None:
    """It is left out and counted; the others are seen, publish, and get their places."""
    await transport.publish(update(1, Row(A, 1), full=True))
    for start in range(0, len(fields), 1000):
        write_share(server, *fields[start : start + 1000])
    assert await totals(transport) == {A: 1}
    assert transport.refused == 1
    await transport.publish(update(2, Row(A, 2)))
    await transport.reserve(update(3), [Reservation((Candidate(A, 9, 1, 1), Candidate(B, 9, 1, 1)))])
    assert await totals(transport) == {A: 3}


@pytest.mark.parametrize("member", ["no-member", "a/b/c/d", "a/b/\n", "x" * 600, "a//c"])
async def test_a_share_of_no_member_is_left_out(
    transport: RedisTransport, server: RedisServer, member: str
) -> None:
    """A member's name of another form counts as a share of another form."""
    await transport.publish(update(1, Row(A, 1), full=True))
    write_share(server, B, "1 1 1 1 1 1", member=member)
    assert await totals(transport) == {A: 1}
    assert transport.refused == 1


async def test_keys_of_other_types_keep_no_member_out(transport: RedisTransport, server: RedisServer) -> None:
    """Where a share should be there is a text or a list."""
    await transport.publish(update(1, Row(A, 1), full=True))
    for member, command in (("a/0/a", ("SET", "text")), ("b/0/b", ("RPUSH", "item"))):
        key = f"{{tokenway}}:share:{member}"
        server.command("ZADD", "{tokenway}:members", "99999999999999", member)
        server.command(command[0], key, command[1])
        server.command("PEXPIRE", key, "600000")
    assert await totals(transport) == {A: 1}
    assert transport.refused == 2
    await transport.reserve(update(2), [Reservation((Candidate(A, 1, 1, 1),))])
    assert await totals(transport) == {A: 2}


@pytest.mark.parametrize(
    "damage",
    [
        [("DEL", "{tokenway}:members"), ("SET", "{tokenway}:members", "text")],
        [("DEL", f"{{tokenway}}:share:{ONE}"), ("SET", f"{{tokenway}}:share:{ONE}", "text")],
        [("HSET", f"{{tokenway}}:share:{ONE}", "@newest", "junk", "@full", "junk")],
        [("ZADD", "{tokenway}:members", "-inf", "a/0/a")],
        [("ZADD", "{tokenway}:members", "-99999999999999", "a/0/a")],
        [("ZADD", "{tokenway}:members", "-inf", "@clock")],
    ],
)
async def test_what_no_other_would_mend_is_written_over(
    transport: RedisTransport, server: RedisServer, damage: list[tuple[str, ...]]
) -> None:
    """Damage to what a member writes itself lasts until its next update; meanwhile nobody's call fails."""
    await transport.publish(update(1, Row(A, 1), full=True))
    for command in damage:
        server.command(*command)
    await transport.snapshot()
    await transport.publish(update(2, Row(A, 2), full=True))
    assert await totals(transport) == {A: 2}
    await transport.reserve(update(3), [Reservation((Candidate(A, 1, 1, 1),))])
    assert await totals(transport) == {A: 3}


async def test_a_share_of_a_later_version_is_read_as_far_as_it_is_known(
    transport: RedisTransport, server: RedisServer
) -> None:
    """Fields and numbers that it adds are left out."""
    write_share(server, "@newest", "7", "@full", "7", "@version", "two, perhaps", B, "7 3 0 0 0 0 99")
    assert await totals(transport) == {B: 3}
    assert transport.refused == 0


async def test_a_damaged_row_of_its_own_is_written_over(
    transport: RedisTransport, server: RedisServer
) -> None:
    """A member whose row was damaged makes it good with what it says next, late or not."""
    await transport.publish(update(5, Row(A, 1), full=True))
    server.command("HSET", f"{{tokenway}}:share:{ONE}", A, "junk")
    assert await totals(transport) == {}
    await transport.publish(update(4, Row(A, 9)))
    await transport.publish(update(6, Row(A, 2), full=True))
    assert await totals(transport) == {A: 2}


async def test_members_without_number_are_read_as_far_as_there_may_be_any(
    transport: RedisTransport, server: RedisServer
) -> None:
    """Thousands of forged leases that last for ever do not hide one that ends in a minute."""
    await transport.publish(update(1, Row(A, 1), full=True))
    for start in range(0, 6000, 1000):
        words = [word for number in range(start, start + 1000) for word in ("9" * 14, f"f/{number}/f")]
        server.command("ZADD", "{tokenway}:members", *words)
    assert await totals(transport) == {A: 1}


async def test_an_interrupted_call_leaves_no_answer_behind(
    transport: RedisTransport, server: RedisServer
) -> None:
    """After a call was cancelled at any moment the next one gets its own answer."""
    await transport.publish(update(1, Row(A, 1), full=True))
    for turns in range(12):
        call = asyncio.create_task(transport.publish(update(2 + turns, Row(B, turns))))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        assert (await totals(transport))[A] == 1


async def test_a_lost_connection_is_an_error_once(tmp_path: Path) -> None:
    """Killed, the server fails calls and subscriptions; restarted, it is used as if nothing had been."""
    with running(tmp_path) as server:
        async with connected(server.url) as transport:
            await transport.publish(update(1, Row(A, 1), full=True))
            async with transport.subscribe() as messages:
                server.kill()
                with pytest.raises(TransportError):
                    async with asyncio.timeout(DEADLINE_S):
                        await anext(messages)
            for _ in range(2):
                with pytest.raises(TransportError):
                    await transport.publish(update(2, Row(A, 2)))
            with pytest.raises(TransportError):
                await transport.snapshot()
            with pytest.raises(TransportError):
                async with transport.subscribe():
                    pass
            server.start()
            assert await totals(transport) == {}
            await transport.publish(update(3, Row(A, 3), full=True))
            assert await totals(transport) == {A: 3}


RIGHTS = (
    "~{tokenway}:* &{tokenway}:* +evalsha +eval +publish +subscribe +time +hset +hget +hmget +hgetall +hdel "
    "+del +pexpire +pttl +zadd +zrem +zrange +zrangebyscore +zremrangebyscore"
)
"""As the documentation of `redis_transport` has them."""


async def test_the_documented_rights_suffice_and_passwords_stay_secret(server: RedisServer) -> None:
    """A user with just these can do all of it; a wrong password or a missing right is an error without it."""
    documented = " ".join((redis_transport.__doc__ or "").replace("{P}", "{tokenway}").split())
    assert RIGHTS in documented
    server.command("FLUSHALL")
    server.command("ACL", "SETUSER", "gw", "reset", "resetchannels", "on", ">s3cret", *RIGHTS.split())
    server.command("ACL", "SETUSER", "weak", "reset", "on", ">s3cret", "+ping")
    host = server.url.removeprefix("redis://")
    async with connected(f"redis://gw:s3cret@{host}") as transport:
        async with transport.subscribe() as messages, asyncio.timeout(DEADLINE_S):
            for number, full in enumerate((True, False, True), start=2):
                await transport.publish(update(number, Row(A, number), full=full))
                assert (await anext(messages)).sequence == number
            await transport.publish(update(1, Row(A, 9), Row(B, 9), full=True))
            await transport.publish(update(3, Row(A, 9), full=True))
            await transport.reserve(update(5), [Reservation((Candidate(A, 0, 1, 1),))])
        assert await totals(transport) == {A: 5}
        await transport.publish(update(6, leaving=True))
        async with transport.addressed_to(("0.a", "all")) as payloads, asyncio.timeout(DEADLINE_S):
            for name, payload in (("0.a", b"1"), ("all", b"2"), ("0.a", b"3")):
                assert await transport.send_to(name, payload)
                assert await anext(payloads) == payload
            assert not await transport.send_to("0.b", b"4")
    async with connected(server.url, username="gw", password="s3cret") as transport:
        assert await transport.snapshot() == []
    for user, password in (("gw", "wr0ng"), ("weak", "s3cret"), ("stranger", "s3cret")):
        async with connected(server.url, username=user, password=password) as transport:
            with pytest.raises(TransportError) as error:
                await transport.snapshot()
            assert password not in str(error.value)
    server.command("ACL", "DELUSER", "gw", "weak")


async def test_cluster(tmp_path: Path) -> None:
    """The node that has the slot is found from any other, and found again when the slot has moved."""
    arguments = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
    with (
        running(tmp_path / "1", arguments) as first,
        running(tmp_path / "2", arguments) as second,
    ):
        slots = [str(slot) for slot in range(16_384)]
        slot = int(first.command("CLUSTER", "KEYSLOT", "{tokenway}:members")[1:])
        first.command("CLUSTER", "ADDSLOTS", *(s for s in slots if s != str(slot)))
        second.command("CLUSTER", "ADDSLOTS", str(slot))
        first.command("CLUSTER", "MEET", "127.0.0.1", str(second.port))
        await until(lambda: all(b"cluster_state:ok" in s.command("CLUSTER", "INFO") for s in (first, second)))
        await until(
            lambda: all(
                b"cluster_slots_assigned:16384" in s.command("CLUSTER", "INFO") for s in (first, second)
            )
        )
        nodes = f"127.0.0.1:{free_port()},127.0.0.1:{first.port}"
        async with connected(f"redis+cluster://{nodes}") as transport:
            async with transport.subscribe() as messages, asyncio.timeout(DEADLINE_S):
                await transport.publish(update(1, Row(A, 1), full=True))
                assert (await anext(messages)).rows == (Row(A, 1),)
                reserved = await transport.reserve(update(2), [Reservation((Candidate(A, 1, 1, 1),))])
                assert reserved == [Reserved(0, (1,))]
            assert await totals(transport) == {A: 2}

            second.command("FLUSHALL")
            to = first.command("CLUSTER", "MYID").split(b"\r\n")[1].decode()
            for one in (first, second):
                one.command("CLUSTER", "SETSLOT", str(slot), "NODE", to)
            await transport.publish(update(3, Row(A, 5), full=True))
            assert await totals(transport) == {A: 5}
            assert first.command("DBSIZE") == b":2\r\n"


async def test_a_node_that_says_no_host_means_its_own(server: RedisServer) -> None:
    """Redis 7, `cluster-preferred-endpoint-type unknown-endpoint`, says where a slot is by its port alone."""

    async def moved(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"EVALSHA")
        writer.write(b"-MOVED 1 :%d\r\n" % server.port)
        await writer.drain()
        writer.close()

    node = await asyncio.start_server(moved, "127.0.0.1")
    port = node.sockets[0].getsockname()[1]
    async with node, connected(f"redis+cluster://127.0.0.1:{port}") as transport:
        await transport.publish(update(1, Row(A, 1), full=True))
        assert await totals(transport) == {A: 1}
        connection = transport._connection
        assert isinstance(connection, Connection)
        assert connection.host == "127.0.0.1", "none at all, which happens to be this machine"


async def test_sentinel(tmp_path: Path) -> None:
    """The master is the one the sentinels name, after a fail-over the new one."""
    async with AsyncExitStack() as stack:
        master = stack.enter_context(running(tmp_path / "master"))
        replica = stack.enter_context(
            running(tmp_path / "replica", ["--replicaof", "127.0.0.1", str(master.port)])
        )
        folder = tmp_path / "sentinel"
        folder.mkdir()
        (folder / "sentinel.conf").write_text(
            f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 3000\n"
        )
        await until(lambda: b"master_link_status:up" in replica.command("INFO", "replication"))
        sentinel = stack.enter_context(running(folder, sentinel=True))
        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/main"
        transport = await stack.enter_async_context(connected(url))
        await transport.publish(update(1, Row(A, 1), full=True))
        assert master.command("DBSIZE") == b":2\r\n"
        await until(lambda: str(replica.port).encode() in sentinel.command("SENTINEL", "REPLICAS", "main"))

        master.kill()
        with pytest.raises(TransportError):
            await transport.publish(update(2, Row(A, 2)))

        def is_master() -> bool:
            with suppress(ConnectionError):  # the fail-over breaks its connections
                return b"role:master" in replica.command("INFO", "replication")
            return False

        await until(is_master)
        await until(
            lambda: (
                str(replica.port).encode() in sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
            )
        )
        async with transport.subscribe() as messages, asyncio.timeout(DEADLINE_S):
            await transport.publish(update(3, Row(A, 3), full=True))
            assert (await anext(messages)).sequence == 3
        assert await totals(transport) == {A: 3}
        async with connected(f"redis+sentinel://127.0.0.1:{sentinel.port}/other") as unknown:
            with pytest.raises(TransportError):
                await unknown.snapshot()


async def test_a_master_that_was_demoted_is_left_though_its_connections_stay(tmp_path: Path) -> None:
    """It refuses what writes, in words that depend on its version: the next call asks the sentinels anew."""
    with running(tmp_path / "first") as first, running(tmp_path / "second") as second:
        masters = [first, second]

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"main\r\n")
            port = str(masters[0].port).encode()
            writer.write(b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(port), port))
            await reader.read()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as sentinel:
            port = sentinel.sockets[0].getsockname()[1]
            async with connected(f"redis+sentinel://127.0.0.1:{port}/main") as transport:
                await transport.publish(update(1, Row(A, 1), full=True))
                masters.reverse()
                first.command("REPLICAOF", "127.0.0.1", str(second.port))
                with pytest.raises(TransportError, match="read only replica"):
                    await transport.publish(update(2, Row(A, 2)))
                await transport.publish(update(3, Row(A, 3), full=True))
                assert await totals(transport) == {A: 3}
                assert second.command("DBSIZE") == b":2\r\n"
