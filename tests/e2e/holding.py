"""What the tests of late binding hold requests with: engines that answer when released, and how to ask.

Rules:
    1. A prefill that gives no first token counts as done when its predicted time is over, so an engine that
       is full of prefill opens then, whatever it does: `FULL_TOKENS` outlast what a test does meanwhile.
    2. Once an engine has answered, its prompts are predicted to take as long as that took.
    3. A full KV cache is full until an answer ends: for as long as a test likes.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import yaml
from aiohttp import web

from extproc.observing.explain import verdict
from testbed.processes import get
from tests.e2e.harness import Recorder, Reply, Served, Stack, chat, eventually, post, sample

FULL_TOKENS: Final = 170_000
"""Fills an engine: 22.5 s at the prices that learning begins from. What waits behind it has to fit into
`holding.max_s` with it: a request that cannot be answered within that time is refused at once."""

ASKED_TOKENS: Final = 12_000
"""Six engine steps, 0.4 s at those prices: a dozen can wait behind `FULL_TOKENS`, and whichever is sent makes
its engine full again, which 0.1 s do."""

BURST_TOKENS: Final = 6_000
"""Half of that: a simulated engine is to compute two dozen of them while a test waits."""

SHORT_TOKENS: Final = 200

_TIMESTAMP: Final = 'tokenway_config_last_reload_success_timestamp_seconds{file="tokenway.yaml"}'

_BLOCK_TOKENS: Final = 16

_TOKEN: Final = "tok "
"""Four bytes, which is what a token is taken to have before any was counted."""


class GatedEngine(Recorder):
    """An engine that sends the headers of a stream at once and its tokens when it is released.

    Args:
        kv_tokens: Size of its KV cache, which it then reports; it also gives every first token at once, since
            only what is computed takes room there. 0 keeps the size to itself.
    """

    def __init__(self, kv_tokens: int = 0) -> None:
        super().__init__()
        self.behaviour = self._answer
        self._kv_tokens = kv_tokens
        self._waiting: deque[asyncio.Event] = deque()
        self._is_open = False

    @property
    def arrived(self) -> list[str]:
        """Names of the requests that came, in order."""
        return [_name(received.body) for received in self.received]

    async def has(self, count: int) -> None:
        """Wait until so many have come in all."""

        async def read() -> list[str]:
            return self.arrived

        await eventually(read, lambda names: len(names) >= count)

    def let_go(self) -> None:
        """Answer the oldest one."""
        self._waiting.popleft().set()

    def open(self) -> None:
        """Answer everybody, and at once from now on."""
        self._is_open = True
        while self._waiting:
            self.let_go()

    async def _record(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/metrics" or not self._kv_tokens:
            return await super()._record(request)
        labels = f'block_size="{_BLOCK_TOKENS}",num_gpu_blocks="{self._kv_tokens // _BLOCK_TOKENS}"'
        return web.Response(text=f"vllm:cache_config_info{{{labels}}} 1.0\n")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        if self._kv_tokens:
            await answer.write(_event("well", None))
        if not self._is_open:
            released = asyncio.Event()
            self._waiting.append(released)
            await released.wait()
        await answer.write(_event("done", "stop"))
        await answer.write(b"data: [DONE]\n\n")
        return answer


def _event(content: str, finish_reason: str | None) -> bytes:
    delta = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]}
    return b"data: " + json.dumps(delta).encode() + b"\n\n"


@asynccontextmanager
async def gated(kv_tokens: int = 0) -> AsyncIterator[GatedEngine]:
    """A started engine for the length of a block; it lets everybody go at the end."""
    engine = GatedEngine(kv_tokens)
    await engine.start()
    try:
        yield engine
    finally:
        engine.open()
        await engine.stop()


def served_by(cluster: str, **rule: Any) -> dict[str, Any]:
    """A model whose requests may be held."""
    return {
        "rules": [{"cluster": cluster, **rule}],
        "load_balancing": {"algorithm": "least_completion"},
    }


def ask(
    stack: Served,
    model: str,
    name: str,
    tokens: int = ASKED_TOKENS,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> asyncio.Task[Reply]:
    """Ask for a stream. No two names share a block, so nothing of it is cached anywhere."""
    body = {**chat(model, f"{name} " + _TOKEN * tokens, stream=True), **fields}
    return asyncio.create_task(post(stack, body, headers), name=name)


async def fill(stack: Served, model: str, *engines: GatedEngine) -> list[asyncio.Task[Reply]]:
    """One request on each of the model's endpoints, which are full of prefill then."""
    asked = [ask(stack, model, f"full-{number}", FULL_TOKENS) for number in range(len(engines))]
    await asyncio.gather(*(engine.has(1) for engine in engines))
    return asked


async def fill_caches(stack: Stack, model: str, *engines: GatedEngine) -> list[asyncio.Task[Reply]]:
    """One request on each of the model's endpoints, which is being answered and has its part of the cache."""
    asked = [ask(stack, model, f"full-{number}") for number in range(len(engines))]
    await asyncio.gather(*(engine.has(1) for engine in engines))

    async def prefilling() -> int:
        rows = await stack.rows()
        return sum(int(rows[engine.key]["prefill_tokens"]) for engine in engines)

    await eventually(prefilling, lambda tokens: tokens == 0)
    return asked


async def reconfigured(stack: Stack, **sections: Any) -> None:
    """Change sections of tokenway.yaml, and wait until that is in force."""

    async def loaded() -> float | None:
        return sample(await stack.metrics(), _TIMESTAMP)

    before = await loaded()
    file = stack.run_dir / "tokenway.yaml"
    config = yaml.safe_load(file.read_text())
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    new = file.with_suffix(".new")
    new.write_text(yaml.safe_dump(config))
    new.replace(file)
    await eventually(loaded, lambda after: after != before)


async def held(stack: Stack, count: int) -> None:
    """Wait until exactly so many are held."""

    async def read() -> int:
        number: int = (await stack.endpoints())["held"]
        return number

    await eventually(read, lambda number: number == count)


async def answered(asked: Iterable[asyncio.Task[Reply]]) -> list[Reply]:
    """The answers, each of them a whole stream."""
    replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200] * len(replies), replies
    assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in replies)
    return replies


async def all_free(stack: Stack) -> None:
    """No request is held and nothing is charged."""
    await held(stack, 0)
    await stack.settled()


def total(scrape: str, name: str, **labels: str) -> float:
    """The sum of a metric over all series that have these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", scrape, re.MULTILINE)
    return sum(float(value) for series, value in found if all(label in series for label in wanted))


async def envoy_total(stack: Stack, name: str) -> int:
    """A counter of Envoy's external processing filter."""
    text = (await get(f"http://127.0.0.1:{stack.envoy_admin_port}/stats?filter=ext_proc")).decode()
    return sum(int(value) for value in re.findall(rf"ext_proc\.(?:\w+\.)?{name}: (\d+)$", text, re.MULTILINE))


async def held_records(stack: Stack, model: str, count: int) -> list[dict[str, Any]]:
    """Those of the model's latest decisions that were held first; each can be recomputed."""
    records = [record for record in await stack.last(count) if record["model"] == model and record["held_s"]]
    assert all(record["hold"]["reason"] in ("prefill", "kv_cache") for record in records)
    assert {verdict(record) for record in records} <= {"recomputed: same choice, same place in line"}
    return records


def _name(body: bytes) -> str:
    messages: Sequence[dict[str, str]] = json.loads(body)["messages"]
    return messages[0]["content"].split(" ", 1)[0]
