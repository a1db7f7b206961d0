"""Clients cannot steer: neither by headers, nor by body fields, nor by Envoy's own."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from aiohttp import web

from extproc.config.rule_headers import SECRET_HEADERS
from extproc.request.sanitize import STEERING_FIELDS, STEERING_HEADERS, STEERING_XARGS
from tests.e2e.conftest import Shared
from tests.e2e.harness import DEBUG_HEADERS, DECISION_HEADER, Recorder, answer_chat, chat, post, send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

_UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")


def _fails_once(recorder: Recorder, status: int) -> None:
    """Make the recorder's first answer an error and all later ones good."""

    async def behave(request: web.Request) -> web.StreamResponse:
        if len(recorder.received) == 1:
            return web.json_response({"error": {"message": "busy"}}, status=status)
        return await answer_chat(request)

    recorder.behaviour = behave


async def test_spoofed_destination_steers_nothing(plain: Shared) -> None:
    """However a client names the decoy as its endpoint, every request goes to the one the rule allows."""
    decoy = plain.decoy.key
    spoofed = {
        "x-gateway-destination-endpoint": decoy,
        "x-gateway-destination-endpoint-subset": decoy,
        "x-envoy-original-dst-host": decoy,
        "x-data-parallel-host-port": decoy,
        "x-session-token": decoy,
        "target-pod": decoy,
        "cluster-name": "sim",
        "x-tokenway-owner": "0.spoofed",
        "x-tokenway-model": "model:sim",
    }
    for _ in range(10):
        assert (await post(plain.stack, chat("steered", "hello"), spoofed)).status == 200
    assert len(plain.recorder.received) == 10
    assert plain.decoy.received == []


async def test_steering_headers_never_reach_the_engine(plain: Shared) -> None:
    """Of all headers that steer engines or gateways the engine sees none; ordinary ones it sees unchanged."""
    spoofed = dict.fromkeys(STEERING_HEADERS, "spoofed")
    sent = {**spoofed, "x-tokenway-owner": "0.spoofed", "x-tokenway-request-id": "spoofed", "x-tenant": "a"}
    assert (await post(plain.stack, chat("recorded", "hello"), sent)).status == 200
    (received,) = plain.recorder.received
    assert received.headers.keys().isdisjoint(STEERING_HEADERS)
    assert "spoofed" not in " ".join(received.headers.values())
    assert _UUID.fullmatch(received.headers["x-tokenway-request-id"])
    assert received.headers["x-tenant"] == "a"


CREDENTIALS = {name: f"secret-{number}" for number, name in enumerate((*SECRET_HEADERS, "x-tokenway-debug"))}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
async def test_engines_see_no_credential_and_nothing_of_ours(plain: Shared, path: str) -> None:
    """What proves who the client is, and what steers this gateway, ends here; the request's id goes on."""
    body = {**chat("recorded", "hello"), "input": "hello"}
    assert (await send(plain.stack, "POST", path, body, CREDENTIALS)).status == 200
    (received,) = plain.recorder.received
    assert "secret" not in str(received.headers)
    ours = {name for name in received.headers if "tokenway" in name}
    assert ours == {"x-tokenway-request-id"}


async def test_an_engine_cannot_speak_in_our_name(plain: Shared) -> None:
    """Headers that name Tokenway are Tokenway's own: an engine's are removed, streamed or not."""

    async def forge(request: web.Request) -> web.StreamResponse:
        kind = "text/event-stream" if b'"stream": true' in await request.read() else "application/json"
        names = ["X-Tokenway-Decision-Id", "x-tokenway-anything", "x-tokenway-owner", "x-engine"]
        return web.Response(body=b"{}", headers={"content-type": kind, **dict.fromkeys(names, "forged")})

    plain.recorder.behaviour = forge
    for stream in (False, True):
        reply = await post(plain.stack, chat("recorded", "hello", stream=stream))
        assert [name for name, value in reply.headers.items() if value == "forged"] == ["x-engine"]
    reply = await post(plain.stack, chat("recorded", "hello"), DEBUG_HEADERS)
    assert _UUID.fullmatch(reply.headers[DECISION_HEADER])


async def test_spoofed_request_id_frees_no_other_request(plain: Shared) -> None:
    """Two requests under the same spoofed id are charged and ended apart."""
    arrived, release = asyncio.Event(), asyncio.Event()

    async def held(request: web.Request) -> web.StreamResponse:
        if not arrived.is_set():
            arrived.set()
            await release.wait()
        return await answer_chat(request)

    plain.recorder.behaviour = held
    spoofed = {"x-tokenway-request-id": "11111111-1111-4111-8111-111111111111"}
    first = asyncio.create_task(post(plain.stack, chat("recorded", "first"), spoofed))
    await arrived.wait()
    assert (await post(plain.stack, chat("recorded", "second"), spoofed)).status == 200
    await asyncio.sleep(0.2)
    assert (await plain.stack.endpoints())["in_flight"] == 1
    release.set()
    assert (await first).status == 200


@pytest.mark.parametrize("status", [503, 429])
async def test_spoofed_retry_headers_are_ignored(plain: Shared, status: int) -> None:
    """A client cannot switch retries off: an engine's first 503 or 429 is still made good."""
    _fails_once(plain.recorder, status)
    spoofed = {"x-envoy-max-retries": "0", "x-envoy-retry-on": "", "x-envoy-attempt-count": "9"}
    assert (await post(plain.stack, chat("recorded", "hello"), spoofed)).status == 200
    assert len(plain.recorder.received) == 2


async def test_spoofed_timeouts_are_ignored(plain: Shared) -> None:
    """A client cannot set Envoy's time-outs: an answer later than its header says still comes."""

    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        return await answer_chat(request)

    plain.recorder.behaviour = late
    spoofed = {"x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-upstream-rq-per-try-timeout-ms": "1"}
    assert (await post(plain.stack, chat("recorded", "hello"), spoofed)).status == 200
    assert len(plain.recorder.received) == 1


async def test_steering_body_fields_are_removed(plain: Shared) -> None:
    """Fields that steer engines are gone from the body the engine gets; all others are as they were."""
    wanted = chat("recorded", "hello") | {"temperature": 0.5, "cache_salt": "mine", "vllm_xargs": {"mine": 1}}
    sent = wanted | {name: {"spoofed": True} for name in STEERING_FIELDS}
    sent["vllm_xargs"] = {"mine": 1} | dict.fromkeys(STEERING_XARGS, "spoofed")
    assert (await post(plain.stack, sent)).status == 200
    (received,) = plain.recorder.received
    assert json.loads(received.body) == wanted
    assert received.headers["content-length"] == str(len(received.body))


async def test_clean_body_is_forwarded_untouched(plain: Shared) -> None:
    """A body without steering fields arrives as the very bytes the client sent."""
    body = b'{ "messages": [{"role":"user","content":"caf\\u00e9"}],\n "model":"recorded", "seed": 1e2 }'
    assert (await post(plain.stack, body)).status == 200
    assert plain.recorder.received[0].body == body
