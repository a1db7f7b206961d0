"""The start-up of announcements against engines over real sockets: ask, check, follow, fall back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from extproc.config.loading import parse as parse_config
from extproc.rendering.loading import load
from extproc.request.parse import parse
from extproc.routing.announced import Announced
from extproc.server.announcements import Announcements
from extproc.types import Endpoint
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.types import EndpointKey

pytestmark = pytest.mark.asyncio

DATA = Path(__file__).parents[1] / "data" / "rendering"
FAMILY = "chatml"
BLOCK_TOKENS = 4
TEXT = "what an engine computes it announces, and what it announces is found again as text, block by block"
WITHIN_S = 15.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds, or fail."""
    deadline_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to hold"
        await asyncio.sleep(0.01)


class Engine:
    """`/tokenize`, `/kv_event_sources`, a PUB and a ROUTER; completions are tokenized, chats are not."""

    def __init__(self) -> None:
        self.rendering = load(DATA / FAMILY)
        self.agrees = True
        self.publishes = True
        self.batches: list[bytes] = []
        self.port = 0
        self._context = zmq.asyncio.Context()
        self.pub = self._context.socket(zmq.PUB)
        self.router = self._context.socket(zmq.ROUTER)
        for socket in (self.pub, self.router):
            socket.bind("tcp://127.0.0.1:*")

    @property
    def endpoint(self) -> Endpoint:
        """As the gateway knows it."""
        return Endpoint(EndpointKey(f"127.0.0.1:{self.port}"), "c")

    async def start(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/kv_event_sources", self._sources)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self._replays = asyncio.create_task(self._replay())

    async def stop(self) -> None:
        """Close."""
        self._replays.cancel()
        await asyncio.wait([self._replays])
        await self._runner.cleanup()
        self._context.destroy(linger=0)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            return web.json_response({"error": {"message": "no chat template"}}, status=400)
        ids = self.rendering.encoder.encode(self.rendering.canonical.of(body["prompt"]).decode())
        return web.json_response({"count": len(ids), "tokens": ids if self.agrees else ids[::-1]})

    async def _sources(self, _: web.Request) -> web.Response:
        if not self.publishes:
            return web.json_response({})
        rank = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.pub.getsockopt_string(zmq.LAST_ENDPOINT),
            "replay_endpoint": self.router.getsockopt_string(zmq.LAST_ENDPOINT),
            "topic": "",
        }
        return web.json_response({"0": rank})

    async def compute(self, text: str) -> int:
        """Compute a prompt and publish its blocks; returns its tokens."""
        ids = self.rendering.encoder.encode(text)
        blocks = len(ids) // BLOCK_TOKENS
        stored = {
            "type": "BlockStored",
            "block_hashes": [hash(tuple(ids[: (i + 1) * BLOCK_TOKENS])) & (2**63 - 1) for i in range(blocks)],
            "parent_block_hash": None,
            "token_ids": ids[: blocks * BLOCK_TOKENS],
            "block_size": BLOCK_TOKENS,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }
        self.batches.append(msgspec.msgpack.encode([time.time(), [stored], 0]))
        number = len(self.batches) - 1
        await self.pub.send_multipart([b"", number.to_bytes(8, "big"), self.batches[number]])
        return len(ids)

    async def _replay(self) -> None:
        while True:
            peer, _, start = await self.router.recv_multipart()
            for number in range(int.from_bytes(start, "big"), len(self.batches)):
                frames = [peer, b"", b"", number.to_bytes(8, "big"), self.batches[number]]
                await self.router.send_multipart(frames)
            await self.router.send_multipart([peer, b"", b"", b"\xff" * 8, b""])


class Gateway:
    """The part of a worker that follows engines."""

    def __init__(self) -> None:
        self.caches = CacheMap()
        self.announced = Announced(self.caches, time.time)
        self.announcements = Announcements(self.caches, self.announced, time.monotonic, time.time)

    def configure(self, engines: list[Engine], *, tokenizer: str | None = FAMILY) -> None:
        """These engines serve model `m`."""
        model: dict[str, Any] = {"rules": [{"cluster": "c"}]}
        if tokenizer is not None:
            model["tokenizer"] = tokenizer
        config = parse_config(orjson.dumps({"models": {"m": model}}).decode(), "tokenway.yaml")
        self.announcements.configure(config, {"c": [engine.endpoint for engine in engines]}, DATA)

    def tokens(self, engine: Engine) -> int | None:
        """What is believed cached of `TEXT` by an engine; None if it does not announce."""
        request = parse("/v1/completions", orjson.dumps({"model": "m", "prompt": TEXT}))
        found = self.announced.match(request, "m", None, (engine.endpoint.key,), 0.25)
        return None if found is None else found.tokens[0]


@asynccontextmanager
async def started() -> AsyncIterator[Engine]:
    """An engine for the length of a block."""
    engine = Engine()
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    """Started, with nothing to follow."""
    gateway = Gateway()
    gateway.announcements.start()
    yield gateway
    await gateway.announcements.stop()


async def test_an_engine_is_found_checked_and_followed(gateway: Gateway) -> None:
    """What it computed before, what it computes now, and nothing once it is no longer configured."""
    async with started() as engine:
        tokens = await engine.compute(TEXT)
        gateway.configure([engine])
        hit = (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        await until(lambda: gateway.tokens(engine) == hit)
        assert gateway.announced.is_announcing(engine.endpoint.key)
        gateway.configure([])
        await until(lambda: gateway.tokens(engine) is None)
        assert gateway.caches.stats.replicas == 0


async def test_an_engine_that_tokenizes_otherwise_is_left_to_history(gateway: Gateway) -> None:
    """Files of another model: nothing is believed of its announcements."""
    async with started() as engine, started() as honest:
        engine.agrees = False
        await engine.compute(TEXT)
        await honest.compute(TEXT)
        gateway.configure([engine, honest])
        await until(lambda: bool(gateway.tokens(honest)))
        assert not gateway.announced.is_announcing(engine.endpoint.key)
        assert gateway.tokens(engine) is None


async def test_an_engine_that_begins_to_publish_is_noticed(gateway: Gateway) -> None:
    """It is asked again; coming back to health asks it at once."""
    async with started() as engine:
        engine.publishes = False
        gateway.configure([engine])
        await asyncio.sleep(0.2)
        assert not gateway.announced.is_announcing(engine.endpoint.key)
        engine.publishes = True
        gateway.announcements.came_back(engine.endpoint.key)
        await until(lambda: gateway.announced.is_announcing(engine.endpoint.key))
        await engine.compute(TEXT)
        await until(lambda: bool(gateway.tokens(engine)))


async def test_without_a_tokenizer_nobody_is_asked(gateway: Gateway) -> None:
    """And a folder that holds none is an error in the log, not the end of the gateway."""
    async with started() as engine:
        gateway.configure([engine], tokenizer=None)
        gateway.configure([engine], tokenizer="nowhere")
        gateway.configure([engine])
        await until(lambda: gateway.announced.is_announcing(engine.endpoint.key))
