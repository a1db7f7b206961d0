"""What Envoy lets through while Tokenway is gone (killed) or late (stopped): inference, and nothing else."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from extproc.request.parse import INFERENCE_PATHS, is_form
from extproc.request.paths import ADMIN_PATHS
from extproc.request.sanitize import STEERING_FIELDS, STEERING_XARGS
from testbed.processes import get
from tests.e2e.harness import (
    Recorder,
    Reply,
    Stack,
    chat,
    check_for_any_api,
    cluster,
    eventually,
    exchange,
    post,
    recording,
    running_stack,
    sample,
    send,
)

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    "/v1/embeddings": {"input": "hi"},
}
MODELS: dict[str, Any] = {
    "open": {"rules": [{"cluster": "c"}], "aliases": ["org/open", "größe-大-🦀"]},
    "gated": {"rules": [{"cluster": "c", "headers": {"x-team": "red"}}]},
    "partly": {"rules": [{"cluster": "other", "headers": {"x-team": "red"}}, {"cluster": "c"}]},
    "off": {
        "rules": [{"cluster": "c", "weight": 0}, {"cluster": "c", "headers": {"x-team": "red"}}],
        "aliases": ["off-too"],
    },
    "part": {"rules": [{"cluster": "both", "subset": {"pool": "right"}}]},
}


class Away:
    """A stack whose gateway does not answer.

    Attributes:
        stack: The Envoy.
        engine: Behind every cluster but `other`.
        other: Behind `other`, and without the label in `both`.
    """

    def __init__(self, stack: Stack, engine: Recorder, other: Recorder) -> None:
        self.stack = stack
        self.engine = engine
        self.other = other


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["gone", "late"])
async def _away(request: pytest.FixtureRequest) -> AsyncIterator[Away]:
    async with recording() as engine, recording() as other:
        both = cluster("both", [engine.key, other.key])
        both["endpoints"][0]["labels"] = {"pool": "right"}
        clusters = [cluster("c", [engine.key]), cluster("other", [other.key]), both]
        async with running_stack(clusters, {"models": MODELS}) as stack:
            assert (await post(stack, chat("open", "before"))).status == 200
            if request.param == "gone":
                await stack.gateway.kill()
            else:
                stack.gateway.signal(signal.SIGSTOP)
            yield Away(stack, engine, other)
            if request.param == "late":
                stack.gateway.signal(signal.SIGCONT)


@pytest.fixture
def away(_away: Away) -> Away:
    """The stack with clean recorders."""
    _away.engine.reset()
    _away.other.reset()
    return _away


async def test_inference_goes_on(away: Away) -> None:
    """Every inference API of a model open to all is served, with the body as it came."""
    for path, body in BODIES.items():
        away.engine.reset()
        sent = json.dumps({"model": "open", **body}, indent=2).encode()
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await send(away.stack, "POST", path, sent, headers)).status == 200
        (received,) = away.engine.received
        assert (received.path, received.body) == (path, sent)


async def test_nothing_else_is_reached(away: Away) -> None:
    """No path by which engines are administered is served, by any method, with or without a model."""
    paths = [*sorted(ADMIN_PATHS), "/sleep?level=2", "/", "/health", "/v1/models", "/v1/chat/completions/x"]
    few = ("/sleep", "/metrics", "/v1/load_lora_adapter", "/v1/models")
    asked = [("POST", path) for path in paths]
    asked += [(method, path) for path in few for method in ("GET", "PUT", "DELETE", "PATCH")]
    turn = asyncio.Semaphore(32)

    async def status(method: str, path: str) -> int:
        async with turn:
            try:
                return (await send(away.stack, method, path, {"model": "open", "messages": []})).status
            except aiohttp.ClientConnectionError:  # answered and closed before the body was sent
                return 0

    statuses = await asyncio.gather(*(status(*each) for each in asked))
    assert set(statuses) <= {0, 404, 503}
    assert away.engine.received == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
async def test_inference_takes_post_alone(away: Away, method: str) -> None:
    """As with Tokenway: 405."""
    assert (await send(away.stack, method, "/v1/chat/completions", chat("open", "hi"))).status == 405
    assert away.engine.received == []


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/responses/resp_1", "/v1/models"])
async def test_what_needs_tokenway_is_later(away: Away, path: str) -> None:
    """What Envoy cannot place by itself is 503 and worth another try, not unknown."""
    reply = await send(
        away.stack, "POST", path, b"--x--", {"content-type": "multipart/form-data; boundary=x"}
    )
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert away.engine.received == []


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "open", "priority": 1}, 503, "overloaded_error"),
        ({"messages": []}, 400, "invalid_request_error"),
    ],
)
async def test_refusals_at_the_messages_api_are_anthropics(
    away: Away, body: dict[str, Any], status: int, kind: str
) -> None:
    """The script's own words reach the client in the shape that Anthropic's clients parse."""
    reply = await send(away.stack, "POST", "/v1/messages", body)
    said = json.loads(reply.body)
    assert (reply.status, said["type"], said["error"]["type"]) == (status, "error", kind)
    assert "not valid HTTP" not in said["error"]["message"]
    assert said["request_id"]


SPELLINGS = {
    "/%73leep": 404,
    "/v1/../sleep": 404,
    "//sleep": 404,
    "/v1/chat/completions/../../../sleep": 404,
    "/v1%2F..%2Fsleep": 404,
    "/v1/chat/completions;/../../../sleep": 404,
    "/SLEEP": 404,
    "/v1/chat/completions/x": 404,
    "/v1/chat/completions/.x": 404,
    "/V1/chat/completions": 404,
    "/v1/chat/completion%2573": 404,
    "/v1/chat/completions%20": 404,
    "/v1/chat/completion%73": 200,
    "//v1/./chat/x/%2e%2e/completions": 200,
    "/v1/chat%2Fcompletions?level=2": 200,
    "http://h/v1/chat/completions": 200,
}


@pytest.mark.parametrize(("path", "status"), SPELLINGS.items(), ids=SPELLINGS.keys())
async def test_a_path_has_one_reading(away: Away, path: str, status: int) -> None:
    """Envoy decodes and normalises before it compares, and the engine gets the path that was compared."""
    body = json.dumps(chat("open", "hi")).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    reply = await exchange(away.stack.port, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    assert reply.status == status
    paths = [one.path.partition("?")[0] for one in away.engine.received]
    assert paths == (["/v1/chat/completions"] if status == 200 else [])


SLASHED = ["/", "//", "%2F", "/?beta=true", "/./", "/x/../"]
"""What Envoy makes one slash of, at the end of a path."""


@pytest.mark.parametrize("end", SLASHED)
async def test_a_slash_at_the_end_of_a_path_is_no_matter(away: Away, end: str) -> None:
    """On every path of inference, as while Tokenway is there; forms alone wait for it."""
    body = json.dumps({"model": "open", **BODIES["/v1/messages"], "prompt": "hi"}).encode()

    async def status(path: str) -> int:
        head = f"POST {path}{end} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        sent = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        return (await exchange(away.stack.port, sent)).status

    statuses = await asyncio.gather(*map(status, INFERENCE_PATHS))
    served = [path for path in INFERENCE_PATHS if not is_form(path)]
    expected = {path: 200 if path in served else 503 for path in INFERENCE_PATHS}
    assert dict(zip(INFERENCE_PATHS, statuses, strict=True)) == expected
    query = "".join(end.partition("?")[1:])
    assert sorted(one.path for one in away.engine.received) == sorted(f"{path}{query}" for path in served)


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/responses/resp_1/", "/v1/audio/transcriptions/"])
async def test_nor_is_it_on_paths_that_wait_for_tokenway(away: Away, path: str) -> None:
    """503 with and without it; what no path is with a slash is none without."""
    assert (await send(away.stack, "GET", path)).status == 503
    assert (await send(away.stack, "GET", "/v1/chat/completions/")).status == 405
    assert (await send(away.stack, "POST", "/v1/audio/", b"{}")).status == 404
    assert away.engine.received == []


def with_text(text: str) -> bytes:
    """A good chat request with further text among its fields."""
    return b'{"model": "open", "messages": [{"role": "user", "content": "hi"}], ' + text.encode() + b"}"


STEERING = {
    **{name: with_text(f'"{name}": 1') for name in STEERING_FIELDS},
    **{
        f"vllm_xargs.{name}": with_text(f'"vllm_xargs": {{ "a":1,\n"{name}": "x"}}')
        for name in STEERING_XARGS
    },
    "first": b'{"priority":-1,' + with_text('"x": 1')[1:],
    "after_much": with_text('"x": "' + "x" * 1_000_000 + '", "priority": -1'),
    "after_nested": with_text('"x": [{"a": "]}"}, [[]], "\\"}"], "priority": -1'),
    "escaped_key": with_text('"prior\\u0069ty": -1'),
    "escaped_key_of_xargs": with_text('"vllm_xargs": {"kv_transfer_p\\u0061rams": 1}'),
    "escaped_xargs": with_text('"vllm_\\u0078args": {"kv_transfer_params": 1}'),
    "twice": with_text('"priority": 0, "priority": -1'),
    "second_xargs": with_text('"vllm_xargs": {}, "vllm_xargs": {"kv_transfer_params": 1}'),
    "backslashes": with_text('"x": "\\\\", "priority": -1, "y": "\\\\\\""'),
    "model_twice": with_text('"model": "open"'),
    "other_model_twice": with_text('"model": "gated"'),
    "model_twice_escaped": b'{"m\\u006fdel": "open", "model": "open", "messages": []}',
    "half_of_a_character": b'{"model": "open\\ud83e", "messages": []}',
    "other_half_of_a_character": b'{"model": "open\\udd80\\ud83e", "messages": []}',
    "two_halves_of_none": b'{"model": "open\\ud83e\\u0041", "messages": []}',
    "model_with_escaped_nul": b'{"model": "open\\u0000", "messages": []}',
    "no_escape": b'{"model": "\\x6fpen", "messages": []}',
    "cut_escape": b'{"model": "open\\u00", "messages": []}',
    "key_of_no_text": b'{"model": "open", "\\ud83e": 1}',
    "model_with_line_end": b'{"model": "open\\r\\nx: y", "messages": []}',
    "model_with_nul": b'{"model": "open\x00", "messages": []}',
    "model_long": json.dumps(chat("m" * 2_000, "hi")).encode(),
    "no_model": b'{"messages": []}',
    "model_number": b'{"model": 1}',
    "model_null": b'{"model": null}',
    "model_empty": b'{"model": ""}',
    "model_nested": b'{"x": {"model": "open"}, "messages": []}',
    "empty": b"",
    "list": b'[{"model": "open"}]',
    "text": b'"open"',
    "cut": with_text('"x": 1')[:-1],
    "cut_in_text": b'{"model": "open',
    "behind_the_end": with_text('"x": 1') + b'{"priority": 1}',
    "two_values": with_text('"x": 1') + b" []",
    "comment": with_text('/* "x": 1 */ "priority": 1'),
    "no_comma": with_text('"x": 1 "priority": 1'),
    "single_quotes": with_text("'priority': 1"),
    "byte_order_mark": b"\xef\xbb\xbf" + with_text('"priority": 1'),
    "utf_16": with_text('"priority": 1').decode().encode("utf-16"),
    "utf_32": with_text('"priority": 1').decode().encode("utf-32"),
    "form": b"model=open&priority=1",
    "many_brackets": with_text('"x": [' + "[]," * 2_000_000 + "[]]"),
    "many_quotes": with_text('"x": "' + '\\"' * 2_000_000 + '"'),
    "many_fields": with_text(", ".join(f'"x{n}": 1' for n in range(2_000))),
    "many_spaces": with_text('"x":' + " " * 4_000_000 + "1"),
    "long_number": with_text('"x": ' + "1" * 10_000),
    "deep": with_text('"x": ' + "[" * 2_000_000),
}


async def test_what_steers_or_cannot_be_read_is_refused(away: Away) -> None:
    """Without Tokenway no worker can take a field out: such a body reaches no engine, and we say so."""

    async def refused(name: str, body: bytes) -> None:
        reply = await post(away.stack, body)
        error = reply.json["error"]
        assert (reply.status, error["code"]) in {
            (503, "gateway_unavailable"),
            (400, "invalid_json"),
            (400, "missing_model"),
        }, name
        assert reply.headers["content-type"] == "application/json", name
        assert (reply.status == 503) == ("retry-after" in reply.headers), name

    await asyncio.gather(*(refused(name, body) for name, body in STEERING.items()))
    assert away.engine.received == []


HARMLESS = {
    "nested": with_text(
        '"metadata": {"priority": 1, "model": "gated", "vllm_xargs": {"kv_transfer_params": 1}}'
    ),
    "in_text": with_text('"user": "\\"priority\\": 1, \\\\", "seed": -1.5e+3, "logprobs": null, "n": 1'),
    "xargs": with_text('"vllm_xargs": {"mine": {"kv_transfer_params": 1}, "kv": [1]}'),
    "other_case": with_text('"Priority": 1'),
    "spaces": b' \r\n\t{ "messages" :[ ] , "model"\n: "open" , "a" : { } , "b":[ ]\t} \n',
    "alias_with_escaped_slash": b'{"model": "org\\/open", "messages": []}',
    "escaped_model": b'{"model": "\\u006fpen", "messages": []}',
    "escaped_model_key": b'{"m\\u006fdel": "open", "messages": []}',
    "escaped_alias": json.dumps({"model": "größe-大-🦀", "messages": []}).encode(),
    "alias_as_it_is": json.dumps({"model": "größe-大-🦀", "messages": []}, ensure_ascii=False).encode(),
    "escaped_key": json.dumps({"model": "open", "größe\n🦀": 1, "messages": []}).encode(),
    "large": json.dumps(chat("open", 'x"\\\n' * 100_000)).encode(),
    "token_ids": json.dumps({"model": "open", "prompt": list(range(100_000))}).encode(),
    "utf_8": json.dumps(chat("open", "café 🦀"), ensure_ascii=False).encode(),
}


async def test_what_only_looks_like_steering_passes(away: Away) -> None:
    """Names count where engines read them, as they read them; the body arrives byte for byte."""
    replies = await asyncio.gather(*(post(away.stack, body) for body in HARMLESS.values()))
    statuses = dict(zip(HARMLESS, (reply.status for reply in replies), strict=True))
    assert statuses == dict.fromkeys(HARMLESS, 200)
    assert sorted(one.body for one in away.engine.received) == sorted(HARMLESS.values())


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "identity, gzip", "GZIP", "gzip,", ",x"])
async def test_a_compressed_body_is_refused(away: Away, encoding: str) -> None:
    """Envoy cannot read it."""
    reply = await post(away.stack, with_text('"x": 1'), {"content-encoding": encoding})
    assert (reply.status, reply.json["error"]["code"]) == (503, "gateway_unavailable")
    assert away.engine.received == []


@pytest.mark.parametrize("encoding", ["", "identity", "Identity", " identity , IDENTITY,", ","])
async def test_an_encoding_that_is_none_is_none(away: Away, encoding: str) -> None:
    """As while Tokenway is there."""
    reply = await post(away.stack, with_text('"x": 1'), {"content-encoding": encoding})
    assert reply.status == 200
    assert len(away.engine.received) == 1


async def test_what_calls_itself_grpc_is_refused_as_json(away: Away) -> None:
    """As with Tokenway: 415 with a body, not gRPC's 200."""
    for path, model in (("/v1/chat/completions", "gated"), ("/sleep", "open"), ("/v1/models", "open")):
        reply = await send(away.stack, "POST", path, chat(model, "hi"), {"content-type": "application/grpc"})
        check_for_any_api(reply, 415, "invalid_request")
    assert away.engine.received == []


async def test_models_that_want_a_header_stay_closed(away: Away) -> None:
    """Neither without the header nor with it: Envoy alone does not judge; a default rule is served."""
    for model in ("gated", "off", "off-too", "unknown"):
        for headers in ({}, {"x-team": "red"}):
            reply = await post(away.stack, chat(model, "hi"), headers)
            assert (reply.status, reply.json["error"]["code"]) == (404, "model_not_found")
    assert away.engine.received == []
    assert (await post(away.stack, chat("partly", "hi"))).status == 200
    assert len(away.engine.received) == 1
    assert away.other.received == []


async def test_a_rule_for_a_part_of_a_cluster_keeps_to_it(away: Away) -> None:
    """Only endpoints with the rule's labels are used."""
    replies = await asyncio.gather(*(post(away.stack, chat("part", f"{n}")) for n in range(8)))
    assert {reply.status for reply in replies} == {200}
    assert len(away.engine.received) == 8
    assert away.other.received == []


async def test_headers_that_steer_are_removed(away: Away) -> None:
    """A client names neither its endpoint, nor its model's cluster, nor an owner."""
    spoofed = {
        "x-gateway-destination-endpoint": away.other.key,
        "x-data-parallel-rank": "1",
        "x-tokenway-owner": "0.spoofed",
        "x-tokenway-model": "model:gated",
    }
    assert (await post(away.stack, chat("open", "hi"), spoofed)).status == 200
    (received,) = away.engine.received
    assert "x-data-parallel-rank" not in received.headers
    assert (await send(away.stack, "POST", "/sleep", chat("open", "hi"), spoofed)).status == 404
    assert len(away.engine.received) == 1
    assert away.other.received == []


async def test_the_list_of_models_waits(away: Away) -> None:
    """`/v1/models` is Tokenway's own answer: 503 and Retry-After until it is back."""
    for path in ("/v1/models", "/v1/models/open"):
        reply = await send(away.stack, "GET", path)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.json["error"]["code"] == "gateway_unavailable"
    assert away.engine.received == []


async def test_refusals_have_the_shape_of_their_api(away: Away) -> None:
    """Anthropic's clients read another error object than OpenAI's."""
    body = {"model": "open", "priority": 1, **BODIES["/v1/messages"]}
    reply = await send(away.stack, "POST", "/v1/messages", body)
    assert (reply.status, reply.json["type"], reply.json["error"]["type"]) == (
        503,
        "error",
        "overloaded_error",
    )
    reply = await send(away.stack, "POST", "/v1/responses", {**body, "input": "hi"})
    assert reply.json["error"].keys() == {"message", "type", "param", "code"}


CHOICES = [("open", "refuse"), ("refuse", "open")]


@pytest.mark.parametrize(("gone", "late"), CHOICES, ids=["late_refused", "gone_refused"])
async def test_gone_and_late_are_chosen_apart(gone: str, late: str) -> None:
    """Each setting decides for its own cause, also when the cause shows only after the headers' answer."""
    expected = {"open": 200, "refuse": 503}
    async with recording() as engine:
        config = {
            "models": {"open": MODELS["open"]},
            "away": {"gone": gone, "late": late},
            "default_cluster": "c",
        }
        async with running_stack([cluster("c", [engine.key])], config) as stack:
            rest = await _half_sent(stack)
            stack.gateway.signal(signal.SIGSTOP)
            replies = [await post(stack, chat("open", "hi")), await rest()]
            assert [reply.status for reply in replies] == [expected[late]] * 2
            assert (await send(stack, "GET", "/anything")).status == 503
            stack.gateway.signal(signal.SIGCONT)

            async def served() -> int:
                return (await post(stack, chat("open", "hi"))).status

            await eventually(served, lambda status: status == 200)
            rest = await _half_sent(stack)
            await stack.gateway.kill()
            await asyncio.sleep(0.3)
            replies = [await rest(), await post(stack, chat("open", "hi"))]
            assert [reply.status for reply in replies] == [expected[gone]] * 2
            refused = [reply for reply in replies if reply.status == 503]
            assert all(reply.headers["retry-after"] == "1" for reply in refused)
            assert all(reply.json["error"]["code"] == "gateway_unavailable" for reply in refused)


async def _half_sent(stack: Stack) -> Callable[[], Awaitable[Reply]]:
    """A request whose headers Tokenway has answered; returned is what sends its body and gives the answer."""
    body = json.dumps(chat("open", "in two parts")).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode())
    await writer.drain()
    reading = asyncio.create_task(reader.read())
    await asyncio.sleep(0.3)

    async def rest() -> Reply:
        if not reading.done():  # else it was refused by its headers alone
            writer.write(body)
        async with asyncio.timeout(20):
            head, _, answered = (await reading).partition(b"\r\n\r\n")
        writer.close()
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Reply(int(status.split()[1]), headers, answered)

    return rest


async def test_allowed_fields_pass() -> None:
    """What `request.allow_fields` lets clients say, they may say without Tokenway too."""
    async with recording() as engine:
        allowed = {"allow_fields": ["priority", "vllm_xargs.kv_cache_report_mode"]}
        async with running_stack(
            [cluster("c", [engine.key])], {"models": MODELS_OF_ONE, "request": allowed}
        ) as stack:
            await stack.gateway.kill()
            fine = with_text('"priority": 1, "vllm_xargs": {"kv_cache_report_mode": "x"}')
            assert (await post(stack, fine)).status == 200
            assert (await post(stack, with_text('"rid": 1'))).status == 503
            assert len(engine.received) == 1


MODELS_OF_ONE = {"open": {"rules": [{"cluster": "c"}]}}


async def test_the_script_runs_only_without_tokenway() -> None:
    """With an answer from Tokenway, neither reads the body again nor runs at all."""

    async def executed(stack: Stack) -> float:
        text = (await get(f"http://127.0.0.1:{stack.envoy_admin_port}/stats/prometheus")).decode()
        value = sample(text, 'envoy_http_lua_fallback_executions{envoy_http_conn_manager_prefix="ingress"}')
        return value or 0.0

    async with (
        recording() as engine,
        running_stack(
            [cluster("c", [engine.key])], {"models": MODELS_OF_ONE, "default_cluster": "c"}
        ) as stack,
    ):
        for _ in range(5):
            assert (await post(stack, chat("open", "hi"))).status == 200
        assert (await send(stack, "GET", "/anything")).status == 200
        assert (await post(stack, chat("unknown", "hi"))).status == 404
        assert await executed(stack) == 0
        await stack.gateway.kill()
        assert (await post(stack, chat("open", "hi"))).status == 200
        assert await executed(stack) == 1


async def test_one_endpoint_gets_no_more_than_its_bound() -> None:
    """What Envoy sends by itself is bounded per endpoint and in waiting; the rest is 503 at once."""
    release = asyncio.Event()

    async with recording() as engine:
        plain = engine.behaviour

        async def held(request: Any) -> Any:
            await release.wait()
            return await plain(request)

        config = {"models": MODELS_OF_ONE, "away": {"max_requests_per_endpoint": 2}}
        async with running_stack([cluster("c", [engine.key])], config) as stack:
            await stack.gateway.kill()
            engine.behaviour = held
            asked = [asyncio.create_task(post(stack, chat("open", f"{n}"))) for n in range(12)]

            async def refused() -> int:
                return sum(task.done() for task in asked)

            await eventually(refused, lambda count: count >= 7)
            assert len(engine.received) <= 2
            release.set()
            replies = await asyncio.gather(*asked)
    assert {reply.status for reply in replies} == {200, 503}


ANY: dict[str, Any] = {
    **MODELS,
    "later": {"rules": [{"cluster": "unlisted"}]},
    "*": {"rules": [{"cluster": "both", "headers": {"x-team": "red"}}, {"cluster": "other"}]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def away_any() -> AsyncIterator[Away]:
    """One that serves names that no model has, and is killed."""
    async with recording() as engine, recording() as other:
        clusters = [cluster("c", [engine.key]), cluster("other", [other.key]), cluster("both", [other.key])]
        async with running_stack(clusters, {"models": ANY}) as stack:
            assert (await post(stack, chat("whatever", "before"))).status == 200
            await stack.gateway.kill()
            yield Away(stack, engine, other)


async def test_names_that_no_model_has_are_served_by_the_rule_for_any(away_any: Away) -> None:
    """By its rule without headers; a name that a model has goes where that model goes, or nowhere."""

    async def served(model: str) -> tuple[int, int, int]:
        away_any.engine.reset()
        away_any.other.reset()
        reply = await post(away_any.stack, chat(model, "hi"))
        return reply.status, len(away_any.engine.received), len(away_any.other.received)

    for name in ("whatever", "org/adapter-7", "*", "x" * 200):
        assert await served(name) == (200, 0, 1), name
    for name in ("open", "org/open"):
        assert await served(name) == (200, 1, 0), name
    for name in ("gated", "off", "off-too", "later"):
        assert await served(name) == (503, 0, 0), name
    assert await served("x" * 201) == (404, 0, 0)
