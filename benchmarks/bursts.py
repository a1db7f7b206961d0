"""How evenly several gateways place a burst, and what sharing costs: 64 requests in one instant.

    python -m benchmarks.bursts [--transport redis|http] [--rounds 20]

Each gateway is a process with its own store; all meet in one real redis-server (that of the development
dependencies), or in one metadata-center service. A round: every gateway gets its part of 64 requests, chosen
at random, and places them as they come: least total requests, ties at random. Then all loads are summed:
`spread` is the most minus the least over 8 equal endpoints, with ten requests a millisecond over all
gateways (`ramp`) or all at once (`instant`). A request's added latency is what it takes from view to place;
in push mode that is all in memory. CPU per request is the whole process', sending and receiving included.

`latency` compares what carries messages: Redis' publish/subscribe and its streams, the same 100-byte message.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.http_server import HttpServer
from metadata_center.sharing.http_transport import HttpTransport
from metadata_center.sharing.messages import Candidate, Row, Update, encode, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.sync import Sync, SyncSettings
from metadata_center.sharing.transport import Transport
from metadata_center.types import Charge, EndpointKey, RequestId
from testbed.redis_server import running

REQUESTS = 64
ENDPOINTS = tuple(EndpointKey(f"10.0.0.{host}:8000") for host in range(8))
RAMP_S = 0.0001
"""Between two requests of a ramp, over all gateways."""

SETTLE_S = 0.3
"""Between rounds: everything said was heard."""

RESERVE_S = 1.0
"""Bound on compare and set here, so that the figures show its whole latency."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How charges are shared."""

    name: str
    optimistic: bool
    reserve: bool


MODES = (
    Mode("push", optimistic=False, reserve=False),
    Mode("push_optimistic", optimistic=True, reserve=False),
    Mode("compare_and_set", optimistic=False, reserve=True),
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one gateway did in one round: requests per endpoint, seconds each decision took, CPU seconds."""

    placed: list[int]
    took_s: list[float]
    cpu_s: float
    local: int


def transport_to(url: str) -> Transport:
    """The transport for an address."""
    return HttpTransport(url) if url.startswith("http") else RedisTransport(parse_url(url))


def gateway(number: int, url: str, mode: Mode, pipe: Connection) -> None:
    """One gateway's process: rounds come through `pipe` as start time and due times, parts go back."""
    asyncio.run(_gateway(number, url, mode, pipe))


async def _gateway(number: int, url: str, mode: Mode, pipe: Connection) -> None:
    store = SharedStore(
        member_id(f"gw{number}", 0, secrets.token_hex(4)),
        Counters(),
        PrefixIndex(1, 1),
        optimistic=mode.optimistic,
    )
    store.load.retain(frozenset(ENDPOINTS))
    slots = store.load.slots(ENDPOINTS)
    settings = SyncSettings(reserve_timeout_s=RESERVE_S)
    sync = Sync(store, transport_to(url), time.monotonic, random.Random(number), settings)
    sync.start()
    rng = random.Random(number)
    while not sync.stats.connected:  # noqa: ASYNC110 - once, before anything is measured
        await asyncio.sleep(0.01)
    pipe.send(None)
    loop = asyncio.get_running_loop()
    while (due := await loop.run_in_executor(None, pipe.recv)) is not None:
        part = await _round(store, slots, sync, mode, rng, due)
        pipe.send(part)
        await asyncio.sleep(SETTLE_S / 2)
        for index in range(len(due)):
            store.load.release(RequestId(str(index)), time.monotonic())
    await sync.stop()


async def _round(
    store: SharedStore,
    slots: tuple[int, ...],
    sync: Sync,
    mode: Mode,
    rng: random.Random,
    due: Sequence[float],
) -> Part:
    took_s: list[float] = []
    places: list[EndpointKey] = []
    local = sync.stats.reserve_timeouts

    async def decide(index: int) -> None:
        began_s = time.perf_counter()
        store.load.advance(time.monotonic())
        requests = store.load.view(slots).requests
        order = sorted(range(len(slots)), key=lambda row: (requests[row], rng.random()))
        place = ENDPOINTS[order[0]]
        name = RequestId(str(index))
        store.load.charge(Charge(name, place, 100, 200), time.monotonic(), None)
        if mode.reserve:
            candidates = [Candidate(ENDPOINTS[row], requests[row], 100, 200) for row in order]
            place = await sync.reserve(name, candidates) or place
        took_s.append(time.perf_counter() - began_s)
        places.append(place)

    if due:
        await asyncio.sleep(max(0.0, due[0] - time.monotonic()))
    cpu_s = time.process_time()
    tasks = []
    for index, at_s in enumerate(due):
        if at_s > time.monotonic():
            await asyncio.sleep(at_s - time.monotonic())
        tasks.append(asyncio.create_task(decide(index)))
    await asyncio.gather(*tasks)
    await asyncio.sleep(SETTLE_S / 2)
    cpu_s = time.process_time() - cpu_s
    placed = [places.count(key) for key in ENDPOINTS]
    return Part(placed, took_s, cpu_s, sync.stats.reserve_timeouts - local)


def burst(gateways: int, mode: Mode, url: str, rounds: int, gap_s: float) -> dict[str, float]:
    """Rounds of one setting.

    Args:
        gateways: Processes.
        mode: How charges are shared.
        url: Where they meet.
        rounds: How many.
        gap_s: Between two requests, over all gateways; 0 for all at once.
    """
    context = multiprocessing.get_context("spawn")
    rng = random.Random(gateways)
    pipes, processes = [], []
    for number in range(gateways):
        ours, theirs = context.Pipe()
        process = context.Process(target=gateway, args=(number, url, mode, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    time.sleep(SETTLE_S)
    spreads, took_s, cpu_s, local = [], [], [], 0
    for _ in range(rounds):
        start_s = time.monotonic() + 0.05
        owners = [rng.randrange(gateways) for _ in range(REQUESTS)]
        for number, pipe in enumerate(pipes):
            pipe.send([start_s + index * gap_s for index, owner in enumerate(owners) if owner == number])
        parts: list[Part] = [pipe.recv() for pipe in pipes]
        sums = [sum(counts) for counts in zip(*(part.placed for part in parts), strict=True)]
        spreads.append(max(sums) - min(sums))
        took_s += [one for part in parts for one in part.took_s]
        cpu_s.append(sum(part.cpu_s for part in parts) / REQUESTS)
        local += sum(part.local for part in parts)
        time.sleep(SETTLE_S)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(10.0)
    cuts = statistics.quantiles(took_s, n=100)
    return {
        "spread_mean": round(statistics.mean(spreads), 2),
        "spread_max": max(spreads),
        "added_us_p50": round(cuts[49] * 1e6, 1),
        "added_us_p99": round(cuts[98] * 1e6, 1),
        "cpu_us_per_request": round(statistics.median(cpu_s) * 1e6, 1),
        "local": local,
    }


async def latency(url: str, messages: int = 2000) -> dict[str, float]:
    """Microseconds from sending to having received, one message at a time, and their CPU, one process."""
    payload = encode(
        Update(member_id("gw", 0, "bench"), 1, (Row(ENDPOINTS[0], 1, 1, 1, 1), Row(ENDPOINTS[1], 1)))
    )
    found: dict[str, float] = {}
    client, reader = Redis.from_url(url), Redis.from_url(url)

    async def timed(name: str, send: Callable[[], Any], receive: Callable[[], Any]) -> None:
        took_s = []
        cpu_s = time.process_time()
        for _ in range(messages):
            began_s = time.perf_counter()
            receiving = asyncio.ensure_future(receive())
            await send()
            await receiving
            took_s.append(time.perf_counter() - began_s)
        cpu_s = time.process_time() - cpu_s
        cuts = statistics.quantiles(took_s, n=100)
        found[f"{name}_us_p50"] = round(cuts[49] * 1e6, 1)
        found[f"{name}_us_p99"] = round(cuts[98] * 1e6, 1)
        found[f"{name}_cpu_us"] = round(cpu_s / messages * 1e6, 1)

    last = "0"

    async def read_stream() -> None:
        nonlocal last
        answer: Any = await reader.xread({"bench": last}, block=5000)
        last = answer[0][1][-1][0]

    async with reader.pubsub() as subscription:
        await subscription.subscribe("bench")
        await subscription.get_message(timeout=5.0)
        await timed(
            "pubsub",
            lambda: client.publish("bench", payload),
            lambda: subscription.get_message(ignore_subscribe_messages=True, timeout=5.0),
        )
    await timed("stream", lambda: client.xadd("bench", {"m": payload}, maxlen=1000), read_stream)
    await client.aclose()
    await reader.aclose()
    return found


async def transport_latency(url: str, messages: int = 1000) -> dict[str, float]:
    """Microseconds of a message through our transport: accepted, and heard by the sender itself."""
    transport = transport_to(url)
    accepted_s, heard_s = [], []
    async with transport.subscribe() as heard:
        for sequence in range(1, messages + 1):
            update = Update(member_id("gw", 0, "bench"), sequence, (Row(ENDPOINTS[0], sequence),))
            began_s = time.perf_counter()
            receiving = asyncio.ensure_future(anext(heard))
            await transport.publish(update)
            accepted_s.append(time.perf_counter() - began_s)
            await receiving
            heard_s.append(time.perf_counter() - began_s)
    await transport.publish(Update(member_id("gw", 0, "bench"), messages + 1, leaving=True))
    await transport.close()
    accepted, echoed = statistics.quantiles(accepted_s, n=100), statistics.quantiles(heard_s, n=100)
    return {
        "accepted_us_p50": round(accepted[49] * 1e6, 1),
        "heard_us_p50": round(echoed[49] * 1e6, 1),
        "heard_us_p99": round(echoed[98] * 1e6, 1),
    }


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        server = HttpServer(Limits())
        await server.start("127.0.0.1", 0)
        pipe.send(server.port)
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await server.stop()

    asyncio.run(serve())


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--transport", choices=("redis", "http"), default="redis")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    result: dict[str, Any] = {"transport": options.transport, "rounds": options.rounds, "machine": machine}
    with ExitStack() as stack:
        if options.transport == "redis":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            url = stack.enter_context(running(folder)).url
            result["latency"] = asyncio.run(latency(url))
            print(result["latency"])
        else:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            stack.callback(process.join, 10.0)
            stack.callback(ours.send, None)
            url = f"http://127.0.0.1:{ours.recv()}"
        result["transport_latency"] = asyncio.run(transport_latency(url))
        print(result["transport_latency"])
        for shape, gap_s in (("instant", 0.0), ("ramp", RAMP_S)):
            for gateways in (1, 2, 4):
                for mode in MODES:
                    found = burst(gateways, mode, url, options.rounds, gap_s)
                    print(f"{shape:8}{gateways} gateways  {mode.name:16}{found}", flush=True)
                    result[f"{shape}_{gateways}_{mode.name}"] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
