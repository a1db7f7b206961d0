"""The ext_proc service: passes the stream machine what came and does what it says.

Rules:
    1. Nothing is concluded from the end of a call and nothing is released here: how a request ended is said
       by the access log.
    2. A bug in a decision fails its own stream only: it gets UNKNOWN, and Envoy carries the request on by its
       own fallback policy.
    3. What is decided later comes by a callback. If the stream ends before, it is cancelled at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from extproc.errors import RouterError
from extproc.protocol import wire
from extproc.protocol.awaiting import Awaited
from extproc.protocol.dialect import Dialect
from extproc.protocol.machine import (
    Abandon,
    AnswerHead,
    Decide,
    Effects,
    Finish,
    FirstToken,
    MessageKind,
    Phase,
    SendAwaitBody,
    SendContinue,
    SendDecision,
    SendImmediate,
    SendPass,
    SpuriousMessage,
    Stream,
    StreamEnding,
)
from extproc.request.answer_head import HeadCollector
from extproc.request.first_token import FirstTokenDetector
from extproc.transport.seam import Call, Message, Received, Rpc, Status
from extproc.values.deciding import Deciding, Now, Refusal
from extproc.values.exchange import Body, LineVerdict, RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.placements import Decision


class Decider(Protocol):
    """Chooses endpoints, and gets the events of a stream."""

    def decide(self, request: RequestHeaders, body: Body) -> Deciding[Decision]:
        """Choose and charge, in one step, now or later."""

    def first_token(self, request_id: str, *, late: bool) -> None:
        """The first token of this request's answer passes now; `late` if other bytes came before it."""

    def answer_head(self, request_id: str, head: bytes) -> None:
        """The answer to this request begins with `head`; called where its verdict asks for it."""

    def rejected(self, request: RequestHeaders | None, error: RouterError) -> None:
        """A request was refused."""

    def stream_ended(self, phase: Phase, how: StreamEnding) -> None:
        """A stream ended in `phase`."""


class Processor:
    """`envoy.service.ext_proc.v3.ExternalProcessor`.

    Args:
        judge: What the request line alone decides.
        decider: Chooses endpoints.
        dialect: How Envoy is answered.
        want_first_chunk: Called per stream: is the first chunk wanted?
    """

    def __init__(
        self,
        judge: Callable[[RequestHeaders], LineVerdict],
        decider: Decider,
        dialect: Dialect,
        want_first_chunk: Callable[[], bool],
    ) -> None:
        self.judge = judge
        self.decider = decider
        self.dialect = dialect
        self._want_first_chunk = want_first_chunk
        self._is_closing = False
        self.streams_active = 0

    @property
    def rpc(self) -> Rpc:
        """To be served; its answers are serialised already."""
        return Rpc(wire.SERVICE, "Process", self.open, has_last=True)

    def open(self, call: Call) -> Exchange:
        """One HTTP request's stream."""
        self.streams_active += 1
        exchange = Exchange(self, call, first_chunk=self._want_first_chunk())
        if self._is_closing:
            exchange.turn_away()
        return exchange

    def close(self) -> None:
        """Take no new streams from now on, so that Envoy asks another worker; those that are open go on."""
        self._is_closing = True

    def ended(self, phase: Phase, how: StreamEnding) -> None:
        """A stream ended in `phase`."""
        self.streams_active -= 1
        self.decider.stream_ended(phase, how)


class Exchange:
    """One HTTP request's stream; a `Receiver`, and a `Waiter` for its decision.

    Args:
        processor: Whose it is.
        call: Its call.
        first_chunk: The first chunk of its answer is wanted.
    """

    __slots__ = (
        "_awaited",
        "_call",
        "_dialect",
        "_first_chunk",
        "_is_over",
        "_phase",
        "_processor",
        "_request",
        "_stream",
    )

    def __init__(self, processor: Processor, call: Call, *, first_chunk: bool) -> None:
        self._processor = processor
        self._call = call
        self._first_chunk = first_chunk
        self._dialect = processor.dialect
        self._stream = Stream(processor.judge)
        self._phase = self._stream.phase
        self._request: RequestHeaders | None = None
        self._awaited: Awaited | None = None
        self._is_over = False

    def turn_away(self) -> None:
        """End it before its first message, as a worker does that cannot be reached."""
        self._end(self._phase, StreamEnding.CLOSED)
        self._call.abort(Status.UNAVAILABLE, "stopping")

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        try:
            self._receive(self._dialect.parse(message))
        except SpuriousMessage as spurious:
            self._end(self._phase, StreamEnding.SPURIOUS)
            self._call.abort(Status.INVALID_ARGUMENT, str(spurious))
        except Exception:
            self._end(self._phase, StreamEnding.FAILED)
            raise

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self._end(self._stream.phase, StreamEnding.CLOSED)
        self._call.finish(b"")

    def on_reset(self) -> None:
        """See `Receiver`."""
        self._end(self._stream.phase, StreamEnding.CLOSED)

    def _receive(self, message: Any) -> None:
        stream = self._stream
        if self._awaited is None:  # else what came before is still unanswered
            self._phase = stream.phase
        which = message.WhichOneof("request")
        if which == "request_body":
            effects = stream.receive_body(message.request_body.body)
        elif which == "request_headers":
            self._request = request = self._dialect.request_headers(message)
            effects = stream.receive_headers(request)
        elif which == "response_body":
            chunk = message.response_body
            effects = stream.receive_chunk(chunk.body, end_of_stream=chunk.end_of_stream)
        elif which is None:  # a message that a later Envoy may send and we need not know
            return
        else:
            effects = stream.receive(MessageKind(which))
        if type(effects[0]) is Decide:
            self._decide(effects[0])
        else:
            self._perform(effects, which, None)

    def _decide(self, effect: Decide) -> None:
        deciding = self._processor.decider.decide(effect.request, effect.body)
        if isinstance(deciding, Now):
            self._answer(deciding.decision)
        elif isinstance(deciding, Refusal):
            self._perform(self._stream.refused(deciding.error), "request_body", None)
        else:
            if deciding.patience_s is not None:
                self._call.send(self._dialect.patience(deciding.patience_s))
            self._awaited = Awaited(deciding.pending, self)
            self._awaited.begin()

    def _answer(self, decision: Decision) -> None:
        wants_token = decision.stream and self._first_chunk
        token = FirstTokenDetector(decision.operation) if wants_token else None
        head = HeadCollector() if self._stream.wants_head else None
        self._perform(self._stream.decided(token, head), "request_body", decision)

    def decided(self, decision: Decision) -> None:
        """See `Waiter`."""
        self._awaited = None
        self._answer(decision)

    def refused(self, error: RouterError) -> None:
        """See `Waiter`."""
        self._awaited = None
        self._perform(self._stream.refused(error), "request_body", None)

    def failed(self) -> None:
        """See `Waiter`."""
        self._awaited = None
        self._end(self._phase, StreamEnding.FAILED)
        self._call.abort(Status.UNKNOWN, "")

    def _perform(self, effects: Effects, which: str, decided: Decision | None) -> None:
        """Do what the machine says, about a message of kind `which`."""
        answer: Message = b""
        dialect, decider = self._dialect, self._processor.decider
        for effect in effects:
            if isinstance(effect, SendAwaitBody):
                answer = dialect.await_body(first_chunk=self._first_chunk or effect.head)
            elif isinstance(effect, SendDecision):
                assert decided is not None
                answer = dialect.decision(decided, to_trailers=effect.to_trailers)
            elif isinstance(effect, Finish):
                self._end(self._phase, StreamEnding.FINISHED)
                self._call.finish(answer or dialect.let_pass(MessageKind(which)))
                return
            elif isinstance(effect, FirstToken):
                decider.first_token(self._request_id, late=effect.late)
            elif isinstance(effect, AnswerHead):
                decider.answer_head(self._request_id, effect.head)
            elif isinstance(effect, SendContinue):
                answer = dialect.let_pass(effect.kind)
            elif isinstance(effect, SendImmediate):
                if effect.error is not None:
                    decider.rejected(self._request, effect.error)
                answer = dialect.immediate(effect.status, effect.body, effect.details, effect.error)
            elif isinstance(effect, SendPass):
                answer = dialect.pass_to(effect.to)
            elif isinstance(effect, Abandon):
                self._end(Phase.DECIDING, StreamEnding.CLOSED)
                self._call.finish(b"")
                return
        self._call.send(answer)

    @property
    def _request_id(self) -> str:
        assert self._request is not None
        return self._request.headers.get(REQUEST_ID_HEADER, "")

    def _end(self, phase: Phase, how: StreamEnding) -> None:
        """The stream is over: its decision is not waited for."""
        if self._is_over:
            return
        self._is_over = True
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None
        self._processor.ended(phase, how)
