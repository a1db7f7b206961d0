"""Cases 13 to 27 of an endpoint picker (`tests.e2e.picker_table`): bodies, answers, loads, and leaving."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final

from aiohttp import web

from extproc.picker.dialect import CHUNK_BYTES
from testbed.processes import get
from tests.e2e.harness import FAST_HEALTH, Behaviour, chat, cluster, eventually, exchange, key_of, simulators
from tests.e2e.holding import GatedEngine, gated, served_by, total
from tests.e2e.picker import DROPPED, PATH, Picked, destination_of, running_picker
from tests.e2e.picker_table import arrived, case, first_of, occupied


@case(
    13, "Chunks of up to 1 MiB come, chunks of at most 62,000 bytes go, one end; no byte is one empty chunk."
)
async def _(picked: Picked) -> None:
    for path, body in (
        (PATH, json.dumps(chat("recorded", "x" * 1_500_000)).encode()),
        ("/passed", random.Random(1).randbytes(1_500_000)),
        ("/passed", b""),
    ):
        async with picked.stream() as stream:
            await stream.ask(path)
            for at in range(0, len(body), 1 << 20):
                await stream.body(body[at : at + (1 << 20)], end=False)
            await stream.body(b"", end=True)
            _, chunks = await stream.request_given_back()
        assert b"".join(chunk.body for chunk in chunks) == body
        assert max(len(chunk.body) for chunk in chunks) <= CHUNK_BYTES
        assert [chunk.end_of_stream for chunk in chunks].count(True) == 1


def written(kind: str, *pieces: bytes, pause_s: float = 0.0, coding: str | None = None) -> Behaviour:
    """An engine that writes these pieces one by one."""
    said = {} if coding is None else {"content-encoding": coding}

    async def behaviour(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": kind, **said})
        await reply.prepare(request)
        for piece in pieces:
            await reply.write(piece)
            await asyncio.sleep(pause_s)
        return reply

    return behaviour


@case(14, "A JSON answer in several chunks goes on as it is, and one that is no JSON as well.")
async def _(picked: Picked) -> None:
    for pieces in ((b'{"cho', b'ices": [{}]', b"}"), (b'{"choices": [', b"\xff\x00nonsense")):
        picked.recorder.behaviour = written("application/json", *pieces)
        reply = await picked.post(chat("recorded", "x"))
        assert (reply.status, reply.body) == (200, b"".join(pieces))


@case(
    15,
    "Events go on in their order, and usage is counted wherever an event is cut.",
    "usage is lost where its event is cut",
)
async def _(picked: Picked) -> None:
    event = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":10}}\n\n'
    first = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    for at in range(1, len(event)):
        picked.recorder.behaviour = written(
            "text/event-stream", first, event[:at], event[at:], b"data: [DONE]\n\n"
        )
        reply = await picked.post(chat("recorded", f"cut {at}", 16, stream=True))
        assert reply.body == first + event + b"data: [DONE]\n\n"
        outcome = await picked.last_outcome()
        assert (outcome["prompt_tokens"], outcome["completion_tokens"]) == (7, 10)


@case(16, "Fallbacks are named in the order of their scores; who served is charged from then on.")
async def _(picked: Picked) -> None:
    tokenway = picked.picker.tokenway
    async with occupied(picked, 4, 0, 2), picked.stream() as stream:
        await stream.ask()
        await stream.body(json.dumps(chat("three", "order")).encode(), end=True)
        headers, _ = await stream.request_given_back()
        keys = [recorder.key for recorder in picked.three]
        assert destination_of(headers) == f"{keys[1]},{keys[2]},{keys[0]}"

        async def requests() -> list[int]:
            rows = await tokenway.rows()
            return [int(rows[key]["requests"]) for key in keys]

        assert await requests() == [4, 1, 2]
        await stream.answer(served=keys[2])
        assert (await stream.heard()).HasField("response_headers")
        assert await requests() == [4, 0, 3]
        await stream.chunk(b'{"choices": [{}]}', end=True)
        assert (await stream.heard()).HasField("response_body")
        assert await requests() == [4, 0, 2]


@case(
    17,
    "A request that ends with trailers goes on whole, with them; so does an answer.",
    "a request that ends with trailers hangs",
)
async def _(picked: Picked) -> None:
    body = json.dumps(chat("recorded", "x")).encode()
    half = len(body) // 2
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        "transfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n"
    ).encode()
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:])]
    for listener in ("header", "metadata"):  # whose route retries, and keeps a copy for that
        port = picked.picker.ports[listener]
        reply = await exchange(port, head, *chunks, b"0\r\nx-end: 1\r\n\r\n", pause_s=0.05)
        assert (reply.status, picked.recorder.received[-1].body) == (200, body)
    picked.recorder.behaviour = _with_trailers
    reader, writer = await asyncio.open_connection("127.0.0.1", picked.picker.ports["metadata"])
    writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    try:
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"x-end: 7\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()
    assert b"\r\n\r\n2\r\n{}\r\n0\r\n" in answer


async def _with_trailers(request: web.Request) -> web.StreamResponse:
    transport = request.transport
    assert transport is not None
    transport.write(
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n"
        b"2\r\n{}\r\n0\r\nx-end: 7\r\n\r\n"
    )
    await asyncio.sleep(0.2)
    transport.close()
    return web.Response()


@case(
    18,
    "Where all endpoints are full, priority below 0 gets 429, whether requests are held (`holding`) or "
    "not; others are sent, or wait, the higher priority first, and are served; where there is room all "
    "are. The objective is read from either header.",
)
async def _(picked: Picked) -> None:
    for holds in (True, False):
        async with gated(kv_tokens=20_000) as engine:
            config = {
                "models": {"full": served_by("full")},
                "holding": {"enabled": holds, "max_s": 50.0},
                "health": FAST_HEALTH,
            }
            clusters = [cluster("full", [engine.key])]
            objectives = {"batch": -1, "chat": 1}
            async with running_picker(
                clusters, config, is_tls=picked.picker.is_tls, objectives=objectives
            ) as stack:
                await _full(Picked(stack, (), engine), engine, holds=holds)


async def _full(picked: Picked, engine: GatedEngine, *, holds: bool) -> None:
    tokenway = picked.picker.tokenway

    def ask(name: str, **headers: str) -> asyncio.Task[Any]:
        body = chat("full", f"{name} " + "tok " * 12_000, stream=True)
        return asyncio.create_task(picked.post(body, **headers))

    async def of_endpoint(name: str) -> int:
        return int((await tokenway.rows())[engine.key][name])

    # Until the engine has reported its cache's size, five times as much is thought to fit.
    await eventually(lambda: of_endpoint("capacity_blocks"), lambda blocks: blocks < 400)
    first = ask("first", x_llm_d_inference_objective="batch")  # there is room for it
    await engine.has(1)
    await eventually(lambda: of_endpoint("prefill_tokens"), lambda tokens: tokens == 0)
    new, alias = "x_llm_d_inference_objective", "x_gateway_inference_objective"
    for said in ({new: "batch"}, {alias: "batch"}, {new: "No Name!", alias: "batch"}):
        reply = await ask("batch", **said, x_llm_d_inference_fairness_id="t1")
        assert (reply.status, reply.headers[DROPPED]) == (429, "rejected-saturated")
        assert int(reply.headers["retry-after"]) > 0
        (record,) = await tokenway.last(1)
        standing = {"objective": "batch", "priority": -1, "fairness_id": "t1", "is_known": True}
        assert record["standing"] == standing

    async def under_way() -> int:
        return int((await tokenway.endpoints())["held"]) if holds else await of_endpoint("requests") - 1

    # The new name wins over its alias; one that is not known is of priority 0.
    waits = ask("waits", **{new: "unknown", alias: "batch"})
    await eventually(under_way, lambda count: count == 1)
    matters = ask("matters", x_gateway_inference_objective="chat")
    await eventually(under_way, lambda count: count == 2)
    engine.open()
    assert [(await each).status for each in (first, waits, matters)] == [200] * 3
    # What is sent first may be overtaken on its way; the order itself is tested without Envoy
    # (tests/unit/choosing/test_priorities.py).
    assert sorted(engine.arrived) == ["first", "matters", "waits"]
    ignored = [
        total(await tokenway.metrics(), "tokenway_headers_ignored_total", header="objective", reason=reason)
        for reason in ("malformed", "unknown")
    ]
    assert ignored == [1.0, 1.0]
    told = [line for line in tokenway.gateway_log() if line["event"] == "a request header says nothing"]
    assert [(line["sent_as"], line.get("objective")) for line in told] == [
        ("x-llm-d-inference-objective", None),
        ("x-llm-d-inference-objective", "unknown"),
    ]
    await tokenway.settled()


@case(
    19,
    "A client that leaves in the stream, an endpoint that is removed in it: every counter returns to 0.",
    "counters below 0 when an endpoint comes and goes",
)
async def _(picked: Picked) -> None:
    async with simulated_removal(picked) as (tokenway, port, key):
        for leaves in (True, False):
            body = json.dumps(chat("sim", f"long {leaves}", 400, True)).encode()
            head = (
                f"POST {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            await reader.readuntil(b"data: ")
            assert await tokenway.charged()
            if leaves:
                writer.transport.abort()
                with suppress(ConnectionError):
                    await writer.wait_closed()
            else:
                tokenway.write_clusters(cluster("sim", []))
                await eventually(tokenway.rows, lambda rows: key not in rows)
                async with asyncio.timeout(60):
                    answer = await reader.read()
                assert b"[DONE]" in answer
                writer.close()
                await writer.wait_closed()
            await tokenway.settled()


@asynccontextmanager
async def simulated_removal(picked: Picked) -> AsyncIterator[tuple[Any, int, str]]:
    """A picker of its own before one simulator: its gateway, its Envoy's port, its endpoint."""
    async with simulators(1, time_scale=0.2) as (engine,):
        clusters = [cluster("sim", [key_of(engine)])]
        config = {"models": {"sim": {"rules": [{"cluster": "sim"}]}}}
        async with running_picker(clusters, config, is_tls=picked.picker.is_tls) as stack:
            yield stack.tokenway, stack.ports["metadata"], key_of(engine)


@case(
    20,
    "A burst of twelve alike spreads over three, four each; what shares a prefix follows it.",
    "herds within a scrape",
)
async def _(picked: Picked) -> None:
    async with occupied(picked, 0, 0, 0):
        burst = [asyncio.create_task(picked.post(chat("three", f"burst {n}"))) for n in range(12)]
        await arrived(picked.three, (4, 4, 4))
    assert [reply.status for reply in await asyncio.gather(*burst)] == [200] * 12
    # Engines that take time for a prompt: with others a prefix is learned to be worth nothing.
    async with simulators(3, time_scale=0.05) as engines:
        clusters = [cluster("sim", list(map(key_of, engines)))]
        config = {"models": {"sim": {"rules": [{"cluster": "sim"}]}}}
        async with running_picker(clusters, config, is_tls=picked.picker.is_tls) as stack:
            prefix = "the same long beginning " * 400
            for turn in range(6):
                reply = await Picked(stack, engines, picked.recorder).post(chat("sim", f"{prefix}{turn}"))
                assert reply.status == 200
                await stack.tokenway.settled()
        assert sorted(len(engine.served) for engine in engines) == [0, 0, 6]


@case(21, "The end of a body said twice is one decision, one answer, one charge.")
async def _(picked: Picked) -> None:
    body = json.dumps(chat("recorded", "twice")).encode()
    async with picked.stream() as stream:
        await stream.ask()
        await stream.body(body, end=True)
        await stream.body(body, end=True)
        headers, chunks = await stream.request_given_back()
        assert destination_of(headers) == picked.recorder.key
        assert b"".join(chunk.body for chunk in chunks) == body
        assert (await picked.picker.tokenway.charged())["in_flight"] == 1
        await stream.body(b"", end=True)
        await stream.answer(end=True)
        assert (await stream.heard()).WhichOneof("response") == "response_headers"


@case(22, "An answer of status 400 or more is seen to be one.", "looks for the status under another key")
async def _(picked: Picked) -> None:
    async def behaviour(request: web.Request) -> web.StreamResponse:
        status = int(json.loads(await request.read())["messages"][0]["content"])
        return web.json_response({"error": {"message": "no"}}, status=status)

    picked.recorder.behaviour = behaviour
    for status, ended in ((404, "completed"), (422, "completed"), (500, "upstream_error")):
        assert (await picked.post(chat("recorded", str(status)))).status == status
        outcome = await picked.last_outcome()
        assert (outcome["status"], outcome["ended"]) == (status, ended)


@case(23, "No picker: FailClose answers 500; FailOpen goes on without it once its endpoint is removed.")
async def _(picked: Picked) -> None:
    body = json.dumps(chat("sim", "x", 2)).encode()
    for listener, get_status, post_status in (
        ("dead", 500, 500),
        ("gone", 500, 500),
        ("dead_open", 200, 500),
        ("gone_open", 200, 200),
    ):
        found = [
            (await picked.send("GET", "/health", listener=listener)).status,
            (await picked.send("POST", PATH, body, listener=listener)).status,
        ]
        assert found == [get_status, post_status], listener


LARGE: Final = random.Random(7).randbytes(10_000_000)


@case(24, "10 MB, and 5,000 events, pass byte for byte.")
async def _(picked: Picked) -> None:
    picked.recorder.behaviour = written("application/octet-stream", LARGE)
    assert (await picked.post(chat("recorded", "x"))).body == LARGE
    events = [f'data: {{"choices":[{{"delta":{{"content":"{n}"}}}}]}}\n\n'.encode() for n in range(5_000)]
    picked.recorder.behaviour = written("text/event-stream", *events)
    replies = await asyncio.gather(*(picked.post(chat("recorded", "x", stream=True)) for _ in range(4)))
    assert {reply.body for reply in replies} == {b"".join(events)}


@case(25, "Ports of one pod are endpoints of their own: chosen, charged and removed each for itself.")
async def _(picked: Picked) -> None:
    one, other, _ = picked.three
    async with AsyncExitStack() as stack:
        clusters = [cluster("ranks", [one.key, other.key])]
        config = {"models": {"ranks": {"rules": [{"cluster": "ranks"}]}}}
        second = await stack.enter_async_context(
            running_picker(clusters, config, is_tls=picked.picker.is_tls)
        )
        ranks = Picked(second, (), one, (one, other))
        for each in (one, other):
            for number in range(2):
                reply = await ranks.post(chat("ranks", f"{number}"), x_test_subset=each.key)
                assert reply.status == 200
                assert (await ranks.last_outcome())["endpoint"] == each.key
        second.tokenway.write_clusters(cluster("ranks", [other.key]))
        await eventually(second.tokenway.rows, lambda rows: one.key not in rows)
        one.received.clear()
        assert (await ranks.post(chat("ranks", "x"), x_test_subset=one.key)).status == 503
        for number in range(4):
            assert (await ranks.post(chat("ranks", f"left {number}"))).status == 200
        assert one.received == []
        await second.tokenway.settled()


NAMES: Final = (
    "",
    "liveness",
    "readiness",
    "inference-extension",
    "envoy.service.ext_proc.v3.ExternalProcessor",
    "anything else",
)


async def health(picked: Picked, name: str, port: int | None = None) -> bytes:
    """What `grpc.health.v1.Health/Check` says, serialised."""
    async with picked.picker.channel(port) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        request = b"" if not name else b"\x0a" + bytes([len(name)]) + name.encode()
        answer: bytes = await check(request, timeout=5)
        return answer


@case(26, "Health answers by every service name, on a port of its own, in clear text, as on the picker's.")
async def _(picked: Picked) -> None:
    for port in (None, picked.picker.health_port):
        for name in NAMES:
            assert await health(picked, name, port) == b"\x08\x01"
    page = await get(f"http://127.0.0.1:{picked.picker.metrics_port}/metrics")
    assert b"tokenway_" in page


@case(
    27,
    "`test-epp-endpoint-selection` chooses, above the subset, where the conformance suite is allowed for; "
    "elsewhere it is taken off.",
)
async def _(picked: Picked) -> None:
    selects = {"test_epp_endpoint_selection": picked.three[2].key}
    async with occupied(picked, 0, 1, 9):
        assert await first_of(picked, chat("three", "no test"), **selects) == 0
        assert "test-epp-endpoint-selection" not in picked.three[0].received[-1].headers
    clusters = [cluster("three", [recorder.key for recorder in picked.three])]
    config = {"models": {"three": {"rules": [{"cluster": "three"}]}}, "default_cluster": "three"}
    async with running_picker(clusters, config, is_tls=picked.picker.is_tls, conformance=True) as stack:
        tested = Picked(stack, (), picked.recorder, picked.three)
        for only in picked.three:
            chosen = {"test_epp_endpoint_selection": only.key, "x_test_subset": picked.three[0].key}
            reply = await tested.post(chat("three", "x"), **chosen)
            served = reply.headers["x-conformance-test-served-endpoint"]
            assert (reply.status, served) == (200, only.key)
            named = {name.replace("_", "-"): value for name, value in chosen.items()}
            reply = await tested.send("GET", "/", headers=named)
            served = reply.headers["x-conformance-test-served-endpoint"]
            assert (reply.status, served) == (200, only.key)
        await stack.tokenway.settled()
