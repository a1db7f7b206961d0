"""The endpoint-picker service: passes the machine what came, does what it says, keeps the streams' time.

Rules:
    1. A request that was decided here ends here, once: `on_event` gets its end by the end of its answer
       or of its stream, whichever comes first, whatever failed.
    2. A bug in a decision fails its own stream only.
    3. Time passes by `tick` alone: bodies that do not come are given up, leases of what runs are renewed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from extproc.errors import RouterError
from extproc.picker.answer import PassingAnswer
from extproc.picker.dialect import PickerDialect, WrongMode
from extproc.picker.machine import Echo, End, PickStream, SendRequest
from extproc.picker.reading import NOTHING
from extproc.picker.renaming import Renaming
from extproc.protocol import wire
from extproc.protocol.awaiting import Awaited
from extproc.protocol.machine import (
    Abandon,
    Decide,
    Effects,
    Finish,
    MessageKind,
    Phase,
    SendContinue,
    SendImmediate,
    SendPass,
    SpuriousMessage,
    StreamEnding,
)
from extproc.protocol.servicer import Decider
from extproc.request.answer_head import HeadCollector
from extproc.request.first_token import FirstTokenDetector
from extproc.transport.seam import Call, Received, Rpc, Status
from extproc.values.deciding import Now, Refusal
from extproc.values.endings import AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.exchange import LineVerdict, RequestHeaders, Sight
from extproc.values.headers import CONTENT_ENCODING, REQUEST_ID_HEADER
from extproc.values.outcomes import Ended
from extproc.values.placements import Decision
from metadata_center.addresses import Address
from metadata_center.types import RequestId

ALIVE_S = 10.0
"""How often a request that runs is said to: many times within any sensible lease."""


class Picker:
    """`envoy.service.ext_proc.v3.ExternalProcessor` as an endpoint picker.

    Args:
        judge: What the request line alone decides; passes requests to named endpoints only.
        decider: Chooses and charges.
        on_event: Gets what happens to the requests that were decided here.
        dialect: How the gateway is answered.
        owner: This worker's name.
        max_body_bytes: Of a request's body.
        upload_s: For a request's body to come.
        first_chunk: If first tokens are looked for; as of now.
        clock: Monotonic seconds.
        leaves: Streams are left when nothing of them is needed any more and their answer is not wanted back;
            the ends of such requests come from elsewhere.
    """

    def __init__(
        self,
        judge: Callable[[RequestHeaders], LineVerdict],
        decider: Decider,
        on_event: Callable[[RequestEvent], None],
        dialect: PickerDialect,
        owner: str,
        max_body_bytes: int,
        upload_s: float,
        first_chunk: Callable[[], bool],
        clock: Callable[[], float],
        *,
        leaves: bool = False,
    ) -> None:
        self.judge = judge
        self.decider = decider
        self.on_event = on_event
        self.dialect = dialect
        self.owner = owner
        self.max_body_bytes = max_body_bytes
        self.first_chunk = first_chunk
        self.clock = clock
        self.leaves = leaves
        self._upload_s = upload_s
        self._exchanges: dict[PickExchange, None] = {}
        self._is_closing = False

    @property
    def rpc(self) -> Rpc:
        """To be served."""
        return Rpc(wire.SERVICE, "Process", self.open)

    def __len__(self) -> int:
        """Streams that are open."""
        return len(self._exchanges)

    def open(self, call: Call) -> PickExchange:
        """One HTTP request begins."""
        exchange = PickExchange(self, call)
        self._exchanges[exchange] = None
        if self._is_closing:
            exchange.turn_away()
        return exchange

    def close(self) -> None:
        """Take no new streams from now on; those that are open go on."""
        self._is_closing = True

    def tick(self) -> None:
        """Some time has passed."""
        now_s = self.clock()
        for exchange in list(self._exchanges):
            exchange.tick(now_s, self._upload_s)

    def ended(self, exchange: PickExchange, phase: Phase, how: StreamEnding) -> None:
        """A stream is over."""
        self._exchanges.pop(exchange, None)
        self.decider.stream_ended(phase, how)


class PickExchange:
    """One HTTP request's stream; a `Receiver`, and a `Waiter` for its decision.

    Args:
        picker: Whose it is.
        call: Its call.
    """

    __slots__ = (
        "_alive_s",
        "_answer",
        "_awaited",
        "_call",
        "_chunk",
        "_decided_s",
        "_decision",
        "_encoded",
        "_first_byte_s",
        "_head",
        "_is_envoy",
        "_is_over",
        "_last_byte_s",
        "_picker",
        "_received_s",
        "_renaming",
        "_request",
        "_request_bytes",
        "_served",
        "_status",
        "_stream",
        "_token",
        "_type",
    )

    def __init__(self, picker: Picker, call: Call) -> None:
        self._picker = picker
        self._call = call
        self._stream = PickStream(picker.judge, picker.max_body_bytes)
        self._received_s = self._alive_s = self._decided_s = picker.clock()
        self._request: RequestHeaders | None = None
        self._request_bytes = 0
        self._awaited: Awaited | None = None
        self._decision: Decision | None = None
        self._chunk: Any = None
        self._answer = PassingAnswer()
        self._renaming: Renaming | None = None
        self._first_byte_s: float | None = None
        self._last_byte_s = 0.0
        self._token: FirstTokenDetector | None = None
        self._head: HeadCollector | None = None
        self._served: Address | None = None
        self._status = 0
        self._type: str | None = None
        self._encoded = False
        self._is_envoy = False
        self._is_over = False

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        try:
            self._receive(self._picker.dialect.parse(message))
        except (SpuriousMessage, WrongMode) as refused:
            self._close(StreamEnding.SPURIOUS)
            self._call.abort(Status.INVALID_ARGUMENT, str(refused))
        except Exception:
            self._close(StreamEnding.FAILED)
            raise

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self._close(StreamEnding.FINISHED if self._stream.is_answered else StreamEnding.CLOSED)
        self._call.finish()

    def on_reset(self) -> None:
        """See `Receiver`."""
        self._close(StreamEnding.FINISHED if self._stream.is_answered else StreamEnding.CLOSED)

    def turn_away(self) -> None:
        """End it before its first message, as a picker does that cannot be reached."""
        self._close(StreamEnding.CLOSED)
        self._call.abort(Status.UNAVAILABLE, "stopping")

    def tick(self, now_s: float, upload_s: float) -> None:
        """Some time has passed."""
        if self._decision is not None and not self._stream.is_answered:
            if now_s - self._alive_s >= ALIVE_S:
                self._alive_s = now_s
                self._picker.on_event(RequestAlive(self._request_id, self._picker.owner))
        elif now_s - self._received_s >= upload_s:
            if self._stream.phase is Phase.AWAIT_HEADERS:
                self._close(StreamEnding.CLOSED)
                self._call.abort(Status.DEADLINE_EXCEEDED, "no request came on this stream")
                return
            self._perform(self._stream.timed_out(), MessageKind.REQUEST_BODY)

    def _receive(self, message: Any) -> None:
        stream = self._stream
        which = message.WhichOneof("request")
        if which == "response_body":
            self._chunk = chunk = message.response_body
            effects = stream.receive_answer_chunk(end_of_stream=chunk.end_of_stream)
            if effects and self._passes(chunk.body, end_of_stream=chunk.end_of_stream):
                effects = (*effects, *stream.leave())
        elif which == "request_body":
            self._chunk = chunk = message.request_body
            self._request_bytes += len(chunk.body)
            effects = stream.receive_body(chunk.body, end_of_stream=chunk.end_of_stream)
        elif which == "request_headers":
            mode = self._picker.dialect.answer_mode(message)
            request = self._picker.dialect.request_headers(message, mode)
            self._is_envoy = self._picker.dialect.is_envoy(message)
            effects = stream.receive_headers(request, mode)
            self._request = request
        elif which == "response_headers":
            self._chunk = message
            self._begins(message)
            effects = stream.receive_answer_headers(end_of_stream=message.response_headers.end_of_stream)
        elif which == "request_trailers":
            effects = stream.receive_trailers()
        elif which == "response_trailers":
            effects = stream.receive_answer_trailers()
        else:  # a message that a later Envoy may send and we need not know
            return
        self._perform(effects, MessageKind(which))

    def _decide(self, effect: Decide) -> None:
        deciding = self._picker.decider.decide(effect.request, effect.body)
        if isinstance(deciding, Now):
            self._decided(deciding.decision)
        elif isinstance(deciding, Refusal):
            self._perform(self._stream.refused(deciding.error), MessageKind.REQUEST_BODY)
        else:
            self._awaited = Awaited(deciding.pending, self)
            self._awaited.begin()

    def _decided(self, decision: Decision) -> None:
        picker = self._picker
        self._decision = decision
        self._decided_s = self._alive_s = picker.clock()
        effects = self._stream.decided()
        if decision.stream and picker.first_chunk():
            self._token = FirstTokenDetector(decision.operation)
        if self._stream.wants_head:
            self._head = HeadCollector()
        if self._may_leave:
            effects = (*effects, *self._stream.leave())
        self._perform(effects, MessageKind.REQUEST_BODY)

    @property
    def _may_leave(self) -> bool:
        """Nothing more of the answer is of interest."""
        is_read = self._token is not None or self._head is not None
        return self._picker.leaves and not (is_read and self._is_shown)

    @property
    def _is_shown(self) -> bool:
        """Chunks of the answer come here."""
        return self._request is not None and self._request.shows_answer

    def decided(self, decision: Decision) -> None:
        """See `Waiter`."""
        self._awaited = None
        self._decided(decision)

    def refused(self, error: RouterError) -> None:
        """See `Waiter`."""
        self._awaited = None
        self._perform(self._stream.refused(error), MessageKind.REQUEST_BODY)

    def failed(self) -> None:
        """See `Waiter`."""
        self._awaited = None
        self._close(StreamEnding.FAILED)
        self._call.abort(Status.UNKNOWN, "")

    def _perform(self, effects: Effects, kind: MessageKind) -> None:
        """Do what the machine says, about a message of that kind."""
        dialect, call = self._picker.dialect, self._call
        for effect in effects:
            if isinstance(effect, Echo):
                self._echo(kind)
            elif isinstance(effect, SendContinue):
                self._let_pass(effect.kind)
            elif isinstance(effect, Decide):
                self._decide(effect)
            elif isinstance(effect, SendRequest):
                assert self._decision is not None
                for answer in dialect.decision(
                    self._decision, effect.body, trailers=effect.trailers, is_envoy=self._is_envoy
                ):
                    call.send(answer)
            elif isinstance(effect, SendPass):
                call.send(dialect.pass_to(effect.to, is_envoy=self._is_envoy))
            elif isinstance(effect, SendImmediate):
                if effect.error is not None:
                    self._picker.decider.rejected(self._request, effect.error)
                call.send(dialect.immediate(effect.status, effect.body, effect.details, effect.error))
            elif isinstance(effect, End):
                self._tell_end(whole=effect.whole)
            elif isinstance(effect, Abandon):
                self._abandon()
            elif isinstance(effect, Finish):
                self._over(StreamEnding.FINISHED)
                call.finish()

    def _echo(self, kind: MessageKind) -> None:
        """Give the chunk back that came, or what a model's other name makes of it."""
        chunk, renaming = self._chunk, self._renaming
        body, end = chunk.body, chunk.end_of_stream
        if renaming is not None and kind is MessageKind.RESPONSE_BODY:
            body = renaming.feed(body, end=end)
            if not body and chunk.body and not end:
                return
        for answer in self._picker.dialect.echo(kind, body, end_of_stream=end):
            self._call.send(answer)

    def _let_pass(self, kind: MessageKind) -> None:
        dialect = self._picker.dialect
        if kind is MessageKind.RESPONSE_HEADERS:
            self._call.send(dialect.answer_begins(self._chunk, is_renamed=self._renaming is not None))
            return
        if kind is MessageKind.RESPONSE_TRAILERS and self._renaming is not None:
            held = self._renaming.feed(b"", end=True)
            if held:
                for answer in dialect.echo(MessageKind.RESPONSE_BODY, held, end_of_stream=False):
                    self._call.send(answer)
        self._call.send(dialect.let_pass(kind))

    def _begins(self, message: Any) -> None:
        """The answer begins."""
        for header in message.response_headers.headers.headers:
            if header.key == ":status":
                text = str(header.raw_value, "ascii", "replace") or header.value
                self._status = int(text) if len(text) == 3 and text.isascii() and text.isdigit() else 0
            elif header.key == "content-type":
                self._type = str(header.raw_value, "utf-8", "replace") or header.value
            elif header.key == CONTENT_ENCODING:
                coding = str(header.raw_value, "ascii", "replace") or header.value
                codings = {each.strip() for each in coding.lower().split(",")}
                self._encoded = not codings <= {"", "identity"}
        self._answer.begins(self._type, is_encoded=self._encoded)
        if self._decision is None:
            return
        renamed = self._decision.renamed
        if renamed is not None and self._stream.is_echoed and not self._encoded and _is_text(self._type):
            self._renaming = Renaming(renamed)
        served = self._picker.dialect.served(message)
        if served is None:
            return
        try:
            self._served = Address.parse(served)
        except ValueError:
            return
        if str(self._served) != self._decision.plan.endpoints[0]:
            self._picker.on_event(AttemptStarted(self._request_id, self._picker.owner, self._served))

    def _passes(self, chunk: bytes, *, end_of_stream: bool) -> bool:
        """A chunk of the answer passes; True if the stream may be left after it."""
        if self._decision is None:
            return False
        self._answer.add(chunk)
        self._last_byte_s = now_s = self._picker.clock()
        if self._first_byte_s is None:
            self._first_byte_s = now_s
        decider = self._picker.decider
        if self._token is not None:
            sight = self._token.look(chunk, end_of_stream=end_of_stream)
            if sight is not Sight.NOT_YET:
                self._token = None
                if sight is not Sight.NEVER:
                    decider.first_token(self._request_id, late=sight is Sight.PASSES_LATE)
        if self._head is not None and (self._head.add(chunk) or end_of_stream):
            head, self._head = self._head, None
            decider.answer_head(self._request_id, head.head)
        return not end_of_stream and self._may_leave

    def _tell_end(self, *, whole: bool) -> None:
        """The request that was decided is over."""
        now_s, answer = self._picker.clock(), self._answer
        usage, error = answer.told() if self._is_shown else NOTHING
        first_s = self._first_byte_s
        is_timed = first_s is not None and usage.completion_tokens is not None
        assert self._decision is not None
        ended = Ended.CLIENT_ABORT
        if whole:
            ended = Ended.UPSTREAM_ERROR if self._status >= 500 else Ended.COMPLETED
        end = RequestEnd(
            self._request_id,
            self._picker.owner,
            self._served or Address.parse(self._decision.plan.endpoints[0]),
            1,
            self._status,
            ended,
            "via_upstream" if whole else "stream_ended",
            (),
            None if first_s is None else first_s - self._decided_s,
            now_s - self._received_s,
            self._last_byte_s - first_s if first_s is not None and is_timed else None,
            self._request_bytes,
            answer.num_bytes if self._is_shown else None,
            *usage,
            "encoded" if self._encoded else "",
            error,
            self._type,
        )
        self._picker.on_event(end)

    @property
    def _request_id(self) -> RequestId:
        assert self._request is not None
        return RequestId(self._request.headers[REQUEST_ID_HEADER])

    def _abandon(self) -> None:
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None

    def _close(self, how: StreamEnding) -> None:
        """No peer listens any more."""
        if self._is_over:
            return
        phase = self._stream.phase
        for effect in self._stream.closed():
            if isinstance(effect, Abandon):
                self._abandon()
            elif isinstance(effect, End):
                self._tell_end(whole=effect.whole)
        self._over(how, phase)

    def _over(self, how: StreamEnding, phase: Phase = Phase.DONE) -> None:
        if not self._is_over:
            self._is_over = True
            self._picker.ended(self, phase, how)


def _is_text(content_type: str | None) -> bool:
    """An answer that says the model's name: JSON, or a stream of it; of several types the first counts."""
    kind = "" if content_type is None else content_type.partition(",")[0].partition(";")[0].strip().lower()
    return kind == "text/event-stream" or kind.endswith("json")
