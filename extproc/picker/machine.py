"""One stream of the endpoint-picker protocol as a sans-IO machine: events in, effects out.

Rules:
    1. No I/O, no clock, no protobuf. Each `receive` takes an event and returns the effects, in order.
    2. Nothing is said of a request before its end: headers, body and trailers are answered together, once.
    3. Request and answer are two halves. An answer that comes while the request is not decided is Envoy's
       own: the request is given up, and the answer passes.
    4. What comes of the request after its end is not answered: Envoy 1.35 to 1.37 may send the end twice. Nor
       is what comes after the end of the answer.
    5. `Finish` comes after a whole response of our own, and after the peer's own end. While an answer is
       wanted back the stream is never left: what Envoy handed over would be lost with it.
    6. `End` comes exactly once for each request that was decided and charged, and for no other; but for those
       that are left early, whose end the access log brings.

Source: envoy/extensions/filters/http/ext_proc/v3/processing_mode.proto, FULL_DUPLEX_STREAMED; Envoy 1.40.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from extproc.errors import Reason, RouterError, Shape
from extproc.protocol.machine import (
    Abandon,
    Decide,
    Effect,
    Effects,
    Finish,
    MessageKind,
    Phase,
    SendContinue,
    SendImmediate,
    SendPass,
    SpuriousMessage,
)
from extproc.values.exchange import (
    NEED_BODY_AND_HEAD,
    AnswerAtOnce,
    LineVerdict,
    NeedBody,
    PassTo,
    RefuseAtOnce,
    RequestHeaders,
)
from extproc.values.headers import REQUEST_ID_HEADER


@dataclass(frozen=True, slots=True)
class SendRequest(Effect):
    """Answer headers, body and trailers of the request with the decision.

    Attributes:
        body: As it came; None if the request has none.
        trailers: They came, and are answered last.
    """

    body: bytes | None
    trailers: bool


@dataclass(frozen=True, slots=True)
class Echo(Effect):
    """Answer the message with itself."""


@dataclass(frozen=True, slots=True)
class End(Effect):
    """The request that was decided is over; `whole` if all of its answer has passed."""

    whole: bool


class AnswerMode(Enum):
    """What the gateway does with the body of an answer."""

    ECHOED = auto()
    """Each chunk goes on when it comes back: FULL_DUPLEX_STREAMED."""
    SHOWN = auto()
    """Each chunk goes on at a word: STREAMED, BUFFERED."""
    UNSEEN = auto()
    """It goes on by itself: NONE."""


_NOTHING: Effects = ()
_ECHO = (Echo(),)
_CONTINUE = {kind: (SendContinue(kind),) for kind in MessageKind}


class PickStream:
    """The state of one stream.

    Args:
        judge: Pure function from request headers to verdict.
        max_body_bytes: More is not kept, and refused.
    """

    __slots__ = (
        "_chunks",
        "_headers",
        "_is_charged",
        "_is_passing",
        "_judge",
        "_max_body_bytes",
        "_mode",
        "_num_bytes",
        "_trailers",
        "is_answered",
        "phase",
        "wants_head",
    )

    def __init__(self, judge: Callable[[RequestHeaders], LineVerdict], max_body_bytes: int) -> None:
        self.phase = Phase.AWAIT_HEADERS
        """`AWAIT_FIRST_CHUNK` once the request is answered, `DONE` once its answer passes."""
        self.is_answered = False
        """All of the answer has passed."""
        self.wants_head = False
        """The verdict asked for the head of the answer."""
        self._judge = judge
        self._max_body_bytes = max_body_bytes
        self._headers: RequestHeaders | None = None
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._is_charged = False
        self._is_passing = False
        self._mode = AnswerMode.ECHOED
        self._trailers = False

    @property
    def is_echoed(self) -> bool:
        """The answer is wanted back."""
        return self._mode is AnswerMode.ECHOED

    def receive_headers(self, event: RequestHeaders, mode: AnswerMode = AnswerMode.ECHOED) -> Effects:
        """Request headers arrived, and with them what becomes of the answer."""
        if self.phase is not Phase.AWAIT_HEADERS:
            raise SpuriousMessage(self.phase, MessageKind.REQUEST_HEADERS)
        self._headers = event
        self._mode = mode
        verdict = self._judge(event)
        if isinstance(verdict, NeedBody):
            self.phase = Phase.AWAIT_BODY
            self.wants_head = verdict is NEED_BODY_AND_HEAD
            return self._decide() if event.end_of_stream else _NOTHING
        if isinstance(verdict, PassTo):
            self.phase = Phase.AWAIT_FIRST_CHUNK
            self._is_passing = not event.end_of_stream
            return (SendPass(verdict),)
        self.phase = Phase.DONE
        if isinstance(verdict, AnswerAtOnce):
            return (SendImmediate(verdict.status, verdict.body, "tokenway_answer"), Finish())
        assert isinstance(verdict, RefuseAtOnce)
        return self._refuse(verdict.error)

    def receive_body(self, chunk: bytes, *, end_of_stream: bool) -> Effects:
        """A chunk of the request body arrived."""
        if self._is_passing:
            self._is_passing = not end_of_stream
            return _ECHO
        if self.phase is Phase.AWAIT_HEADERS:
            raise SpuriousMessage(self.phase, MessageKind.REQUEST_BODY)
        if self.phase is not Phase.AWAIT_BODY:
            return _NOTHING
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_body_bytes:
            text = f"The request body is larger than {self._max_body_bytes} bytes."
            return self._give_up(RouterError(Reason.BODY_TOO_LARGE, text, param="body"))
        if chunk:
            self._chunks.append(chunk)
        return self._decide() if end_of_stream else _NOTHING

    def receive_trailers(self) -> Effects:
        """Request trailers arrived: with them the request ends."""
        if self.phase is Phase.AWAIT_HEADERS:
            raise SpuriousMessage(self.phase, MessageKind.REQUEST_TRAILERS)
        if self.phase is Phase.AWAIT_BODY:
            self._trailers = True
            return self._decide()
        if self.phase is Phase.DECIDING:
            self._trailers = True
            return _NOTHING
        self._is_passing = False
        return _CONTINUE[MessageKind.REQUEST_TRAILERS]

    def decided(self) -> Effects:
        """The shell has a decision, which is charged."""
        if self.phase is not Phase.DECIDING:
            raise SpuriousMessage(self.phase, MessageKind.DECIDED)
        assert self._headers is not None
        self.phase = Phase.AWAIT_FIRST_CHUNK
        self._is_charged = True
        body = None if self._headers.end_of_stream else self._chunks[0]
        self._chunks = []
        return (SendRequest(body, self._trailers),)

    def leave(self) -> Effects:
        """Nothing more of the request that was decided is of interest here; its end comes elsewhere.

        Without effect where the answer is wanted back.
        """
        if self._mode is AnswerMode.ECHOED or not self._is_charged:
            return _NOTHING
        self.phase = Phase.DONE
        self._is_charged = False
        return (Finish(),)

    def refused(self, error: RouterError) -> Effects:
        """The shell cannot serve the request."""
        if self.phase is not Phase.DECIDING:
            raise SpuriousMessage(self.phase, MessageKind.REFUSED)
        return self._give_up(error)

    def timed_out(self) -> Effects:
        """The body has not come in its time."""
        if self.phase is not Phase.AWAIT_BODY:
            return _NOTHING
        return self._give_up(RouterError(Reason.BODY_TIMEOUT, "The request body did not come in time."))

    def receive_answer_headers(self, *, end_of_stream: bool) -> Effects:
        """Response headers arrived."""
        begins = self._answer_begins()
        return (*begins, *_CONTINUE[MessageKind.RESPONSE_HEADERS], *self._passed(end_of_stream))

    def receive_answer_chunk(self, *, end_of_stream: bool) -> Effects:
        """A chunk of the response body arrived; where it is shown its headers may not have been."""
        if self.phase is not Phase.DONE:
            if self._mode is not AnswerMode.SHOWN:
                raise SpuriousMessage(self.phase, MessageKind.RESPONSE_BODY)
            return (*self._answer_begins(), *self.receive_answer_chunk(end_of_stream=end_of_stream))
        if self.is_answered:
            return _NOTHING
        passes = _ECHO if self._mode is AnswerMode.ECHOED else _CONTINUE[MessageKind.RESPONSE_BODY]
        return (*passes, *self._passed(True)) if end_of_stream else passes

    def receive_answer_trailers(self) -> Effects:
        """Response trailers arrived: with them the answer ends."""
        if self.phase is not Phase.DONE:
            raise SpuriousMessage(self.phase, MessageKind.RESPONSE_TRAILERS)
        return (*_CONTINUE[MessageKind.RESPONSE_TRAILERS], *self._passed(True))

    def closed(self) -> Effects:
        """The peer ended the stream, or it failed here."""
        was, self.phase = self.phase, Phase.DONE
        self._chunks = []
        if was is Phase.DECIDING:
            return (Abandon(), Finish())
        ended, self._is_charged = self._is_charged, False
        is_whole = was is Phase.DONE and self._mode is AnswerMode.UNSEEN  # as far as it shows
        return (End(is_whole), Finish()) if ended else (Finish(),)

    def _answer_begins(self) -> Effects:
        """What is not decided by now is not wanted any more."""
        abandoned = (Abandon(),) if self.phase is Phase.DECIDING else _NOTHING
        self.phase = Phase.DONE
        self._chunks = []
        return abandoned

    def _passed(self, is_whole: bool) -> Effects:
        """The answer ends here, or not."""
        if not is_whole or self.is_answered:
            return _NOTHING
        self.is_answered = True
        ended, self._is_charged = self._is_charged, False
        return (End(True),) if ended else _NOTHING

    def _decide(self) -> Effects:
        assert self._headers is not None
        self.phase = Phase.DECIDING
        self._chunks = [b"".join(self._chunks)]
        return (Decide(self._headers, self._chunks[0]),)

    def _give_up(self, error: RouterError) -> Effects:
        self.phase = Phase.DONE
        self._chunks = []
        return self._refuse(error)

    def _refuse(self, error: RouterError) -> Effects:
        assert self._headers is not None
        headers = self._headers
        body = error.body(Shape.of(headers.path), headers.headers.get(REQUEST_ID_HEADER, ""))
        return (SendImmediate(error.status, body, f"tokenway_{error.reason.value}", error), Finish())
