"""What a message costs its sender, Redis and a receiver, and what Redis keeps of a share."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Final

from benchmarks.sizing.members import keys, store_of, sync_of, update
from benchmarks.sizing.model import Cost
from benchmarks.sizing.readings import Redis, used_cpu_s
from metadata_center.sharing.messages import Candidate, Reservation, Update, encode, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.types import Charge, RequestId

SHAPES: Final = ((1, 0), (17, 0), (1, 1))
"""Rows and chains of the messages that are measured; costs lie on lines between."""

MESSAGES: Final = 1_000
DELIVERED_TO: Final = 16
PACE_S: Final = 0.001
"""Between two messages: sender, Redis and receiver wake for each, as they do below a thousand a second."""


@contextmanager
def subscribers(url: str, count: int) -> Iterator[None]:
    """Connections that read the channel and do nothing with it, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_drain, args=(url, count, theirs), daemon=True)
    process.start()
    ours.recv()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _drain(url: str, count: int, pipe: Connection) -> None:
    host, _, port = url.removeprefix("redis://").partition(":")
    open_ = [socket.create_connection((host, int(port))) for _ in range(count)]
    for connection in open_:
        connection.sendall(b"SUBSCRIBE {tokenway}:updates\r\n")
        connection.recv(4096)
    pipe.send(None)
    while True:
        for connection in open_:
            connection.recv(1 << 16)


async def publishing(url: str, redis: Redis, rows: int, chains: int, *, is_sent: bool) -> dict[str, float]:
    """Per message: bytes into and out of Redis, CPU of both sides; a subscriber has subscribed already.

    The same without sending is what the loop itself costs, and Redis when idle.
    """
    transport = RedisTransport(parse_url(url))
    await transport.publish(update(1, rows, chains))
    before, cpu_s = redis.info(), time.process_time()
    for sequence in range(2, MESSAGES + 2):
        message = update(sequence, rows, chains)
        if is_sent:
            await transport.publish(message)
        await asyncio.sleep(PACE_S)
    cpu_s = time.process_time() - cpu_s
    after = redis.info()
    await transport.publish(Update(member_id("gateway-1", 0, "0123abcd"), MESSAGES + 2, leaving=True))
    await transport.close()
    spent = {
        "in_bytes": after["total_net_input_bytes"] - before["total_net_input_bytes"],
        "out_bytes": after["total_net_output_bytes"] - before["total_net_output_bytes"],
        "redis_s": used_cpu_s(after) - used_cpu_s(before),
        "send_s": cpu_s,
    }
    return {name: figure / MESSAGES for name, figure in spent.items()}


def messages(url: str, redis: Redis) -> tuple[dict[str, Cost], float]:
    """Costs of sending by name, and CPU of Redis per subscriber."""

    def spent(*, is_sent: bool) -> list[dict[str, float]]:
        return [asyncio.run(publishing(url, redis, *shape, is_sent=is_sent)) for shape in SHAPES]

    idle, alone = spent(is_sent=False), spent(is_sent=True)
    found = {
        name: _cost(*(one[name] - other[name] for one, other in zip(alone, idle, strict=True)))
        for name in alone[0]
    }
    with subscribers(url, DELIVERED_TO):
        heard = spent(is_sent=True)
    pushed = ((one["out_bytes"] - other["out_bytes"]) for one, other in zip(heard, alone, strict=True))
    found["out_bytes"] = _cost(*(figure / DELIVERED_TO for figure in pushed))
    return found, max(0.0, heard[0]["redis_s"] - alone[0]["redis_s"]) / DELIVERED_TO


def _cost(one_row: float, more_rows: float, with_chain: float) -> Cost:
    """Of the figures of `SHAPES`."""
    return Cost(one_row, max(0.0, more_rows - one_row) / 16, max(0.0, with_chain - one_row))


def receiving(url: str) -> Cost:
    """CPU of a gateway per message received, of a process that does nothing else; the less of two runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_receiver, args=(url, theirs), daemon=True)
    process.start()
    host, _, port = url.removeprefix("redis://").partition(":")
    sequence, spent_s = 0, []
    before = ours.recv()
    with socket.create_connection((host, int(port))) as connection:
        for rows, chains in SHAPES * 2:
            for _ in range(MESSAGES):
                sequence += 1
                data = encode(update(sequence, rows, chains, full=sequence == 1, worker=1))
                head = b"*3\r\n$7\r\nPUBLISH\r\n$18\r\n{tokenway}:updates\r\n$%d\r\n" % len(data)
                connection.sendall(head + data + b"\r\n")
                connection.recv(64)
                time.sleep(PACE_S)
            ours.send(None)
            after = ours.recv()
            spent_s.append((after[1] - before[1]) / (after[0] - before[0]))
            before = after
    process.kill()
    process.join()
    return _cost(*(min(pair) for pair in zip(spent_s[: len(SHAPES)], spent_s[len(SHAPES) :], strict=True)))


def _receiver(url: str, pipe: Connection) -> None:
    async def receive() -> None:
        sync = sync_of(store_of(0, 100), url)
        sync.start()
        while not sync.stats.connected:  # noqa: ASYNC110 - once, before anything is measured
            await asyncio.sleep(0.01)
        while True:
            pipe.send((sync.stats.received, time.process_time()))
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    asyncio.run(receive())


def comparing(endpoints: int) -> float:
    """CPU to find what changed, and to make the message, when one endpoint's load did."""
    store = store_of(0, endpoints)
    store.outgoing(0.0)
    place = keys(endpoints)[-1]
    began_s = time.process_time()
    for number in range(MESSAGES):
        store.load.charge(Charge(RequestId(str(number)), place, 100, 200), 0.0, None)
        store.outgoing(0.0)
    return (time.process_time() - began_s) / MESSAGES


async def reserving(url: str, redis: Redis, members: int) -> float:
    """CPU of Redis for a message with one reservation among three endpoints of a hundred."""
    transport = RedisTransport(parse_url(url), prefix=f"reserve{members}")
    for worker in range(members):
        await transport.publish(update(1, 100, 0, full=True, worker=worker))
    candidates = tuple(Candidate(key, 3 * members, 100, 200) for key in keys(3))
    before = redis.info()
    for sequence in range(2, MESSAGES + 2):
        await transport.reserve(update(sequence, 1, 0), [Reservation(candidates)])
    after = redis.info()
    await transport.close()
    return (used_cpu_s(after) - used_cpu_s(before)) / MESSAGES


async def share_bytes(url: str, redis: Redis, rows: int) -> int:
    """Redis memory of one member's share."""
    transport = RedisTransport(parse_url(url))
    await transport.publish(update(1, rows, 0, full=True))
    size = redis.memory_usage("{tokenway}:share:gateway-1/0/0123abcd")
    await transport.publish(Update(member_id("gateway-1", 0, "0123abcd"), 2, leaving=True))
    await transport.close()
    return size


def connection_bytes(url: str, redis: Redis) -> float:
    """Redis memory of a connection that has subscribed."""
    before = redis.info()["used_memory"]
    with subscribers(url, DELIVERED_TO):
        return (redis.info()["used_memory"] - before) / DELIVERED_TO
