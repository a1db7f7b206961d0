"""What an Istio gateway's Envoy must do with Tokenway beside it, whoever configured it; a function each.

The models are `sim` (simulated engines), `recorded` (the recorder), `pair` (recorder and decoy), `mortal`
(one that dies, and the decoy), `retried` (one that fails, and the decoy), `gated` (the recorder, for a header
alone), `half` (the recorder, a subset of `pair`) and `part` (the same by a label that Istio has no subset
for).
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from extproc.request.sanitize import STEERING_HEADERS
from tests.e2e.assembled_stack import cluster_of
from tests.e2e.harness import (
    DEBUG_HEADERS,
    DEBUG_TOKEN_ENV,
    DECISION_HEADER,
    Load,
    Recorder,
    Stack,
    answer_chat,
    chat,
    check_for_any_api,
    cluster,
    eventually,
    key_of,
    post,
    send,
    send_until_heard,
)
from tokenway.simulator.server.app import SimulatorServer

_UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")

MODELS: dict[str, Any] = {
    "sim": {"rules": [{"cluster": cluster_of("sim")}], "aliases": ["org/sim"]},
    "recorded": {"rules": [{"cluster": cluster_of("recorder")}]},
    "pair": {"rules": [{"cluster": cluster_of("pair")}], "load_balancing": {"algorithm": "round_robin"}},
    "mortal": {"rules": [{"cluster": cluster_of("mortal")}], "load_balancing": {"algorithm": "round_robin"}},
    "retried": {
        "rules": [{"cluster": cluster_of("retried")}],
        "load_balancing": {"algorithm": "round_robin"},
    },
    "gated": {"rules": [{"cluster": cluster_of("recorder"), "headers": {"x-team": "red"}}]},
    "half": {"rules": [{"cluster": cluster_of("pair"), "subset": {"subset": "right"}}]},
    "part": {"rules": [{"cluster": cluster_of("pair"), "subset": {"pool": "right"}}]},
}


CONFIG: dict[str, Any] = {
    "models": MODELS,
    "explain": {"debug_token_env": DEBUG_TOKEN_ENV},
    "server": {"drain_s": 10},
    "health": {"interval_s": 600},  # an endpoint that dies is found by a request
}


ANSWER_EVENTS = [
    *(
        b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"
        for choice in (
            {"index": 0, "delta": {"role": "assistant", "content": "well"}, "finish_reason": None},
            {"index": 0, "delta": {}, "finish_reason": "stop"},
        )
    ),
    b"data: [DONE]\n\n",
]
"""A small streamed answer."""


@dataclass(frozen=True, slots=True)
class Under:
    """A gateway under an Istio profile.

    Attributes:
        stack: Tokenway and Envoy.
        engines: Behind `sim`.
        recorder: Behind `recorded` and first in `pair`.
        decoy: The other one of `pair` and of `mortal`.
        mortal: The first of `mortal`; one scenario ends it.
        failing: The first of `retried`; one scenario has it fail.
    """

    stack: Stack
    engines: list[SimulatorServer]
    recorder: Recorder
    decoy: Recorder
    mortal: Recorder
    failing: Recorder

    def reset(self) -> None:
        """Clean recorders."""
        for recorder in (self.recorder, self.decoy, self.mortal, self.failing):
            recorder.reset()

    def clusters(self) -> list[dict[str, Any]]:
        """As clusters.json has them."""
        pair = cluster(cluster_of("pair"), [self.recorder.key, self.decoy.key])
        pair["endpoints"][0]["labels"] = {"pool": "right", "subset": "right"}
        return [
            cluster(cluster_of("sim"), map(key_of, self.engines)),
            cluster(cluster_of("recorder"), [self.recorder.key]),
            cluster(cluster_of("mortal"), [self.mortal.key, self.decoy.key]),
            cluster(cluster_of("retried"), [self.failing.key, self.decoy.key]),
            pair,
        ]


async def ended(stack: Stack) -> dict[str, Any]:
    """The newest decision record, with its outcome."""

    async def read() -> dict[str, Any]:
        return (await stack.last(1))[0]

    return await eventually(read, lambda record: record["outcome"] is not None)


def place_of(key: str) -> str:
    """`ip:port` of an endpoint, whose key has its workload before that if Istio lists it."""
    return key.rpartition("@")[2]


def chosen(record: dict[str, Any]) -> str:
    """The endpoint that a decision named first."""
    key: str = record["snapshot"]["keys"][record["choice"]["order"][0]]
    return key


async def whole_answers_come_from_the_chosen(under: Under) -> None:
    """The official client is answered by the engine that was chosen; usage is known."""
    async with under.stack.client() as client:
        answer = await client.chat.completions.create(
            model="sim",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=5,
            extra_body={"ignore_eos": True},
        )
    record = await ended(under.stack)
    assert answer.usage is not None
    assert record["outcome"]["endpoint"] == chosen(record)
    assert record["outcome"]["completion_tokens"] == answer.usage.completion_tokens == 5
    assert record["outcome"]["prompt_tokens"] == answer.usage.prompt_tokens
    assert record["outcome"]["attempts"] == 1
    await under.stack.settled()


async def streams_come_from_the_chosen(under: Under) -> None:
    """The same streamed, spread over the engines; the end tells usage and the time to the first token."""
    async with under.stack.client() as client:

        async def ask(number: int) -> None:
            stream = await client.chat.completions.create(
                model="org/sim",
                messages=[{"role": "user", "content": f"{number}: hello"}],
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            chunks = [chunk async for chunk in stream]
            assert (
                sum(len(chunk.choices) > 0 and bool(chunk.choices[0].delta.content) for chunk in chunks) == 5
            )
            assert chunks[-1].usage is not None

        await asyncio.gather(*map(ask, range(8)))
    await under.stack.settled()
    records = await under.stack.last(8)
    assert all(record["outcome"]["endpoint"] == chosen(record) for record in records)
    assert all(record["outcome"]["completion_tokens"] == 5 for record in records)
    assert all(record["outcome"]["ttft_s"] > 0 for record in records)
    keys = {key_of(engine) for engine in under.engines}
    assert {place_of(record["outcome"]["endpoint"]) for record in records} == keys


async def clients_steer_nothing(under: Under) -> None:
    """What a client says of clusters and endpoints is gone before anything reads it."""
    spoofed = dict.fromkeys(STEERING_HEADERS, under.decoy.key) | {
        "x-tokenway-owner": "0.spoofed",
        "x-tokenway-cluster": cluster_of("pair"),
        "x-tokenway-model": "model:pair",
        "x-tokenway-request-id": "spoofed",
        "x-tenant": "a",
    }
    for _ in range(4):
        assert (await post(under.stack, chat("recorded", "hello"), spoofed)).status == 200
    assert under.decoy.received == []
    assert len(under.recorder.received) == 4
    for received in under.recorder.received:
        assert received.headers.keys().isdisjoint(STEERING_HEADERS)
        assert _UUID.fullmatch(received.headers["x-tokenway-request-id"])
        assert received.headers["x-tenant"] == "a"


async def engines_see_nothing_of_ours(under: Under) -> None:
    """Neither credentials nor the headers by which the gateway is steered reach an engine."""
    secrets = {"authorization": "Bearer secret", "x-api-key": "secret", "cookie": "s=secret"}
    assert (await post(under.stack, chat("recorded", "hello"), secrets)).status == 200
    (received,) = under.recorder.received
    assert "secret" not in str(received.headers)
    assert {name for name in received.headers if "tokenway" in name} == {"x-tokenway-request-id"}
    assert not any(name.startswith(":") for name in received.headers)


async def engines_cannot_speak_in_our_name(under: Under) -> None:
    """An engine's `x-tokenway-` headers end at the gateway; the decision's id is shown to operators."""

    async def forge(_: web.Request) -> web.StreamResponse:
        forged = {"x-tokenway-decision-id": "forged", "X-Tokenway-Any": "forged", "x-engine": "forged"}
        return web.Response(body=b"{}", headers={"content-type": "application/json", **forged})

    under.recorder.behaviour = forge
    reply = await post(under.stack, chat("recorded", "hello"))
    assert [name for name, value in reply.headers.items() if value == "forged"] == ["x-engine"]
    reply = await post(under.stack, chat("recorded", "hello"), DEBUG_HEADERS)
    assert _UUID.fullmatch(reply.headers[DECISION_HEADER])


async def endpoints_are_tried_in_order(under: Under) -> None:
    """An endpoint that answers 503, 429 or hangs up is followed by the next of the list."""

    async def refuse(status: int) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def behave(request: web.Request) -> web.StreamResponse:
            if status == 0:
                assert request.transport is not None
                request.transport.abort()
            return web.json_response({"error": {"message": "busy"}}, status=status or 500)

        return behave

    for status in (503, 429, 0):
        for recorder in (under.recorder, under.decoy):
            recorder.reset()
        under.recorder.behaviour = await refuse(status)
        # In turn each of the two is first: of two requests one meets the one that fails.
        replies = [await post(under.stack, chat("pair", f"{status}")) for _ in range(2)]
        assert [reply.status for reply in replies] == [200, 200], status
        await under.stack.settled()
        outcomes = [record["outcome"] for record in await under.stack.last(2)]
        assert all(place_of(outcome["endpoint"]) == under.decoy.key for outcome in outcomes)
        if under.recorder.received:
            assert sorted(outcome["attempts"] for outcome in outcomes) == [1, 2]
    assert len(under.decoy.received) == 2


async def the_first_token_is_timed_from_the_attempt_that_answered(under: Under) -> None:
    """One endpoint takes a second to say 503, the next half a second to begin: that half is the time."""

    async def refuse(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1.0)
        return web.json_response({"error": {"message": "busy"}}, status=503)

    async def begin_late(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await asyncio.sleep(0.5)
        for event in ANSWER_EVENTS:
            await answer.write(event)
        return answer

    under.failing.behaviour, under.decoy.behaviour = refuse, begin_late
    # In turn each of the two is first: of two requests one meets the one that fails.
    for turn in range(2):
        reply = await post(under.stack, chat("retried", f"{turn}", stream=True))
        assert (reply.status, reply.body) == (200, b"".join(ANSWER_EVENTS))
    await under.stack.settled()
    outcomes = [record["outcome"] for record in await under.stack.last(2)]
    assert sorted(outcome["attempts"] for outcome in outcomes) == [1, 2]
    assert all(place_of(outcome["endpoint"]) == under.decoy.key for outcome in outcomes)
    assert all(0.5 <= outcome["ttft_s"] < 1.0 for outcome in outcomes), outcomes


async def an_engine_that_is_gone_is_followed_by_the_next(under: Under) -> None:
    """Connections refused where the first of the list was: the next answers, and is charged and credited."""
    assert [(await post(under.stack, chat("mortal", f"{turn}"))).status for turn in range(2)] == [200, 200]
    assert len(under.mortal.received) == len(under.decoy.received) == 1
    await under.mortal.stop()
    replies = [await post(under.stack, chat("mortal", f"{turn}")) for turn in range(2)]
    assert [reply.status for reply in replies] == [200, 200]
    await under.stack.settled()
    outcomes = [record["outcome"] for record in await under.stack.last(2)]
    assert all(place_of(outcome["endpoint"]) == under.decoy.key for outcome in outcomes)
    assert max(outcome["attempts"] for outcome in outcomes) == 2


async def a_subset_is_kept(under: Under) -> None:
    """A rule for a subset of a host's endpoints goes to those alone."""
    for turn in range(4):
        assert (await post(under.stack, chat("half", f"{turn}"))).status == 200
    assert len(under.recorder.received) == 4
    assert under.decoy.received == []


async def a_stored_response_stays_where_it_was_made(under: Under) -> None:
    """What names a stored response goes to the engine that holds it, by a request line or by a body."""

    def storing(recorder: Recorder) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def behave(_: web.Request) -> web.StreamResponse:
            stored = {
                "id": f"resp_{recorder.port}",
                "object": "response",
                "status": "completed",
                "output": [],
            }
            return web.json_response({**stored, "usage": {"input_tokens": 3, "output_tokens": 1}})

        return behave

    for recorder in (under.recorder, under.decoy):
        recorder.behaviour = storing(recorder)
    for _ in range(2):  # in turn at each
        first = await send(under.stack, "POST", "/v1/responses", {"model": "pair", "input": "hello"})
        assert first.status == 200, first
        made: str = first.json["id"]
        await under.stack.settled()
        for _ in range(3):
            assert (await send(under.stack, "GET", f"/v1/responses/{made}")).json["id"] == made
        then = {"model": "pair", "input": "more", "previous_response_id": made}
        assert (await send(under.stack, "POST", "/v1/responses", then)).json["id"] == made
    await under.stack.settled()


async def large_bodies_pass(under: Under) -> None:
    """Beyond Envoy's own buffer of 1 MiB, byte for byte; what exceeds ours is 413 in the API's shape."""
    text = "long " * 600_000
    reply = await send_until_heard(under.stack, "POST", "/v1/chat/completions", chat("recorded", text))
    assert reply.status == 200, reply
    (received,) = under.recorder.received
    assert len(received.body) > len(text)
    reply = await post(under.stack, b'{"model": "recorded", "x": "' + b"y" * (33 << 20) + b'"}')
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_large")


async def errors_are_in_the_apis_shape(under: Under) -> None:
    """Tokenway's refusals and Envoy's own answers are what clients of the API parse."""
    reply = await post(under.stack, chat("unknown", "hello"))
    assert (reply.status, reply.json["error"]["code"]) == (404, "model_not_found")
    reply = await send(under.stack, "GET", "/nowhere")
    assert (reply.status, reply.json["error"]["code"]) == (404, "unknown_path")


async def what_calls_itself_grpc_is_refused_as_json(under: Under) -> None:
    """415 with a body, where Envoy makes 200 of a refusal."""
    grpc = {"content-type": "application/grpc"}
    check_for_any_api(await post(under.stack, chat("unknown", "hello"), grpc), 415, "invalid_request")


async def an_engine_that_switches_protocols_has_not_answered(under: Under) -> None:
    """The client gets 502 in a shape that clients of every API parse."""

    async def switch(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n")
        request.transport.close()
        return web.Response()

    under.recorder.behaviour = switch
    reply = await post(under.stack, chat("recorded", "switch"))
    check_for_any_api(reply, 502, "no_healthy_endpoint")
    await under.stack.settled()


async def a_tokenway_that_is_stopped_loses_nothing(under: Under) -> None:
    """Stopped under load it answers what it has; meanwhile Envoy serves alone, and then it is asked again."""
    stack = under.stack
    async with Load(stack, "sim", clients=4, stream=True) as load:
        await load.more(8)
        stack.gateway.signal(signal.SIGTERM)
        assert await stack.gateway.ended() == 0
        await load.more(8)
        await stack.start_gateway()

        async def served() -> int:
            total: int = sum(row["served_total"] for row in (await stack.rows()).values())
            return total

        await eventually(served, lambda count: count >= 8)
    assert load.failures == []
    await stack.settled()


async def without_tokenway_models_are_served(under: Under) -> None:
    """With Tokenway killed a model open to all goes to its own engines, and nothing else goes anywhere."""
    await under.stack.gateway.kill()
    try:
        assert (await post(under.stack, chat("recorded", "hello"))).status == 200
        (received,) = under.recorder.received
        assert received.path == "/v1/chat/completions"
        for spoofed in (
            {"x-tokenway-model": "model:pair"},
            {"x-tokenway-owner": "0.x"},
            {"x-tokenway-cluster": "x"},
        ):
            assert (await post(under.stack, chat("recorded", "hello"), spoofed)).status == 200
        assert under.decoy.received == []
        assert len(under.recorder.received) == 4
        for turn in range(4):
            assert (await post(under.stack, chat("half", f"{turn}"))).status == 200
        assert under.decoy.received == []
        async with under.stack.client() as client:
            await client.chat.completions.create(
                model="sim", messages=[{"role": "user", "content": "hello"}], max_tokens=3
            )
        under.recorder.reset()
        for model, status in (("gated", 404), ("part", 404), ("unknown", 404)):
            reply = await post(under.stack, chat(model, "hello"), {"x-team": "red"})
            assert (reply.status, reply.json["error"]["code"]) == (status, "model_not_found"), model
        reply = await post(under.stack, {**chat("recorded", "hello"), "priority": 1})
        assert (reply.status, reply.json["error"]["code"]) == (503, "gateway_unavailable")
        reply = await send(under.stack, "POST", "/v1/chat/completions/", chat("sim", "hello"))
        assert reply.status == 200
        reply = await send(under.stack, "POST", "/sleep", chat("recorded", "hello"))
        assert reply.status == 404
        assert (await send(under.stack, "GET", "/v1/models")).status == 503
        assert under.recorder.received == []
    finally:
        await under.stack.start_gateway()
    under.recorder.behaviour = answer_chat

    async def ask() -> str | None:
        reply = await post(under.stack, chat("recorded", "hello"), DEBUG_HEADERS)
        return reply.headers.get(DECISION_HEADER)

    await eventually(ask, lambda decision: decision is not None)


SCENARIOS: tuple[Callable[[Under], Awaitable[None]], ...] = (
    whole_answers_come_from_the_chosen,
    streams_come_from_the_chosen,
    clients_steer_nothing,
    engines_see_nothing_of_ours,
    engines_cannot_speak_in_our_name,
    endpoints_are_tried_in_order,
    the_first_token_is_timed_from_the_attempt_that_answered,
    an_engine_that_is_gone_is_followed_by_the_next,
    a_subset_is_kept,
    a_stored_response_stays_where_it_was_made,
    large_bodies_pass,
    errors_are_in_the_apis_shape,
    what_calls_itself_grpc_is_refused_as_json,
    an_engine_that_switches_protocols_has_not_answered,
    a_tokenway_that_is_stopped_loses_nothing,
    without_tokenway_models_are_served,
)


async def led_by_a_rule(
    stack: Stack,
    lead: Callable[[str], None],
    services: Sequence[str],
    cluster_of_service: Callable[[str], str],
    workers: int,
) -> Load:
    """Load while a rule leads to one of two services after the other; each worker follows each time.

    Args:
        stack: Serves; the rule leads to the first service.
        lead: Has the rule lead to a service.
        services: Two.
        cluster_of_service: As records name it.
        workers: Of the gateway.
    """

    async def clusters() -> set[str]:
        return {record["cluster"] for record in await stack.last(2 * workers)}

    async with Load(stack, "sim", clients=8, stream=False, max_tokens=4) as load:
        await load.more(16)
        for turn in range(1, 5):
            service = services[turn % 2]
            lead(service)
            await eventually(clusters, {cluster_of_service(service)}.__eq__)
            await load.more(16)
    return load
