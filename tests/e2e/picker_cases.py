"""Cases 1 to 12 of an endpoint picker (`tests.e2e.picker_table`): the choice, and what comes of requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from aiohttp import web

from tests.e2e.harness import Behaviour, chat, cluster, eventually
from tests.e2e.picker import DROPPED, PATH, Picked, destination_of, running_picker
from tests.e2e.picker_table import case, first_of, occupied, running_prompts


@case(
    1,
    "The least busy endpoint is chosen, wherever it stands: of 3, 0 and 10 requests the one with none; of "
    "as many requests that with less prefill ahead, and with less in its KV cache.",
)
async def _(picked: Picked) -> None:
    for loads, least in (((3, 0, 10), 1), ((0, 10, 3), 0), ((10, 3, 0), 2)):
        async with occupied(picked, *loads):
            assert await first_of(picked, chat("three", f"which of {loads}")) == least
        picked.reset()
    for least in range(3):
        for prefilled in (False, True):
            prompts = ["short" if at == least else f"{at} " + "long prompt " * 4_000 for at in range(3)]
            async with running_prompts(picked, prompts, prefilled=prefilled):
                rows = await picked.picker.tokenway.rows()
                asked = [rows[recorder.key] for recorder in picked.three]
                assert [row["requests"] for row in asked] == [1, 1, 1]
                assert [row["prefill_tokens"] > 0 for row in asked] == [not prefilled] * 3
                assert await first_of(picked, chat("three", f"which {least} {prefilled}")) == least
            picked.reset()


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


NO_JSON: Final = (
    b"no healthy upstream",
    b"",
    b'{"model": "three", "messages": [',
    b'{"model": "three"} {}',
    b'["three"]',
    b'"three"',
    b"7",
    b"null",
    b'{"model": "three", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    b"[" * 100_000,
)


@case(
    5,
    "A body that is no JSON object, cut off, not UTF-8 or nested without end: 400 in the shape of its "
    "API, no engine is asked, and the next request is served. (The body is OpenAI's or Anthropic's error "
    "object, not llm-d's sentence.)",
)
async def _(picked: Picked) -> None:
    for path in (PATH, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"):
        for body in NO_JSON:
            reply = await picked.send("POST", path, body)
            assert reply.status == 400, (path, body[:40], reply)
            assert reply.headers["content-type"] == "application/json"
            error = reply.json["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"]
            if path == "/v1/messages":
                assert reply.json["type"] == "error"
            else:
                assert error["code"].startswith("invalid_"), (body[:40], error)
            assert DROPPED not in reply.headers
    assert [recorder.received for recorder in picked.three] == [[], [], []]
    assert (await picked.post(chat("three", "x"))).status == 200


@case(
    6,
    "`model` missing, null, empty or no string: 400, with all of the APIs, and `model` as the parameter "
    "that is wrong; a path that is no inference needs none, whatever its body.",
)
async def _(picked: Picked) -> None:
    inputs: dict[str, dict[str, Any]] = {
        PATH: {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
        "/v1/embeddings": {"input": "x"},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
        "/v1/rerank": {"query": "x", "documents": ["y"]},
    }
    for path, body in inputs.items():
        for model in ({}, {"model": None}, {"model": ""}, {"model": 7}, {"model": ["three"]}):
            reply = await picked.send("POST", path, json.dumps(body | model).encode())
            assert reply.status == 400, (path, model, reply)
            if path != "/v1/messages":
                assert reply.json["error"]["param"] == "model", (path, model, reply.json)
            assert "model" in reply.json["error"]["message"]
    assert [recorder.received for recorder in picked.three] == [[], [], []]
    for method, data in (
        ("POST", b"anything"),
        ("POST", b'{"messages": []}'),
        ("PUT", b""),
        ("DELETE", None),
    ):
        assert (await picked.send(method, "/passed?by=us", data)).status == 200
    asked = [(each.method, each.path, each.body) for recorder in picked.three for each in recorder.received]
    assert sorted(asked) == [
        ("DELETE", "/passed?by=us", b""),
        ("POST", "/passed?by=us", b"anything"),
        ("POST", "/passed?by=us", b'{"messages": []}'),
        ("PUT", "/passed?by=us", b""),
    ]


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
    "A request without a body (GET, HEAD, DELETE, a POST of no bytes) goes to an endpoint within the "
    "subset, without one to any of the pool; where there is none, in the subset or in the pool: 503.",
    "any endpoint of the pool; 500 for an empty one",
)
async def _(picked: Picked) -> None:
    asks = (("GET", None), ("HEAD", None), ("DELETE", None), ("POST", b""))
    for recorder in picked.three:
        for method, body in asks:
            hint = {"x-test-subset": recorder.key}
            assert (await picked.send(method, "/info", body, headers=hint)).status == 200
        assert [(each.method, each.path) for each in recorder.received] == [
            (each, "/info") for each, _ in asks
        ]
    picked.reset()
    for _ in range(30):
        assert (await picked.send("GET", "/info")).status == 200
    assert min(len(recorder.received) for recorder in picked.three) > 0
    two = f"{picked.three[0].key},{picked.three[2].key}"
    picked.reset()
    for _ in range(20):
        assert (await picked.send("GET", "/info", headers={"x-test-subset": two})).status == 200
    assert [bool(recorder.received) for recorder in picked.three] == [True, False, True]
    for listener in ("metadata", "header"):
        for subset in ("10.0.0.9", ","):
            reply = await picked.send("GET", "/info", listener=listener, headers={"x-test-subset": subset})
            assert (reply.status, reply.headers[DROPPED]) == (503, "rejected-no-endpoints")
    await _empty(picked)


async def _empty(picked: Picked) -> None:
    """The only endpoint leaves the pool."""
    config = {"models": {"last": {"rules": [{"cluster": "last"}]}}, "default_cluster": "last"}
    clusters = [cluster("last", [picked.recorder.key])]
    async with running_picker(clusters, config, is_tls=picked.picker.is_tls) as stack:
        emptied = Picked(stack, (), picked.recorder)
        assert (await emptied.send("GET", "/info")).status == 200
        stack.tokenway.write_clusters(cluster("last", []))
        await eventually(stack.tokenway.rows, lambda rows: not rows)
        for method, body in (("GET", None), ("POST", b""), ("POST", b"anything")):
            reply = await emptied.send(method, "/info", body)
            assert (reply.status, reply.headers[DROPPED]) == (503, "rejected-no-endpoints")
        reply = await emptied.post(chat("last", "x"))
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
        return web.json_response({"model": "base", "choices": [{}], "text": '"model":"base"'})

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
