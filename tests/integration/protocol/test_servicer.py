"""The ext_proc service over a real socket: what Envoy sees, and what is left when it goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.accesslog.service import AccessLog, Dispatcher
from extproc.protocol import machine, wire
from extproc.protocol.bootstrap_dialect import AWAIT_BODY_AND_FIRST_CHUNK
from extproc.protocol.servicer import Processor
from extproc.transport import grpc_aio
from extproc.values.deciding import Deciding
from extproc.values.exchange import Body, RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.placements import Decision
from metadata_center.types import RequestId
from tests.conftest import CHAT, DIALECT, OWNER, Rig, build_rig, chat, endpoint
from tests.integration.protocol.exchanges import body, chunk, headers
from tests.waiting import until

pytestmark = pytest.mark.asyncio

KEYS = tuple(endpoint(number).key for number in range(3))
STREAM_ACCESS_LOGS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"


class Served:
    """A rig behind a real server, and a client that speaks as Envoy does."""

    def __init__(self, rig: Rig, channel: grpc.aio.Channel) -> None:
        self.rig = rig
        self.want_first_chunk = True
        self.processor = Processor(rig.gateway.judge, rig.gateway, DIALECT, lambda: self.want_first_chunk)
        self._process = channel.stream_stream(
            wire.PROCESS,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )
        self._log = channel.stream_unary(
            STREAM_ACCESS_LOGS,
            request_serializer=als_pb2.StreamAccessLogsMessage.SerializeToString,
            response_deserializer=als_pb2.StreamAccessLogsResponse.FromString,
        )
        self._log_raw = channel.stream_unary(
            STREAM_ACCESS_LOGS, response_deserializer=als_pb2.StreamAccessLogsResponse.FromString
        )

    async def log_raw(self, message: bytes) -> None:
        """Envoy's access log says this, serialised already."""
        await self._log_raw(iter([message]))

    def call(self) -> Any:
        """A new HTTP request's stream."""
        return self._process()

    async def decided(self, request_id: str, body: bytes) -> Any:
        """A stream that got its decision."""
        call = self.call()
        await call.write(headers(request_id))
        await call.read()
        await call.write(pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=True)))
        answer = await call.read()
        assert answer.WhichOneof("response") == "request_body"
        return call

    async def end(self, *request_ids: str) -> None:
        """Envoy's access log reports that these requests are over."""
        message = als_pb2.StreamAccessLogsMessage()
        for request_id in request_ids:
            common = message.http_logs.log_entry.add().common_properties
            common.access_log_type = accesslog_pb2.DownstreamEnd
            common.custom_tags.update({"rid": request_id, "owner": OWNER})
            common.response_flags.downstream_connection_termination = True
        await self._log(iter([message]))

    def load(self) -> list[tuple[int, int, int]]:
        """The counters of all endpoints."""
        return [self.rig.load(key) for key in KEYS]

    async def idle(self) -> None:
        """Wait until no stream is open."""
        await until(lambda: self.processor.streams_active == 0)

    def endings(self, phase: str, how: str) -> float:
        """Streams that ended like this."""
        return self.rig.metric("tokenway_stream_endings_total", phase=phase, how=how)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A rig behind its services on a Unix socket."""
    rig = build_rig()
    address = f"unix:{tmp_path / 'gw.sock'}"
    server = grpc.aio.server()
    server.add_insecure_port(address)
    dispatcher = Dispatcher(
        OWNER,
        lambda entry: rig.ends.take(entry, rig.clock()),
        lambda _owner, _entry: False,
        lambda _entry: None,
        rig.scheduling.recorder,
    )
    async with grpc.aio.insecure_channel(address) as channel:
        served = Served(rig, channel)
        access_log = AccessLog(dispatcher.dispatch, rig.scheduling.recorder, rig.clock.wall)
        server.add_generic_rpc_handlers(grpc_aio.handlers([served.processor.rpc, access_log.rpc]))
        await server.start()
        yield served
    await server.stop(None)


async def test_an_ending_with_what_is_no_text_loses_no_other(served: Served) -> None:
    """One engine's answer had it; the endings of everybody else came in the same message, and are taken."""
    for request_id in ("r1", "r2", "r3"):
        await served.decided(request_id, chat("x" * 1000))
    message = als_pb2.StreamAccessLogsMessage()
    for request_id in ("r1", "r2", "r3"):
        common = message.http_logs.log_entry.add().common_properties
        common.access_log_type = accesslog_pb2.DownstreamEnd
        common.custom_tags.update({"rid": request_id, "owner": OWNER, "other": f"@@@{request_id}"})
    raw = message.SerializeToString().replace(b"@@@r2", b"\xff\xfe\xff\xff\xff")
    await served.log_raw(raw)
    assert served.load() == [(0, 0, 0)] * len(KEYS)


async def test_a_stream_is_decided_watched_and_left(served: Served) -> None:
    """The body gets the decision, comments pass, the first data passes and closes the stream."""
    call = served.call()
    await call.write(headers("r"))
    first = await call.read()
    assert first == pb.ProcessingResponse.FromString(AWAIT_BODY_AND_FIRST_CHUNK)
    await call.write(body(chat("x" * 1000, stream=True)))
    answer = await call.read()
    assert answer.request_body.response.clear_route_cache
    chosen, tokens = served.rig.chosen(), served.rig.record().prompt_tokens
    assert served.rig.load(chosen) == (1, tokens, tokens)
    await call.write(chunk(b": keep-alive\n\n"))
    assert (await call.read()).WhichOneof("response") == "response_body"
    await call.write(chunk(b"data: {}\n\n"))
    assert await call.read() == pb.ProcessingResponse(response_body=pb.BodyResponse())
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert served.rig.load(chosen) == (1, 0, tokens)
    inflight = served.rig.scheduling.running.get(RequestId("r"))
    assert inflight is not None
    assert not inflight.first_byte_is_token
    assert served.endings("await_first_chunk", "finished") == 1
    assert served.processor.streams_active == 0
    await served.end("r")
    assert served.load() == [(0, 0, 0)] * 3


@pytest.mark.parametrize(("stream", "want_first_chunk"), [(False, True), (True, False)])
async def test_the_decision_is_the_last_word_where_no_token_is_awaited(
    served: Served, stream: bool, want_first_chunk: bool
) -> None:
    """The stream is closed right after the answer: Envoy carries on alone."""
    served.want_first_chunk = want_first_chunk
    call = await served.decided("r", chat(stream=stream))
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_trailers_after_the_body_are_let_through(served: Served) -> None:
    """A request may end by trailers; each message gets its own kind of answer."""
    call = await served.decided("r", chat(stream=True))
    await call.write(pb.ProcessingRequest(request_trailers=pb.HttpTrailers()))
    assert (await call.read()).WhichOneof("response") == "request_trailers"
    await call.write(chunk(b"data: {}\n\n"))
    assert (await call.read()).WhichOneof("response") == "response_body"
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        (headers("r", "/v1/models", "GET", end_of_stream=True), 200, None),
        (headers("r", CHAT, "GET", end_of_stream=True), 405, "method_not_allowed"),
        (headers("r", "/elsewhere"), 404, "unknown_path"),
        (headers("r", end_of_stream=True), 400, "invalid_json"),
    ],
)
async def test_what_needs_no_engine_is_answered_here(
    served: Served, message: pb.ProcessingRequest, status: int, code: str | None
) -> None:
    """The models, wrong methods, unknown paths and requests without a body get a whole response at once."""
    call = served.call()
    await call.write(message)
    reply = (await call.read()).immediate_response
    assert reply.status.code == status
    assert await call.read() is grpc.aio.EOF
    assert code is None or served.rig.metric("tokenway_rejections_total", reason=code) == 1
    assert served.load() == [(0, 0, 0)] * 3


async def test_a_refused_body_is_answered_and_charged_nothing(served: Served) -> None:
    """A body that cannot be served gets its error as the answer to the body message."""
    call = served.call()
    await call.write(headers("r"))
    await call.read()
    await call.write(body(b"{"))
    reply = (await call.read()).immediate_response
    assert (reply.status.code, reply.details) == (400, "tokenway_invalid_json")
    assert await call.read() is grpc.aio.EOF
    assert served.load() == [(0, 0, 0)] * 3


async def test_a_local_reply_while_the_body_is_awaited_is_left_alone(served: Served) -> None:
    """Envoy's own 413 comes as response headers; the stream is closed at once, so that it goes out."""
    call = served.call()
    await call.write(headers("r"))
    await call.read()
    await call.write(pb.ProcessingRequest(response_headers=pb.HttpHeaders()))
    assert await call.read() == pb.ProcessingResponse(response_headers=pb.HeadersResponse())
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def reach(served: Served, where: str) -> Any:
    """A stream that waits at one of the places where Envoy may leave it."""
    if where == "decided":
        return await served.decided("r", chat("x" * 1000, stream=True))
    call = served.call()
    if where == "body":
        await call.write(headers("r"))
        await call.read()
    await until(lambda: served.processor.streams_active == 1)
    return call


LEAVING = [("headers", "await_headers"), ("body", "await_body"), ("decided", "await_first_chunk")]


@pytest.mark.parametrize(("where", "phase"), LEAVING)
@pytest.mark.parametrize("politely", [True, False])
async def test_a_stream_that_ends_leaves_nothing_behind(
    served: Served, where: str, phase: str, politely: bool
) -> None:
    """A reset or a close at any wait ends the stream; what was charged stays until the access log ends it."""
    call = await reach(served, where)
    if politely:
        await call.done_writing()
        assert await call.read() == pb.ProcessingResponse()  # empty: Envoy, having left, does not read it
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
    else:
        call.cancel()
    await served.idle()
    assert served.endings(phase, "closed") == 1
    charged = sum(requests for requests, _, _ in served.load())
    assert charged == len(served.rig.scheduling.running) == int(where == "decided")
    await served.end("r")
    assert served.load() == [(0, 0, 0)] * 3
    assert len(served.rig.scheduling.running) == 0


async def test_resets_at_any_moment_leave_nothing_behind(served: Served) -> None:
    """However a reset falls between reads, decision and answers, the access log cleans up after it."""

    async def hurried(number: int) -> None:
        call = served.call()
        await call.write(headers(str(number)))
        if number % 3:
            await call.read()
        await call.write(body(chat("x" * 1000, stream=True)))
        if number % 3 == 2:
            await call.read()
        await asyncio.sleep(number * 0.0002)
        call.cancel()

    await asyncio.gather(*(hurried(number) for number in range(60)))
    await (await served.decided("after all of them", chat())).read()
    await served.idle()
    assert not any(served.endings(phase.lower(), "failed") for phase in machine.Phase.__members__)
    assert served.rig.scheduling.load.in_flight > 20
    await served.end("after all of them", *map(str, range(60)))
    assert served.load() == [(0, 0, 0)] * 3
    assert len(served.rig.scheduling.running) == 0


@pytest.mark.parametrize("message", [body(b"{}"), pb.ProcessingRequest(response_trailers=pb.HttpTrailers())])
async def test_a_spurious_message_is_an_invalid_argument(
    served: Served, message: pb.ProcessingRequest
) -> None:
    """What the protocol does not allow ends its stream with a status, not with an answer."""
    call = served.call()
    await call.write(message)
    with pytest.raises(grpc.aio.AioRpcError, match="AWAIT_HEADERS"):
        await call.read()
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    await served.idle()
    assert served.endings("await_headers", "spurious") == 1


async def test_a_message_of_no_kind_is_ignored(served: Served) -> None:
    """A newer Envoy may send what we do not know."""
    call = served.call()
    await call.write(pb.ProcessingRequest())
    await call.write(headers("r"))
    assert (await call.read()).WhichOneof("response") == "request_headers"
    call.cancel()
    await served.idle()


async def test_a_bug_fails_its_own_stream_alone(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in one decision ends that stream; another one open meanwhile goes on."""
    decide = served.rig.gateway.decide

    def broken(request: RequestHeaders, text: Body) -> Deciding[Decision]:
        if request.headers[REQUEST_ID_HEADER] == "bad":
            raise ZeroDivisionError
        return decide(request, text)

    served.rig.gateway.decide = broken
    caplog.set_level(logging.CRITICAL)
    good = await served.decided("good", chat(stream=True))
    bad = served.call()
    await bad.write(headers("bad"))
    await bad.read()
    await bad.write(body(chat()))
    with pytest.raises(grpc.aio.AioRpcError):
        await bad.read()
    assert await bad.code() is grpc.StatusCode.UNKNOWN
    assert served.endings("await_body", "failed") == 1
    await good.write(chunk(b"data: {}\n\n"))
    assert (await good.read()).WhichOneof("response") == "response_body"
    assert await good.read() is grpc.aio.EOF
    await served.idle()
    await served.end("good", "bad")
    assert served.load() == [(0, 0, 0)] * 3
