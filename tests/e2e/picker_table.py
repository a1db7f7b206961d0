"""What an endpoint picker has to do, case by case: the table, and what its cases are looked at with.

The numbers are those of a list that was made of the protocol's specification, the hermetic tests of llm-d's
router and its known defects. `llm_d` is what reading its source (August 2026) says of the same case; nothing
of it was run here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from tests.e2e.harness import Recorder, chat, eventually
from tests.e2e.picker import Picked

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
        CASES.sort(key=lambda each: each.number)
        return check

    return add


@asynccontextmanager
async def occupied(picked: Picked, *loads: int) -> AsyncIterator[None]:
    """So many requests run at each of the three recorders; they end with the block, answered."""
    done = asyncio.Event()

    async def behaviour(_: web.Request) -> web.StreamResponse:
        await done.wait()
        return web.json_response({"choices": [{}]})

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


@asynccontextmanager
async def running_prompts(picked: Picked, prompts: Sequence[str], *, prefilled: bool) -> AsyncIterator[None]:
    """A stream with each of the prompts runs at each of the three recorders, its first token given or not."""
    done = asyncio.Event()

    async def behaviour(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        if prefilled:
            await reply.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
        await done.wait()
        await reply.write(b"data: [DONE]\n\n")
        return reply

    for recorder in picked.three:
        recorder.behaviour = behaviour
    asked = [
        asyncio.create_task(picked.post(chat("three", prompt, 64, stream=True), x_test_subset=recorder.key))
        for recorder, prompt in zip(picked.three, prompts, strict=True)
    ]
    await arrived(picked.three, (1, 1, 1))

    async def prefilling() -> int:
        rows = await picked.picker.tokenway.rows()
        return sum(int(rows[recorder.key]["prefill_tokens"]) for recorder in picked.three)

    await eventually(prefilling, lambda tokens: (tokens == 0) is prefilled)
    try:
        yield
    finally:
        done.set()
        replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200] * 3


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


def table() -> str:
    """The cases as the document shows them."""
    rows = [f"| {each.number} | {each.words} | {each.llm_d} |" for each in CASES]
    return "\n".join(["| | case | llm-d, by its source |", "|---|---|---|", *rows])
