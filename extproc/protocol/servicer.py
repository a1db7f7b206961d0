"""The gRPC loop around the stream machine: reads messages, performs effects, answers.

Cancellation hides in grpc.aio: a stream that Envoy reset while we wait for its next message looks like one
that ended. So nothing is concluded from the end of a stream, and nothing is released here.

A bug in a decision fails its own stream only: the exception leaves `process`, gRPC answers UNKNOWN, and Envoy
carries the request on by its own fallback policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any, Protocol

import grpc

from extproc.errors import RouterError
from extproc.protocol import machine, wire
from extproc.protocol.machine import Kind, Phase, Stream
from extproc.values.exchange import LineVerdict, PassTo, RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER


class StreamEnding(StrEnum):
    """How an ext_proc stream ended; a metric label."""

    FINISHED = auto()
    CLOSED = auto()
    SPURIOUS = auto()
    FAILED = auto()


class Decided(Protocol):
    """What the loop needs to know of a decision."""

    @property
    def stream(self) -> bool:
        """The client asked for a stream."""

    @property
    def late_marker(self) -> bool:
        """The API announces itself before its first token."""

    def answer(self, *, to_trailers: bool) -> bytes:
        """The serialised answer."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """A decision that will be there later than Envoy would wait by itself.

    Attributes:
        decision: Cancelled when the client leaves meanwhile; it must not charge after that. What it gives may
            have to be awaited as well.
        patience_s: It is there after this long at the latest.
    """

    decision: Awaitable[Decided | Awaitable[Decided]]
    patience_s: float


class Decider(Protocol):
    """Who chooses, and who is told when the first token passes."""

    def decide(self, request: RequestHeaders, body: bytes) -> Decided | Awaitable[Decided] | Deferred:
        """Choose and charge, in one step, now or later. Raises RouterError if the request cannot be served.

        What is awaited is cancelled when the client leaves meanwhile; it must not charge after that.
        """

    def first_token(self, request_id: str, *, late: bool) -> None:
        """The first token of this request's answer passes now; `late` if other bytes came before it."""

    def answer_head(self, request_id: str, head: bytes) -> None:
        """The answer to this request begins with `head`; told where its verdict asked for it."""

    def pass_to(self, to: PassTo) -> bytes:
        """The serialised answer that routes a request past us."""

    def rejected(self, request: RequestHeaders | None, error: RouterError) -> None:
        """A request was refused."""

    def stream_ended(self, phase: Phase, how: StreamEnding) -> None:
        """A stream ended in `phase`."""


class Processor:
    """`envoy.service.ext_proc.v3.ExternalProcessor`.

    Args:
        judge: What the request line alone decides.
        decider: Chooses endpoints.
        want_first_chunk: Called per stream: is the first chunk wanted?
    """

    def __init__(
        self,
        judge: Callable[[RequestHeaders], LineVerdict],
        decider: Decider,
        want_first_chunk: Callable[[], bool],
    ) -> None:
        self._judge = judge
        self._decider = decider
        self._want_first_chunk = want_first_chunk
        self._reads: set[asyncio.Task[Any]] = set()
        self.streams_active = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service, its answers already serialised.

        To Envoy `Process` streams both ways. Here its last answer is what the handler returns, so that gRPC
        sends it together with the status: one operation, and one turn of two threads, less per request.
        """
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {"Process": grpc.stream_unary_rpc_method_handler(self.process, request_deserializer=wire.parse)},
        )

    async def process(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """Serve one HTTP request's stream; returns the last answer."""
        first_chunk = self._want_first_chunk()
        stream = Stream(self._judge, want_first_chunk=first_chunk)
        request: RequestHeaders | None = None
        ahead: asyncio.Task[Any] | None = None
        phase, how = stream.phase, StreamEnding.FAILED
        self.streams_active += 1
        try:
            while True:
                message = await (ahead or context.read())
                ahead = None
                if message is grpc.aio.EOF:
                    phase, how = stream.phase, StreamEnding.CLOSED
                    stream.receive(Kind.CLOSED)
                    return b""
                phase = stream.phase
                which = message.WhichOneof("request")
                if which == "request_body":
                    effects = stream.receive_body(message.request_body.body)
                elif which == "request_headers":
                    request = wire.request_headers(message)
                    effects = stream.receive_headers(request)
                elif which == "response_body":
                    chunk = message.response_body
                    effects = stream.receive_chunk(chunk.body, end_of_stream=chunk.end_of_stream)
                elif which is None:  # a message that a later Envoy may send and we need not know
                    continue
                else:
                    effects = stream.receive(Kind(which))
                decided = None
                if type(effects[0]) is machine.Decide:
                    decided, effects, ahead = await self._decide(stream, effects[0], context)
                answer = b""
                for effect in effects:
                    match effect:
                        case machine.SendAwaitBody():
                            first = first_chunk or effect.head
                            answer = wire.AWAIT_BODY_AND_FIRST_CHUNK if first else wire.AWAIT_BODY
                        case machine.SendDecision():
                            assert decided is not None
                            answer = decided.answer(to_trailers=effect.to_trailers)
                        case machine.Finish():
                            how = StreamEnding.FINISHED
                            return answer or wire.CONTINUE[Kind(which)]
                        case machine.FirstToken():
                            assert request is not None
                            request_id = request.headers.get(REQUEST_ID_HEADER, "")
                            self._decider.first_token(request_id, late=effect.late)
                        case machine.AnswerHead():
                            assert request is not None
                            request_id = request.headers.get(REQUEST_ID_HEADER, "")
                            self._decider.answer_head(request_id, effect.head)
                        case machine.SendContinue():
                            answer = wire.CONTINUE[effect.kind]
                        case machine.SendImmediate(status, body, details, error):
                            if error is not None:
                                self._decider.rejected(request, error)
                            answer = wire.immediate(status, body, details, error)
                        case machine.SendPass(to):
                            answer = self._decider.pass_to(to)
                        case machine.Abandon():
                            phase, how = Phase.DECIDING, StreamEnding.CLOSED
                            return b""
                await context.write(answer)
        except machine.SpuriousMessage as spurious:
            how = StreamEnding.SPURIOUS
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(spurious))
            raise  # abort has raised already
        except asyncio.CancelledError:
            phase, how = stream.phase, StreamEnding.CLOSED
            raise
        finally:
            self.streams_active -= 1
            self._decider.stream_ended(phase, how)

    async def _decide(
        self, stream: Stream, effect: machine.Decide, context: grpc.aio.ServicerContext[Any, Any]
    ) -> tuple[Decided | None, machine.Effects, asyncio.Task[Any] | None]:
        """Decide, and what to do then; third, a read that was begun while a decision was waited for."""
        ahead = None
        try:
            answer: Decided | Awaitable[Any]
            decision = self._decider.decide(effect.request, effect.body)
            if isinstance(decision, Deferred):
                answer = asyncio.ensure_future(decision.decision)
                try:
                    await context.write(wire.patience(decision.patience_s))
                except BaseException:  # the client left just now: nobody will wait
                    answer.cancel()
                    raise
            else:
                answer = decision
            while isinstance(answer, Awaitable):
                later = asyncio.ensure_future(answer)
                abandoned, ahead = await self._wait(stream, later, ahead, context)
                if abandoned is not None:
                    return None, abandoned, None
                answer = later.result()
        except RouterError as error:
            return None, stream.refused(error), ahead
        return answer, stream.decided(stream=answer.stream, late_marker=answer.late_marker), ahead

    async def _wait(
        self,
        stream: Stream,
        decision: asyncio.Future[Any],
        ahead: asyncio.Task[Any] | None,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> tuple[machine.Effects | None, asyncio.Task[Any] | None]:
        """Until the decision is there, or the client is gone: then the decision is cancelled.

        A read cannot be taken back from gRPC, so the one that was begun to notice the end of the stream is
        returned, to be awaited in place of the next one.
        """
        try:
            while True:
                if ahead is None:
                    ahead = asyncio.ensure_future(context.read())
                    self._reads.add(ahead)
                    ahead.add_done_callback(self._forget_read)
                await asyncio.wait((decision, ahead), return_when=asyncio.FIRST_COMPLETED)
                if not ahead.done():
                    return None, ahead
                message, ahead = ahead.result(), None
                if message is grpc.aio.EOF:
                    return stream.receive(Kind.CLOSED), None
                which = message.WhichOneof("request")
                if which is None:
                    continue
                effects = stream.receive(Kind(which))
                if type(effects[0]) is machine.Abandon:
                    return effects, None
                await context.write(wire.CONTINUE[Kind(which)])
        finally:
            decision.cancel()

    def _forget_read(self, read: asyncio.Task[Any]) -> None:
        """A read that outlives its stream ends with it, by EOF, cancellation or an error of gRPC."""
        self._reads.discard(read)
        if not read.cancelled():
            read.exception()
