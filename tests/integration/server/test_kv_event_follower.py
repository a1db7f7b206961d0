"""The start-up of announcements against engines over real sockets: ask, check, follow, fall back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
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
from extproc.routing.event_caches import EventCaches
from extproc.server.engines.kv_event_follower import KvEventFollower
from extproc.values.endpoints import Endpoint
from metadata_center.addresses import Address
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.types import EndpointKey
from tests.waiting import until

pytestmark = pytest.mark.asyncio

DATA = Path(__file__).parents[2] / "data" / "rendering"
FAMILY = "chatml"
BLOCK_TOKENS = 4
TEXT = "what an engine computes it announces, and what it announces is found again as text, block by block"


class Rank:
    """One publisher: a PUB and a ROUTER that replays all it ever published."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.batches: list[bytes] = []
        self.pub = context.socket(zmq.PUB)
        self.router = context.socket(zmq.ROUTER)
        for socket in (self.pub, self.router):
            socket.bind("tcp://127.0.0.1:*")

    @property
    def answer(self) -> dict[str, Any]:
        """As the engine names it."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.pub.getsockopt_string(zmq.LAST_ENDPOINT),
            "replay_endpoint": self.router.getsockopt_string(zmq.LAST_ENDPOINT),
            "topic": "",
        }

    async def publish(self, event: dict[str, Any]) -> None:
        """A batch of one event."""
        self.batches.append(msgspec.msgpack.encode([time.time(), [event], 0]))
        number = len(self.batches) - 1
        await self.pub.send_multipart([b"", number.to_bytes(8, "big"), self.batches[number]])

    async def replay(self) -> None:
        """Answer for ever."""
        while True:
            peer, _, start = await self.router.recv_multipart()
            for number in range(int.from_bytes(start, "big"), len(self.batches)):
                frames = [peer, b"", b"", number.to_bytes(8, "big"), self.batches[number]]
                await self.router.send_multipart(frames)
            await self.router.send_multipart([peer, b"", b"", b"\xff" * 8, b""])


class Engine:
    """`/tokenize`, `/kv_event_sources` and two ranks; completions are tokenized, chats are not."""

    def __init__(self) -> None:
        self.rendering = load(DATA / FAMILY)
        self.agrees = True
        self.named = [0]  # ranks that it says it has
        self.claimed: list[dict[str, Any]] = []  # publishers of others that it says are its own
        self.asked = 0  # how often
        self.port = 0
        self._context = zmq.asyncio.Context()
        self.ranks = [Rank(self._context), Rank(self._context)]

    @property
    def endpoint(self) -> Endpoint:
        """As the gateway knows it."""
        return Endpoint(EndpointKey(f"uid/{self.port}"), "c", Address("127.0.0.1", self.port))

    async def start(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/kv_event_sources", self._sources)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self._replays = [asyncio.create_task(rank.replay()) for rank in self.ranks]

    async def stop(self) -> None:
        """Close."""
        for task in self._replays:
            task.cancel()
        await asyncio.wait(self._replays)
        await self._runner.cleanup()
        self._context.destroy(linger=0)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            return web.json_response({"error": {"message": "no chat template"}}, status=400)
        ids = self.rendering.encoder.encode(self.rendering.canonical.of(body["prompt"]).decode())
        return web.json_response({"count": len(ids), "tokens": ids if self.agrees else ids[::-1]})

    async def _sources(self, _: web.Request) -> web.Response:
        self.asked += 1
        answers = [*(self.ranks[number].answer for number in self.named), *self.claimed]
        return web.json_response({str(number): answer for number, answer in enumerate(answers)})

    async def compute(self, text: str, *, rank: int = 0) -> int:
        """Compute a prompt and publish its blocks; returns how many of its tokens are cached for it now."""
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
        await self.ranks[rank].publish(stored)
        return (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


class Gateway:
    """The part of a worker that follows engines."""

    def __init__(self) -> None:
        self.known: dict[EndpointKey, tuple[Endpoint, ...]] = {}
        self.caches = CacheMap()
        self.event_caches = EventCaches(self.caches, time.time)
        self.kv_event_follower = KvEventFollower(self.caches, self.event_caches, time.monotonic, time.time)

    def configure(
        self,
        engines: list[Engine],
        *,
        tokenizer: str | None = FAMILY,
        served: str = "m",
        variables: dict[str, Any] | None = None,
    ) -> None:
        """These engines serve model `m`, under the name `served`."""
        model: dict[str, Any] = {
            "rules": [{"cluster": "c", "model": served}],
            "chat_template_kwargs": variables or {},
        }
        if tokenizer is not None:
            model["tokenizer"] = tokenizer
        config = parse_config(orjson.dumps({"models": {"m": model}}).decode(), "tokenway.yaml")
        gone = dict.fromkeys(self.known, ())
        self.known = {engine.endpoint.key: (engine.endpoint,) for engine in engines}
        self.kv_event_follower.configure(config, DATA)
        self.kv_event_follower.update({**gone, **self.known})

    def tokens(self, engine: Engine) -> int | None:
        """What is believed cached of `TEXT` by an engine; None if it does not announce."""
        request = parse("/v1/completions", orjson.dumps({"model": "m", "prompt": TEXT}))
        found = self.event_caches.match(request, "m", None, (engine.endpoint.key,), 0.25)
        return None if found is None else found.tokens[0]

    def came_back(self, engine: Engine) -> None:
        """Health has it that this engine answers again."""
        self.kv_event_follower.came_back(engine.endpoint.key)

    def is_announcing(self, engine: Engine) -> bool:
        """True if it speaks for itself."""
        return self.event_caches.is_announcing(engine.endpoint.key)

    @property
    def sources(self) -> int:
        """Publishers that are followed."""
        return sum(self.kv_event_follower.stats.sources.values())


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
    gateway.kv_event_follower.start()
    yield gateway
    await gateway.kv_event_follower.stop()


async def test_an_engine_is_found_checked_and_followed(gateway: Gateway) -> None:
    """What it computed before, what it computes now, and nothing once it is no longer configured."""
    async with started() as engine:
        hit = await engine.compute(TEXT)
        gateway.configure([engine])
        await until(lambda: gateway.tokens(engine) == hit)
        assert gateway.is_announcing(engine)
        gateway.configure([])
        await until(lambda: gateway.tokens(engine) is None)
        assert gateway.caches.stats.replicas == 0


async def test_an_engine_that_tokenizes_otherwise_is_left_to_history(gateway: Gateway) -> None:
    """Files of another model: nothing is believed of its events."""
    async with started() as engine, started() as honest:
        engine.agrees = False
        await engine.compute(TEXT)
        await honest.compute(TEXT)
        gateway.configure([engine, honest])
        await until(lambda: bool(gateway.tokens(honest)))
        assert not gateway.is_announcing(engine)
        assert gateway.tokens(engine) is None


async def test_an_engine_that_begins_to_publish_is_noticed(gateway: Gateway) -> None:
    """It is asked again; coming back to health asks it at once."""
    async with started() as engine:
        engine.named = []
        gateway.configure([engine])
        await until(lambda: engine.asked > 0)
        assert not gateway.is_announcing(engine)
        engine.named = [0]
        gateway.came_back(engine)
        await until(lambda: gateway.is_announcing(engine))
        await engine.compute(TEXT)
        await until(lambda: bool(gateway.tokens(engine)))


async def test_an_engine_that_publishes_no_longer_is_followed_no_longer(gateway: Gateway) -> None:
    """It came back as one without publishers: history speaks for it, and its map is empty."""
    async with started() as engine, started() as other:
        hit = await engine.compute(TEXT)
        await other.compute(TEXT)
        gateway.configure([engine, other])
        await until(lambda: gateway.tokens(engine) == gateway.tokens(other) == hit)
        engine.named = []
        gateway.came_back(engine)
        await until(lambda: gateway.sources == 1)
        assert gateway.caches.stats.replicas == 1
        assert (gateway.tokens(engine), gateway.tokens(other)) == (None, hit)
        engine.named = [0]
        gateway.came_back(engine)
        await until(lambda: gateway.tokens(engine) == hit)


async def test_an_engine_that_agrees_no_longer_is_followed_no_longer(gateway: Gateway) -> None:
    """Asked anew, it has another tokenizer; once it agrees again, all that it published is learned again."""
    async with started() as engine:
        hit = await engine.compute(TEXT)
        gateway.configure([engine])
        await until(lambda: gateway.tokens(engine) == hit)
        engine.agrees = False
        gateway.configure([engine], served="n")  # asks, and nothing else
        await until(lambda: not gateway.is_announcing(engine))
        assert (gateway.caches.stats.replicas, gateway.sources) == (0, 0)
        engine.agrees = True
        gateway.came_back(engine)
        await until(lambda: gateway.tokens(engine) == hit)


async def test_a_rank_that_is_added_leaves_the_others_as_they_are(gateway: Gateway) -> None:
    """What the first rank announced is not learned anew, and need not be replayed."""
    async with started() as engine:
        hit = await engine.compute(TEXT)
        gateway.configure([engine])
        await until(lambda: gateway.tokens(engine) == hit)
        engine.named = [0, 1]
        gateway.came_back(engine)
        await until(lambda: gateway.sources == 2 and gateway.is_announcing(engine))
        assert gateway.tokens(engine) == hit


@pytest.mark.parametrize("liar_first", [False, True])
async def test_an_engine_that_names_anothers_publisher_keeps_none_from_being_followed(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, liar_first: bool
) -> None:
    """The other one, or the one that comes after, goes on announcing; who is second is left to history."""
    async with started() as honest, started() as liar, started() as later:
        liar.claimed = [honest.ranks[0].answer]
        first = liar if liar_first else honest
        hit = await honest.compute(TEXT)
        gateway.configure([first])
        await until(lambda: gateway.is_announcing(first))
        gateway.configure([honest, liar, later])
        await until(lambda: gateway.is_announcing(later) and honest.asked > 0 and liar.asked > 0)
        assert gateway.is_announcing(first)
        second = honest if liar_first else liar
        problem = f"it names a publisher of {first.endpoint.key}"
        await until(lambda: problem in [getattr(each, "problem", "") for each in caplog.records])
        assert not gateway.is_announcing(second)
        assert await later.compute(TEXT) == hit
        await until(lambda: gateway.tokens(later) == hit)
        gateway.configure([second, later])
        await until(lambda: gateway.is_announcing(second))
        assert gateway.tokens(later) == hit


async def test_what_a_rank_held_goes_with_it(gateway: Gateway) -> None:
    """An engine that came back with fewer ranks is not believed to hold what the others had."""
    async with started() as engine:
        engine.named = [0, 1]
        hit = await engine.compute(TEXT, rank=1)
        gateway.configure([engine])
        await until(lambda: gateway.tokens(engine) == hit)
        engine.named = [0]
        gateway.came_back(engine)
        await until(lambda: gateway.sources == 1 and gateway.is_announcing(engine))
        assert gateway.tokens(engine) == 0
        assert gateway.caches.stats.held == 0


async def test_an_engine_that_dropped_its_cache_is_believed_empty(gateway: Gateway) -> None:
    """All its ranks, at once; it alone, and it goes on announcing."""
    async with started() as engine, started() as other:
        engine.named = [0, 1]
        hit = await engine.compute(TEXT)
        await engine.compute(TEXT, rank=1)
        await other.compute(TEXT)
        gateway.configure([engine, other])
        await until(lambda: gateway.tokens(engine) == gateway.tokens(other) == hit)
        gateway.kv_event_follower.cleared(engine.endpoint.key)
        gateway.kv_event_follower.cleared(EndpointKey("127.0.0.1:1"))
        assert (gateway.tokens(engine), gateway.tokens(other)) == (0, hit)
        await engine.compute(TEXT)
        await until(lambda: gateway.tokens(engine) == hit)


async def test_other_template_variables_are_learned_anew(gateway: Gateway) -> None:
    """What was announced under the former configuration is found under the new one as well."""
    async with started() as engine:
        hit = await engine.compute(TEXT)
        gateway.configure([engine])
        await until(lambda: gateway.tokens(engine) == hit)
        gateway.configure([engine], variables={"enable_thinking": False})
        await until(lambda: engine.asked == 2 and gateway.tokens(engine) == hit)


async def test_why_an_engine_does_not_announce_is_logged_when_it_changes(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is asked; and once more if it announced meanwhile."""
    monkeypatch.setattr("extproc.server.engines.kv_event_follower._FIRST_RETRY_S", 0.01)
    caplog.set_level(logging.INFO, "tokenway.kv_events")

    def logged() -> list[str]:
        return [
            vars(record)["reason"]
            for record in caplog.records
            if record.getMessage() == "endpoint does not announce"
        ]

    async with started() as engine:
        engine.named = []
        gateway.configure([engine])
        await until(lambda: engine.asked > 2)
        gateway.came_back(engine)
        before = engine.asked
        await until(lambda: engine.asked > before + 2)
        assert logged() == ["it publishes no events"]
        engine.named, engine.agrees = [0], False
        await until(lambda: len(logged()) == 2)
        before = engine.asked
        await until(lambda: engine.asked > before + 2)
        assert logged()[1:] == ["it does not agree with the tokenizer files"]
        differing = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len({vars(record)["reason"] for record in differing}) == len(differing)
        engine.agrees = True
        await until(lambda: gateway.is_announcing(engine))
        engine.agrees = False
        gateway.came_back(engine)
        await until(lambda: logged()[2:] == ["it does not agree with the tokenizer files"])


async def test_without_a_tokenizer_no_engine_is_asked(gateway: Gateway) -> None:
    """And a folder that holds none is an error in the log, not the end of the gateway."""
    async with started() as engine:
        gateway.configure([engine], tokenizer=None)
        gateway.configure([engine], tokenizer="nowhere")
        gateway.configure([engine])
        await until(lambda: gateway.is_announcing(engine))
