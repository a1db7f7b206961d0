"""What answers say of themselves is heard by a picker too: on the real Envoy, as Istio configures it."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.answer_cases import CASES, NO_ERRORS
from tests.e2e.event_streams import conversation, events, response
from tests.e2e.harness import Recorder, cluster, eventually, recording, sample
from tests.e2e.picker import Picked, PickerStack, running_picker
from tests.e2e.picker_answer_cases import written
from tests.e2e.usage_cases import BODIES, CHAT, REPORTED, STREAMS, UNKNOWN, USAGE, WHOLE, dumped, token

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

REQUESTS = 24
AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class Behind:
    """A picker, and what is behind it.

    Attributes:
        picker: Serves `recorded`, and each case of `CASES` by its name.
        recorder: Of `recorded`.
        replicas: Of each case: the one that fails, the one that answers.
    """

    picker: PickerStack
    recorder: Recorder
    replicas: dict[str, tuple[Recorder, Recorder]]

    async def outcome(self) -> dict[str, Any]:
        """Of the latest request."""
        return await Picked(self.picker, (), self.recorder).last_outcome()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def behind() -> AsyncIterator[Behind]:
    """One picker for all."""
    async with AsyncExitStack() as exits:
        recorder = await exits.enter_async_context(recording())
        replicas, clusters = {}, [cluster("recorded", [recorder.key])]
        for name, case in CASES.items():
            broken = await exits.enter_async_context(recording())
            healthy = await exits.enter_async_context(recording())
            broken.behaviour, healthy.behaviour = case.bad, events(*case.good, after_s=0.1)
            replicas[name] = broken, healthy
            clusters.append(cluster(name, [broken.key, healthy.key]))
        models = {name: {"rules": [{"cluster": name}]} for name in ("recorded", *CASES)}
        picker = await exits.enter_async_context(running_picker(clusters, {"models": models}))
        yield Behind(picker, recorder, replicas)
        await picker.tokenway.settled()


async def ask(behind: Behind, path: str, body: dict[str, Any]) -> bytes:
    """One answer."""
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.post(behind.picker.url() + path, json=body) as reply,
    ):
        return await reply.read()


@pytest.mark.parametrize("name", CASES)
async def test_a_replica_that_fails_fast_attracts_no_traffic(behind: Behind, name: str) -> None:
    """Of two replicas the one that answers nothing gets few requests, none of them counted as completed."""
    case, (broken, healthy) = CASES[name], behind.replicas[name]
    body, turn = response if case.path == "responses" else conversation, asyncio.Semaphore(AT_A_TIME)

    async def one(number: int) -> None:
        async with turn:
            await ask(behind, f"/v1/{case.path}", body(number) | {"model": name})

    await asyncio.gather(*map(one, range(REQUESTS)))
    tokenway = behind.picker.tokenway
    await tokenway.settled()
    reached = len(broken.received)
    rows, scrape = await tokenway.rows(), await tokenway.metrics()
    assert 1 <= reached <= REQUESTS // 3
    assert rows[broken.key]["served_total"] == 0
    assert rows[healthy.key]["served_total"] == REQUESTS - reached
    series = f'tokenway_endpoint_failures_total{{endpoint="{broken.key}",kind="{case.kind}"}}'
    assert sample(scrape, series) == reached


@pytest.mark.parametrize("name", NO_ERRORS)
async def test_what_looks_like_an_error_and_is_an_answer(behind: Behind, name: str) -> None:
    """Text that models write, errors of tools, an end without a last event: no failures of the engine."""
    path, parts = NO_ERRORS[name]
    behind.recorder.behaviour = events(*parts)
    body = response(0) if path == "responses" else conversation(0)
    await ask(behind, f"/v1/{path}", body | {"model": "recorded", "prompt": "hi"})
    assert (await behind.outcome())["ended"] == "completed"


def counted(outcome: dict[str, Any]) -> tuple[int | None, ...]:
    """Its tokens."""
    return outcome["prompt_tokens"], outcome["completion_tokens"], outcome["cached_tokens"]


@pytest.mark.parametrize("name", WHOLE)
async def test_usage_of_whole_answers(behind: Behind, name: str) -> None:
    """That of the answer itself, wherever it is, and nothing else."""
    path, answer, expected = WHOLE[name]
    behind.recorder.behaviour = written("application/json", dumped(answer))
    assert await ask(behind, path, {"model": "recorded", **BODIES[path]}) == dumped(answer)
    assert counted(await behind.outcome()) == expected


@pytest.mark.parametrize("name", STREAMS)
async def test_usage_of_streams(behind: Behind, name: str) -> None:
    """At both ends of it, however its lines end."""
    path, stream, expected = STREAMS[name]
    behind.recorder.behaviour = written("text/event-stream", stream)
    assert await ask(behind, path, {"model": "recorded", "stream": True, **BODIES[path]}) == stream
    assert counted(await behind.outcome()) == expected


@pytest.mark.parametrize(
    ("coding", "expected"), [("identity", REPORTED), ("Identity", REPORTED), ("gzip", UNKNOWN)]
)
async def test_a_coding_that_is_none_hides_nothing(
    behind: Behind, coding: str, expected: tuple[int | None, ...]
) -> None:
    """A header that names no compression; of a compressed answer nothing is known."""
    body = dumped({"choices": [{}], "usage": USAGE})
    sent = gzip.compress(body) if coding == "gzip" else body
    behind.recorder.behaviour = written("application/json", sent, coding=coding)
    await ask(behind, CHAT, {"model": "recorded", **BODIES[CHAT]})
    assert counted(await behind.outcome()) == expected


async def test_a_client_that_leaves_had_what_passed(behind: Behind) -> None:
    """What the engine had counted by then is known."""
    chunks = [token(usage={**USAGE, "completion_tokens": number}) for number in range(1, 1_000)]
    behind.recorder.behaviour = written("text/event-stream", *chunks, pause_s=0.01)
    body = {"model": "recorded", "stream": True, **BODIES[CHAT]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(behind.picker.url() + CHAT, json=body) as reply,
    ):
        seen = b""
        while seen.count(b"\n\n") < 20:
            seen += await reply.content.readany()
    outcome = await eventually(behind.outcome, lambda found: found["ended"] == "client_abort")
    prompt, completion, cached = counted(outcome)
    assert (prompt, cached) == (100, 64)
    assert completion is not None
    assert 20 <= completion < 1_000
