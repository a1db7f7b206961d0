"""What the simulator serves beside generations: stored responses, pooling APIs, audio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.settings import ServerSettings
from tokenway.simulator.server.stored import EngineResponses, Stored

SETTINGS = ServerSettings(models=("tiny",), time_scale=0.05)


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


async def post(http: aiohttp.ClientSession, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Status and body."""
    async with http.post(path, json=body) as answer:
        return answer.status, await answer.json()


async def get(http: aiohttp.ClientSession, path: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    """Status and body."""
    async with http.request(method, path) as answer:
        return answer.status, await answer.json()


async def test_a_response_is_kept_and_built_on(http: aiohttp.ClientSession) -> None:
    """The next turn's prompt begins with the last one's, answer included, and finds its blocks."""
    text = "a prompt of several blocks " * 20
    _, first = await post(http, "/v1/responses", input=text, max_output_tokens=32)
    previous = first["id"]
    _, second = await post(
        http, "/v1/responses", input="go on", previous_response_id=previous, max_output_tokens=4
    )
    assert second["previous_response_id"] == previous
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"] + 32
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > first["usage"]["input_tokens"] - 32
    assert await get(http, f"/v1/responses/{previous}") == (200, first)
    _, items = await get(http, f"/v1/responses/{second['id']}/input_items")
    assert [item["content"][0]["text"] for item in items["data"]] == ["go on"]


async def test_a_streamed_response_is_kept(http: aiohttp.ClientSession) -> None:
    """As it was at its end."""
    async with http.post(
        "/v1/responses", json={"input": "hello", "stream": True, "max_output_tokens": 4}
    ) as answer:
        text = await answer.text()
    response_id = text.partition('"id":"')[2].partition('"')[0]
    status, stored = await get(http, f"/v1/responses/{response_id}")
    assert (status, stored["usage"]["output_tokens"]) == (200, 4)


async def test_what_is_not_stored_is_vllms_404(http: aiohttp.ClientSession) -> None:
    """Unknown, never stored or deleted, by every way to ask; an id of another form is 400."""
    _, answer = await post(http, "/v1/responses", input="x", store=False, max_output_tokens=1)
    _, deleted = await post(http, "/v1/responses", input="x", max_output_tokens=1)
    gone = {"id": deleted["id"], "object": "response", "deleted": True}
    assert await get(http, f"/v1/responses/{deleted['id']}", "DELETE") == (200, gone)
    for response_id in ("resp_unknown", answer["id"], deleted["id"]):
        message = f"Response with id '{response_id}' not found."
        error = {"message": message, "type": "invalid_request_error", "param": "response_id", "code": 404}
        for tail, method in (("", "GET"), ("", "DELETE"), ("/cancel", "POST"), ("/input_items", "GET")):
            assert await get(http, f"/v1/responses/{response_id}{tail}", method) == (404, {"error": error})
        assert await post(http, "/v1/responses", input="x", previous_response_id=response_id) == (
            404,
            {"error": error},
        )
    assert (await get(http, "/v1/responses/other"))[0] == 400


async def test_a_background_response_runs_until_it_is_cancelled(
    http: aiohttp.ClientSession, server: SimulatorServer
) -> None:
    """It is there at once, and its engine is free when it is cancelled; a finished one cannot be."""
    _, queued = await post(http, "/v1/responses", input="x", background=True, max_output_tokens=4000)
    assert queued["status"] == "queued"
    path = f"/v1/responses/{queued['id']}"
    while (await get(http, path))[1]["status"] != "in_progress":  # noqa: ASYNC110 - over HTTP
        await asyncio.sleep(0)
    assert (await post(http, f"{path}/cancel"))[1]["status"] == "cancelled"
    while server.engine.num_running:  # noqa: ASYNC110 - the engine steps in this loop
        await asyncio.sleep(0.001)
    assert (await get(http, path))[1]["status"] == "cancelled"
    assert (await post(http, f"{path}/cancel"))[0] == 400
    _, short = await post(http, "/v1/responses", input="x", background=True, max_output_tokens=2)
    while (await get(http, f"/v1/responses/{short['id']}"))[1]["status"] != "incomplete":  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_the_store_is_bounded() -> None:
    """The oldest goes first."""
    store = EngineResponses(2)
    for number in range(3):
        store.add(Stored({"id": f"resp_{number}", "output": []}, [], []))
    assert [store.get(f"resp_{number}") is None for number in range(3)] == [True, False, False]
    assert store.remove("resp_2")
    assert not store.remove("resp_2")


@pytest.mark.parametrize(
    ("path", "body", "number"),
    [
        ("/rerank", {"query": "q", "documents": ["a", "b", "c"]}, 3),
        ("/v2/rerank", {"query": "q", "documents": [{"text": "a"}, {"text": "b"}], "top_n": 1}, 1),
        ("/score", {"text_1": "q", "text_2": ["a", "b"]}, 2),
        ("/v1/score", {"queries": ["q", "r"], "documents": ["a", "b"]}, 2),
        ("/classify", {"input": ["a", "b"]}, 2),
        ("/pooling", {"input": "a"}, 1),
        ("/pooling", {"messages": [{"role": "user", "content": "a"}]}, 1),
    ],
)
async def test_what_is_pooled_has_a_result_each(
    http: aiohttp.ClientSession, path: str, body: dict[str, Any], number: int
) -> None:
    """The same for the same input, each with its index, and what it cost."""
    status, answer = await post(http, path, model="tiny", **body)
    results = answer["results" if "rerank" in path else "data"]
    assert (status, len(results)) == (200, number)
    assert {result["index"] for result in results} <= set(range(3))
    assert answer["usage"]["total_tokens"] > 0
    again = (await post(http, path, model="tiny", **body))[1]
    assert again["results" if "rerank" in path else "data"] == results


async def test_ranks_are_sorted(http: aiohttp.ClientSession) -> None:
    """Best first."""
    _, answer = await post(http, "/rerank", query="q", documents=list("abcdefgh"))
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)


async def test_tokens_are_counted(http: aiohttp.ClientSession) -> None:
    """As `/tokenize` has them."""
    messages = [{"role": "user", "content": "hello there"}]
    _, counted = await post(http, "/v1/messages/count_tokens", model="tiny", messages=messages)
    _, tokenized = await post(http, "/tokenize", model="tiny", messages=messages)
    assert counted == {"input_tokens": tokenized["count"]}
    assert (await post(http, "/detokenize", tokens=[1, 2])) == (200, {"prompt": "1 2"})


@pytest.mark.parametrize("stream", [None, "true"])
async def test_audio_is_heard(http: aiohttp.ClientSession, stream: str | None) -> None:
    """The same file gives the same text, whole or streamed; without a file there is nothing to hear."""
    for kind in ("transcriptions", "translations"):
        form = aiohttp.FormData({"model": "tiny"} | ({} if stream is None else {"stream": stream}))
        form.add_field("file", b"RIFF" * 1000, filename="a.wav")
        async with http.post(f"/v1/audio/{kind}", data=form) as answer:
            text = await answer.text()
        assert answer.status == 200
        assert ("[DONE]" in text) is (stream is not None)
    async with http.post("/v1/audio/transcriptions", data={"model": "tiny"}) as answer:
        assert answer.status == 400
