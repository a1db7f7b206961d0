"""KV cache events as vLLM 0.32 puts them on ZeroMQ.

Rules:
    1. A batch is a msgpack array `[ts, events, data_parallel_rank]`; an event is a map tagged by `type`.
    2. Frames are `[topic, sequence number u64 big-endian, payload]`; numbers start at 0 and have no gaps.
    3. A physical block is announced once when stored and once when removed; nothing is sent for a hit.
    4. As in vLLM, PUB binds only to a wildcard, `ipc://` or `inproc://` address and connects to any other
       one, unless it is to bind; the replay ROUTER always binds.

Source: captures from a running engine, byte for byte.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tokenway.simulator.engine.prefix_cache import BlocksRemoved, BlocksStored, CacheEvent
from tokenway.simulator.server.settings import BlockSource, KvEventsConfig

_HIGH_WATER_MARK = 100_000  # vLLM's default
REPLAY_END = (-1).to_bytes(8, "big", signed=True)


class BlockStored(msgspec.Struct, tag="BlockStored", omit_defaults=True):
    """Consecutive full blocks of one sequence; `token_ids` covers all of them."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", omit_defaults=True):
    """One physical block gone."""

    block_hashes: list[int | bytes]
    medium: str
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    """The whole cache gone."""


class EventBatch(msgspec.Struct, array_like=True):
    """What one engine step did to the cache; `ts` is Unix time in seconds."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def to_wire(
    events: Iterable[CacheEvent], block_size: int
) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
    """The engine's events as vLLM words them; stored events must carry a `BlockSource`."""
    wire: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
    for event in events:
        if isinstance(event, BlocksStored):
            source: BlockSource = event.source
            start = event.first_block * block_size
            extra: list[list[Any] | None] = [None] * len(event.keys)
            if source.cache_salt and not event.first_block:
                extra[0] = [source.cache_salt]
            wire.append(
                BlockStored(
                    list(event.keys),
                    event.parent,
                    source.token_ids[start : start + len(event.keys) * block_size].tolist(),
                    block_size,
                    None,
                    "GPU",
                    None,
                    extra,
                    0,
                    "full_attention",
                    source.session_id,
                )
            )
        elif isinstance(event, BlocksRemoved):
            wire.extend(BlockRemoved([key], "GPU", 0) for key in event.keys)
        else:
            wire.append(AllBlocksCleared())
    return wire


class KvEventPublisher:
    """Publishes batches and replays them on request. Owns its sockets and one task."""

    def __init__(self, config: KvEventsConfig, block_size: int, rank: int) -> None:
        self._config = config
        self._block_size = block_size
        self._rank = rank
        self._encoder = msgspec.msgpack.Encoder()
        self._topic = config.topic.encode()
        self._sequence = 0
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._pub_context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._pub: zmq.Socket[bytes] | None = None
        self._router: zmq.asyncio.Socket | None = None
        self._replay_task: asyncio.Task[None] | None = None
        self.endpoint = config.endpoint
        self.replay_endpoint = config.replay_endpoint

    def start(self) -> None:
        """Open the sockets; afterwards `endpoint` and `replay_endpoint` name real ports.

        Raises:
            zmq.ZMQError: An address cannot be bound.
        """
        self._pub_context = zmq.Context()
        self._pub = pub = self._pub_context.socket(zmq.PUB)
        pub.linger = 0
        pub.sndhwm = _HIGH_WATER_MARK
        endpoint = self._config.endpoint
        if self._config.bind or "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc", "inproc")):
            pub.bind(endpoint)
            self.endpoint = _reachable(pub.getsockopt_string(zmq.LAST_ENDPOINT))
        else:
            pub.connect(endpoint)
        if self._config.replay_endpoint is not None:
            self._router = router = zmq.asyncio.Context().socket(zmq.ROUTER)
            router.linger = 0
            router.bind(self._config.replay_endpoint)
            self.replay_endpoint = _reachable(router.getsockopt_string(zmq.LAST_ENDPOINT))
            self._replay_task = asyncio.create_task(self._serve_replay(router))

    def publish(self, events: Iterable[CacheEvent], ts: float) -> None:
        """Send one batch; never blocks, and drops it if no subscriber is there, as PUB does."""
        if self._pub is None:
            raise RuntimeError("the publisher is not started")
        batch = EventBatch(ts, to_wire(events, self._block_size), self._rank)
        payload = self._encoder.encode(batch)
        number = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        self._buffer.append((number, payload))
        self._pub.send_multipart((self._topic, number, payload), zmq.NOBLOCK)

    def describe(self) -> dict[str, Any]:
        """This rank's entry of `/kv_event_sources`."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.endpoint,
            "replay_endpoint": self.replay_endpoint,
            "buffer_steps": self._config.buffer_steps,
            "hwm": _HIGH_WATER_MARK,
            "max_queue_size": _HIGH_WATER_MARK,
            "topic": self._config.topic,
        }

    async def stop(self) -> None:
        """Close the sockets; unsent messages are dropped."""
        if self._replay_task is not None:
            self._replay_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._replay_task
        if self._router is not None:
            self._router.context.destroy(linger=0)
        if self._pub_context is not None:
            self._pub_context.destroy(linger=0)

    async def _serve_replay(self, router: zmq.asyncio.Socket) -> None:
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            peer, start = frames[0], frames[2]
            for number, payload in tuple(self._buffer):
                if number >= start:
                    await router.send_multipart((peer, b"", self._topic, number, payload))
            await router.send_multipart((peer, b"", b"", REPLAY_END, b""))


def _reachable(endpoint: str) -> str:
    """A bound address as a client on this host would write it."""
    return endpoint.replace("//0.0.0.0:", "//127.0.0.1:")
