"""One ext_proc stream as a sans-IO machine: events in, effects out.

Rules:
    1. No I/O, no clock, no protobuf. `receive` takes an event and returns the effects to perform, in order.
    2. The table `TRANSITIONS` is the whole protocol. A (phase, event) pair that is not in it is a
       `SpuriousMessage`: the machine is left as it was, nothing is answered.
    3. Every message that Envoy waits on is answered at most once. After `Finish` nothing is left to say.
    4. The machine releases nothing. A request that was decided ends by its access-log entry, which comes for
       every ending; one that was not decided was never charged.

Theory of operation:
    Envoy sends request headers; an inference request is told to send its whole body (BUFFERED), anything else
    is routed or refused at once. The body leads to `Decide`, which the shell may answer now or later with
    `decided` or `refused` (a decision is a step that may be deferred: `DECIDING` is a phase like any other,
    in which the client may leave). The answer names the endpoints. If the answer is to be a stream and its
    first chunk is wanted, the machine waits for one body chunk that carries data, skipping server-sent-event
    comments, lets it pass and finishes: Envoy flushes what it queued and streams the rest alone. An error is
    no token, and ends the wait as well.

    What is unsatisfying: with response headers skipped, a chunk of an error body looks like any other chunk;
    it is recognised by not being server-sent events.

    Where the head of an answer is of interest (an API whose answers have names that later requests use),
    whole answers are waited for as well, until there is the first event of it, `HEAD_BYTES` or all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum, auto

from extproc.errors import RouterError, Shape
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
from metadata_center.types import value


class Phase(StrEnum):
    """Where the conversation with Envoy stands; a metric label."""

    AWAIT_HEADERS = auto()
    AWAIT_BODY = auto()
    DECIDING = auto()
    AWAIT_FIRST_CHUNK = auto()
    DONE = auto()


class Kind(StrEnum):
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

    def __init__(self, phase: Phase, kind: Kind) -> None:
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
    body: bytes


@dataclass(frozen=True, slots=True)
class SendDecision(Effect):
    """Answer the message Envoy waits on with the decision; `to_trailers` if those came instead of a body."""

    to_trailers: bool


@dataclass(frozen=True, slots=True)
class SendContinue(Effect):
    """Let a message pass unchanged."""

    kind: Kind


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
_CONTINUE = {kind: (SendContinue(kind),) for kind in Kind}
_CONTINUE_BODY = _CONTINUE[Kind.RESPONSE_BODY]
_DECISION = (SendDecision(to_trailers=False),)
_DECISION_AT_TRAILERS = (SendDecision(to_trailers=True),)
_LAST_DECISION = (*_DECISION, Finish())
_LAST_DECISION_AT_TRAILERS = (*_DECISION_AT_TRAILERS, Finish())

Effects = tuple[Effect, ...]

HEAD_BYTES = 4096
"""Of an answer, where its head is of interest."""

_LINE_START = b"\n"
_DATA = b"\ndata:"
_BEGINS_WITH_ERROR = re.compile(rb'\n(?:event: ?error\b|data: ?\{ ?"(?:error"|(?:type|object)": ?"error"))')
"""An error event: OpenAI's and vLLM's `{"error": …}`, vLLM's older `{"object": "error", …}`, Anthropic's
`event: error`. It is the first that matters here: an engine that fails at once has computed nothing."""

_RESPONSES_API_TOKEN = b"response.output_"
"""The Responses API announces `response.created` and `response.in_progress` before any token exists."""


class Stream:
    """The state of one ext_proc stream.

    Args:
        judge: Pure function from request headers to verdict.
        want_first_chunk: True to wait for the first chunk of a streamed answer.
    """

    __slots__ = (
        "_at_trailers",
        "_carry",
        "_head",
        "_headers",
        "_is_sse",
        "_judge",
        "_marker",
        "_want_first_chunk",
        "_wants_head",
        "_wants_token",
        "phase",
    )

    def __init__(self, judge: Callable[[RequestHeaders], LineVerdict], *, want_first_chunk: bool) -> None:
        self.phase = Phase.AWAIT_HEADERS
        self._judge = judge
        self._want_first_chunk = want_first_chunk
        self._headers: RequestHeaders | None = None
        self._at_trailers = False
        self._carry = _LINE_START
        self._marker = _DATA
        self._is_sse = False
        self._wants_head = self._wants_token = False
        self._head = b""

    def __repr__(self) -> str:
        return f"<Stream {self.phase.name}>"

    def receive_headers(self, event: RequestHeaders) -> Effects:
        """Request headers arrived."""
        if self.phase is not Phase.AWAIT_HEADERS:
            raise SpuriousMessage(self.phase, Kind.REQUEST_HEADERS)
        verdict = self._judge(event)
        self._headers = event
        if isinstance(verdict, NeedBody):
            self._wants_head = verdict is NEED_BODY_AND_HEAD
            if event.end_of_stream:
                return self._decide(b"")
            self.phase = Phase.AWAIT_BODY
            return _AWAIT_BODY_AND_HEAD if self._wants_head else _AWAIT_BODY
        self.phase = Phase.DONE
        if isinstance(verdict, PassTo):
            return (SendPass(verdict), Finish())
        if isinstance(verdict, AnswerAtOnce):
            return (SendImmediate(verdict.status, verdict.body, "tokenway_answer"), Finish())
        assert isinstance(verdict, RefuseAtOnce)
        return self._refuse(verdict.error)

    def receive_body(self, body: bytes) -> Effects:
        """The whole request body arrived; when trailers follow, Envoy does not mark it as the end."""
        if self.phase is not Phase.AWAIT_BODY:
            raise SpuriousMessage(self.phase, Kind.REQUEST_BODY)
        return self._decide(body)

    def receive(self, kind: Kind) -> Effects:
        """A message whose content does not matter, or the end of the stream (`CLOSED`)."""
        self._expect(kind)
        if kind is Kind.REQUEST_TRAILERS:
            if self.phase is Phase.AWAIT_BODY:
                self._at_trailers = True
                return self._decide(b"")
            return _CONTINUE[kind]
        if kind is Kind.RESPONSE_HEADERS and self.phase is Phase.AWAIT_FIRST_CHUNK:
            return _CONTINUE[kind]
        # What is left ends the stream: a local reply while we wait, a response without body, the close.
        was = self.phase
        self.phase = Phase.DONE
        if was is Phase.DECIDING:
            return (Abandon(), Finish())
        return _FINISH

    def receive_chunk(self, chunk: bytes, *, end_of_stream: bool) -> Effects:
        """A chunk of the response body arrived."""
        self._expect(Kind.RESPONSE_BODY)
        if self.phase is not Phase.AWAIT_FIRST_CHUNK:
            return self._leave()
        if not self._wants_head:
            return self._look_for_token(chunk, end_of_stream)
        self._head += chunk
        effects = self._look_for_token(chunk, end_of_stream) if self._wants_token else _CONTINUE_BODY
        is_over = end_of_stream or type(effects[-1]) is Finish
        if not is_over and not _is_whole_head(self._head):
            return effects
        self._wants_head = False
        head, self._head = self._head[:HEAD_BYTES], b""
        if not self._wants_token:
            self.phase = Phase.DONE
            effects = _FINISH
        return (AnswerHead(head), *effects)

    def _look_for_token(self, chunk: bytes, end_of_stream: bool) -> Effects:
        is_first = self._carry == _LINE_START
        chunk = self._carry + chunk
        if self._marker in chunk:
            self.phase = Phase.DONE
            if _BEGINS_WITH_ERROR.search(chunk) is not None:
                return _FINISH
            return _FIRST_TOKEN if is_first else _LATE_FIRST_TOKEN
        begins = chunk.lstrip()[:1]
        if end_of_stream or not (self._is_sse or _may_begin_sse(begins)):
            self.phase = Phase.DONE
            return _FINISH
        self._is_sse = self._is_sse or begins != b""
        self._carry = chunk[1 - len(self._marker) :]
        return _CONTINUE_BODY

    def decided(self, *, stream: bool, late_marker: bool) -> Effects:
        """The shell has a decision.

        Args:
            stream: The client asked for a stream.
            late_marker: The API announces itself before its first token (Responses).
        """
        if self.phase is not Phase.DECIDING:
            raise SpuriousMessage(self.phase, Kind.DECIDED)
        self._wants_token = stream and self._want_first_chunk
        if self._wants_token or self._wants_head:
            self.phase = Phase.AWAIT_FIRST_CHUNK
            if late_marker:
                self._marker = _RESPONSES_API_TOKEN
            return _DECISION_AT_TRAILERS if self._at_trailers else _DECISION
        self.phase = Phase.DONE
        return _LAST_DECISION_AT_TRAILERS if self._at_trailers else _LAST_DECISION

    def refused(self, error: RouterError) -> Effects:
        """The shell cannot serve the request."""
        self._expect(Kind.REFUSED)
        self.phase = Phase.DONE
        return self._refuse(error)

    def _decide(self, body: bytes) -> Effects:
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

    def _expect(self, kind: Kind) -> None:
        if kind not in TRANSITIONS[self.phase]:
            raise SpuriousMessage(self.phase, kind)


def _is_whole_head(head: bytes) -> bool:
    """Enough of an answer to see how it begins: its first event that says anything, or `HEAD_BYTES`."""
    if len(head) >= HEAD_BYTES:
        return True
    lines = _LINE_START + head
    data = lines.find(_DATA)
    return data >= 0 and _may_begin_sse(head.lstrip()[:1]) and lines.find(b"\n\n", data) >= 0


def _may_begin_sse(begins: bytes) -> bool:
    """A line of server-sent events starts with a field name or a colon, JSON and HTML with a bracket."""
    return begins not in (b"{", b"[", b"<")


TRANSITIONS: dict[Phase, dict[Kind, tuple[Phase, ...]]] = {
    Phase.AWAIT_HEADERS: {
        Kind.REQUEST_HEADERS: (Phase.AWAIT_BODY, Phase.DECIDING, Phase.DONE),
        Kind.RESPONSE_HEADERS: (Phase.DONE,),
        Kind.RESPONSE_BODY: (Phase.DONE,),
        Kind.CLOSED: (Phase.DONE,),
    },
    Phase.AWAIT_BODY: {
        Kind.REQUEST_BODY: (Phase.DECIDING,),
        Kind.REQUEST_TRAILERS: (Phase.DECIDING,),
        Kind.RESPONSE_HEADERS: (Phase.DONE,),
        Kind.RESPONSE_BODY: (Phase.DONE,),
        Kind.RESPONSE_TRAILERS: (Phase.DONE,),
        Kind.CLOSED: (Phase.DONE,),
    },
    Phase.DECIDING: {
        Kind.DECIDED: (Phase.AWAIT_FIRST_CHUNK, Phase.DONE),
        Kind.REFUSED: (Phase.DONE,),
        Kind.REQUEST_TRAILERS: (Phase.DECIDING,),
        Kind.RESPONSE_HEADERS: (Phase.DONE,),
        Kind.RESPONSE_BODY: (Phase.DONE,),
        Kind.RESPONSE_TRAILERS: (Phase.DONE,),
        Kind.CLOSED: (Phase.DONE,),
    },
    Phase.AWAIT_FIRST_CHUNK: {
        Kind.REQUEST_TRAILERS: (Phase.AWAIT_FIRST_CHUNK,),
        Kind.RESPONSE_HEADERS: (Phase.AWAIT_FIRST_CHUNK,),
        Kind.RESPONSE_BODY: (Phase.AWAIT_FIRST_CHUNK, Phase.DONE),
        Kind.RESPONSE_TRAILERS: (Phase.DONE,),
        Kind.CLOSED: (Phase.DONE,),
    },
    Phase.DONE: {Kind.CLOSED: (Phase.DONE,)},
}
"""The protocol: in each phase, what may arrive and the phases it may lead to. Tests walk it."""
