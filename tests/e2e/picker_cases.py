"""What an endpoint picker has to do, case by case; the table, and how each is looked at from without.

The numbers are those of a list that was made of the protocol's specification, the hermetic tests of llm-d's
router and its known defects. `llm_d` is what reading its source (August 2026) says of the same case; nothing
of it was run here.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from extproc.picker.dialect import CHUNK_BYTES
from testbed.processes import get
from tests.e2e.harness import FAST_HEALTH, Behaviour, Recorder, chat, cluster, eventually, exchange, key_of
from tests.e2e.holding import GatedEngine, gated, served_by
from tests.e2e.picker import DROPPED, PATH, Picked, destination_of, running_picker

Check = Callable[[Picked], Awaitable[None]]

PASSES: Final = "passes"


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Attributes:
        number: In the list.
        words: What has to be.
        llm_d: `PASSES`, or how llm-d fails.
        check: Looks at it.
    """

    number: int
    words: str
    llm_d: str
    check: Check


CASES: list[Case] = []
"""In the order of their numbers."""


def case(number: int, words: str, llm_d: str = PASSES) -> Callable[[Check], Check]:
    """Add a case to the table."""

    def add(check: Check) -> Check:
        CASES.append(Case(number, words, llm_d, check))
        return check

    return add


@asynccontextmanager
async def occupied(picked: Picked, *loads: int) -> AsyncIterator[None]:
    """So many requests run at each of the three recorders; they end with the block, answered."""
    done = asyncio.Event()

    async def behaviour(_: web.Request) -> web.StreamResponse:
        await done.wait()
        return web.json_response({"choices": []})

    for recorder in picked.three:
        recorder.behaviour = behaviour
    asked = [
        asyncio.create_task(picked.post(chat("three", f"load {at} {number}"), x_test_subset=recorder.key))
        for at, recorder in enumerate(picked.three)
        for number in range(loads[at])
    ]
    await arrived(picked.three, loads)
    for recorder in picked.three:
        recorder.received.clear()
    try:
        yield
    finally:
        done.set()
        replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200] * len(asked)


async def arrived(recorders: Sequence[Recorder], counts: Sequence[int]) -> None:
    """Wait until each has so many requests."""

    async def read() -> list[int]:
        return [len(recorder.received) for recorder in recorders]

    await eventually(read, lambda numbers: numbers == list(counts))


async def first_of(picked: Picked, body: dict[str, Any], **headers: str) -> int:
    """Which of the three gets a request; it is answered when the block around ends."""
    before = [len(recorder.received) for recorder in picked.three]
    asked = asyncio.create_task(picked.post(body, **headers))

    async def read() -> list[int]:
        return [len(recorder.received) - had for recorder, had in zip(picked.three, before, strict=True)]

    came = await eventually(read, any)
    asked.add_done_callback(lambda task: task.exception())
    return came.index(1)


@case(1, "The least busy endpoint is chosen: of 3, 0 and 10 requests the one with none.")
async def _(picked: Picked) -> None:
    async with occupied(picked, 3, 0, 10):
        assert await first_of(picked, chat("three", "which")) == 1


@case(2, "An adapter that one endpoint alone has (label) goes there, though others are less busy.")
async def _(picked: Picked) -> None:
    async with occupied(picked, 4, 0, 1):
        assert await first_of(picked, chat("adapted", "which")) == 0
        assert json.loads(picked.three[0].received[-1].body)["model"] == "polite"


@case(3, "Nothing is shed by default: the one endpoint that has the adapter is taken at 6 requests, too.")
async def _(picked: Picked) -> None:
    async with occupied(picked, 6, 9, 10):
        for number in range(3):
            assert await first_of(picked, chat("adapted", f"which {number}")) == 0


@case(4, "A body in two messages is decided like one in one; nothing is said before its end.")
async def _(picked: Picked) -> None:
    body = json.dumps(chat("recorded", "halves")).encode()
    async with picked.stream() as halved:
        await halved.ask()
        await halved.body(body[:20], end=False)
        async with picked.stream() as other:  # decided later, answered earlier
            await other.ask()
            await other.body(body, end=True)
            headers, _ = await other.request_given_back()
            expected = destination_of(headers)
        await halved.body(body[20:], end=True)
        headers, chunks = await halved.request_given_back()
    assert destination_of(headers) == expected == picked.recorder.key
    assert b"".join(chunk.body for chunk in chunks) == body


@case(5, "A body that is no JSON: 400. (The body is OpenAI's error object, not llm-d's sentence.)")
async def _(picked: Picked) -> None:
    reply = await picked.post(b"no healthy upstream")
    assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_json")


@case(6, "`model` missing: 400; a path that is no inference needs none.")
async def _(picked: Picked) -> None:
    reply = await picked.post(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert (reply.status, reply.json["error"]["code"]) == (400, "missing_model")
    assert (await picked.send("POST", "/passed", b"anything")).status == 200


@case(7, "A subset of three: its best; of one: that one, though it is the busiest; of a stranger: 503.")
async def _(picked: Picked) -> None:
    keys = [recorder.key for recorder in picked.three]
    async with occupied(picked, 2, 0, 10):
        assert await first_of(picked, chat("three", "all"), x_test_subset=",".join(keys)) == 1
        assert await first_of(picked, chat("three", "one"), x_test_subset=keys[2]) == 2
        reply = await picked.post(chat("three", "x"), x_test_subset="192.168.1.99:8000")
        assert (reply.status, reply.headers[DROPPED]) == (503, "rejected-no-endpoints")


@case(8, "A subset that is there and empty: 503.")
async def _(picked: Picked) -> None:
    reply = await picked.post(chat("three", "x"), x_test_subset=",")
    assert (reply.status, reply.headers[DROPPED]) == (503, "rejected-no-endpoints")
    async with picked.stream() as stream:
        await stream.ask(hint=[])
        await stream.body(json.dumps(chat("three", "x")).encode(), end=True)
        assert (await stream.heard()).immediate_response.status.code == 503


@case(9, "A subset tells ports of one address apart.", "compares addresses without ports")
async def _(picked: Picked) -> None:
    for only in picked.three:
        for hint in (only.key, f" 10.0.0.9:80 ,{only.key}"):
            before = len(only.received)
            for number in range(3):
                assert (await picked.post(chat("three", f"{number}"), x_test_subset=hint)).status == 200
            assert len(only.received) == before + 3
    assert (await picked.post(chat("three", "x"), x_test_subset="127.0.0.1")).status == 200


@case(
    10,
    "A GET goes to an endpoint within the subset; where there is none: 503.",
    "any endpoint of the pool; 500 for an empty one",
)
async def _(picked: Picked) -> None:
    for recorder in picked.three:
        for _ in range(3):
            hint = {"x-test-subset": recorder.key}
            assert (await picked.send("GET", "/info", headers=hint)).status == 200
        assert [(each.method, each.path) for each in recorder.received] == [("GET", "/info")] * 3
    for listener in ("metadata", "header"):
        reply = await picked.send("GET", "/info", listener=listener, headers={"x-test-subset": "10.0.0.9"})
        assert (reply.status, reply.headers[DROPPED]) == (503, "rejected-no-endpoints")


def _named(*cuts: int) -> tuple[bytes, Behaviour]:
    """A stream that says the engine's name for its model, written in so many pieces."""
    body = (
        b'data: {"id":"1","model":"base","choices":[{"delta":{"content":"\\"model\\":\\"base\\""}}]}\n\n'
        b"data: [DONE]\n\n"
    )

    async def behaviour(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for begins, ends in zip((0, *cuts), (*cuts, len(body)), strict=True):
            await reply.write(body[begins:ends])
            await asyncio.sleep(0)
        return reply

    return body, behaviour


@case(11, "A model that is rewritten, by a rule or by header, is so in the request, and back in the answer.")
async def _(picked: Picked) -> None:
    async def whole(_: web.Request) -> web.StreamResponse:
        return web.json_response({"model": "base", "choices": [], "text": '"model":"base"'})

    for asked, headers in (
        ("tuned", {}),
        ("whatever", {"x_gateway_model_name_rewrite": "tuned"}),
        ("whatever", {"x_llm_d_model_name_rewrite": "tuned", "x_gateway_model_name_rewrite": "nobody"}),
    ):
        picked.recorder.behaviour = whole
        reply = await picked.post(chat(asked, "x"), **headers)
        assert (reply.json["model"], reply.json["text"]) == (asked, '"model":"base"')
        assert json.loads(picked.recorder.received[-1].body)["model"] == "base"
        assert not {name for name in picked.recorder.received[-1].headers if "rewrite" in name}
        for cuts in ((), (10, 20, 25, 30), (23, 24, 26, 29)):
            body, picked.recorder.behaviour = _named(*cuts)
            reply = await picked.post(chat(asked, "x", stream=True), **headers)
            assert reply.body == body.replace(b'"model":"base"', f'"model":"{asked}"'.encode(), 1)
    assert (await picked.post(chat("tuned", "x"), x_gateway_model_name_rewrite="nobody")).status == 404


@case(12, "The destination is in header and metadata, equal; a client's own is neither followed nor sent on.")
async def _(picked: Picked) -> None:
    for listener in ("metadata", "header"):
        reply = await picked.post(
            chat("recorded", "x"), listener=listener, x_gateway_destination_endpoint="10.6.6.6:1"
        )
        assert reply.status == 200
        received = picked.recorder.received[-1].headers
        assert received["x-gateway-destination-endpoint"] == picked.recorder.key
    async with picked.stream() as stream:
        await stream.ask(x_gateway_destination_endpoint="10.6.6.6:1", x_llm_d_inference_objective="batch")
        await stream.body(json.dumps(chat("recorded", "x")).encode(), end=True)
        headers, _ = await stream.request_given_back()
    assert destination_of(headers) == picked.recorder.key
    assert "x-llm-d-inference-objective" in headers.request_headers.response.header_mutation.remove_headers


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


def written(kind: str, *pieces: bytes) -> Behaviour:
    """An engine that writes these pieces one by one."""

    async def behaviour(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": kind})
        await reply.prepare(request)
        for piece in pieces:
            await reply.write(piece)
            await asyncio.sleep(0)
        return reply

    return behaviour


@case(14, "A JSON answer in several chunks goes on as it is, and one that is no JSON as well.")
async def _(picked: Picked) -> None:
    for pieces in ((b'{"cho', b'ices": []', b"}"), (b'{"choices": [', b"\xff\x00nonsense")):
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
        await stream.chunk(b'{"choices": []}', end=True)
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
    "Where requests are held (`holding`) and all endpoints are full, priority below 0 gets 429, "
    "others wait and are served.",
)
async def _(picked: Picked) -> None:
    async with gated(kv_tokens=20_000) as engine:
        config = {
            "models": {"full": served_by("full")},
            "holding": {"enabled": True, "max_s": 50.0},
            "health": FAST_HEALTH,
        }
        clusters = [cluster("full", [engine.key])]
        objectives = {"batch": -1, "chat": 1}
        async with running_picker(
            clusters, config, is_tls=picked.picker.is_tls, objectives=objectives
        ) as stack:
            await _full(Picked(stack, (), engine), engine)


async def _full(picked: Picked, engine: GatedEngine) -> None:
    def ask(name: str, **headers: str) -> asyncio.Task[Any]:
        body = chat("full", f"{name} " + "tok " * 12_000, stream=True)
        return asyncio.create_task(picked.post(body, **headers))

    async def capacity() -> int:
        return int((await picked.picker.tokenway.rows())[engine.key]["capacity_blocks"])

    # Until the engine has reported its cache's size, five times as much is thought to fit.
    await eventually(capacity, lambda blocks: blocks < 400)
    first = ask("first")
    await engine.has(1)

    async def prefilling() -> int:
        return int((await picked.picker.tokenway.rows())[engine.key]["prefill_tokens"])

    await eventually(prefilling, lambda tokens: tokens == 0)
    waits = [ask("waits"), ask("matters", x_gateway_inference_objective="chat")]

    async def held() -> int:
        return int((await picked.picker.tokenway.endpoints())["held"])

    await eventually(held, lambda count: count == 2)
    reply = await ask("batch", x_llm_d_inference_objective="batch", x_llm_d_inference_fairness_id="t1")
    assert (reply.status, reply.headers[DROPPED]) == (429, "rejected-saturated")
    (record,) = await picked.picker.tokenway.last(1)
    assert record["standing"] == {"objective": "batch", "priority": -1, "fairness_id": "t1"}
    engine.open()
    assert [(await each).status for each in (first, *waits)] == [200, 200, 200]
    await picked.picker.tokenway.settled()


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
    from tests.e2e.harness import simulators

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
    picked.reset()
    prefix = "the same long beginning " * 400
    for turn in range(6):
        assert (await picked.post(chat("three", f"{prefix}{turn}"))).status == 200
    assert sorted(len(recorder.received) for recorder in picked.three) == [0, 0, 6]


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


def table() -> str:
    """The cases as the document shows them."""
    rows = [f"| {each.number} | {each.words} | {each.llm_d} |" for each in CASES]
    return "\n".join(["| | case | llm-d, by its source |", "|---|---|---|", *rows])
