"""What the shared metadata center costs, by number of endpoints and gateways.

    python -m benchmarks.sizing [--requests-per-s 100] [--round-trip-ms 0.5] [--kv-tokens 400000]

Takes about a minute. First the costs of single things are measured, with a real redis-server (that of the
development dependencies): bytes and CPU of a message at the sender, at Redis and at a receiver, memory of a
share, of a remembered block, of an announced block. The table is computed from these, by the formulas of this
module. Last, a few gateways run for some seconds, and what they used is printed beside what was computed.

All is per worker process: a gateway of four workers is four members. CPU is CPU time, so that neighbours on
the machine disturb it little. Requests come at random and each changes the load three times: charged, prefill
done (and its blocks sent), ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import random
import secrets
import socket
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec

from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.cache_map.holders import Replica
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.kv_events.decoding import decode as decode_batch
from metadata_center.load.counters import MAX_SLOTS, Counters, num_bytes
from metadata_center.sharing.messages import (
    Candidate,
    Chain,
    Reservation,
    Row,
    Update,
    decode,
    encode,
    member_id,
)
from metadata_center.sharing.peers import Peers
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import HEARTBEATS_PER_LEASE, SharedStore
from metadata_center.sharing.sync import MESSAGES_PER_S, Sync
from metadata_center.types import Charge, EndpointKey, RequestId
from testbed.redis_server import RedisServer, running

ENDPOINTS: Final = (10, 100, 1_000)
GATEWAYS: Final = (1, 4, 16)
CHANGES_PER_REQUEST: Final = 3
LEASE_S: Final = 6.0
"""The default of `metadata_center.lease_s`."""

PROMPT_BLOCKS: Final = 32
"""Of 512 bytes: 16 KiB, about 4,000 tokens."""

NEW_TOKENS: Final = 2_000
"""Announced per request: half of that prompt, and the answer."""

BLOCK_TOKENS: Final = 16
"""vLLM's default on GPUs."""

BLOCK_BYTES: Final = 512
"""The default of `request.block_bytes`."""

TOKENS_PER_BYTE: Final = 0.25
"""What the gateway starts with, before it learned a model's."""

SHAPES: Final = ((1, 0), (17, 0), (1, 1))
"""Rows and chains of the messages that are measured; costs lie on lines between."""

MESSAGES: Final = 1_000
DELIVERED_TO: Final = 16
PACE_S: Final = 0.001
"""Between two messages: sender, Redis and receiver wake for each, as they do below a thousand a second."""

SAMPLE_BLOCKS: Final = 64_000
CHECK_S: Final = 5.0
FIRST_TOKEN_S: Final = 0.2
DURATION_S: Final = 1.0
"""Of a request in the check. How long it lasts does not matter to messages."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a message: its first row with all that every message has, each further row, and a prompt's chain."""

    first_row: float
    row: float
    chain: float

    def of(self, rows: float, chains: float) -> float:
        """Of a message with so many rows, >= 1, and chains; also for means of many messages."""
        return self.first_row + self.row * (rows - 1.0) + self.chain * chains


@dataclass(frozen=True, slots=True)
class Unit:
    """What was measured. Times are CPU seconds.

    Attributes:
        in_bytes: Into Redis, per message.
        out_bytes: Out of Redis, per message and member, per subscription.
        redis_s: Of Redis, per message, without subscribers.
        delivery_s: Of Redis, per message and subscriber.
        send_s: Of a gateway, per message sent, by number of rows.
        receive_s: Of a gateway, per message received.
        compare_s: Of a gateway, to find what changed, by number of endpoints.
        reserve_s: Of Redis, for a message with one reservation, by number of members with a share.
        share_bytes: In Redis, by number of rows.
        connection_bytes: In Redis, per connection.
        peer_row_bytes: In a gateway, per row of another member.
        history_block_bytes: In a gateway, per block and endpoint that holds it.
        announced_block_bytes: In a gateway, per announced block that one engine holds.
        announced_block_s: Of a gateway, to take an announced block in and, later, its removal.
    """

    in_bytes: Cost
    out_bytes: Cost
    redis_s: Cost
    delivery_s: float
    send_s: Cost
    receive_s: Cost
    compare_s: dict[int, float]
    reserve_s: dict[int, float]
    share_bytes: dict[int, int]
    connection_bytes: float
    peer_row_bytes: float
    history_block_bytes: float
    announced_block_bytes: float
    announced_block_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What is assumed.

    Attributes:
        requests_per_s: Per gateway, > 0.
        round_trip_s: From a gateway to Redis and back.
        answer_s: Mean time from decision to end.
        kv_tokens: KV cache of one engine.
    """

    requests_per_s: float
    round_trip_s: float
    answer_s: float
    kv_tokens: int


# What is computed.


def messages_per_s(changes_per_s: float, pause_s: float) -> float:
    """Messages that changes at random moments make, if one leaves at once or when `pause_s` are over.

    After a message the next one leaves after the pause if anything changed in it, else with the next change:
    on average `pause_s + exp(-changes_per_s * pause_s) / changes_per_s` later.
    """
    return 1.0 / (pause_s + math.exp(-changes_per_s * pause_s) / changes_per_s)


def distinct(draws: float, endpoints: int) -> float:
    """Endpoints hit by so many draws, each of them at random."""
    missed: float = (1.0 - 1.0 / endpoints) ** draws
    return endpoints * (1.0 - missed)


def traffic(load: Load, endpoints: int, members: int) -> tuple[float, float, float]:
    """Messages per second of each member, and their mean numbers of rows and chains.

    Heartbeats are among them, which list all endpoints with load.
    """
    changes_per_s = CHANGES_PER_REQUEST * load.requests_per_s
    pause_s = max(load.round_trip_s, members / MESSAGES_PER_S)
    sent = messages_per_s(changes_per_s, pause_s)
    full = min(sent, HEARTBEATS_PER_LEASE / LEASE_S)
    loaded = distinct(load.requests_per_s * load.answer_s, endpoints)
    rows = ((sent - full) * distinct(changes_per_s / sent, endpoints) + full * loaded) / sent
    return sent, max(1.0, rows), load.requests_per_s / sent


def between(points: dict[int, float], x: float) -> float:
    """The value at `x` on the straight lines between points; beyond them, in proportion."""
    known = sorted(points)
    if x <= known[0]:
        return points[known[0]]
    for low, high in pairwise(known):
        if x <= high:
            return points[low] + (points[high] - points[low]) * (x - low) / (high - low)
    return points[known[-1]] * x / known[-1]


def sized(unit: Unit, load: Load, endpoints: int, members: int) -> dict[str, float]:
    """One row of the table: `members` gateways of one worker each, over `endpoints`."""
    sent, rows, chains = traffic(load, endpoints, members)
    accepted = sent * members
    listed = distinct(load.requests_per_s * (load.answer_s + LEASE_S / HEARTBEATS_PER_LEASE), endpoints)
    share_bytes = between({n: float(size) for n, size in unit.share_bytes.items()}, listed)
    engine_blocks = load.kv_tokens / BLOCK_TOKENS
    history_blocks = load.kv_tokens / TOKENS_PER_BYTE / BLOCK_BYTES
    redis_s = unit.redis_s.of(rows, chains) + members * unit.delivery_s
    send_s = unit.send_s.of(rows, chains) + between(unit.compare_s, endpoints)
    reserved = load.requests_per_s * members
    return {
        "redis_memory_kib": members * (share_bytes + 2 * unit.connection_bytes) / 1024,
        "messages_per_s": accepted,
        "rows_per_message": rows,
        "deliveries_per_s": accepted * members,
        "redis_in_mbit_per_s": accepted * unit.in_bytes.of(rows, chains) * 8e-6,
        "redis_out_mbit_per_s": accepted * members * unit.out_bytes.of(rows, chains) * 8e-6,
        "redis_cpu_percent": accepted * redis_s * 100,
        "gateway_send_cpu_percent": sent * send_s * 100,
        "gateway_receive_cpu_percent": accepted * unit.receive_s.of(rows, chains) * 100,
        "gateway_events_cpu_percent": reserved * NEW_TOKENS / BLOCK_TOKENS * unit.announced_block_s * 100,
        "reserve_redis_cpu_percent": reserved * between(unit.reserve_s, members) * 100,
        "shares_mib": ((members - 1) * listed * unit.peer_row_bytes + num_bytes(1, MAX_SLOTS)) / 2**20,
        "history_mib": endpoints * history_blocks * unit.history_block_bytes / 2**20,
        "cache_map_mib": endpoints * engine_blocks * unit.announced_block_bytes / 2**20,
        "cache_map_blocks": endpoints * engine_blocks,
    }


# What is measured.


def keys(count: int) -> tuple[EndpointKey, ...]:
    """Endpoints."""
    return tuple(EndpointKey(f"10.20.{n // 250}.{n % 250}:8000") for n in range(count))


def update(sequence: int, rows: int, chains: int, *, full: bool = False, worker: int = 0) -> Update:
    """A message as a busy gateway sends it: three requests on each endpoint, 2,000 tokens to prefill."""
    busy = tuple(Row(key, 3, 1, 2_000 + n % 100, 12_000, 900) for n, key in enumerate(keys(rows)))
    chain = Chain.of(busy[0].endpoint, [(n + 1) << 40 for n in range(PROMPT_BLOCKS)])
    name = member_id("gateway-1", worker, "0123abcd")
    return Update(name, sequence, busy, full, LEASE_S, (chain,) * chains)


class Redis:
    """Readings of a redis-server."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def info(self) -> dict[str, float]:
        """All numbers of INFO."""
        found: dict[str, float] = {}
        for section in ("cpu", "stats", "memory", "clients"):
            for line in self._server.command("INFO", section).decode().splitlines():
                name, _, number = line.partition(":")
                if number.replace(".", "", 1).isdigit():
                    found[name] = float(number)
        return found

    def memory_usage(self, key: str) -> int:
        """Bytes of one key, all of its fields looked at."""
        return int(self._server.command("MEMORY", "USAGE", key, "SAMPLES", "0").strip()[1:])


def _cpu_s(info: dict[str, float]) -> float:
    return info["used_cpu_sys"] + info["used_cpu_user"]


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
        "redis_s": _cpu_s(after) - _cpu_s(before),
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


def _store(number: int, endpoints: int) -> SharedStore:
    member = member_id(f"gw{number}", 0, secrets.token_hex(4))
    store = SharedStore(member, Counters(), PrefixIndex(1_000, 1_000), share_lease_s=LEASE_S)
    store.load.retain(frozenset(keys(endpoints)))
    store.load.slots(keys(endpoints))
    return store


def _sync(store: SharedStore, url: str, prefix: str = "tokenway") -> Sync:
    transport = RedisTransport(parse_url(url), prefix=prefix)
    return Sync(store, transport, time.monotonic, random.Random(1))


def _receiver(url: str, pipe: Connection) -> None:
    async def receive() -> None:
        sync = _sync(_store(0, 100), url)
        sync.start()
        while not sync.stats.connected:  # noqa: ASYNC110 - once, before anything is measured
            await asyncio.sleep(0.01)
        while True:
            pipe.send((sync.stats.received, time.process_time()))
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    asyncio.run(receive())


def comparing(endpoints: int) -> float:
    """CPU to find what changed, and to make the message, when one endpoint's load did."""
    store = _store(0, endpoints)
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
    return (_cpu_s(after) - _cpu_s(before)) / MESSAGES


async def share_bytes(url: str, redis: Redis, rows: int) -> int:
    """Redis memory of one member's share."""
    transport = RedisTransport(parse_url(url))
    await transport.publish(update(1, rows, 0, full=True))
    size = redis.memory_usage("{tokenway}:share:gateway-1/0/0123abcd")
    await transport.publish(Update(member_id("gateway-1", 0, "0123abcd"), 2, leaving=True))
    await transport.close()
    return size


def allocated(make: Callable[[], object]) -> float:
    """Bytes that Python and numpy allocate for what `make` returns."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        after = tracemalloc.get_traced_memory()[0]
        del made
    finally:
        tracemalloc.stop()
    return float(after - before)


def peer_rows() -> Peers:
    """Shares of fifteen members on 1,000 endpoints."""
    peers = Peers("me")
    for worker in range(15):
        peers.apply(decode(encode(update(1, 1_000, 0, full=True, worker=worker))), 0.0)
    return peers


def history() -> PrefixIndex:
    """Prompts of which no two endpoints know the same."""
    index = PrefixIndex(SAMPLE_BLOCKS, SAMPLE_BLOCKS)
    rng = random.Random(1)
    for number in range(SAMPLE_BLOCKS // PROMPT_BLOCKS):
        index.record(keys(100)[number % 100], [rng.getrandbits(64) for _ in range(PROMPT_BLOCKS)])
    return index


def block_events() -> tuple[list[bytes], list[bytes]]:
    """Batches of 64 stored blocks, of prompts of 256 that share nothing; and batches that remove them."""
    rng = random.Random(1)
    stored, removed, parent = [], [], None
    for number in range(SAMPLE_BLOCKS // 64):
        if number % 4 == 0:
            parent = None
        hashes = [rng.getrandbits(64) for _ in range(64)]
        event = {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": parent,
            "token_ids": [rng.randrange(50_000) for _ in range(64 * BLOCK_TOKENS)],
            "block_size": BLOCK_TOKENS,
            "medium": "GPU",
        }
        gone = [{"type": "BlockRemoved", "block_hashes": [one], "medium": "GPU"} for one in reversed(hashes)]
        stored.append(msgspec.msgpack.encode([0.0, [event], 0]))
        removed.append(msgspec.msgpack.encode([0.0, gone, 0]))
        parent = hashes[-1]
    return stored, removed


def announced(batches: list[bytes], pieces: list[bytes]) -> tuple[CacheMap, list[Replica]]:
    """What a hundred engines announced."""
    caches = CacheMap()
    replicas = [caches.attach(key, 0, "m", pieces) for key in keys(100)]
    for number, batch in enumerate(batches):
        caches.apply(replicas[number // 4 % 100], decode_batch(batch))
    return caches, replicas


def measured(url: str, redis: Redis) -> Unit:
    """Everything that a table is computed from."""
    costs, delivery_s = messages(url, redis)
    stored, removed = block_events()
    pieces = [b"%04d" % (n % 10_000) for n in range(50_000)]  # four bytes a token, as English has
    began_s = time.process_time()
    caches, replicas = announced(stored, pieces)
    held = caches.stats.held
    for number, batch in reversed(list(enumerate(removed))):  # tails first, as engines evict
        caches.apply(replicas[number // 4 % 100], decode_batch(batch))
    spent_s = time.process_time() - began_s
    info = redis.info()
    with subscribers(url, DELIVERED_TO):
        grown = redis.info()["used_memory"] - info["used_memory"]
    return Unit(
        in_bytes=costs["in_bytes"],
        out_bytes=costs["out_bytes"],
        redis_s=costs["redis_s"],
        delivery_s=delivery_s,
        send_s=costs["send_s"],
        receive_s=receiving(url),
        compare_s={count: comparing(count) for count in ENDPOINTS},
        reserve_s={count: asyncio.run(reserving(url, redis, count)) for count in GATEWAYS},
        share_bytes={count: asyncio.run(share_bytes(url, redis, count)) for count in ENDPOINTS},
        connection_bytes=grown / DELIVERED_TO,
        peer_row_bytes=allocated(peer_rows) / 15_000,
        history_block_bytes=allocated(history) / SAMPLE_BLOCKS,
        announced_block_bytes=allocated(lambda: announced(stored, pieces)) / held,
        announced_block_s=spent_s / held,
    )


# Gateways that run, beside what was computed of them.


def _gateway(number: int, url: str, requests_per_s: float, prefix: str | None, pipe: Connection) -> None:
    asyncio.run(_serve(number, url, requests_per_s, prefix, pipe))


async def _serve(number: int, url: str, requests_per_s: float, prefix: str | None, pipe: Connection) -> None:
    """Requests at random for `CHECK_S`; without a prefix of its own, to show what else they cost."""
    store = _store(number, 100)
    places, rng = keys(100), random.Random(number)
    sync = _sync(store, url, prefix or "sizing")
    if prefix:
        sync.start()
        while not sync.stats.connected:  # noqa: ASYNC110 - once, before anything is measured
            await asyncio.sleep(0.01)
    pipe.send(None)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, pipe.recv)
    due_s, count = loop.time(), 0
    begin_s, end_s = due_s + DURATION_S, due_s + DURATION_S + CHECK_S
    round_trips_s: list[float] = []
    before, cpu_s = sync.stats, 0.0
    while (due_s := due_s + rng.expovariate(requests_per_s)) < end_s:
        await asyncio.sleep(due_s - loop.time())
        if not round_trips_s and due_s >= begin_s:
            before, cpu_s = sync.stats, time.process_time()
        if due_s >= begin_s:
            round_trips_s.append(sync.stats.round_trip_s)
        name, place = RequestId(str(count)), rng.choice(places)
        blocks = [(number << 56) + (count << 16) + block for block in range(PROMPT_BLOCKS)]
        count += 1
        store.load.charge(Charge(name, place, 2_000, 4_000), time.monotonic(), None)
        loop.call_later(FIRST_TOKEN_S, _first_token, store, name, place, blocks if prefix else [])
        loop.call_later(DURATION_S, store.load.release, name, time.monotonic())
    cpu_s = time.process_time() - cpu_s
    after = sync.stats
    pipe.send(
        (
            (after.published - before.published) / CHECK_S,
            (after.received - before.received) / CHECK_S,
            cpu_s / CHECK_S,
            statistics.mean(round_trips_s),
        )
    )
    await loop.run_in_executor(None, pipe.recv)


def _first_token(store: SharedStore, name: RequestId, place: EndpointKey, blocks: list[int]) -> None:
    store.load.release_prefill(name)
    if blocks:
        store.share(place, blocks)


def check(
    url: str, redis: Redis, gateways: int, requests_per_s: float, prefix: str | None
) -> dict[str, float]:
    """What gateways use that run for `CHECK_S` over 100 endpoints, means over gateways; and Redis."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(gateways):
        ours, theirs = context.Pipe()
        arguments = (number, url, requests_per_s, prefix, theirs)
        processes.append(context.Process(target=_gateway, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(None)
    time.sleep(DURATION_S)
    before = redis.info()
    sent, received, cpu, round_trip_s = zip(*(pipe.recv() for pipe in pipes), strict=True)
    after = redis.info()
    for process in processes:
        process.kill()
        process.join()

    def per_s(name: str) -> float:
        return (after[name] - before[name]) / CHECK_S

    return {
        "messages_per_s": sum(sent),
        "deliveries_per_s": sum(received),
        "gateway_cpu_percent": 100 * sum(cpu) / gateways,
        "redis_cpu_percent": 100 * (_cpu_s(after) - _cpu_s(before)) / CHECK_S,
        "redis_in_mbit_per_s": per_s("total_net_input_bytes") * 8e-6,
        "redis_out_mbit_per_s": per_s("total_net_output_bytes") * 8e-6,
        "round_trip_ms": 1e3 * sum(round_trip_s) / gateways,
    }


def checked(unit: Unit, load: Load, url: str, redis: Redis, gateways: int) -> dict[str, tuple[float, float]]:
    """Measured and computed, for 100 endpoints and the round trip that was measured."""
    alone = check(url, redis, 1, load.requests_per_s, None)
    found = check(url, redis, gateways, load.requests_per_s, f"check{gateways}")
    same = Load(load.requests_per_s, found["round_trip_ms"] / 1e3, DURATION_S, load.kv_tokens)
    expected = sized(unit, same, 100, gateways)
    found["gateway_cpu_percent"] -= alone["gateway_cpu_percent"]
    expected["gateway_cpu_percent"] = (
        expected["gateway_send_cpu_percent"] + expected["gateway_receive_cpu_percent"]
    )
    expected["round_trip_ms"] = found["round_trip_ms"]
    return {name: (figure, expected[name]) for name, figure in found.items()}


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests-per-s", type=float, default=100.0, help="per gateway")
    parser.add_argument("--round-trip-ms", type=float, default=0.5, help="gateway to Redis and back")
    parser.add_argument("--answer-s", type=float, default=10.0, help="mean duration of a request")
    parser.add_argument("--kv-tokens", type=int, default=400_000, help="KV cache of one engine")
    options = parser.parse_args()
    load = Load(options.requests_per_s, options.round_trip_ms / 1e3, options.answer_s, options.kv_tokens)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        redis = Redis(server)
        unit = measured(server.url, redis)
        print("measured (bytes, CPU seconds):")
        for name, figure in asdict(unit).items():
            print(f"  {name:22} {msgspec.json.encode(_plain(figure)).decode()}")
        table = {
            f"{endpoints}_{gateways}": {
                name: rounded(figure) for name, figure in sized(unit, load, endpoints, gateways).items()
            }
            for endpoints in ENDPOINTS
            for gateways in GATEWAYS
        }
        print("computed, endpoints_gateways:")
        for name in next(iter(table.values())):
            print(f"  {name:28}" + "".join(f"{row[name]:>11.10g}" for row in table.values()))
        print(f"  {'':28}" + "".join(f"{name:>11}" for name in table))
        checks = {}
        for gateways in (1, 4):
            found = checked(unit, load, server.url, redis, gateways)
            checks[gateways] = {name: [rounded(one) for one in pair] for name, pair in found.items()}
            print(f"{gateways} gateways, 100 endpoints: [measured, computed] {checks[gateways]}")
    print(
        json.dumps(
            {
                "machine": machine,
                "assumed": asdict(load),
                "measured": _plain(asdict(unit)),
                "computed": table,
                "checks": checks,
            }
        )
    )


def _plain(figure: object) -> object:
    """Nested figures, rounded, with names that JSON has."""
    if isinstance(figure, dict):
        return {str(name): _plain(inner) for name, inner in figure.items()}
    return rounded(figure) if isinstance(figure, int | float) else figure


if __name__ == "__main__":
    main()
