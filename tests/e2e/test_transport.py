"""Envoy and Tokenway's own HTTP/2 under what a few hundred quick requests never do to them."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from testbed.processes import get
from tests.e2e.harness import Recorder, Stack, chat, cluster, eventually, post, recording, running_stack

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

MEBIBYTE = 1 << 20
SECONDS = 60.0

ENVOY_FAULTS = re.compile(
    r"^cluster\.tokenway-(?:extproc|als|xds)\.http2\."
    r"((?:rx_messaging_error|\w*flood|stream_refused_errors|tx_flush_timeout|header_overflow): [1-9]\d*)$",
    re.MULTILINE,
)
"""Whatever Envoy counts of peers that break HTTP/2's rules, if it is not 0."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine() -> AsyncIterator[Recorder]:
    """The one engine."""
    async with recording() as started:
        yield started


def by_codec(text: str, *, is_oghttp2: bool) -> str:
    """Envoy's configuration with one of its two codecs of HTTP/2 for all that it opens or takes."""
    document = yaml.safe_load(text)

    def choose(node: Any) -> None:
        if isinstance(node, dict):
            if "http2_protocol_options" in node:
                node["http2_protocol_options"]["use_oghttp2_codec"] = is_oghttp2
            for inner in node.values():
                choose(inner)
        elif isinstance(node, list):
            for inner in node:
                choose(inner)

    choose(document)
    return yaml.safe_dump(document)


@pytest_asyncio.fixture(
    scope="module", loop_scope="session", params=[False, True], ids=["nghttp2", "oghttp2"]
)
async def stack(engine: Recorder, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    """A gateway by our own transport, with time for a slow machine; Envoy by each of its codecs."""
    config = {
        "server": {"transport": "native"},
        "models": {"m": {"rules": [{"cluster": "c"}]}},
        "health": {"timeout_s": 30.0, "unhealthy_threshold": 10},  # the engine shares this process
        "signals": {"timeout_s": SECONDS, "first_byte_timeout_s": SECONDS},
    }
    adapt = functools.partial(by_codec, is_oghttp2=request.param)
    async with running_stack([cluster("c", [engine.key])], config, adapt=adapt) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def well(stack: Stack, engine: Recorder) -> AsyncIterator[Stack]:
    """The stack; afterwards nothing is charged, no stream is left, and neither side blames the other."""
    engine.reset()
    yield stack
    await stack.settled()

    async def open_streams() -> list[str]:
        scrape = await stack.metrics()
        return re.findall(r"^tokenway_streams_active (?!0\.0).*$", scrape, re.MULTILINE)

    await eventually(open_streams, lambda left: not left)
    assert "tokenway_transport_faults_total{" not in await stack.metrics()
    stats = (await get(f"http://127.0.0.1:{stack.envoy_admin_port}/stats")).decode()
    assert ENVOY_FAULTS.findall(stats) == []
    assert re.findall(r"^access_logs\.grpc_access_log\.logs_dropped: [1-9].*$", stats, re.MULTILINE) == []
    assert (await post(stack, chat("m", "after"))).status == 200


async def asked(stack: Stack, body: bytes, leave_after_s: float | None = None) -> int:
    """The status of a request on a connection of its own; 0 if the client left before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    try:
        async with asyncio.timeout(SECONDS if leave_after_s is None else leave_after_s):
            writer.write(head + b"content-length: %d\r\n\r\n" % len(body))
            writer.write(body)
            return int((await reader.readuntil(b"\r\n")).split()[1])
    except TimeoutError:
        assert leave_after_s is not None
        return 0
    finally:
        writer.transport.abort()


def prompt(size: int, number: int) -> bytes:
    """A request of about so many bytes."""
    return json.dumps(chat("m", f"{number} " + "word " * (size // 5))).encode()


async def test_many_requests_at_once(well: Stack) -> None:
    """Two hundred, on connections of their own."""
    statuses = Counter(await asyncio.gather(*(asked(well, prompt(2_000, number)) for number in range(200))))
    assert statuses == {200: 200}


async def test_clients_that_leave_in_every_phase(well: Stack) -> None:
    """While they send, while it is decided, while they are answered: each is let go, and others go on."""
    rng = random.Random(5)

    async def use(number: int) -> int:
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        body = prompt(rng.choice([500, 20_000, 300_000]), number)
        return await asked(well, body, rng.choice([0.001, 0.005, 0.02, None]))

    statuses = Counter(await asyncio.gather(*(use(number) for number in range(600))))
    assert set(statuses) == {0, 200}
    assert min(statuses.values()) > 100


async def test_large_bodies_beside_small_ones(well: Stack, engine: Recorder) -> None:
    """Eight of ten megabytes and a hundred of some bytes arrive whole."""
    large = [prompt(10 * MEBIBYTE, number) for number in range(8)]
    small = [prompt(100, number) for number in range(100)]
    statuses = Counter(await asyncio.gather(*(asked(well, body) for body in (*large, *small))))
    assert statuses == {200: 108}
    lengths = Counter(len(received.body) // MEBIBYTE for received in engine.received)
    assert lengths == {9: 8, 0: 100} or lengths == {10: 8, 0: 100}


async def test_an_envoy_that_stands_still(well: Stack, engine: Recorder) -> None:
    """It is stopped while bodies are on their way, and all of them arrive when it goes on."""

    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        return web.json_response({"choices": [{}]})

    engine.behaviour = slow
    envoy = well._envoy
    assert envoy is not None
    asking = [asyncio.create_task(asked(well, prompt(3 * MEBIBYTE, number))) for number in range(8)]
    for _ in range(3):
        await asyncio.sleep(0.1)
        envoy.signal(signal.SIGSTOP)
        await asyncio.sleep(0.5)
        envoy.signal(signal.SIGCONT)
    assert Counter(await asyncio.gather(*asking)) == {200: 8}
