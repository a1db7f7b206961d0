"""Cache events on the wire, against captures of vLLM 0.32."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.kv_events import REPLAY_END, EventBatch
from tokenway.simulator.server.settings import KvEventsConfig, ServerSettings

CAPTURES = sorted((Path(__file__).parent / "captures").glob("*.bin"))
SETTINGS = ServerSettings(
    models=("tiny",),
    profile=replace(PROFILES["demo"], block_size=32, kv_tokens=256),
    time_scale=0.05,
    kv_events=KvEventsConfig("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "kv@replica-1@tiny"),
)


@pytest.fixture
async def server() -> AsyncIterator[SimulatorServer]:
    """A replica of eight 32-token blocks that publishes its events."""
    async with running(SETTINGS) as started:
        yield started


async def _complete(server: SimulatorServer, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, **fields}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/completions", json=body) as answer,
    ):
        assert answer.status == 200
        decoded: dict[str, Any] = await answer.json()
        return decoded


async def _post(server: SimulatorServer, path: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(server.url + path) as answer:
        assert answer.status == 200


async def _replay(server: SimulatorServer, start: int = 0) -> list[list[bytes]]:
    """`[topic, sequence number, payload]` of every batch from `start`, by the replay protocol."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/kv_event_sources") as answer:
        endpoint = (await answer.json())["0"]["replay_endpoint"]
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    batches: list[list[bytes]] = []
    try:
        dealer.connect(endpoint)
        await dealer.send_multipart([b"", start.to_bytes(8, "big")])
        while True:
            async with asyncio.timeout(5):
                frames = await dealer.recv_multipart()
            assert frames[0] == b""
            if frames[2] == REPLAY_END:
                assert frames[1:] == [b"", b"\xff" * 8, b""]
                return batches
            batches.append(frames[1:])
    finally:
        context.destroy(linger=0)


def _events(payload: bytes) -> list[dict[str, Any]]:
    """Events of a batch with hashes replaced by their order of appearance, since the algorithms differ."""
    timestamp, events, rank = msgspec.msgpack.decode(payload)
    assert (type(timestamp), rank) == (float, 0)
    names: dict[int, int] = {}
    for event in events:
        if "block_hashes" in event:
            event["block_hashes"] = [names.setdefault(key, len(names)) for key in event["block_hashes"]]
        if event.get("parent_block_hash") is not None:
            event["parent_block_hash"] = "earlier"
    return list(events)


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)
def test_a_captured_batch_survives_decoding_and_encoding_byte_for_byte(path: Path) -> None:
    """Field names, order, defaults and integer widths are those of vLLM."""
    captured = path.read_bytes()
    batch = msgspec.msgpack.decode(captured, type=EventBatch)
    assert msgspec.msgpack.encode(batch) == captured


async def test_the_captured_scenario_gives_the_captured_events(server: SimulatorServer) -> None:
    """The same requests that were sent to vLLM leave the same events, hashes and times apart."""
    first = list(range(100, 200))
    await _complete(server, first)
    await _complete(server, first + list(range(300, 330)))
    await _complete(server, list(range(1000, 1064)), session_id="sess-42")
    await _post(server, "/reset_prefix_cache")
    await _complete(server, first)
    captured = {path.stem: _events(path.read_bytes()) for path in CAPTURES}
    assert [_events(payload) for _, _, payload in await _replay(server)] == [
        captured["kv1_000_seq0"],
        captured["kv1_001_seq1"],
        captured["kv1_006_seq6"],
        captured["kv1_012_seq12"],
    ]


async def test_frames_carry_topic_and_gapless_numbers(server: SimulatorServer) -> None:
    """Sequence numbers start at 0, are big-endian, and a replay starts where it is asked to."""
    for start in (0, 1000, 2000):
        await _complete(server, list(range(start, start + 40)))
    frames = await _replay(server)
    assert [frame[0] for frame in frames] == [b"kv@replica-1@tiny"] * 3
    assert [int.from_bytes(frame[1], "big") for frame in frames] == [0, 1, 2]
    assert await _replay(server, 2) == frames[2:]
    assert await _replay(server, 3) == []


async def test_a_subscriber_gets_what_a_replay_repeats(server: SimulatorServer) -> None:
    """PUB and ROUTER carry the same events, and a pure hit has none."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/kv_event_sources") as answer:
        source = (await answer.json())["0"]
    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    try:
        subscriber.subscribe(b"kv@")
        subscriber.connect(source["endpoint"])
        received: list[list[bytes]] = []
        async with asyncio.timeout(5):
            # The first batches may be lost while the subscription travels, as with any PUB socket.
            for start in range(0, 100_000, 100):
                await _complete(server, list(range(start, start + 40)))
                if await subscriber.poll(20):
                    received.append(await subscriber.recv_multipart())
                    break
            await _complete(server, list(range(start, start + 40)))
            await _complete(server, list(range(7, 47)))
            received.append(await subscriber.recv_multipart())
        assert received == (await _replay(server))[-2:]
    finally:
        context.destroy(linger=0)


async def test_blocks_filled_while_decoding_and_evicted_ones_are_announced(server: SimulatorServer) -> None:
    """Generated tokens extend the chain; making room names each removed block in its own event."""
    await _complete(server, list(range(60)), max_tokens=40, ignore_eos=True)
    chains = [_events(frame[2]) for frame in await _replay(server)]
    assert [len(event["token_ids"]) for events in chains for event in events] == [32, 32, 32]
    assert [events[0]["parent_block_hash"] for events in chains] == [None, "earlier", "earlier"]
    await _complete(server, list(range(5000, 5000 + 230)))
    kinds = [event["type"] for event in _events((await _replay(server))[-1][2])]
    assert kinds == ["BlockRemoved", "BlockRemoved", "BlockRemoved", "BlockStored"]


async def test_a_cache_salt_separates_and_is_announced_on_block_zero(server: SimulatorServer) -> None:
    """A salted prompt misses the unsalted one's blocks and says why."""
    prompt = list(range(100))
    await _complete(server, prompt)
    answer = await _complete(server, prompt, cache_salt="tenant-a")
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    salted = _events((await _replay(server))[-1][2])
    assert salted[0]["extra_keys"] == [["tenant-a"], None, None]


async def test_a_publisher_connects_to_a_plain_address_as_vllm_does() -> None:
    """The subscriber binds and the replica comes to it, unless it is to bind."""
    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    try:
        subscriber.subscribe(b"")
        port = subscriber.bind_to_random_port("tcp://127.0.0.1")
        config = KvEventsConfig(f"tcp://127.0.0.1:{port}")
        async with running(replace(SETTINGS, kv_events=config)) as server, asyncio.timeout(5):
            start = 0
            while not await subscriber.poll(20):
                start += 100
                await _complete(server, list(range(start, start + 40)))
            assert (await subscriber.recv_multipart())[0] == b""
    finally:
        context.destroy(linger=0)
