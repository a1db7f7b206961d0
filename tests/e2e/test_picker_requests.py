"""Requests of odd shapes by way of a foreign gateway: whatever they are, they are served or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.harness import Reply, chat, cluster, eventually, exchange, recording
from tests.e2e.holding import total
from tests.e2e.picker import DESTINATION, PATH, Picked, running_picker

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

LISTENERS = ("metadata", "header")
"""Where the gateway goes by the metadata, and where by the header."""

ELSEWHERE = "10.6.6.6:1"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def picked() -> AsyncIterator[Picked]:
    """A picker before two recorders: `recorded` is the first, and all that is no inference goes there."""
    async with recording() as recorder, recording() as decoy:
        clusters = [cluster("recorded", [recorder.key]), cluster("decoy", [decoy.key])]
        models = {name: {"rules": [{"cluster": name}]} for name in ("recorded", "decoy")}
        config = {"models": models, "default_cluster": "recorded"}
        async with running_picker(clusters, config, fallbacks=0) as picker:
            yield Picked(picker, (), recorder, (decoy,))


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _settled(picked: Picked) -> AsyncIterator[None]:
    """Whatever a test did, nothing stays charged."""
    picked.reset()
    yield
    await picked.picker.tokenway.settled()


@pytest.mark.parametrize("listener", LISTENERS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_client_that_names_endpoints_in_every_way(picked: Picked, listener: str, method: str) -> None:
    """Several times over, in any letter case, of any place and as any of the protocol's headers."""
    (decoy,) = picked.three
    names = (DESTINATION, f"{DESTINATION}-subset", f"{DESTINATION}-served")
    spoofed = "".join(
        f"{name.title() if number else name}: {place}\r\n"
        for name in names
        for number, place in enumerate((decoy.key, ELSEWHERE, f"{decoy.key},{ELSEWHERE}"))
    )
    body = b"" if method == "GET" else chat_bytes()
    path = "/info" if method == "GET" else PATH
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{spoofed}content-length: {len(body)}\r\n\r\n"
    reply = await exchange(picked.picker.ports[listener], head.encode(), body)
    assert reply.status == 200
    assert decoy.received == []
    (received,) = picked.recorder.received
    assert {name: received.headers.get(name) for name in names} == {
        **dict.fromkeys(names),
        DESTINATION: picked.recorder.key,
    }


def chat_bytes() -> bytes:
    """A small request for `recorded`."""
    return json.dumps(chat("recorded", "x")).encode()


CHUNKED = "transfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n"
NOTHING_AND_TRAILERS = b"0\r\nx-end: 1\r\n\r\n"


@pytest.mark.parametrize("listener", [*LISTENERS, "unretried"])
async def test_trailers_without_a_body(picked: Picked, listener: str) -> None:
    """Of a request that is none for inference they go on; one for inference has said nothing."""
    port = picked.picker.ports[listener]
    for method in ("POST", "PUT", "GET"):
        head = f"{method} /info HTTP/1.1\r\nhost: x\r\n{CHUNKED}".encode()
        assert (await exchange(port, head, NOTHING_AND_TRAILERS)).status == 200
    assert [(each.method, each.body) for each in picked.recorder.received] == [
        ("POST", b""),
        ("PUT", b""),
        ("GET", b""),
    ]
    reply = await exchange(
        port, f"POST {PATH} HTTP/1.1\r\nhost: x\r\n{CHUNKED}".encode(), NOTHING_AND_TRAILERS
    )
    assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_json")


async def _with_headers(picked: Picked, listener: str, lines: str) -> Reply:
    body = chat_bytes()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\n{lines}content-length: {len(body)}\r\n\r\n"
    return await exchange(picked.picker.ports[listener], head.encode(), body)


@pytest.mark.parametrize("listener", LISTENERS)
async def test_headers_up_to_the_gateways_own_bound(picked: Picked, listener: str) -> None:
    """Many, or large: served, or refused by the gateway, which blames no engine for it."""
    many = ["".join(f"x-{number}: y\r\n" for number in range(count)) for count in (80, *range(90, 101))]
    base = "".join(f"x-{number}: {'y' * 7_400}\r\n" for number in range(8))
    large = [f"{base}x-rest: {'y' * size}\r\n" for size in range(1_600, 2_200, 20)]
    for kind in (many, large):
        found = []
        for lines in kind:
            found.append((await _with_headers(picked, listener, lines)).status)
            if found[-1] == 500:  # there was no room for what the picker adds
                assert (await picked.last_outcome())["ended"] == "client_abort"
        assert found == sorted(found, key=[200, 500, 431].index)
        assert set(found) >= {200, 431}


async def test_expectations_are_met(picked: Picked) -> None:
    """A client that waits for 100 Continue before it sends its body."""
    body = chat_bytes()
    reader, writer = await asyncio.open_connection("127.0.0.1", picked.picker.ports["metadata"])
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
    async with asyncio.timeout(10):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()


async def test_an_endpoint_that_the_gateway_has_not(picked: Picked) -> None:
    """As where its pool has others: the one that the gateway takes is charged and counted."""
    (decoy,) = picked.three
    tokenway = picked.picker.tokenway
    async with recording() as stranger:
        tokenway.write_clusters(
            cluster("recorded", [picked.recorder.key]), cluster("decoy", [decoy.key, stranger.key])
        )
        await eventually(tokenway.rows, lambda rows: stranger.key in rows)
        before = total(await tokenway.metrics(), "tokenway_fallbacks_total", cluster="decoy")
        hint = {"x_test_subset": stranger.key}
        assert (await picked.post(chat("decoy", "x"), **hint)).status == 200
        outcome = await picked.last_outcome()
        assert stranger.received == []
        assert outcome["endpoint"] in (picked.recorder.key, decoy.key)
        after = total(await tokenway.metrics(), "tokenway_fallbacks_total", cluster="decoy")
        assert after == before + 1
        assert (await picked.post(chat("decoy", "x"), listener="header", **hint)).status == 200
        assert len(stranger.received) == 1
