"""The HTTP face of the simulator, over real sockets."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import orjson
import pytest

from tokenway.simulator.__main__ import parse_settings
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.faults import FaultKind, parse_fault
from tokenway.simulator.server.settings import ServerSettings

SETTINGS = ServerSettings(models=("tiny", "alias"), time_scale=0.1, request_id_headers=True)
MESSAGES = [{"role": "user", "content": "hello there, this is a prompt of more than one block " * 4}]


@pytest.fixture
async def server() -> AsyncIterator[SimulatorServer]:
    """A quick replica."""
    async with running(SETTINGS) as started:
        yield started


@pytest.fixture
async def http(server: SimulatorServer) -> AsyncIterator[aiohttp.ClientSession]:
    """A client with the server's base URL."""
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(10)) as session:
        yield session


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **fields}


def _data(raw: bytes) -> list[Any]:
    """Decoded `data:` lines of an event stream; `[DONE]` stays a string."""
    lines = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    return [line.decode() if line == b"[DONE]" else orjson.loads(line) for line in lines]


async def _state(http: aiohttp.ClientSession) -> dict[str, Any]:
    async with http.get("/sim/state") as answer:
        state: dict[str, Any] = await answer.json()
        return state


async def _until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Let the server work until something holds; it lives in this event loop, so no sleep decides."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to hold"
        await asyncio.sleep(0)


async def test_a_chat_stream_has_vllms_chunks(http: aiohttp.ClientSession) -> None:
    """Role first, one chunk per token, the finish reason on the last, usage only if asked for, then DONE."""
    async with http.post("/v1/chat/completions", json=_chat(stream=True)) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        plain = _data(await answer.read())
    options = {"include_usage": True}
    async with http.post("/v1/chat/completions", json=_chat(stream=True, stream_options=options)) as answer:
        counted = _data(await answer.read())
    assert plain[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in plain[:-1]] == [None] * 4 + ["length"]
    assert all(chunk["choices"][0]["delta"]["content"] for chunk in plain[1:-1])
    assert plain[-1] == counted[-1] == "[DONE]"
    assert "usage" not in plain[-2]
    assert counted[-2]["choices"] == []
    usage = counted[-2]["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (4, usage["prompt_tokens"] + 4)
    assert usage["prompt_tokens_details"]["cached_tokens"] == (usage["prompt_tokens"] - 1) // 16 * 16


async def test_streamed_and_whole_answers_say_the_same(http: aiohttp.ClientSession) -> None:
    """The text depends on the prompt only."""
    async with http.post("/v1/completions", json={"model": "tiny", "prompt": "hello"}) as answer:
        whole = await answer.json()
    async with http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "hello", "stream": True}
    ) as answer:
        pieces = _data(await answer.read())[:-1]
    assert whole["choices"][0]["text"] == "".join(chunk["choices"][0]["text"] for chunk in pieces)
    assert whole["usage"]["completion_tokens"] == len(pieces) == 16
    assert (whole["object"], whole["choices"][0]["finish_reason"]) == ("text_completion", "length")


async def test_the_next_turn_hits_the_generated_blocks(http: aiohttp.ClientSession) -> None:
    """A reply sent back as history is cached beyond the prompt that made it."""
    async with http.post("/v1/chat/completions", json=_chat(max_tokens=64)) as answer:
        first = await answer.json()
    history = [*MESSAGES, first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    async with http.post("/v1/chat/completions", json=_chat(messages=history)) as answer:
        usage = (await answer.json())["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"]


async def test_token_ids_are_a_prompt(http: aiohttp.ClientSession) -> None:
    """A list of ids counts exactly, bare or as the only one of a batch."""
    for prompt in ([1, 2, 3], [[1, 2, 3]]):
        async with http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}) as answer:
            assert (await answer.json())["usage"]["prompt_tokens"] == 3


async def test_responses_stream_and_whole(http: aiohttp.ClientSession) -> None:
    """The Responses API opens before the first token, counts its events and ends with the whole response."""
    body = {"model": "tiny", "input": "hi", "instructions": "be brief", "max_output_tokens": 3}
    async with http.post("/v1/responses", json=body) as answer:
        whole = await answer.json()
    async with http.post("/v1/responses", json={**body, "stream": True}) as answer:
        events = _data(await answer.read())
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4:7] == ["output_text.delta"] * 3
    assert kinds[7:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert events[-1]["response"]["status"] == whole["status"] == "incomplete"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events[4:7])
    assert text == events[7]["text"] == whole["output"][0]["content"][0]["text"]
    assert whole["usage"]["output_tokens"] == events[-1]["response"]["usage"]["output_tokens"] == 3


async def test_messages_stream_and_whole(http: aiohttp.ClientSession) -> None:
    """The Messages API starts with the first token and ends with the stop reason and the counts."""
    body = {"model": "tiny", "system": "be brief", "messages": MESSAGES, "max_tokens": 2}
    async with http.post("/v1/messages", json=body) as answer:
        whole = await answer.json()
    async with http.post("/v1/messages", json={**body, "stream": True}) as answer:
        events = _data(await answer.read())
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "max_tokens"
    assert "".join(event["delta"]["text"] for event in events[2:4]) == whole["content"][0]["text"]
    assert events[-2]["usage"]["cache_read_input_tokens"] > 0


async def test_embeddings_are_unit_vectors_per_input(http: aiohttp.ClientSession) -> None:
    """Each input has its own vector, and base64 is honoured."""
    async with http.post("/v1/embeddings", json={"model": "tiny", "input": ["a", "bb"]}) as answer:
        body = await answer.json()
    async with http.post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"}) as answer:
        encoded = await answer.json()
    first, second = (entry["embedding"] for entry in body["data"])
    assert first != second
    assert sum(value * value for value in first) == pytest.approx(1.0, abs=1e-5)
    assert isinstance(encoded["data"][0]["embedding"], str)
    assert body["usage"]["prompt_tokens"] == 2


async def test_an_unbounded_answer_stops_by_itself(http: aiohttp.ClientSession) -> None:
    """Without `ignore_eos` a generous bound is not reached, with it it is."""
    async with http.post("/sim/fault", json={"kind": "slow", "factor": 0.05}) as answer:
        assert answer.status == 200
    for ignore_eos, expected in ((False, "stop"), (True, "length")):
        body = {"prompt": "hello", "max_tokens": 1600, "ignore_eos": ignore_eos}
        async with http.post("/v1/completions", json=body) as answer:
            whole = await answer.json()
        assert whole["choices"][0]["finish_reason"] == expected
        assert (whole["usage"]["completion_tokens"] == 1600) is ignore_eos


async def _stream_lines(server: SimulatorServer, body: dict[str, Any]) -> tuple[float, float, bytes]:
    """Raw socket: seconds to the headers, seconds to the first data, and the body so far."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    raw = orjson.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    start_s = time.monotonic()
    writer.write(head.encode() + raw)
    await reader.readuntil(b"\r\n\r\n")
    headers_s = time.monotonic() - start_s
    received = b""
    while b"data: " not in received:
        received += await reader.read(4096)
    data_s = time.monotonic() - start_s
    writer.close()
    return headers_s, data_s, received


async def test_headers_of_a_stream_precede_the_prefill() -> None:
    """A long prompt delays the first data, not the headers; comments fill the gap if enabled."""
    async with running(replace(SETTINGS, time_scale=1.0, sse_keep_alive_s=0.03)) as server:
        body = {"prompt": list(range(8000)), "stream": True, "max_tokens": 1}
        headers_s, data_s, received = await _stream_lines(server, body)
    assert headers_s < 0.1 < data_s
    assert b": keep-alive\n\n" in received.partition(b"data: ")[0]


@pytest.mark.parametrize(
    "body",
    [
        _chat(stream=True, max_tokens=20_000, ignore_eos=True),
        _chat(max_tokens=20_000, ignore_eos=True),
        {"prompt": list(range(60_000)), "stream": True},
    ],
    ids=["stream decode", "whole", "stream prefill"],
)
async def test_a_client_that_goes_away_frees_the_engine(
    server: SimulatorServer, http: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    """In all three situations the request is aborted and its blocks are free within 50 ms or so."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    raw = orjson.dumps({"model": "tiny", **body})
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    await _until(lambda: server.engine.kv_usage_ratio > 0)
    writer.transport.abort()
    await _until(lambda: not server.engine.kv_usage_ratio, within_s=0.5)
    assert (await _state(http))["served"][-1]["finish_reason"] == "abort"


@pytest.mark.parametrize(
    ("raw", "status", "error"),
    [
        (
            b'{"model":',
            400,
            {
                "message": "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.9', 'msg': 'JSON "
                "decode error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting value'}}",
                "type": "Bad Request",
                "param": "body.9",
                "code": 400,
            },
        ),
        (
            b'{"model":"nope","prompt":"hello"}',
            404,
            {
                "message": "The model `nope` does not exist. Valid aliases: tiny, alias.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            },
        ),
        (
            orjson.dumps({"model": "tiny", "prompt": list(range(70_000)), "max_tokens": 2}),
            400,
            {
                "message": "This model's maximum context length is 65536 tokens. However, your prompt "
                "contains 70000 input tokens, which exceeds this limit even without any output tokens. "
                "Please reduce the length of the input prompt. (parameter=input_tokens, value=70000)",
                "type": "BadRequestError",
                "param": "input_tokens",
                "code": 400,
            },
        ),
    ],
    ids=["bad json", "unknown model", "too long"],
)
async def test_errors_have_vllms_bodies(
    http: aiohttp.ClientSession, raw: bytes, status: int, error: dict[str, Any]
) -> None:
    """What vLLM was seen to answer is answered, word for word."""
    async with http.post("/v1/completions", data=raw) as answer:
        assert (answer.status, await answer.json()) == (status, {"error": error})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt"),
        ("/v1/completions", {"prompt": [1, -1]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [2, 3]]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 65_536}, "input_tokens"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": ["a"]}, "messages"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/completions", [], "body"),
    ],
)
async def test_bodies_that_make_no_sense_are_refused(
    http: aiohttp.ClientSession, path: str, body: Any, param: str
) -> None:
    """A bad field is a 400 that names it, and nothing reaches the engine."""
    async with http.post(path, json=body) as answer:
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, param)
    assert (await _state(http))["served"] == []


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_num_queued_reqs": 1}, "currently busy"),
        ({"max_num_queued_tokens": 20}, "prefill token backlog limit"),
    ],
)
async def test_a_full_queue_is_a_503(limits: dict[str, Any], words: str) -> None:
    """A limit on the queue refuses with vLLM's status, type and words, and counts it."""
    profile = replace(PROFILES["demo"], **limits)
    async with (
        running(replace(SETTINGS, profile=profile)) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        await http.post("/pause?mode=keep")
        first = asyncio.create_task(http.post("/v1/completions", json={"prompt": [1] * 15}))
        await _until(lambda: server.engine.num_waiting > 0)
        async with http.post("/v1/completions", json={"prompt": [1] * 15}) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["type"], error["code"]) == (503, "Service Unavailable", 503)
        assert words in error["message"]
        async with http.get("/metrics") as answer:
            page = await answer.text()
        assert f'reason="{next(iter(limits))}"}} 1.0' in page
        await http.post("/resume")
        assert (await first).status == 200


async def test_metrics_have_vllms_names_and_labels(http: aiohttp.ClientSession) -> None:
    """Every sample a router reads is there, with the engine's numbers."""
    for _ in range(2):
        async with http.post("/v1/chat/completions", json=_chat()) as answer:
            usage = (await answer.json())["usage"]
    async with http.get("/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=1.0.0")
        page = await answer.text()
    samples = dict(re.findall(r"^([a-z0-9_:]+\{[^}]*\}) (\S+)$", page, re.MULTILINE))
    labels = 'engine="0",model_name="tiny"'
    prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    expected = {
        f"vllm:num_requests_running{{{labels}}}": 0,
        f"vllm:num_requests_waiting{{{labels}}}": 0,
        f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}}': 0,
        f"vllm:kv_cache_usage_perc{{{labels}}}": 0,
        f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}}': 1,
        f"vllm:prefix_cache_queries_total{{{labels}}}": 2 * prompt,
        f"vllm:prefix_cache_hits_total{{{labels}}}": cached,
        f"vllm:prompt_tokens_total{{{labels}}}": 2 * prompt,
        f'vllm:prompt_tokens_by_source_total{{{labels},source="local_cache_hit"}}': cached,
        f"vllm:generation_tokens_total{{{labels}}}": 8,
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}': 2,
        'vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}': 0,
        f"vllm:time_to_first_token_seconds_count{{{labels}}}": 2,
        f'vllm:time_to_first_token_seconds_bucket{{{labels},le="+Inf"}}': 2,
        f"vllm:inter_token_latency_seconds_count{{{labels}}}": 6,
        f"vllm:e2e_request_latency_seconds_count{{{labels}}}": 2,
    }
    assert {name: float(samples[name]) for name in expected} == expected
    config = next(name for name in samples if name.startswith("vllm:cache_config_info"))
    assert 'block_size="16"' in config
    assert 'num_gpu_blocks="4096"' in config


async def test_gauges_move_at_the_end_of_a_step(http: aiohttp.ClientSession, server: SimulatorServer) -> None:
    """While the first prefill step runs the page still shows an idle engine, and `/load` does not."""
    async with http.post("/sim/fault", json={"kind": "slow", "factor": 100}) as answer:
        assert answer.status == 200
    body = {"prompt": [1] * 2000, "max_tokens": 2}
    pending = asyncio.create_task(http.post("/v1/completions", json=body))
    await _until(lambda: server.engine.num_running > 0)
    async with http.get("/metrics") as answer:
        assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in await answer.text()
    async with http.get("/load") as answer:
        assert await answer.json() == {"server_load": 1}
    pending.cancel()


async def test_plain_endpoints(http: aiohttp.ClientSession) -> None:
    """Health, version, models and sources answer as vLLM's do."""
    expected: list[tuple[str, Any]] = [("/version", {"version": "0.32.0"}), ("/kv_event_sources", {})]
    for path, body in expected:
        async with http.get(path) as answer:
            assert await answer.json() == body
    for path in ("/health", "/ping"):
        async with http.get(path) as answer:
            assert (answer.status, await answer.read()) == (200, b"")
    async with http.get("/v1/models") as answer:
        models = (await answer.json())["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 65536), ("alias", 65536)]


async def test_development_endpoints(http: aiohttp.ClientSession) -> None:
    """Sleep, wake, pause, resume and reset answer as captured and show in state and metrics."""

    async def post(path: str) -> Any:
        async with http.post(path) as answer:
            return await answer.json()

    async def get(path: str) -> Any:
        async with http.get(path) as answer:
            return await answer.json()

    await post("/v1/completions")
    assert await post("/sleep?level=1") == {"status": "sleeping", "level": 1}
    assert await get("/is_sleeping") == {"is_sleeping": True}
    async with http.get("/metrics") as answer:
        assert 'sleep_state="awake"} 0.0' in await answer.text()
    assert await post("/wake_up") == {"status": "awake", "tags": None}
    assert await get("/is_sleeping") == {"is_sleeping": False}
    assert await post("/pause") == {"status": "paused"}
    assert await get("/is_paused") == {"is_paused": True}
    assert await post("/resume") == {"status": "resumed"}
    async with http.post("/v1/chat/completions", json=_chat()) as answer:
        assert answer.status == 200
    assert (await _state(http))["prefix_cache"]["cached_blocks"] > 0
    assert await post("/reset_prefix_cache") == {"success": True}
    assert (await _state(http))["prefix_cache"]["cached_blocks"] == 0


async def test_pausing_ends_what_is_running(http: aiohttp.ClientSession, server: SimulatorServer) -> None:
    """By default a pause aborts, and the client's stream ends with that reason."""
    body = _chat(stream=True, max_tokens=20_000, ignore_eos=True)
    async with http.post("/v1/chat/completions", json=body) as answer:
        await answer.content.readany()
        await http.post("/pause")
        chunks = _data(await answer.read())
    assert chunks[-2]["choices"][0]["finish_reason"] == "abort"
    assert server.engine.num_running == 0


async def test_request_ids_travel(http: aiohttp.ClientSession) -> None:
    """`X-Request-Id` becomes the answer's id and is echoed; the gateway's own id shows in the state."""
    headers = {"X-Request-Id": "abc-1@@", "X-Tokenway-Request-Id": "gw-7"}
    for stream in (False, True):
        async with http.post("/v1/chat/completions", json=_chat(stream=stream), headers=headers) as answer:
            assert answer.headers["X-Request-Id"] == "abc-1@@"
            raw = await answer.read()
        bodies = _data(raw)[:-1] if stream else [orjson.loads(raw)]
        assert {body["id"] for body in bodies} == {"chatcmpl-abc-1@@"}
    served = (await _state(http))["served"]
    assert [(entry["request_id"], entry["output_tokens"]) for entry in served] == [("gw-7", 4)] * 2


async def test_a_status_fault_takes_its_count_of_requests(http: aiohttp.ClientSession) -> None:
    """Two requests fail and the third is served; health follows the fault until it is cleared."""
    fault = {"kind": "status", "status": 429, "count": 2, "health": 503}
    async with http.post("/sim/fault", json=fault) as answer:
        assert answer.status == 200
    statuses = []
    for _ in range(3):
        async with http.post("/v1/chat/completions", json=_chat()) as answer:
            statuses.append(answer.status)
    assert statuses == [429, 429, 200]
    async with http.get("/health") as answer:
        assert answer.status == 503
    async with http.post("/sim/fault", json={"kind": "none"}) as answer:
        assert answer.status == 200
    async with http.get("/health") as answer:
        assert answer.status == 200


async def test_reset_faults_break_the_connection(
    http: aiohttp.ClientSession, server: SimulatorServer
) -> None:
    """One kind breaks it before the headers, the other after so many tokens, and the engine is freed."""
    await http.post("/sim/fault", json={"kind": "reset_before"})
    with pytest.raises(aiohttp.ClientConnectionError):
        await http.post("/v1/chat/completions", json=_chat())
    await http.post("/sim/fault", json={"kind": "reset_after", "chunks": 2})
    body = {"prompt": "a", "stream": True, "max_tokens": 9000}
    received, broken = b"", False
    async with http.post("/v1/completions", json=body) as answer:
        try:
            async for chunk in answer.content.iter_any():
                received += chunk
        except aiohttp.ClientError:
            broken = True
    assert (broken, received.count(b"data: ")) == (True, 2)
    await _until(lambda: not server.engine.kv_usage_ratio, within_s=0.5)


async def test_a_hanging_replica_accepts_and_never_answers(
    http: aiohttp.ClientSession, server: SimulatorServer
) -> None:
    """The request is counted as load, never served, and forgotten when the client gives up."""
    await http.post("/sim/fault", json={"kind": "hang"})
    with pytest.raises(TimeoutError):
        await http.post("/v1/chat/completions", json=_chat(), timeout=aiohttp.ClientTimeout(0.1))
    await _until(lambda: server.http_requests == 0)
    assert not server.served


@pytest.mark.parametrize(
    "body",
    [[], {}, {"kind": "status", "count": 0}, {"kind": "slow", "factor": "2"}, {"kind": "none", "x": 1}],
)
async def test_a_fault_that_makes_no_sense_is_refused(http: aiohttp.ClientSession, body: Any) -> None:
    """A misspelt fault does not pass for a working one."""
    async with http.post("/sim/fault", json=body) as answer:
        assert answer.status == 400


def test_a_fault_may_last_until_it_is_cleared() -> None:
    """A null count means all requests."""
    fault = parse_fault({"kind": "hang", "count": None})
    assert (fault.kind, fault.count) == (FaultKind.HANG, None)


async def test_a_killed_server_resets_its_connections() -> None:
    """Clients see a broken stream, and no server listens any more."""
    server = SimulatorServer(SETTINGS)
    await server.start()
    async with aiohttp.ClientSession(server.url) as http:
        body = _chat(stream=True, max_tokens=20_000, ignore_eos=True)
        async with http.post("/v1/chat/completions", json=body) as answer:
            await answer.content.readany()
            await server.kill()
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        with pytest.raises(aiohttp.ClientConnectionError):
            await http.get("/health")


async def test_a_stopped_server_ends_its_streams_in_order() -> None:
    """A stop aborts what runs and the client gets it."""
    server = SimulatorServer(SETTINGS)
    await server.start()
    async with aiohttp.ClientSession(server.url) as http:
        body = _chat(stream=True, max_tokens=20_000, ignore_eos=True)
        async with http.post("/v1/chat/completions", json=body) as answer:
            await answer.content.readany()
            await server.stop()
            assert _data(await answer.read())[-1] == "[DONE]"


async def test_real_time_follows_the_profile() -> None:
    """100 tokens of one demo stream take 100 steps of 8 ms, scaled, however coarse the sleeps are."""
    async with (
        running(replace(SETTINGS, time_scale=0.5)) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        start_s = time.monotonic()
        async with http.post("/v1/completions", json={"prompt": "a", "max_tokens": 100}) as answer:
            await answer.read()
        assert time.monotonic() - start_s == pytest.approx(0.5 * (0.005 + 100 * 0.008), rel=0.25)


def test_the_command_line_makes_settings() -> None:
    """Words become settings, the profile can be bent, and nonsense exits."""
    words = (
        "--port 0 --model a --model b --profile llama8b-h100 --time-scale 0.5 --block-size 32 --engine-id 3"
    )
    events = "--kv-events tcp://127.0.0.1:5557 --kv-replay tcp://127.0.0.1:5558 --kv-topic kv@a@b"
    events += " --kv-buffer-steps 9"
    made = parse_settings(f"{words} {events}".split())
    assert (made.models, made.time_scale, made.engine_id) == (("a", "b"), 0.5, 3)
    assert (made.profile.block_size, made.profile.kv_tokens) == (32, 467_000)
    assert made.kv_events is not None
    assert (made.kv_events.replay_endpoint, made.kv_events.buffer_steps) == ("tcp://127.0.0.1:5558", 9)
    for bad in ("--time-scale 0", "--kv-replay tcp://127.0.0.1:1", "--block-size 0", "--profile none"):
        with pytest.raises(SystemExit):
            parse_settings(bad.split())


async def test_the_process_announces_its_port_and_ends_on_sigterm() -> None:
    """`python -m tokenway.simulator` prints where it listens and exits cleanly."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tokenway.simulator",
        "--port",
        "0",
        "--model",
        "m",
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(10):
        line = (await process.stdout.readline()).decode().strip()
        url = line.removeprefix("listening on ")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        async with aiohttp.ClientSession() as http, http.get(f"{url}/health") as answer:
            assert answer.status == 200
        process.terminate()
        assert await process.wait() == 0
