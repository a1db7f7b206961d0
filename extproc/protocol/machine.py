"""One ext_proc stream as a sans-IO machine: events in, effects out.

Rules:
    1. No I/O, no clock, no protobuf. `receive` takes an event and returns the effects to perform, in order.
    2. The table `TRANSITIONS` is the whole protocol. A (phase, event) pair that is not in it is a
       `SpuriousMessage`: the machine is left as it was, nothing is answered.
    3. Every message that Envoy waits on is answered at most once. After `Finish` nothing is left to say.
    4. The machine releases nothing. A request that was decided ends by its access-log entry, which comes for
       every ending; one that was not decided was never charged.

Theory of operation:
    Envoy sends request headers; of an inference request the whole body is requested (BUFFERED), anything else
    is routed or refused at once. The body leads to `Decide`, which the shell may answer now or later with
    `decided` or `refused` (a decision is a step that may be deferred: `DECIDING` is a phase like any other,
    in which the client may leave). The answer names the endpoints. If there is a detector of the first token,
    the machine shows it each chunk of the answer until it has seen the token, or that none will come, and
    finishes: Envoy flushes what it queued and streams the rest alone. The machine knows phases and no API:
    what a token looks like, and how much of an answer is its head, the detector and the collector know.

    What is unsatisfying: with response headers skipped, a chunk of an error body looks like any other chunk;
    detectors recognise it by not being server-sent events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Protocol

from extproc.errors import RouterError, Shape
from extproc.values.exchange import (
    NEED_BODY_AND_HEAD,
    AnswerAtOnce,
    Body,
    LineVerdict,
    NeedBody,
    PassTo,
    RefuseAtOnce,
    RequestHeaders,
    Sight,
)
from extproc.values.headers import REQUEST_ID_HEADER
from metadata_center.types import value


class Phase(StrEnum):
    """Where the conversation with Envoy stands; a metric label."""

    AWAIT_HEADERS = auto()
    AWAIT_BODY = auto()
    DECIDING = auto()
    AWAIT_FIRST_CHUNK = auto()
    DONE = auto()


class StreamEnding(StrEnum):
    """How an ext_proc stream ended; a metric label."""

    FINISHED = auto()
    CLOSED = auto()
    SPURIOUS = auto()
    FAILED = auto()


class MessageKind(StrEnum):
    """What can happen to a stream."""

    REQUEST_HEADERS = auto()
    REQUEST_BODY = auto()
    REQUEST_TRAILERS = auto()
    RESPONSE_HEADERS = auto()
    RESPONSE_BODY = auto()
    RESPONSE_TRAILERS = auto()
    DECIDED = auto()
    REFUSED = auto()
    CLOSED = auto()


class SpuriousMessage(Exception):  # noqa: N818 - the name says what arrived
    """Envoy sent what the protocol does not allow in this phase. The machine is unchanged."""

    def __init__(self, phase: Phase, kind: MessageKind) -> None:
        super().__init__(f"{kind.name} in phase {phase.name}")
        self.phase = phase
        self.kind = kind


class Effect:
    """Something for the shell to do."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class SendAwaitBody(Effect):
    """Answer the headers: send the body and, if the response turns out to be a stream, its first chunk.

    Attributes:
        head: The first chunk of any response is needed.
    """

    head: bool = False


@dataclass(frozen=True, slots=True)
class SendPass(Effect):
    """Answer the headers: route as the verdict says."""

    to: PassTo


@dataclass(frozen=True, slots=True)
class SendImmediate(Effect):
    """Answer with a complete response of our own; `error` is set if it is a refusal."""

    status: int
    body: bytes
    details: str
    error: RouterError | None = None


@value
class Decide(Effect):
    """Choose an endpoint for this request; report back by `decided` or `refused`."""

    request: RequestHeaders
    body: Body


@dataclass(frozen=True, slots=True)
class SendDecision(Effect):
    """Answer the message Envoy waits on with the decision; `to_trailers` if those came instead of a body."""

    to_trailers: bool


@dataclass(frozen=True, slots=True)
class SendContinue(Effect):
    """Let a message pass unchanged."""

    kind: MessageKind


@dataclass(frozen=True, slots=True)
class FirstToken(Effect):
    """The first token of the answer passes right now; `late` if other bytes of the body came before it."""

    late: bool


@dataclass(frozen=True, slots=True)
class AnswerHead(Effect):
    """The answer begins with these bytes, which pass right now."""

    head: bytes


@dataclass(frozen=True, slots=True)
class Abandon(Effect):
    """The client is gone while the decision is pending: drop it."""


@dataclass(frozen=True, slots=True)
class Finish(Effect):
    """Close the stream, letting pass what was not answered; Envoy carries on alone."""


_AWAIT_BODY = (SendAwaitBody(),)
_AWAIT_BODY_AND_HEAD = (SendAwaitBody(head=True),)
_FINISH = (Finish(),)
_FIRST_TOKEN = (FirstToken(late=False), Finish())
_LATE_FIRST_TOKEN = (FirstToken(late=True), Finish())
_CONTINUE = {kind: (SendContinue(kind),) for kind in MessageKind}
_CONTINUE_BODY = _CONTINUE[MessageKind.RESPONSE_BODY]
_DECISION = (SendDecision(to_trailers=False),)
_DECISION_AT_TRAILERS = (SendDecision(to_trailers=True),)
_LAST_DECISION = (*_DECISION, Finish())
_LAST_DECISION_AT_TRAILERS = (*_DECISION_AT_TRAILERS, Finish())

Effects = tuple[Effect, ...]


class TokenDetector(Protocol):
    """Finds the first token in an answer."""

    def look(self, chunk: bytes, *, end_of_stream: bool) -> Sight:
        """What the next chunk says."""


class HeadCollector(Protocol):
    """Keeps the head of an answer."""

    @property
    def head(self) -> bytes:
        """What there is of it."""

    def add(self, chunk: bytes) -> bool:
        """Take the next chunk; True if the head is whole."""


class Stream:
    """The state of one ext_proc stream.

    Args:
        judge: Pure function from request headers to verdict.
    """

    __slots__ = ("_at_trailers", "_head", "_headers", "_judge", "_token", "phase", "wants_head")

    def __init__(self, judge: Callable[[RequestHeaders], LineVerdict]) -> None:
        self.phase = Phase.AWAIT_HEADERS
        self.wants_head = False
        """The verdict asked for the head of the answer."""
        self._judge = judge
        self._headers: RequestHeaders | None = None
        self._at_trailers = False
        self._token: TokenDetector | None = None
        self._head: HeadCollector | None = None

    def __repr__(self) -> str:
        return f"<Stream {self.phase.name}>"

    def receive_headers(self, event: RequestHeaders) -> Effects:
        """Request headers arrived."""
        if self.phase is not Phase.AWAIT_HEADERS:
            raise SpuriousMessage(self.phase, MessageKind.REQUEST_HEADERS)
        verdict = self._judge(event)
        self._headers = event
        if isinstance(verdict, NeedBody):
            self.wants_head = verdict is NEED_BODY_AND_HEAD
            if event.end_of_stream:
                return self._decide(b"")
            self.phase = Phase.AWAIT_BODY
            return _AWAIT_BODY_AND_HEAD if self.wants_head else _AWAIT_BODY
        self.phase = Phase.DONE
        if isinstance(verdict, PassTo):
            return (SendPass(verdict), Finish())
        if isinstance(verdict, AnswerAtOnce):
            return (SendImmediate(verdict.status, verdict.body, "tokenway_answer"), Finish())
        assert isinstance(verdict, RefuseAtOnce)
        return self._refuse(verdict.error)

    def receive_body(self, body: Body) -> Effects:
        """The whole request body arrived; when trailers follow, Envoy does not mark it as the end."""
        if self.phase is not Phase.AWAIT_BODY:
            raise SpuriousMessage(self.phase, MessageKind.REQUEST_BODY)
        return self._decide(body)

    def receive(self, kind: MessageKind) -> Effects:
        """A message whose content does not matter, or the end of the stream (`CLOSED`)."""
        self._expect(kind)
        if kind is MessageKind.REQUEST_TRAILERS:
            if self.phase is Phase.AWAIT_BODY:
                self._at_trailers = True
                return self._decide(b"")
            return _CONTINUE[kind]
        if kind is MessageKind.RESPONSE_HEADERS and self.phase is Phase.AWAIT_FIRST_CHUNK:
            return _CONTINUE[kind]
        # What is left ends the stream: a local reply while we wait, a response without body, the close.
        was = self.phase
        self.phase = Phase.DONE
        if was is Phase.DECIDING:
            return (Abandon(), Finish())
        return _FINISH

    def receive_chunk(self, chunk: bytes, *, end_of_stream: bool) -> Effects:
        """A chunk of the response body arrived."""
        self._expect(MessageKind.RESPONSE_BODY)
        if self.phase is not Phase.AWAIT_FIRST_CHUNK:
            return self._leave()
        if self._head is None:
            return self._look_for_token(chunk, end_of_stream)
        head = self._head
        is_whole = head.add(chunk)
        effects = _CONTINUE_BODY if self._token is None else self._look_for_token(chunk, end_of_stream)
        if not (is_whole or end_of_stream or type(effects[-1]) is Finish):
            return effects
        self._head = None
        if self._token is None:
            self.phase = Phase.DONE
            effects = _FINISH
        return (AnswerHead(head.head), *effects)

    def _look_for_token(self, chunk: bytes, end_of_stream: bool) -> Effects:
        assert self._token is not None
        sight = self._token.look(chunk, end_of_stream=end_of_stream)
        if sight is Sight.NOT_YET:
            return _CONTINUE_BODY
        self.phase = Phase.DONE
        if sight is Sight.PASSES:
            return _FIRST_TOKEN
        return _LATE_FIRST_TOKEN if sight is Sight.PASSES_LATE else _FINISH

    def decided(self, token: TokenDetector | None, head: HeadCollector | None) -> Effects:
        """The shell has a decision.

        Args:
            token: Looks for the first token of the answer; None if that is not wanted.
            head: Keeps its head; None likewise.
        """
        if self.phase is not Phase.DECIDING:
            raise SpuriousMessage(self.phase, MessageKind.DECIDED)
        if token is not None or head is not None:
            self.phase = Phase.AWAIT_FIRST_CHUNK
            self._token, self._head = token, head
            return _DECISION_AT_TRAILERS if self._at_trailers else _DECISION
        self.phase = Phase.DONE
        return _LAST_DECISION_AT_TRAILERS if self._at_trailers else _LAST_DECISION

    def refused(self, error: RouterError) -> Effects:
        """The shell cannot serve the request."""
        self._expect(MessageKind.REFUSED)
        self.phase = Phase.DONE
        return self._refuse(error)

    def _decide(self, body: Body) -> Effects:
        assert self._headers is not None
        self.phase = Phase.DECIDING
        return (Decide(self._headers, body),)

    def _leave(self) -> Effects:
        was = self.phase
        self.phase = Phase.DONE
        return (Abandon(), Finish()) if was is Phase.DECIDING else _FINISH

    def _refuse(self, error: RouterError) -> Effects:
        assert self._headers is not None
        headers = self._headers
        body = error.body(Shape.of(headers.path), headers.headers.get(REQUEST_ID_HEADER, ""))
        return (SendImmediate(error.status, body, f"tokenway_{error.reason.value}", error), Finish())

    def _expect(self, kind: MessageKind) -> None:
        if kind not in TRANSITIONS[self.phase]:
            raise SpuriousMessage(self.phase, kind)


TRANSITIONS: dict[Phase, dict[MessageKind, tuple[Phase, ...]]] = {
    Phase.AWAIT_HEADERS: {
        MessageKind.REQUEST_HEADERS: (Phase.AWAIT_BODY, Phase.DECIDING, Phase.DONE),
        MessageKind.RESPONSE_HEADERS: (Phase.DONE,),
        MessageKind.RESPONSE_BODY: (Phase.DONE,),
        MessageKind.CLOSED: (Phase.DONE,),
    },
    Phase.AWAIT_BODY: {
        MessageKind.REQUEST_BODY: (Phase.DECIDING,),
        MessageKind.REQUEST_TRAILERS: (Phase.DECIDING,),
        MessageKind.RESPONSE_HEADERS: (Phase.DONE,),
        MessageKind.RESPONSE_BODY: (Phase.DONE,),
        MessageKind.RESPONSE_TRAILERS: (Phase.DONE,),
        MessageKind.CLOSED: (Phase.DONE,),
    },
    Phase.DECIDING: {
        MessageKind.DECIDED: (Phase.AWAIT_FIRST_CHUNK, Phase.DONE),
        MessageKind.REFUSED: (Phase.DONE,),
        MessageKind.REQUEST_TRAILERS: (Phase.DECIDING,),
        MessageKind.RESPONSE_HEADERS: (Phase.DONE,),
        MessageKind.RESPONSE_BODY: (Phase.DONE,),
        MessageKind.RESPONSE_TRAILERS: (Phase.DONE,),
        MessageKind.CLOSED: (Phase.DONE,),
    },
    Phase.AWAIT_FIRST_CHUNK: {
        MessageKind.REQUEST_TRAILERS: (Phase.AWAIT_FIRST_CHUNK,),
        MessageKind.RESPONSE_HEADERS: (Phase.AWAIT_FIRST_CHUNK,),
        MessageKind.RESPONSE_BODY: (Phase.AWAIT_FIRST_CHUNK, Phase.DONE),
        MessageKind.RESPONSE_TRAILERS: (Phase.DONE,),
        MessageKind.CLOSED: (Phase.DONE,),
    },
    Phase.DONE: {MessageKind.CLOSED: (Phase.DONE,)},
}
"""The protocol: in each phase, what may arrive and the phases it may lead to. Tests walk it."""
