"""What a request leaves behind is in no cycle: memory is given back without a collection of old objects."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import Reason, RouterError
from extproc.protocol.servicer import Processor
from extproc.request.reading import BodyRead, ReadOrder
from extproc.transport.http2 import frames
from extproc.transport.http2.connection import Connection
from extproc.transport.native import NativeServer, unix_socket
from extproc.values.deciding import Later
from extproc.values.evidence import FailureKind
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.pending import Pending
from extproc.values.placements import Decision
from metadata_center.types import RequestId
from tests.conftest import CHAT, DIALECT, THREE, VirtualLoop, build_rig, chat, request_line
from tests.http2_peers import CALL_FIELDS, GREETING, MAX_MESSAGE_BYTES, data, framed, opening

REQUESTS = 600
"""More than the rig keeps records of, and enough prompts to have some evicted from its history."""


def test_a_request_leaves_no_cycle() -> None:
    """Answered, retried, refused, left by its client, or lost: reference counts alone free all of it."""
    rig = build_rig()
    keys = [endpoint.key for endpoint in THREE]

    def serve(number: int) -> None:
        request_id = f"r{number}"
        if number % 10 == 9:
            rig.gateway.rejected(None, RouterError(Reason.INVALID_JSON, "no"))
        rig.decide(request_id, chat(f"{number:04d} {'word ' * 60}", stream=True))
        rig.clock.advance(0.01)
        if number % 7 == 3:
            rig.failed(request_id, keys[0], FailureKind.RESET)
        rig.gateway.first_token(RequestId(request_id), late=False)
        if number % 11 == 5:
            return  # its lease ends
        rig.clock.advance(0.1)
        rig.end(request_id, prompt_tokens=100, completion_tokens=10, cached_tokens=0)

    for number in range(50):
        serve(number)
    rig.endings.clear()
    rig.shared.clear()
    gc.collect()
    gc.disable()
    try:
        for number in range(50, REQUESTS):
            serve(number)
            rig.endings.clear()
            rig.shared.clear()
        found = gc.collect()
    finally:
        gc.enable()
    assert found < REQUESTS / 10


def garbage_of(run: Callable[[], object]) -> Counter[str]:
    """Our own types that are in cycles, or are held by some, after something was done."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run()
        gc.collect()
        names = [f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return Counter(name for name in names if name.startswith(("extproc.", "metadata_center.")))


class Envoy:
    """Our HTTP/2 and the ext_proc service over a rig, and a peer that sends what Envoy does."""

    def __init__(self) -> None:
        self.rig = build_rig()
        processor = Processor(self.rig.gateway.judge, self.rig.gateway, DIALECT, lambda: True)
        rpc = processor.rpc
        path = rpc.path.encode()
        self.fields = tuple((key, path if key == b":path" else value) for key, value in CALL_FIELDS)
        self.connection = Connection({rpc.path: rpc}, MAX_MESSAGE_BYTES, "tests", self, lambda: None, 0.0)
        self.connection.receive(GREETING, 0.0)
        self.num_calls = 0

    def fault(self, reason: object, detail: str, *, is_connection: bool) -> None:
        """See `Notices`."""
        raise AssertionError(reason, detail, is_connection)

    def bug(self, path: str, error: Exception) -> None:
        """See `Notices`."""
        raise AssertionError(path) from error

    def says(self, stream_id: int, *messages: pb.ProcessingRequest) -> None:
        """Send messages, and take what is answered."""
        content = framed(*(message.SerializeToString() for message in messages))
        self.connection.receive(data(stream_id, content), 0.0)
        while self.connection.take():
            self.connection.outbox.notify_sent()
        self.connection.receive(frames.window_update(0, 10_000), 0.0)

    def asks(self, *, ends: str) -> None:
        """One request, to its end: `first_chunk`, `json`, `refused`, `reset` or `half_close`."""
        number, stream_id = self.num_calls, 2 * self.num_calls + 1
        self.num_calls += 1
        headers = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
        for key, value in ((":method", "POST"), (":path", CHAT), (REQUEST_ID_HEADER, f"r{number}")):
            headers.request_headers.headers.headers.add(key=key, raw_value=value.encode())
        text = b"{" if ends == "refused" else chat(f"{number} {'word ' * 20}", stream=ends == "first_chunk")
        body = pb.ProcessingRequest(request_body=pb.HttpBody(body=text, end_of_stream=True))
        chunk = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
        self.connection.receive(opening(stream_id, fields=self.fields), 0.0)
        self.says(stream_id, headers)
        if ends == "reset":
            self.connection.receive(frames.rst_stream(stream_id, 8), 0.0)
            return
        if ends == "half_close":
            self.connection.receive(data(stream_id, b"", end_stream=True), 0.0)
            return
        self.says(stream_id, body)
        if ends == "first_chunk":
            self.says(stream_id, pb.ProcessingRequest(response_body=pb.HttpBody(body=chunk)))
        if ends != "refused":
            self.rig.end(f"r{number}", prompt_tokens=30, completion_tokens=10)


@pytest.mark.parametrize("ends", ["first_chunk", "json", "refused", "reset", "half_close"])
def test_a_call_leaves_no_cycle(ends: str) -> None:
    """A call and its service know each other while it is open, and not when it is over."""
    envoy = Envoy()

    def ask() -> None:
        for _ in range(1_000):
            envoy.asks(ends=ends)

    envoy.asks(ends=ends)
    assert garbage_of(ask) == {}
    assert envoy.connection.num_streams == 0


def test_a_decision_that_comes_later_leaves_no_cycle() -> None:
    """Given, failed or cancelled: those who wait and those who work let go of each other."""

    class Reader:
        """Reads a body later; see `Readers`."""

        patience_s = 1.0

        def read(self, _order: ReadOrder, _body: bytes) -> Pending[BodyRead]:
            """Knows who waits for it, as `BodyReaders` does."""
            read: Pending[BodyRead] = Pending(lambda: reads.remove(read))
            reads.append(read)
            return read

    reads: list[Pending[BodyRead]] = []
    reader = Reader()

    def wait() -> None:
        for number in range(300):
            reading = reader.read(ReadOrder("", frozenset(), False, frozenset(), 1, False), b"")
            decision: Pending[int] = Pending(reading.cancel)
            reading.then(lambda _, to=decision: to.give(1), decision.fail)  # type: ignore[misc]
            decision.then(lambda _: None, lambda _: None)
            if number % 3 == 0:
                reading.fail(RouterError(Reason.INVALID_JSON, "no"))
            elif number % 3 == 1:
                decision.cancel()
            else:
                reading.give(None)  # type: ignore[arg-type]
            reads.clear()

    assert garbage_of(wait) == {}


def test_a_large_body_that_is_refused_leaves_no_cycle() -> None:
    """It is refused in the turn after the one that understood it: the error does not keep the body."""
    loop = VirtualLoop()
    rig = build_rig(loop=loop)
    rig.configure([])
    body = chat("word " * 60_000)

    def refuse() -> None:
        for number in range(20):
            deciding = rig.gateway.decide(request_line(f"r{number}"), body)
            assert isinstance(deciding, Later)
            refused: list[Exception] = []
            deciding.pending.then(lambda _: None, refused.append)
            loop.run()
            assert isinstance(refused.pop(), RouterError)

    assert garbage_of(refuse) == {}


def test_a_large_body_that_is_decided_leaves_no_cycle() -> None:
    """Scheduled in the turn after the one that understood it. Compiled, a nested function would keep it."""
    loop = VirtualLoop()
    rig = build_rig(loop=loop)
    body = chat("word " * 60_000)

    def decide(times: int) -> None:
        for number in range(times):
            deciding = rig.gateway.decide(request_line(f"r{times}-{number}"), body)
            assert isinstance(deciding, Later)
            found: list[object] = []
            deciding.pending.then(found.append, found.append)
            loop.run()
            assert isinstance(found.pop(), Decision)
            rig.end(f"r{times}-{number}", prompt_tokens=30, completion_tokens=10)
            rig.endings.clear()
            rig.shared.clear()

    decide(3)
    assert garbage_of(lambda: decide(20)) == {}


def test_a_connection_that_is_lost_leaves_no_cycle_of_ours(tmp_path: Path) -> None:
    """Envoy's health checks connect each second, once for each of its clusters, and say nothing."""

    async def connect(count: int) -> None:
        server = NativeServer([], MAX_MESSAGE_BYTES)
        await server.serve(unix_socket(tmp_path / f"s{count}"))
        for _ in range(count):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / f"s{count}"))
                while not server.num_connections:  # noqa: ASYNC110 - the server wakes no task
                    await asyncio.sleep(0)
            while server.num_connections:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await server.stop(0.0)

    asyncio.run(connect(1))
    found = garbage_of(lambda: asyncio.run(connect(100)))
    assert "extproc.transport.http2.connection.Connection" not in found
    assert "extproc.transport.native._Peer" not in found
