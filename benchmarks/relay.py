"""What an access-log entry costs that reaches another replica than the one that decided: CPU of both sides.

    python -m benchmarks.relay [--entries N] [--rounds N]

Two processes, a replica each, and a real redis-server. One sends the ends of requests on at an even pace, so
many in a turn of its event loop as a message of Envoy's log has; the other takes them in, and does nothing
with them. CPU is each process's own, from the first entry sent to the last one taken in, the median of the
rounds and the range. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import cpu_name
from extproc.server.exchanging.entry_relay import EntryRelay
from extproc.values.endings import RequestEnd, RequestEvent
from extproc.values.outcomes import Ended
from metadata_center.addresses import Address
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.types import RequestId
from testbed.redis_server import running

SENDER: Final = "0.1f3a5c7e"
RECEIVER: Final = "0.9b8d6f42"
PACE: Final = 2_000
"""Entries a second."""

TURNS: Final = (1, 8, 64)
"""Entries that are sent on in a turn."""

ENTRY: Final = RequestEnd(
    RequestId("6f1c2a8e-6b1d-4c55-9a51-0c9f3f5b7d21"),
    RECEIVER,
    Address("10.12.34.56", 8000),
    1,
    200,
    Ended.COMPLETED,
    "via_upstream",
    (),
    0.231,
    4.72,
    4.48,
    18_345,
    51_200,
    4_096,
    312,
    3_840,
    content_type="text/event-stream",
)


def _relay(url: str, owner: str, taken: list[RequestEvent]) -> EntryRelay:
    return EntryRelay(owner, RedisTransport(parse_url(url), prefix="bench"), taken.append)


async def receive(url: str, entries: int) -> None:
    """Print when it listens, and its CPU per entry when it has them all."""
    taken: list[RequestEvent] = []
    relay = _relay(url, RECEIVER, taken)
    await relay.start()
    await asyncio.sleep(0.5)  # the subscription
    print("listens", flush=True)
    before = time.process_time()
    while len(taken) < entries:  # noqa: ASYNC110 - its cost is that of 20 wake-ups a second
        await asyncio.sleep(0.05)
    print((time.process_time() - before) / entries, flush=True)
    await relay.stop()


async def send(url: str, entries: int, turn: int) -> float:
    """Send them on; CPU per entry, the pacing left out."""
    relay = _relay(url, SENDER, [])
    await relay.start()
    made = [replace(ENTRY, request_id=RequestId(f"{number:036x}")) for number in range(entries)]
    own, began = time.process_time(), time.monotonic()
    for at in range(0, entries, turn):
        for entry in made[at : at + turn]:
            relay.hand_over(RECEIVER, entry)
        await asyncio.sleep(max(0.0, began + (at + turn) / PACE - time.monotonic()))
    await asyncio.sleep(0.2)  # the last ones
    own = time.process_time() - own
    assert not relay.dropped
    await relay.stop()
    idle = time.process_time()
    began = time.monotonic()
    for at in range(0, entries, turn):
        await asyncio.sleep(max(0.0, began + (at + turn) / PACE - time.monotonic()))
    return (own - (time.process_time() - idle)) / entries


async def measured(url: str, entries: int, turn: int) -> tuple[float, float]:
    """CPU of the sender and of the receiver, seconds per entry."""
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.relay", "--receive", url, "--entries", str(entries)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert other.stdout is not None
    await other.stdout.readline()
    sent = await send(url, entries, turn)
    received = float(await other.stdout.readline())
    await other.wait()
    return sent, received


async def compare(entries: int, rounds: int) -> dict[str, Any]:
    """Every size of a turn, by turns."""
    found: dict[int, list[tuple[float, float]]] = {turn: [] for turn in TURNS}
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as redis:
        for _ in range(rounds):
            for turn in TURNS:
                found[turn].append(await measured(redis.url, entries, turn))
    result: dict[str, Any] = {"cpu": cpu_name(), "load": os.getloadavg()[0], "entries": entries}
    for turn, pairs in found.items():
        for side, seconds in zip(("sender", "receiver"), zip(*pairs, strict=True), strict=True):
            least, middle, most = min(seconds) * 1e6, statistics.median(seconds) * 1e6, max(seconds) * 1e6
            print(f"{turn:3} a turn, {side:8} {middle:6.1f} µs an entry ({least:.1f} to {most:.1f})")
            result[f"{side}_{turn}_us"] = round(middle, 2)
    return result


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", type=int, default=6_400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--receive", metavar="URL", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.receive is not None:
        asyncio.run(receive(words.receive, words.entries))
    else:
        print(json.dumps(asyncio.run(compare(words.entries, words.rounds))))


if __name__ == "__main__":
    main()
