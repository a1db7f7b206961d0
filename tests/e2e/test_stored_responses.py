"""The official client's chains of responses: every turn meets the one engine that knows the last."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
import pytest_asyncio
from aiohttp import web
from openai import AsyncOpenAI

from testbed.redis_server import running
from tests.e2e.conftest import Shared
from tests.e2e.harness import (
    FAST_HEALTH,
    Reply,
    Stack,
    answer_chat,
    cluster,
    eventually,
    key_of,
    recording,
    running_stack,
    send,
    simulators,
)
from tests.e2e.pair import running_pair
from tokenway.simulator.server.app import SimulatorServer

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


def holders(engines: list[SimulatorServer], response_id: str) -> list[int]:
    """Which engines have a response."""
    return [number for number, engine in enumerate(engines) if engine.responses.get(response_id) is not None]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_chain_stays_together(client: AsyncOpenAI, plain: Shared, stream: bool) -> None:
    """Ten turns over eight engines, whole or streamed, each built on the last."""
    previous: Any = openai.NOT_GIVEN
    found = set()
    for turn in range(10):
        asked: dict[str, Any] = {"model": "sim", "input": f"turn {turn}", "max_output_tokens": 4}
        if stream:
            async for event in await client.responses.create(
                **asked, previous_response_id=previous, stream=True
            ):
                if event.type == "response.created":
                    previous = event.response.id
        else:
            previous = (await client.responses.create(**asked, previous_response_id=previous)).id
        found.add(tuple(holders(plain.engines, previous)))
    assert len(found) == 1


async def test_a_response_is_retrieved_listed_and_deleted(client: AsyncOpenAI, plain: Shared) -> None:
    """By every worker of the request line alone, and gone afterwards: then the engine's own 404."""
    made = [
        await client.responses.create(model="sim", input=f"number {number}", max_output_tokens=2)
        for number in range(8)
    ]
    for response in made:
        assert (await client.responses.retrieve(response.id)).id == response.id
        items = await client.responses.input_items.list(response.id)
        assert len(items.data) == 1
        assert (await send(plain.stack, "GET", f"/v1/responses/{response.id}/")).json["id"] == response.id
        await client.responses.delete(response.id)
        assert holders(plain.engines, response.id) == []
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.retrieve(response.id)
        assert f"Response with id '{response.id}' not found." in str(gone.value)


async def test_a_background_response_is_cancelled(client: AsyncOpenAI, plain: Shared) -> None:
    """Its id is known from the first bytes of the answer, while its engine still works."""
    response = await client.responses.create(
        model="sim", input="a long one", background=True, max_output_tokens=8000
    )
    assert response.status == "queued"
    cancelled = await client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    (home,) = holders(plain.engines, response.id)

    async def still_running() -> int:
        return plain.engines[home].engine.num_running

    await eventually(still_running, lambda number: number == 0)


async def test_a_response_is_counted_and_compacted_where_it_is(client: AsyncOpenAI, plain: Shared) -> None:
    """What is asked of eight engines and only one of them can answer."""
    for number in range(8):
        first = await client.responses.create(model="sim", input=f"number {number}", max_output_tokens=2)
        counted = await client.responses.input_tokens.count(
            model="sim", input="and more", previous_response_id=first.id
        )
        assert (
            counted.input_tokens
            > (await client.responses.input_tokens.count(model="sim", input="x")).input_tokens
        )
        compacted = await client.responses.compact(model="sim", previous_response_id=first.id)
        assert [item.type for item in compacted.output] == ["message", "compaction"]
        await plain.stack.settled()
        compact, *_, count = await plain.stack.last(3)
        assert (compact["operation"], count["operation"]) == ("compact", "input_tokens")
        assert compact["holder"] == count["holder"] is not None


async def test_counting_and_compacting_that_engines_lack_costs_nothing_else() -> None:
    """Neither is in vLLM as yet: its own 405 is heard, and chat goes on at every engine."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.startswith("/v1/responses/"):
            error = {
                "message": "Method Not Allowed",
                "type": "Method Not Allowed",
                "param": None,
                "code": 405,
            }
            return web.json_response({"error": error}, status=405)
        return await answer_chat(request)

    async with recording() as a, recording() as b:
        a.behaviour = b.behaviour = answer
        async with running_stack([cluster("c", [a.key, b.key])], CONFIG) as stack, stack.client() as client:
            for _ in range(10):
                for asked in (client.responses.input_tokens.count, client.responses.compact):
                    with pytest.raises(openai.APIStatusError) as refused:
                        await asked(model="m", input="hello")
                    assert refused.value.status_code == 405
            rows = (await stack.rows()).values()
            assert [row["state"] for row in rows] == ["healthy", "healthy"]
            assert (
                await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
            ).id
            await stack.settled()


async def test_a_counted_conversation_has_no_home_yet(client: AsyncOpenAI, plain: Shared) -> None:
    """Where its tokens were counted says nothing of where its first turn is to be answered."""
    for name in ("conv_a", "conv_b"):
        await client.responses.input_tokens.count(model="sim", input="hello", conversation=name)
        await plain.stack.settled()
        await client.responses.create(model="sim", input="hello", conversation=name, max_output_tokens=2)
        await plain.stack.settled()
        (first,) = await plain.stack.last(1)
        assert first["holder"] is None
        await client.responses.create(model="sim", input="hello", conversation=name, max_output_tokens=2)
        await plain.stack.settled()
        (second,) = await plain.stack.last(1)
        assert second["holder"] is not None


async def test_an_unknown_response_is_the_engines_404(engines: list[SimulatorServer]) -> None:
    """By name and as what a new one builds on. Its gateway has no engine that answers 200 to anything."""
    async with running_stack([cluster("sim", map(key_of, engines))]) as stack, stack.client() as client:
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.retrieve("resp_unknown")
        assert "Response with id 'resp_unknown' not found." in str(gone.value)
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.cancel("resp_unknown")
        assert "Response with id 'resp_unknown' not found." in str(gone.value)
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.create(model="sim", input="x", previous_response_id="resp_unknown")
        assert "Response with id 'resp_unknown' not found." in str(gone.value)


async def test_wrong_methods_are_refused(plain: Shared) -> None:
    """In this API's shape, before any engine hears of them."""
    for method, tail in (("PUT", ""), ("POST", ""), ("GET", "/cancel"), ("DELETE", "/input_items")):
        reply = await send(plain.stack, method, f"/v1/responses/resp_1{tail}")
        assert (reply.status, reply.json["error"]["code"]) == (405, "method_not_allowed")
    assert (await send(plain.stack, "POST", "/v1/responses/resp_1/tool_outputs", {})).status == 404


def answers(name: str) -> Any:
    """An engine whose responses are called after it and counted, whole, and which knows its own alone."""
    made: list[str] = []

    async def behave(request: web.Request) -> web.StreamResponse:
        if request.method == "POST" and request.path == "/v1/responses":
            previous = (await request.json()).get("previous_response_id")
            if previous is None or previous in made:
                made.append(f"resp_{name}_{len(made)}")
                return web.json_response({"id": made[-1], "object": "response", "output": []})
            wanted = previous
        else:
            wanted = request.path.split("/")[3]
        if wanted in made:
            return web.json_response({"id": wanted, "object": "response", "by": name})
        return web.json_response({"error": {"message": f"{name} does not know {wanted}"}}, status=404)

    return behave


async def create(stack: Stack, **fields: Any) -> Reply:
    """One response."""
    return await send(stack, "POST", "/v1/responses", {"model": "m", "input": "x", **fields})


CONFIG = {"models": {"m": {"rules": [{"cluster": "c"}]}}, "health": FAST_HEALTH}


async def test_what_the_holder_says_is_not_overruled() -> None:
    """Overloaded, it is not replaced by one that would say 404; dead, the other's 404 passes at once."""
    async with recording() as a, recording() as b:
        a.behaviour, b.behaviour = answers("a"), answers("b")
        async with running_stack([cluster("c", [a.key, b.key])], CONFIG) as stack:
            made: dict[str, str] = {}
            while len(made) < 2:
                response_id = (await create(stack)).json["id"]
                made[response_id.split("_")[1]] = response_id

            async def overloaded(_: web.Request) -> web.StreamResponse:
                return web.json_response({"error": {"message": "busy"}}, status=503)

            known, a.behaviour = a.behaviour, overloaded
            assert (await create(stack, previous_response_id=made["a"])).status == 503
            assert (await send(stack, "GET", f"/v1/responses/{made['a']}")).status == 503
            a.behaviour = known
            assert (await send(stack, "GET", f"/v1/responses/{made['a']}")).json["by"] == "a"

            async def broken_once(request: web.Request) -> web.StreamResponse:
                a.behaviour = known
                assert request.transport is not None
                request.transport.abort()
                return web.Response()

            a.behaviour = broken_once
            assert (await send(stack, "GET", f"/v1/responses/{made['a']}")).json["by"] == "a"
            await a.stop()
            for reply in (
                await send(stack, "GET", f"/v1/responses/{made['a']}"),
                await send(stack, "DELETE", f"/v1/responses/{made['a']}"),
                await create(stack, previous_response_id=made["a"]),
            ):
                assert reply.status == 404
                assert reply.json["error"]["message"].startswith("b does not know")
            await stack.settled()


async def test_a_fallbacks_response_is_the_fallbacks() -> None:
    """The endpoint that served it counts, not the one that was chosen and failed."""
    async with recording() as a, recording() as b:

        async def overloaded(_: web.Request) -> web.StreamResponse:
            return web.json_response({"error": {"message": "busy"}}, status=503)

        a.behaviour, b.behaviour = overloaded, answers("b")
        async with running_stack([cluster("c", [a.key, b.key])], CONFIG) as stack:
            made = [(await create(stack)).json["id"] for _ in range(6)]
            await stack.settled()
            a.behaviour = answers("a")
            for response_id in made:
                assert (await send(stack, "GET", f"/v1/responses/{response_id}")).json["by"] == "b"
                assert (await create(stack, previous_response_id=response_id)).status == 200


async def test_a_draining_engine_still_answers_for_its_responses() -> None:
    """It takes no new ones, but no other has these."""
    async with recording() as a, recording() as b:
        a.behaviour, b.behaviour = answers("a"), answers("b")
        clusters = cluster("c", [a.key, b.key])
        async with running_stack([clusters], CONFIG) as stack:
            made = {(await create(stack)).json["id"] for _ in range(8)}
            clusters["endpoints"][0]["draining"] = True
            stack.write_clusters(clusters)

            async def states() -> set[str]:
                return {row["state"] for row in (await stack.rows()).values()}

            await eventually(states, lambda found: "draining" in found)
            for response_id in made:
                reply = await send(stack, "GET", f"/v1/responses/{response_id}")
                assert reply.json["by"] == response_id.split("_")[1]
                assert (await create(stack, previous_response_id=response_id)).status == 200
            assert {(await create(stack)).json["id"].split("_")[1] for _ in range(6)} == {"b"}


async def test_without_first_chunks_responses_are_still_known() -> None:
    """The setting is about when prefill ends; the head of an answer is looked at here all the same."""
    config = {**CONFIG, "signals": {"first_chunk": False}}
    async with recording() as a, recording() as b:
        a.behaviour, b.behaviour = answers("a"), answers("b")
        async with running_stack([cluster("c", [a.key, b.key])], config) as stack:
            for _ in range(10):
                response_id = (await create(stack)).json["id"]
                assert (await create(stack, previous_response_id=response_id)).status == 200


STREAMS: dict[str, Callable[[bytes], bytes]] = {
    "lines ended by CR": lambda stream: stream.replace(b"\n", b"\r"),
    "a mark before": lambda stream: b"\xef\xbb\xbf" + stream,
    "pings before": lambda stream: b'event: ping\ndata: {"type":"ping"}\n\n' * 200 + stream,
    "data on several lines": lambda stream: stream.replace(b",", b",\ndata: "),
}
"""How a stream of events may be written."""


@pytest.mark.parametrize("way", STREAMS)
async def test_a_streamed_response_is_known_however_it_is_written(way: str) -> None:
    """The next turn meets the engine that made it."""

    def streaming(name: str) -> Any:
        async def behave(request: web.Request) -> web.StreamResponse:
            if (await request.json()).get("previous_response_id"):
                return web.json_response({"id": f"resp_2_{name}", "object": "response", "output": []})
            answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await answer.prepare(request)
            for event in ("response.created", "response.completed"):
                said = {"type": event, "response": {"id": f"resp_{name}", "output": []}}
                stream = f"event: {event}\ndata: {json.dumps(said)}\n\n".encode()
                await answer.write(STREAMS[way](stream))
            return answer

        return behave

    async with recording() as a, recording() as b:
        a.behaviour, b.behaviour = streaming("a"), streaming("b")
        async with running_stack([cluster("c", [a.key, b.key])], CONFIG) as stack:
            await create(stack, stream=True)
            await stack.settled()
            home = (await stack.last(1))[0]["outcome"]["endpoint"]
            name = "a" if home == a.key else "b"
            await create(stack, previous_response_id=f"resp_{name}")
            assert (await stack.last(1))[0]["holder"] == home


async def test_a_large_response_passes_and_is_known() -> None:
    """20 MB of answer reach the client whole; its head was enough."""
    text = "x" * 20_000_000

    async def large(_: web.Request) -> web.StreamResponse:
        return web.json_response({"id": "resp_a", "object": "response", "output": text})

    async with recording() as a, recording() as b:
        a.behaviour = b.behaviour = large
        async with running_stack([cluster("c", [a.key, b.key])], CONFIG) as stack:
            reply = await create(stack)
            assert (reply.status, len(reply.json["output"])) == (200, len(text))
            await stack.settled()
            home = (await stack.last(1))[0]["outcome"]["endpoint"]
            await create(stack, previous_response_id="resp_a")
            assert (await stack.last(1))[0]["holder"] == home


@pytest_asyncio.fixture(loop_scope="session")
async def engines_apart() -> AsyncIterator[list[SimulatorServer]]:
    """Four replicas."""
    async with simulators(4, time_scale=0.05) as started:
        yield started


async def chain(stacks: list[Stack], turns: int) -> list[int]:
    """Status of each turn of one chain that goes through all gateways in turn."""
    body: dict[str, Any] = {"model": "sim", "input": "x", "max_output_tokens": 2}
    first = await send(stacks[0], "POST", "/v1/responses", body)
    previous, statuses = first.json["id"], []
    for turn in range(turns):
        await asyncio.sleep(0.3)  # what one gateway saw is shared within a few milliseconds
        reply = await send(
            stacks[turn % len(stacks)], "POST", "/v1/responses", {**body, "previous_response_id": previous}
        )
        statuses.append(reply.status)
        previous = reply.json.get("id", previous)
    return statuses


async def test_workers_inform_each_other(engines_apart: list[SimulatorServer]) -> None:
    """Envoy gives each request to any worker; all know where a response lives."""
    async with running_stack([cluster("sim", map(key_of, engines_apart))], workers=2) as stack:
        assert await chain([stack], 10) == [200] * 10


async def test_gateways_inform_each_other_and_a_newcomer(
    engines_apart: list[SimulatorServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through the metadata center; one that starts anew gets what it missed."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        async with running_pair(server.url, [cluster("sim", map(key_of, engines_apart))]) as stacks:
            assert await chain(stacks, 8) == [200] * 8
            body = {"model": "sim", "input": "x", "max_output_tokens": 2}
            made = [(await send(stacks[0], "POST", "/v1/responses", body)).json["id"] for _ in range(8)]
            await asyncio.sleep(0.3)
            await stacks[1].gateway.kill()
            await stacks[1].start_gateway()

            async def statuses() -> set[int]:
                return {(await send(stacks[1], "GET", f"/v1/responses/{name}")).status for name in made}

            await eventually(statuses, lambda found: found == {200})
