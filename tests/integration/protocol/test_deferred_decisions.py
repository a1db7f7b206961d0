"""Decisions answered later: the stream waits for them, notices clients that leave, and drops what is left."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.errors import Reason, RouterError
from extproc.protocol import wire
from extproc.protocol.servicer import Processor
from extproc.routing.gateway import Gateway
from extproc.transport import grpc_aio
from extproc.values.deciding import Deciding, Later, settle
from extproc.values.exchange import Body, RequestHeaders
from extproc.values.pending import Pending
from extproc.values.placements import Decision
from tests.conftest import DIALECT, Rig, build_rig, chat
from tests.integration.protocol.exchanges import body, chunk, headers
from tests.waiting import until

pytestmark = pytest.mark.asyncio


class Deferring:
    """A gateway whose decisions wait until the test lets them go."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._asked: list[tuple[Pending[Decision], RequestHeaders, Body]] = []
        self.abandoned = 0
        self.error: Exception | None = None
        self.patience_s: float | None = None
        self.first_token = gateway.first_token
        self.answer_head = gateway.answer_head
        self.rejected = gateway.rejected
        self.stream_ended = gateway.stream_ended

    def decide(self, request: RequestHeaders, body: Body) -> Deciding[Decision]:
        """Later."""
        pending: Pending[Decision] = Pending(self._abandon)
        self._asked.append((pending, request, body))
        return Later(pending, self.patience_s)

    def release(self) -> None:
        """Decide what waits."""
        asked, self._asked = self._asked, []
        for pending, request, text in asked:
            if self.error is not None:
                pending.fail(self.error)
            else:
                settle(pending, self._gateway.decide(request, text))

    @property
    def waiting(self) -> int:
        """Decisions that are pending."""
        return sum(not pending.is_over for pending, _, _ in self._asked)

    def _abandon(self) -> None:
        self.abandoned += 1


class Served:
    """A rig behind a real server, its decisions deferred."""

    def __init__(self, rig: Rig, channel: grpc.aio.Channel) -> None:
        self.rig = rig
        self.decider = Deferring(rig.gateway)
        self.processor = Processor(rig.gateway.judge, self.decider, DIALECT, lambda: True)
        self._process = channel.stream_stream(
            wire.PROCESS,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )

    async def waiting(self, *, stream: bool) -> Any:
        """A stream whose decision is pending."""
        call = self._process()
        await call.write(headers("r"))
        await call.read()
        await call.write(body(chat("x" * 1000, stream=stream)))
        await until(lambda: self.decider.waiting == 1)
        return call

    async def idle(self) -> None:
        """Wait until no stream is open."""
        await until(lambda: self.processor.streams_active == 0)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """On a Unix socket."""
    address = f"unix:{tmp_path / 'gw.sock'}"
    server = grpc.aio.server()
    server.add_insecure_port(address)
    async with grpc.aio.insecure_channel(address) as channel:
        served = Served(build_rig(), channel)
        server.add_generic_rpc_handlers(grpc_aio.handlers([served.processor.rpc]))
        await server.start()
        yield served
    await server.stop(None)


async def test_a_stream_decided_later_goes_on_as_one_decided_at_once(served: Served) -> None:
    """The body is answered when the decision is there; the first chunk still closes the stream."""
    call = await served.waiting(stream=True)
    served.decider.release()
    assert (await call.read()).WhichOneof("response") == "request_body"
    await call.write(chunk(b"data: {}\n\n"))
    assert (await call.read()).WhichOneof("response") == "response_body"
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    await served.idle()


async def test_an_unstreamed_request_decided_later_is_answered_and_left(served: Served) -> None:
    """Its decision is the last word, though a read was begun while it waited."""
    call = await served.waiting(stream=False)
    served.decider.release()
    assert (await call.read()).WhichOneof("response") == "request_body"
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    await served.idle()


async def test_a_late_refusal_is_an_answer(served: Served) -> None:
    """A decision that fails after its wait gives the client the error."""
    served.decider.error = RouterError(Reason.NO_HEALTHY_ENDPOINT, "none", retry_after_s=1)
    call = await served.waiting(stream=True)
    served.decider.release()
    assert (await call.read()).immediate_response.status.code == 503
    assert await call.read() is grpc.aio.EOF
    await served.idle()


@pytest.mark.parametrize("politely", [True, False])
async def test_a_client_that_leaves_while_waiting_is_not_decided(served: Served, politely: bool) -> None:
    """The decision is cancelled at once and nothing is charged."""
    call = await served.waiting(stream=True)
    if politely:
        await call.done_writing()
    else:
        call.cancel()
    await served.idle()
    await until(lambda: served.decider.abandoned == 1)
    assert served.rig.metric("tokenway_stream_endings_total", phase="deciding", how="closed") == 1
    assert len(served.rig.scheduling.running) == 0


async def test_trailers_while_waiting_pass(served: Served) -> None:
    """Request trailers are let through at once; the decision answers the body all the same."""
    call = await served.waiting(stream=True)
    await call.write(pb.ProcessingRequest(request_trailers=pb.HttpTrailers()))
    assert (await call.read()).WhichOneof("response") == "request_trailers"
    served.decider.release()
    assert (await call.read()).WhichOneof("response") == "request_body"
    call.cancel()
    await served.idle()


async def test_a_local_reply_while_waiting_ends_it(served: Served) -> None:
    """Envoy answered by itself (a timeout): the decision is dropped and the stream closed."""
    call = await served.waiting(stream=True)
    await call.write(pb.ProcessingRequest(response_headers=pb.HttpHeaders()))
    assert await call.read() == pb.ProcessingResponse()  # empty: Envoy, having left, does not read it
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    await served.idle()
    assert served.decider.abandoned == 1


async def test_a_spurious_message_while_waiting_is_an_invalid_argument(served: Served) -> None:
    """A second body fails the stream, and the decision with it."""
    call = await served.waiting(stream=True)
    await call.write(body(b"{}"))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    await served.idle()
    assert served.decider.abandoned == 1


async def test_envoy_is_asked_to_wait_before_the_decision_is_there(served: Served) -> None:
    """A decision later than Envoy's own time-out asks for more time first, and then answers as any other."""
    served.decider.patience_s = 12.5
    call = await served.waiting(stream=False)
    patience = await call.read()
    assert patience.WhichOneof("response") is None
    assert patience.override_message_timeout.ToMilliseconds() == 12_500
    served.decider.release()
    assert (await call.read()).WhichOneof("response") == "request_body"
    assert await call.read() is grpc.aio.EOF
    await served.idle()


async def test_a_bug_in_a_late_decision_fails_its_own_stream(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """Its stream gets UNKNOWN and is counted as failed; the next one is decided."""
    caplog.set_level(logging.CRITICAL)
    served.decider.error = ZeroDivisionError()
    call = await served.waiting(stream=True)
    served.decider.release()
    assert await call.code() is grpc.StatusCode.UNKNOWN
    await served.idle()
    assert served.rig.metric("tokenway_stream_endings_total", phase="await_body", how="failed") == 1
    served.decider.error = None
    call = await served.waiting(stream=False)
    served.decider.release()
    assert (await call.read()).WhichOneof("response") == "request_body"
    await served.idle()


async def test_a_decision_that_comes_after_its_client_left_goes_nowhere(served: Served) -> None:
    """The decision may not have been cancelled yet: no stream is answered, and no stream is counted twice."""
    call = await served.waiting(stream=True)
    call.cancel()
    await served.idle()
    served.decider.release()
    assert served.processor.streams_active == 0
    assert served.rig.metric("tokenway_stream_endings_total", phase="deciding", how="closed") == 1
