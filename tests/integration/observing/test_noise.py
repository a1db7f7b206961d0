"""What the logs of gateway and metadata center leave out."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from extproc.observing.noise import QUIET_S, AcceptFaults, is_news


@pytest.mark.parametrize(
    ("name", "event", "expected"),
    [
        ("grpc._cython.cygrpc", "Exception not handled by _handle_exceptions in servicer method [%s]", False),
        ("grpc._cython.cygrpc", "Unexpected [%s] raised by servicer method [%s]", True),
        ("tokenway.worker", "Exception not handled by _handle_exceptions in servicer method [%s]", True),
    ],
)
def test_only_undelivered_answers_are_no_news(name: str, event: str, expected: bool) -> None:
    """What gRPC says of a peer that left is dropped; what it says of our bugs, and all of ours, is kept."""
    record = logging.LogRecord(name, logging.ERROR, "", 0, event, ("x", "y"), None)
    assert is_news(record) is expected


@pytest.mark.asyncio
async def test_a_process_without_files_does_not_fill_its_log(tmp_path: Path) -> None:
    """Asyncio writes a line for each place in the line of those that wait to be accepted, again and again."""
    now_s, lines = 0.0, list[str]()
    passes = AcceptFaults(lambda: now_s)
    loop = asyncio.get_running_loop()

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        record = logging.LogRecord("asyncio", logging.ERROR, "", 0, context["message"], (), None)
        if passes(record):
            lines.append(record.getMessage())

    listening = await asyncio.start_unix_server(lambda *_: None, tmp_path / "s")
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = os.dup(0)
    os.close(number)
    loop.set_exception_handler(note)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, limit[1]))
    try:
        client.connect(str(tmp_path / "s"))
        async with asyncio.timeout(20):
            while not lines:  # noqa: ASYNC110 - what the kernel does wakes no task
                await asyncio.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        loop.set_exception_handler(None)
        client.close()
        listening.close()
    record = logging.LogRecord("asyncio", logging.ERROR, "", 0, lines[0], (), None)
    assert len(lines) == 1
    now_s = QUIET_S - 1
    assert not passes(record)
    now_s = QUIET_S
    assert passes(record)
    assert passes(logging.LogRecord("asyncio", logging.ERROR, "", 0, "another fault", (), None))


NO_REQUESTS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
    b"GET / HTTP/1.1\r\n\r\n",  # no Host
    b"GET /?\xff HTTP/1.1\r\nhost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\nconnection: close\r\n\r\n",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc",
]


@pytest.mark.asyncio
async def test_what_is_no_request_is_no_error_of_ours() -> None:
    """Whoever scans ports gets 400 and writes nothing; an error of a handler is still said."""
    heard: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(str(record.exc_info and record.exc_info[0]))

    async def handle(request: web.Request) -> web.Response:
        if b"fail" in await request.read():
            raise ValueError("a bug")
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    handler = Heard()
    handler.addFilter(is_news)
    logging.getLogger("aiohttp.server").addHandler(handler)
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        for sent in (*NO_REQUESTS, b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nfail"):
            reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
            writer.write(sent)
            async with asyncio.timeout(10):
                assert (await reader.readline()).split()[1] in (b"400", b"500"), sent
            writer.close()
            await writer.wait_closed()
    finally:
        logging.getLogger("aiohttp.server").removeHandler(handler)
        await runner.cleanup()
    assert heard == ["<class 'ValueError'>"]
