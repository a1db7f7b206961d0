"""Traffic at the least cost: an engine that answers at once, a client, closed and open loops, quantiles.

    python -m benchmarks.traffic [--apart] HOST PORT...       the engine, until killed

Engine and client are as plain as they can be, because they share the machine with what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import re
import selectors
import statistics
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

T = TypeVar("T")

MODEL = "bench"

EVENT = (
    b'data: {"id":"x","object":"chat.completion.chunk",'
    b'"choices":[{"index":0,"delta":{"content":"tok "}}]}\n\n'
)
USAGE = b'"usage":{"prompt_tokens":1000,"completion_tokens":10,"prompt_tokens_details":{"cached_tokens":512}}'
LAST_EVENTS = b'data: {"id":"x","choices":[],' + USAGE + b"}\n\ndata: [DONE]\n\n"
JSON_BODY = b'{"id":"x","object":"chat.completion","choices":[{"index":0}],' + USAGE + b"}"

MODELS = b'{"object":"list","data":[{"id":"%s","object":"model","owned_by":"bench"}]}' % MODEL.encode()


def json_answer(body: bytes) -> bytes:
    """An answer of 200 with JSON, on the wire."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


JSON_ANSWER = json_answer(JSON_BODY)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
STREAM_END = b"%x\r\n%s\r\n0\r\n\r\n" % (len(LAST_EVENTS), LAST_EVENTS)

HOLD = b',"user":"hold"}'
"""What the body of a request ends with that is not answered."""

BYTES_PER_TOKEN = 4
_TOKENIZES = re.compile(rb"post [^ ]*/(tokenize|render) ")

FIRST_TOKEN_ALONE_S = 0.001
"""From the first token to the second, so that Envoy sees the first in a packet of its own."""

APART_S = 0.0005
"""Real engines leave 5 to 50 ms."""

TOKENS_PER_WRITE = 50
"""Many tokens a packet, so that the client keeps up."""

CONNECTION_LIMIT_BYTES = 1 << 20
"""A client's read buffer: a stream's end is found in it without pausing after every packet."""


IDLE_CONNECTIONS = 32
"""Opened before requests are sent at a rate: none of them waits for a connection to be made."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: a port of 127.0.0.1, and what to call it."""

    name: str
    port: int


class Engine(asyncio.Protocol):
    """A minimal HTTP/1.1 engine: JSON at once, or `max_tokens` tokens, or nothing.

    Any path will do, but `/v1/models` names the model, and what ends in `/tokenize` or `/render` gets a token
    id for every four bytes, from memory: some routers ask every engine for them.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self._buffer += data
        while True:
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = bytes(self._buffer[:head_end]).lower()
            length = 0
            if b"content-length:" in head:
                length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            if len(self._buffer) < head_end + 4 + length:
                return
            body = bytes(self._buffer[head_end + 4 : head_end + 4 + length])
            del self._buffer[: head_end + 4 + length]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if HOLD in body:
            return
        if _TOKENIZES.match(head):
            self._transport.write(_tokenized(len(body) // BYTES_PER_TOKEN, is_render=b"/render " in head))
            return
        if head.startswith(b"get /v1/models "):
            self._transport.write(json_answer(MODELS))
            return
        if b'"stream":true' not in body:
            self._transport.write(JSON_ANSWER)
            return
        tokens = int(
            body.split(b'tokens":', 1)[1].split(b",", 1)[0].split(b"}", 1)[0]
        )  # some rename max_tokens
        self._transport.write(STREAM_HEAD + TOKEN)
        asyncio.get_running_loop().call_later(FIRST_TOKEN_ALONE_S, self._stream, tokens - 1)

    def _stream(self, left: int) -> None:
        if self._transport.is_closing():
            return
        now = min(left, TOKENS_PER_WRITE)
        self._transport.write(TOKEN * now)
        if left > now:
            asyncio.get_running_loop().call_soon(self._stream, left - now)
        else:
            self._transport.write(STREAM_END)


class ApartEngine(Engine):
    """Streams token by token, `apart_s` apart, so that each comes in a packet of its own."""

    apart_s = APART_S

    def _stream(self, left: int) -> None:
        if self._transport.is_closing():
            return
        if left:
            self._transport.write(TOKEN)
            asyncio.get_running_loop().call_later(self.apart_s, self._stream, left - 1)
        else:
            self._transport.write(STREAM_END)


@functools.cache
def _tokenized(count: int, *, is_render: bool) -> bytes:
    """An answer with so many token ids, in the field of `/render` or that of `/tokenize`."""
    ids = b",".join(b"%d" % (1_000 + index % 30_000) for index in range(count))
    field = b"token_ids" if is_render else b"tokens"
    return json_answer(b'{"count":%d,"max_model_len":1000000,"%s":[%s]}' % (count, field, ids))


async def serve(host: str, ports: list[int], engine: type[Engine] = Engine) -> None:
    """Be an engine on each port of an address, until killed."""
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(engine, host, port)
    await asyncio.Event().wait()


def request(prompt_bytes: int, salt: str, *, stream_tokens: int | None = None) -> bytes:
    """One chat request on the wire.

    Args:
        prompt_bytes: Length of the prompt.
        salt: What the prompt begins with: prompts of different salts share no prefix.
        stream_tokens: How many tokens to stream; None asks for JSON.
    """
    stream = b"" if stream_tokens is None else b',"stream":true,"max_tokens":%d' % stream_tokens
    return _request(prompt_bytes, salt, stream + b"}")


def held_request(prompt_bytes: int, salt: str) -> bytes:
    """One that the engine does not answer; arguments as for `request`."""
    return _request(prompt_bytes, salt, HOLD)


def _request(prompt_bytes: int, salt: str, ending: bytes) -> bytes:
    prompt = (salt + " lorem ipsum" * (prompt_bytes // 12 + 1))[:prompt_bytes]
    body = b'{"model":"%s","messages":[{"role":"user","content":"%s"}]%s' % (
        MODEL.encode(),
        prompt.encode(),
        ending,
    )
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:10000\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )


def requests(count: int, prompt_bytes: int, *, stream_tokens: int | None = None) -> list[bytes]:
    """`count` requests with different prompts; arguments as for `request`."""
    return [request(prompt_bytes, f"{i:08d}", stream_tokens=stream_tokens) for i in range(count)]


class Client:
    """One keep-alive connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        """Open it.

        Raises:
            OSError: No server listens.
        """
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=CONNECTION_LIMIT_BYTES))

    def send(self, message: bytes) -> None:
        """Send a request, and wait for nothing."""
        self._writer.write(message)

    async def ask(self, message: bytes) -> int:
        """Send a request, read the whole answer; returns its status.

        Raises:
            OSError, EOFError: The connection broke.
        """
        self._writer.write(message)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        if b"transfer-encoding: chunked" in head:
            await self._reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            length = int(head.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            await self._reader.readexactly(length)
        return status

    def close(self) -> None:
        """Close it."""
        self._writer.close()


async def closed_loop(target: Target, messages: list[bytes], concurrency: int, seconds: float) -> list[float]:
    """Latencies in ms of as many requests as `concurrency` connections manage in `seconds`.

    Raises:
        RuntimeError: An answer was not 200.
    """
    latencies_ms: list[float] = []
    deadline_s = time.perf_counter() + seconds

    async def one(offset: int) -> None:
        client = await Client.connect(target.port)
        turn = offset
        while time.perf_counter() < deadline_s:
            began_s = time.perf_counter()
            status = await client.ask(messages[turn % len(messages)])
            latencies_ms.append((time.perf_counter() - began_s) * 1e3)
            if status != 200:
                raise RuntimeError(f"{target.name}: status {status}")
            turn += concurrency
        client.close()

    await asyncio.gather(*(one(i) for i in range(concurrency)))
    return latencies_ms


def precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop that waits as long as it is told.

    asyncio's own, by epoll, waits whole milliseconds: what is due within one is sent together, 500 times a
    second a fourth of all requests behind another.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in a `precise_loop`."""
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        return runner.run(work)


async def open_loop(
    target: Target, messages: list[bytes], requests_per_s: float, seconds: float
) -> list[float]:
    """Latencies in ms of Poisson arrivals, the same ones every time.

    Each counts from when it was due: the time by which this process was late to send it is in it.

    Raises:
        RuntimeError: An answer was not 200.
    """
    latencies_ms: list[float] = []
    idle = [await Client.connect(target.port) for _ in range(IDLE_CONNECTIONS)]
    rng = random.Random(1)

    async def one(message: bytes, due_s: float) -> None:
        client = idle.pop() if idle else await Client.connect(target.port)
        status = await client.ask(message)
        if status != 200:
            raise RuntimeError(f"{target.name}: status {status}")
        latencies_ms.append((time.perf_counter() - due_s) * 1e3)
        idle.append(client)

    began_s = due_s = time.perf_counter()
    tasks: list[asyncio.Task[None]] = []
    while due_s < began_s + seconds:
        due_s += rng.expovariate(requests_per_s)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one(messages[len(tasks) % len(messages)], due_s)))
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return latencies_ms


def quantile(values: list[float], q: float) -> float:
    """The value that `q` of the values, rounded down, come before in order; at `q` = 1 the largest.

    Args:
        values: At least one, in any order and unit; the answer is one of them.
        q: 0..1.

    Raises:
        IndexError: There are no values.
    """
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


@dataclass(frozen=True, slots=True)
class OverRounds:
    """A figure that each round has for itself: the median, the least and the most of them."""

    median: float
    least: float
    most: float

    @property
    def rounded(self) -> dict[str, float]:
        """All three to a thousandth, by name."""
        return {name: round(figure, 3) for name, figure in asdict(self).items()}


def over_rounds(
    rounds: Sequence[list[float]], q: float, base: Sequence[list[float]] | None = None
) -> OverRounds:
    """A quantile of each round, less that of `base` in the same round.

    A pause of the machine of 20 ms is more than a hundredth of a round of 2 s at any rate, so that the 99th
    percentile of all together is that of the worst round.

    Args:
        rounds: At least one, each with at least one value.
        q: 0..1.
        base: What is taken off, as many rounds; nothing if left out.

    Raises:
        IndexError, ValueError: There are no values, or not as many rounds of both.
    """
    figures = [quantile(values, q) for values in rounds]
    if base is not None:
        figures = [figure - quantile(values, q) for figure, values in zip(figures, base, strict=True)]
    return OverRounds(statistics.median(figures), min(figures), max(figures))


def main() -> None:
    """Be the engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--apart", action="store_true", help="each token of a stream in a packet of its own")
    parser.add_argument("host")
    parser.add_argument("ports", nargs="+", type=int)
    options = parser.parse_args()
    asyncio.run(serve(options.host, options.ports, ApartEngine if options.apart else Engine))


if __name__ == "__main__":
    main()
