"""Bare publishers of cache events over real ZeroMQ sockets, and a subscriber that follows them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from metadata_center.kv_events.events import Batch, BlockStored
from metadata_center.kv_events.sequencing import SyncState
from metadata_center.kv_events.sources import Source
from metadata_center.kv_events.subscriber import KvEventSubscriber
from metadata_center.types import EndpointKey

ENGINE = EndpointKey("127.0.0.1:8000")


WITHIN_S = 10.0


class Engine:
    """The sockets of one publisher: PUB, and a ROUTER with a buffer, unless it is to have none."""

    def __init__(
        self,
        *,
        pub: str = "tcp://127.0.0.1:*",
        connect: bool = False,
        topic: bytes = b"",
        router: str | None = "tcp://127.0.0.1:*",
        legacy: bool = False,
        life: int = 0,
        buffered: int = 1000,
        hwm: int = 0,
    ) -> None:
        self.context = zmq.asyncio.Context()
        self.topic = topic
        self.legacy = legacy
        self.life = life
        self.buffered = buffered
        self.sent: list[bytes] = []
        self.pub = self.context.socket(zmq.PUB)
        self.pub.sndhwm = hwm
        if connect:
            self.pub.connect(pub)
        else:
            self.pub.bind(pub)
        self.events_address = self.pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_address: str | None = None
        self.asked: list[int] = []
        self.is_mute = False
        if router is not None:
            self.router = self.context.socket(zmq.ROUTER)
            self.router.sndhwm = 0
            self.router.bind(router)
            self.replay_address = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
            self.task = asyncio.create_task(self._replays())

    def source(self, endpoint: EndpointKey = ENGINE, rank: int = 0) -> Source:
        """Where it is, for a subscriber that connects."""
        return Source(endpoint, rank, self.events_address, self.replay_address)

    async def publish(self, *, is_lost: bool = False) -> None:
        """One batch, whose only block has the batch's number as its hash and the life as its parent."""
        number = len(self.sent)
        event = ["BlockStored", [number], self.life, [1, 2], 2, None, "GPU"]
        await self.publish_raw(msgspec.msgpack.encode([time.time(), [event], 0]), is_lost=is_lost)

    async def publish_raw(self, payload: bytes, *, is_lost: bool = False) -> None:
        """One batch of these bytes."""
        number = len(self.sent)
        self.sent.append(payload)
        if not is_lost:
            await self.pub.send_multipart((self.topic, number.to_bytes(8, "big"), payload))

    async def _replays(self) -> None:
        while True:
            peer, _, start = await self.router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            if self.is_mute:
                continue
            head = (peer, b"") if self.legacy else (peer, b"", self.topic)
            first = max(self.asked[-1], len(self.sent) - self.buffered)
            for number, payload in enumerate(self.sent[first:], first):
                await self.router.send_multipart((*head, number.to_bytes(8, "big"), payload))
            await self.router.send_multipart((*head, b"\xff" * 8, b""))

    async def stop(self) -> None:
        """Drop dead."""
        if self.replay_address is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.context.destroy(linger=0)

    def restarted(self) -> Engine:
        """A new life at the same addresses."""
        return Engine(
            pub=self.events_address, topic=self.topic, router=self.replay_address, life=self.life + 1
        )


@asynccontextmanager
async def engines(*started: Engine) -> AsyncIterator[None]:
    """Stop them in the end."""
    try:
        yield
    finally:
        for engine in started:
            await engine.stop()


class View:
    """What a subscriber delivered, as an index would apply it: `(life, number)` of each block, by source."""

    def __init__(self, **options: Any) -> None:
        self.blocks: dict[Source, list[tuple[int | None, int]]] = {}
        self.batches: list[tuple[Source, Batch]] = []
        self.clears: list[Source] = []
        self.states: list[SyncState] = []
        self.subscriber = KvEventSubscriber(
            on_batch=self._on_batch,
            on_clear=self._on_clear,
            on_state=lambda source, state: self.states.append(state),
            **options,
        )

    def _on_batch(self, source: Source, batch: Batch) -> None:
        self.batches.append((source, batch))
        for event in batch.events:
            if isinstance(event, BlockStored):
                known = self.blocks.setdefault(source, [])
                known.extend((event.parent, item) for item in event.hashes)

    def _on_clear(self, source: Source) -> None:
        self.clears.append(source)
        self.blocks.pop(source, None)

    def has(self, source: Source, life: int, count: int) -> Callable[[], bool]:
        """Whether the view is in sync and holds exactly the first `count` batches of a life."""
        expected = [(life, number) for number in range(count)]
        return lambda: (
            self.blocks.get(source, []) == expected and self.subscriber.state(source) is SyncState.IN_SYNC
        )


@asynccontextmanager
async def subscribed(*sources: Source, **options: Any) -> AsyncIterator[View]:
    """A running subscriber."""
    view = View(**options)
    view.subscriber.start()
    view.subscriber.set_sources(sources)
    try:
        yield view
    finally:
        await view.subscriber.stop()
