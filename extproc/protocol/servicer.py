"""The ext_proc service: tells the stream machine what came and does what it says.

Rules:
    1. Nothing is concluded from the end of a call and nothing is released here: how a request ended is told
       by the access log.
    2. A bug in a decision fails its own stream only: it gets UNKNOWN, and Envoy carries the request on by its
       own fallback policy.
    3. What is decided later is told by a callback. Who leaves meanwhile has it cancelled, at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum, auto
from typing import Any, Protocol

from extproc.errors import RouterError
from extproc.protocol import machine, wire
from extproc.protocol.machine import Kind, Phase, Stream
from extproc.transport.seam import Call, Rpc, Status
from extproc.values.deciding import Deciding, Now, Refusal
from extproc.values.exchange import LineVerdict, PassTo, RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.pending import Pending

_log = logging.getLogger("tokenway.ext_proc")


class StreamEnding(StrEnum):
    """How an ext_proc stream ended; a metric label."""

    FINISHED = auto()
    CLOSED = auto()
    SPURIOUS = auto()
    FAILED = auto()


class Decided(Protocol):
    """What the service needs to know of a decision."""

    @property
    def stream(self) -> bool:
        """The client asked for a stream."""

    @property
    def late_marker(self) -> bool:
        """The API announces itself before its first token."""

    def answer(self, *, to_trailers: bool) -> bytes:
        """The serialised answer."""


class Decider(Protocol):
    """Who chooses, and who is told when the first token passes."""

    def decide(self, request: RequestHeaders, body: bytes) -> Deciding[Decided]:
        """Choose and charge, in one step, now or later."""

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
        self.judge = judge
        self.decider = decider
        self._want_first_chunk = want_first_chunk
        self.streams_active = 0

    @property
    def rpc(self) -> Rpc:
        """To be served; its answers are serialised already."""
        return Rpc(wire.SERVICE, "Process", self.open, has_last=True)

    def open(self, call: Call) -> Exchange:
        """One HTTP request's stream."""
        self.streams_active += 1
        return Exchange(self, call, first_chunk=self._want_first_chunk())

    def ended(self, phase: Phase, how: StreamEnding) -> None:
        """A stream ended in `phase`."""
        self.streams_active -= 1
        self.decider.stream_ended(phase, how)


class Exchange:
    """One HTTP request's stream; a `Receiver`.

    Args:
        processor: Whose it is.
        call: Its call.
        first_chunk: The first chunk of its answer is wanted.
    """

    __slots__ = (
        "_call",
        "_first_chunk",
        "_is_over",
        "_pending",
        "_phase",
        "_processor",
        "_request",
        "_stream",
    )

    def __init__(self, processor: Processor, call: Call, *, first_chunk: bool) -> None:
        self._processor = processor
        self._call = call
        self._first_chunk = first_chunk
        self._stream = Stream(processor.judge, want_first_chunk=first_chunk)
        self._phase = self._stream.phase
        self._request: RequestHeaders | None = None
        self._pending: Pending[Decided] | None = None
        self._is_over = False

    def on_message(self, message: bytes) -> None:
        """See `Receiver`."""
        try:
            self._receive(wire.parse(message))
        except machine.SpuriousMessage as spurious:
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
        if self._pending is None:  # else what came before is still unanswered
            self._phase = stream.phase
        which = message.WhichOneof("request")
        if which == "request_body":
            effects = stream.receive_body(message.request_body.body)
        elif which == "request_headers":
            self._request = request = wire.request_headers(message)
            effects = stream.receive_headers(request)
        elif which == "response_body":
            chunk = message.response_body
            effects = stream.receive_chunk(chunk.body, end_of_stream=chunk.end_of_stream)
        elif which is None:  # a message that a later Envoy may send and we need not know
            return
        else:
            effects = stream.receive(Kind(which))
        if type(effects[0]) is machine.Decide:
            self._decide(effects[0])
        else:
            self._perform(effects, which, None)

    def _decide(self, effect: machine.Decide) -> None:
        deciding = self._processor.decider.decide(effect.request, effect.body)
        if isinstance(deciding, Now):
            self._answer(deciding.decision)
        elif isinstance(deciding, Refusal):
            self._perform(self._stream.refused(deciding.error), "request_body", None)
        else:
            if deciding.patience_s is not None:
                self._call.send(wire.patience(deciding.patience_s))
            self._pending = deciding.pending
            deciding.pending.then(self._decided, self._failed)

    def _answer(self, decision: Decided) -> None:
        effects = self._stream.decided(stream=decision.stream, late_marker=decision.late_marker)
        self._perform(effects, "request_body", decision)

    def _decided(self, decision: Decided) -> None:
        """A decision is there that was waited for."""
        self._pending = None
        try:
            self._answer(decision)
        except Exception as error:  # a bug: this stream fails, and whoever decided goes on
            self._fault(error)

    def _failed(self, error: Exception) -> None:
        """A decision will not be there."""
        self._pending = None
        if not isinstance(error, RouterError):
            self._fault(error)
            return
        try:
            self._perform(self._stream.refused(error), "request_body", None)
        except Exception as fault:  # likewise
            self._fault(fault)

    def _fault(self, error: Exception) -> None:
        _log.error("a decision failed", exc_info=error)
        self._end(self._phase, StreamEnding.FAILED)
        self._call.abort(Status.UNKNOWN, "")

    def _perform(self, effects: machine.Effects, which: str, decided: Decided | None) -> None:
        """Do what the machine says, about a message of kind `which`."""
        answer = b""
        for effect in effects:
            match effect:
                case machine.SendAwaitBody():
                    first = self._first_chunk or effect.head
                    answer = wire.AWAIT_BODY_AND_FIRST_CHUNK if first else wire.AWAIT_BODY
                case machine.SendDecision():
                    assert decided is not None
                    answer = decided.answer(to_trailers=effect.to_trailers)
                case machine.Finish():
                    self._end(self._phase, StreamEnding.FINISHED)
                    self._call.finish(answer or wire.CONTINUE[Kind(which)])
                    return
                case machine.FirstToken():
                    self._processor.decider.first_token(self._request_id, late=effect.late)
                case machine.AnswerHead():
                    self._processor.decider.answer_head(self._request_id, effect.head)
                case machine.SendContinue():
                    answer = wire.CONTINUE[effect.kind]
                case machine.SendImmediate(status, body, details, error):
                    if error is not None:
                        self._processor.decider.rejected(self._request, error)
                    answer = wire.immediate(status, body, details, error)
                case machine.SendPass(to):
                    answer = self._processor.decider.pass_to(to)
                case machine.Abandon():
                    self._end(Phase.DECIDING, StreamEnding.CLOSED)
                    self._call.finish(b"")
                    return
        self._call.send(answer)

    @property
    def _request_id(self) -> str:
        assert self._request is not None
        return self._request.headers.get(REQUEST_ID_HEADER, "")

    def _end(self, phase: Phase, how: StreamEnding) -> None:
        """The stream is over: nobody waits for its decision."""
        if self._is_over:
            return
        self._is_over = True
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self._processor.ended(phase, how)
