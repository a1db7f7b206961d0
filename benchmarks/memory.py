"""What Tokenway keeps in memory: idle with a hundred endpoints, after traffic, and per request in flight.

    make bench-memory          (python -m benchmarks.memory)

Resident memory of the worker, from /proc. A request in flight is one that its engine has and does not answer:
its ext_proc call is over, its charge, its record and the blocks of its prompt are kept. What one takes is the
growth over some hundreds, after the same prompts were there before: what is kept but once is there by then.
The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.setups import Setup, python_module, setup
from benchmarks.traffic import Client, closed_loop, held_request, requests
from testbed.processes import free_port

ENDPOINTS: Final = 100
FIRST_SCRAPES_S: Final = 8.0
"""Probes and scrapes of each endpoint, once or twice."""

SETTLED_S: Final = 1.0
PROMPTS_BYTES: Final = (4096, 220_000)
WARM_UP_S: Final = 6.0
CONCURRENCY: Final = 16


async def measure(count: int) -> dict[str, Any]:
    """All figures.

    Args:
        count: Requests held in flight at once.
    """
    engine = free_port()
    every_address = "0.0.0.0"  # noqa: S104 - 127.0.x.y stand for a hundred engines
    with (
        tempfile.TemporaryDirectory(prefix="twm", ignore_cleanup_errors=True) as folder,
        python_module("benchmarks.traffic", every_address, str(engine)),
    ):
        async with setup("tokenway", Path(folder), [engine], first_chunk=True, endpoints=ENDPOINTS) as target:
            await asyncio.sleep(FIRST_SCRAPES_S)
            figures: dict[str, Any] = {"idle_mib": round(target.rss_mib(), 1)}
            for prompt_bytes in PROMPTS_BYTES:
                figures |= await _with_prompts(target, prompt_bytes, count)
    return figures


async def _with_prompts(target: Setup, prompt_bytes: int, count: int) -> dict[str, Any]:
    kilobytes = prompt_bytes // 1000
    await closed_loop(target, requests(count, prompt_bytes), CONCURRENCY, WARM_UP_S)
    await _held(target, prompt_bytes, count)  # their prompts are in the routing history from now on
    await asyncio.sleep(SETTLED_S)
    before_mib = target.rss_mib()
    during_mib = await _held(target, prompt_bytes, count)
    return {
        f"mib_after_{kilobytes}kb_prompts": round(before_mib, 1),
        f"kib_per_request_in_flight_{kilobytes}kb": round((during_mib - before_mib) * 1024 / count, 2),
    }


async def _held(target: Setup, prompt_bytes: int, count: int) -> float:
    """Resident memory while so many requests are in flight."""
    clients = []
    for number in range(count):
        client = await Client.connect(target.port)
        client.send(held_request(prompt_bytes, f"held{number:06d}"))
        clients.append(client)
    await asyncio.sleep(SETTLED_S)
    found_mib = target.rss_mib()
    for client in clients:
        client.close()
    return found_mib


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=400, help="in flight at once")
    print(json.dumps(asyncio.run(measure(parser.parse_args().requests))))


if __name__ == "__main__":
    main()
