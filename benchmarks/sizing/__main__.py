"""What the shared metadata center costs, by number of endpoints and gateways.

    python -m benchmarks.sizing [--requests-per-s 100] [--round-trip-ms 0.5] [--kv-tokens 400000]

Takes about a minute. First the costs of single things are measured, with a real redis-server (that of the
development dependencies): bytes and CPU of a message at the sender, at Redis and at a receiver, memory of a
share, of a remembered block, of an announced block. The table is computed from these, by the formulas of
`benchmarks.sizing.model`. Last, a few gateways run for some seconds, and what they used is printed beside
what was computed.

All is per worker process: a gateway of four workers is four members. CPU is CPU time, so that neighbours on
the machine disturb it little. Requests come at random and each changes the load three times: charged, prefill
done (and its blocks sent), ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import msgspec

from benchmarks.sizing.caches import SAMPLE_BLOCKS, allocated, announced_block, history, peer_rows
from benchmarks.sizing.gateways import checked
from benchmarks.sizing.messages import (
    comparing,
    connection_bytes,
    messages,
    receiving,
    reserving,
    share_bytes,
)
from benchmarks.sizing.model import ENDPOINTS, GATEWAYS, Load, Unit, rounded, sized
from benchmarks.sizing.readings import Redis
from testbed.redis_server import running


def measured(url: str, redis: Redis) -> Unit:
    """Everything that a table is computed from."""
    costs, delivery_s = messages(url, redis)
    block_bytes, block_s = announced_block()
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
        connection_bytes=connection_bytes(url, redis),
        peer_row_bytes=allocated(peer_rows) / 15_000,
        history_block_bytes=allocated(history) / SAMPLE_BLOCKS,
        announced_block_bytes=block_bytes,
        announced_block_s=block_s,
    )


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
