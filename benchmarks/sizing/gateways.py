"""Gateways that run for some seconds, and what they used beside what was computed of them."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection
from typing import Final

from benchmarks.sizing.members import PROMPT_BLOCKS, keys, store_of, sync_of
from benchmarks.sizing.model import Load, Unit, sized
from benchmarks.sizing.readings import Redis, used_cpu_s
from metadata_center.sharing.store import SharedStore
from metadata_center.types import Charge, EndpointKey, RequestId

CHECK_S: Final = 5.0
FIRST_TOKEN_S: Final = 0.2
DURATION_S: Final = 1.0
"""Of a request in the check. How long it lasts does not matter to messages."""


def _gateway(number: int, url: str, requests_per_s: float, prefix: str | None, pipe: Connection) -> None:
    asyncio.run(_serve(number, url, requests_per_s, prefix, pipe))


async def _serve(number: int, url: str, requests_per_s: float, prefix: str | None, pipe: Connection) -> None:
    """Requests at random for `CHECK_S`; without a prefix of its own, to show what else they cost."""
    store = store_of(number, 100)
    places, rng = keys(100), random.Random(number)
    sync = sync_of(store, url, prefix or "sizing")
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
        "redis_cpu_percent": 100 * (used_cpu_s(after) - used_cpu_s(before)) / CHECK_S,
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
