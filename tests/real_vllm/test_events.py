"""Engines bind their KV event sockets, and a gateway that asks the engine can connect and replay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import pytest
import zmq
import zmq.asyncio

from testbed.vllm.engine import BLOCK_TOKENS, SERVED_MODEL
from tests.real_vllm.asking import text
from tests.real_vllm.conftest import Deployment

pytestmark = [pytest.mark.real_vllm, pytest.mark.asyncio(loop_scope="session")]

TIMEOUT_S: Final = 20.0
REPLAY_END: Final = (-1).to_bytes(8, "big", signed=True)


@asynccontextmanager
async def _connected(kind: int, address: str) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


async def _replayed(address: str) -> list[tuple[int, bytes]]:
    """Every batch that the engine still holds."""
    batches: list[tuple[int, bytes]] = []
    async with asyncio.timeout(TIMEOUT_S), _connected(zmq.DEALER, address) as socket:
        await socket.send_multipart([b"", (0).to_bytes(8, "big")])
        while True:
            *_, sequence, payload = await socket.recv_multipart()
            if sequence == REPLAY_END:
                return batches
            batches.append((int.from_bytes(sequence, "big"), payload))


@pytest.mark.parametrize("index", [0, 1], ids=["tcp", "ipc"])
async def test_an_engine_announces_what_it_caches(deployment: Deployment, index: int) -> None:
    """Two subscribers at the address the engine publishes get its batches; replay has all, without gaps."""
    replica = deployment.replicas[index]
    source = await replica.event_source()
    assert source["endpoint"].startswith(f"{replica.transport}://")
    assert "*" not in source["endpoint"]
    rng = random.Random(f"events {replica.port}")

    async def cache_something() -> None:
        await replica.post("/v1/completions", model=SERVED_MODEL, prompt=text(rng, 100), max_tokens=1)

    async def first_frame(subscriber: zmq.asyncio.Socket) -> tuple[int, bytes]:
        _, sequence, payload = await subscriber.recv_multipart()
        return int.from_bytes(sequence, "big"), payload

    async with (
        asyncio.timeout(TIMEOUT_S),
        _connected(zmq.SUB, source["endpoint"]) as one,
        _connected(zmq.SUB, source["endpoint"]) as other,
    ):
        frames = asyncio.gather(first_frame(one), first_frame(other))
        while not frames.done():  # a subscriber misses what is sent before its handshake is over
            await cache_something()
            await asyncio.wait([frames], timeout=0.05)
        received = await frames
    batches = await _replayed(source["replay_endpoint"])
    assert [sequence for sequence, _ in batches] == list(range(len(batches)))
    assert all(dict(batches)[sequence] == payload for sequence, payload in received)
    _, events, rank = msgspec.msgpack.decode(batches[-1][1])
    assert rank == 0
    assert {"BlockStored"} <= {event["type"] for event in events}
    stored = next(event for event in events if event["type"] == "BlockStored")
    assert stored["block_size"] == BLOCK_TOKENS
    assert len(stored["token_ids"]) == BLOCK_TOKENS * len(stored["block_hashes"])
