"""The stream machine: its table walked, its first-chunk detection, and what it never does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from inspect import isdatadescriptor
from operator import methodcaller

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.protocol import machine
from extproc.protocol.machine import (
    TRANSITIONS,
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
)
from extproc.request.answer_head import HEAD_BYTES, HeadCollector
from extproc.request.first_token import FirstTokenDetector
from extproc.values.exchange import (
    NEED_BODY,
    NEED_BODY_AND_HEAD,
    AnswerAtOnce,
    LineVerdict,
    PassTo,
    RefuseAtOnce,
    RequestHeaders,
)
from extproc.values.placements import Plan
from extproc.values.requests import Operation

HEADERS = RequestHeaders("POST", "/v1/chat/completions", {":method": "POST"}, end_of_stream=False)
BODILESS = RequestHeaders("POST", "/v1/chat/completions", {}, end_of_stream=True)
ERROR = RouterError(Reason.NO_HEALTHY_ENDPOINT, "None.", retry_after_s=1)
SENDS = (SendAwaitBody, SendPass, SendImmediate, SendDecision, SendContinue)

VERDICTS: dict[str, LineVerdict] = {
    "need_body": NEED_BODY,
    "need_body_and_head": NEED_BODY_AND_HEAD,
    "pass_to": PassTo(Plan("other")),
    "answer": AnswerAtOnce(200, b"{}"),
    "refuse": RefuseAtOnce(ERROR),
}


def decide(stream: Stream, *, streamed: bool, late: bool = False, watched: bool = True) -> Effects:
    """Give a stream its decision, as the service does."""
    token = FirstTokenDetector(Operation.RESPONSES if late else Operation.CHAT)
    return stream.decided(
        token if streamed and watched else None, HeadCollector() if stream.wants_head else None
    )


def stream_in(phase: Phase, verdict: LineVerdict | None = None) -> Stream:
    """A stream that came to `phase` the usual way."""
    stream = Stream(lambda _: verdict or NEED_BODY)
    if phase is Phase.AWAIT_HEADERS:
        return stream
    stream.receive_headers(HEADERS)
    if phase is Phase.AWAIT_BODY:
        return stream
    stream.receive_body(b"{}")
    if phase is Phase.DECIDING:
        return stream
    decide(stream, streamed=phase is Phase.AWAIT_FIRST_CHUNK)
    assert stream.phase is phase
    return stream


def variants(kind: MessageKind) -> list[Callable[[Stream], Effects]]:
    """Every way the shell gives a stream that kind of event."""
    match kind:
        case MessageKind.REQUEST_HEADERS:
            return [methodcaller("receive_headers", request) for request in (HEADERS, BODILESS)]
        case MessageKind.REQUEST_BODY:
            return [methodcaller("receive_body", b"{}")]
        case MessageKind.RESPONSE_BODY:
            chunks = itertools.product((b"", b": ping\n\n", b"data: {}\n\n", b'{"error":{}}'), (False, True))
            return [methodcaller("receive_chunk", chunk, end_of_stream=end) for chunk, end in chunks]
        case MessageKind.DECIDED:
            flags = itertools.product((False, True), repeat=2)
            return [partial(decide, streamed=streamed, late=late) for streamed, late in flags]
        case MessageKind.REFUSED:
            return [methodcaller("refused", ERROR)]
        case _:
            return [methodcaller("receive", kind)]


def private_state(stream: Stream) -> dict[str, object]:
    """All a stream remembers."""
    fields = (name for name, kind in vars(Stream).items() if isdatadescriptor(kind))
    return {name: getattr(stream, name) for name in fields}


@pytest.mark.parametrize(("phase", "kind"), list(itertools.product(Phase, MessageKind)))
def test_every_pair_leads_where_the_table_says_or_is_spurious(phase: Phase, kind: MessageKind) -> None:
    """A pair in the table leads to each phase it names and no other; any other pair changes nothing."""
    allowed = TRANSITIONS[phase].get(kind)
    reached = set()
    for verdict, event in itertools.product(VERDICTS.values(), variants(kind)):
        stream = stream_in(phase, verdict if phase is Phase.AWAIT_HEADERS else None)
        before = private_state(stream)
        if allowed is None:
            with pytest.raises(SpuriousMessage, match=f"{kind.name} in phase {phase.name}"):
                event(stream)
            assert private_state(stream) == before
        else:
            event(stream)
            reached.add(stream.phase)
    assert reached == set(allowed or ())


def test_the_table_names_every_phase() -> None:
    """No phase is forgotten, none leads out of DONE, and each may be closed."""
    assert set(TRANSITIONS) == set(Phase)
    assert TRANSITIONS[Phase.DONE] == {MessageKind.CLOSED: (Phase.DONE,)}
    assert all(MessageKind.CLOSED in row for row in TRANSITIONS.values())


@pytest.mark.parametrize(
    ("verdict", "effects"),
    [
        ("need_body", (SendAwaitBody(),)),
        ("need_body_and_head", (SendAwaitBody(head=True),)),
        ("pass_to", (SendPass(PassTo(Plan("other"))), Finish())),
        ("answer", (SendImmediate(200, b"{}", "tokenway_answer"), Finish())),
        (
            "refuse",
            (SendImmediate(503, ERROR.body(), "tokenway_no_healthy_endpoint", ERROR), Finish()),
        ),
    ],
)
def test_each_verdict_has_its_answer(verdict: str, effects: Effects) -> None:
    """The request line alone asks for the body, passes the request, answers it or refuses it."""
    stream = Stream(lambda _: VERDICTS[verdict])
    assert stream.receive_headers(HEADERS) == effects


def test_a_request_without_body_is_decided_at_its_headers() -> None:
    """No body message follows headers that end the request: waiting for one would hang it."""
    stream = Stream(lambda _: NEED_BODY)
    assert stream.receive_headers(BODILESS) == (Decide(BODILESS, b""),)
    assert stream.refused(ERROR)[0] == SendImmediate(503, ERROR.body(), "tokenway_no_healthy_endpoint", ERROR)
    assert stream.phase is Phase.DONE


def test_a_request_of_trailers_alone_is_decided_at_its_trailers() -> None:
    """Trailers instead of a body lead to a decision whose answer answers the trailers."""
    stream = stream_in(Phase.AWAIT_BODY)
    assert stream.receive(MessageKind.REQUEST_TRAILERS) == (Decide(HEADERS, b""),)
    assert decide(stream, streamed=False, late=False) == (SendDecision(to_trailers=True), Finish())


@pytest.mark.parametrize("phase", [Phase.DECIDING, Phase.AWAIT_FIRST_CHUNK])
def test_trailers_after_the_body_pass(phase: Phase) -> None:
    """Trailers that follow the body are let through and change nothing."""
    stream = stream_in(phase)
    assert stream.receive(MessageKind.REQUEST_TRAILERS) == (SendContinue(MessageKind.REQUEST_TRAILERS),)
    assert stream.phase is phase


def test_the_decision_answers_the_body_and_ends_what_is_no_stream() -> None:
    """A plain answer needs no watching; a stream is watched until its first chunk."""
    assert decide(stream_in(Phase.DECIDING), streamed=False, late=False) == (
        SendDecision(to_trailers=False),
        Finish(),
    )
    stream = stream_in(Phase.DECIDING)
    assert decide(stream, streamed=True, late=False) == (SendDecision(to_trailers=False),)
    assert stream.phase is Phase.AWAIT_FIRST_CHUNK


def test_a_stream_is_not_watched_when_its_first_chunk_is_not_wanted() -> None:
    """Without the first-chunk signal the decision is the last word."""
    stream = Stream(lambda _: NEED_BODY)
    stream.receive_headers(HEADERS)
    stream.receive_body(b"{}")
    assert decide(stream, streamed=True, watched=False) == (SendDecision(to_trailers=False), Finish())


@pytest.mark.parametrize(
    "kind", [MessageKind.RESPONSE_HEADERS, MessageKind.RESPONSE_BODY, MessageKind.RESPONSE_TRAILERS]
)
def test_a_local_reply_while_the_body_is_awaited_ends_the_stream(kind: MessageKind) -> None:
    """Envoy's own 413 or 504 comes as a response; not leaving would turn it into a hang."""
    for event in variants(kind):
        stream = stream_in(Phase.AWAIT_BODY)
        assert event(stream) == (Finish(),)
        assert stream.phase is Phase.DONE


@pytest.mark.parametrize(
    "kind",
    [
        MessageKind.RESPONSE_HEADERS,
        MessageKind.RESPONSE_BODY,
        MessageKind.RESPONSE_TRAILERS,
        MessageKind.CLOSED,
    ],
)
def test_a_client_that_leaves_during_the_decision_has_it_abandoned(kind: MessageKind) -> None:
    """While a decision is pending, a local reply or the close drops it; its result is then spurious."""
    for event in variants(kind):
        stream = stream_in(Phase.DECIDING)
        assert event(stream) == (Abandon(), Finish())
        with pytest.raises(SpuriousMessage):
            decide(stream, streamed=True, late=False)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.DECIDING])
def test_the_close_says_nothing(phase: Phase) -> None:
    """At any other phase the end of the stream just ends it, as often as it is reported."""
    stream = stream_in(phase)
    assert stream.receive(MessageKind.CLOSED) == (Finish(),)
    assert stream.receive(MessageKind.CLOSED) == (Finish(),)
    assert stream.phase is Phase.DONE


def feed(chunks: list[bytes], *, late: bool = False, ends: bool = True) -> list[machine.Effect]:
    """The effects of these response chunks, until the stream leaves; the last one may end the response."""
    stream = stream_in(Phase.DECIDING)
    decide(stream, streamed=True, late=late)
    effects: list[machine.Effect] = []
    for index, chunk in enumerate(chunks):
        effects += stream.receive_chunk(chunk, end_of_stream=ends and index == len(chunks) - 1)
        if stream.phase is Phase.DONE:
            break
    return effects


CONTINUE = SendContinue(MessageKind.RESPONSE_BODY)
ON_TIME, LATE = [FirstToken(late=False), Finish()], [FirstToken(late=True), Finish()]
COMMENT = b": keep-alive {data: not yet}\n\n"
DATA = b'data: {"choices":[{}]}\n\n'


def test_the_first_data_is_the_first_token_and_is_not_answered() -> None:
    """The chunk that carries the token is left unanswered: Envoy flushes it as the stream closes."""
    assert feed([DATA], ends=False) == ON_TIME


@pytest.mark.parametrize(
    "before",
    [b"", b"event: message_start\n", b"event: message_start\r", b"id: 1\r\n", b"\xef\xbb\xbf", COMMENT],
)
def test_the_marker_is_found_at_the_start_of_any_line(before: bytes) -> None:
    """Comments and other fields in the same chunk do not hide the data line."""
    assert feed([before + DATA], ends=False) == ON_TIME


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error": {"message": "gone"}}\n\n',
        b'data:{"error":{"message":"gone"}}\n\n',
        b'data: {"object":"error","message":"gone"}\n\n',
        b'event: error\ndata: {"type":"error","error":{}}\n\n',
        b'event: error\rdata: {"type":"error","error":{}}\r\r',
        b'error: {"code":500,"message":"gone"}\ndata: {}\n\n',
        b'data:  {"error":{"message":"gone"}}\n\n',
    ],
)
def test_an_error_is_no_token(error: bytes) -> None:
    """An engine that fails at once has computed nothing: the wait ends without a first token."""
    assert feed([error], ends=False) == [Finish()]
    assert feed([COMMENT, error], ends=False) == [CONTINUE, Finish()]


@pytest.mark.parametrize("nothing", [b"null", b" null", b'""', b"{}"])
def test_an_error_of_nothing_is_none(nothing: bytes) -> None:
    """Some servers write the field into every event, before what they say."""
    text = b'data: {"error":%b,"choices":[{"delta":{"content":"a"}}]}\n\n' % nothing
    assert feed([text], ends=False) == ON_TIME


def test_words_of_an_answer_are_no_error() -> None:
    """A model that writes about errors, and a null error, are answers."""
    text = b'data: {"choices":[{"delta":{"content":"data: {\\"error\\": 1}"}}],"error":null}\n\n'
    assert feed([text], ends=False) == ON_TIME


def test_comments_are_skipped() -> None:
    """Keep-alive comments are let through; the data behind them counts as late."""
    assert feed([COMMENT, COMMENT, DATA], ends=False) == [CONTINUE, CONTINUE, *LATE]


def test_an_empty_chunk_is_nothing() -> None:
    """A chunk without bytes neither is the token nor makes it late."""
    assert feed([b"", DATA], ends=False) == [CONTINUE, *ON_TIME]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("cut", range(1, len(COMMENT + DATA)))
def test_the_marker_is_found_wherever_chunks_are_cut(cut: int, end: bytes) -> None:
    """Split at any byte, the token is seen as soon as its line is over, and never before."""
    comment, data = COMMENT.replace(b"\n", end), DATA.replace(b"\n", end)
    text = comment + data
    complete = len(comment) + len(DATA.rstrip()) + 1
    expected = ON_TIME if cut >= complete else [CONTINUE, *LATE]
    assert feed([text[:cut], text[cut:]], ends=False) == expected


@pytest.mark.parametrize("cut", range(1, 6))
def test_the_marker_is_found_when_it_starts_the_answer_in_pieces(cut: int) -> None:
    """The very first line needs no line break before it."""
    assert feed([DATA[:cut], DATA[cut:]], ends=False)[-2:] == LATE


@given(st.lists(st.sampled_from([b":", b" ", b"data", b"x", b"{", b"d", b"ata:"]), max_size=8), st.data())
def test_a_comment_is_never_a_token(words: list[bytes], data: st.DataObject) -> None:
    """Whatever a comment says and wherever it is cut, only a line that starts with `data:` is data."""
    comment = b":" + b"".join(words) + b"\n\n"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(comment)), max_size=5)))
    chunks = [comment[a:b] for a, b in itertools.pairwise([0, *cuts, len(comment)])]
    assert feed([*chunks, DATA], ends=False) == [CONTINUE] * len(chunks) + LATE


@pytest.mark.parametrize("body", [b'{"error":{"code":500}}', b' \n [{"x": "data:"}]', b"<html>"])
@pytest.mark.parametrize("cut", range(4))
def test_an_error_body_has_no_token(body: bytes, cut: int) -> None:
    """What is no stream of events ends the watching without a token, even while it is incomplete."""
    effects = feed([body[:cut], body[cut:]], ends=False)
    assert effects[-1] == Finish()
    assert FirstToken not in map(type, effects)


def test_a_plain_text_error_is_watched_to_its_end() -> None:
    """Text that might be a field of an event is let through until the answer ends."""
    assert feed([b"Internal ", b"Server Error"]) == [CONTINUE, Finish()]


def test_the_end_of_the_answer_ends_the_watching() -> None:
    """An answer of comments alone had no token; data in the last chunk still counts."""
    assert feed([COMMENT]) == [Finish()]
    assert feed([COMMENT, DATA]) == [CONTINUE, *LATE]


CREATED = b'event: response.created\ndata: {"type":"response.created","response":{"tools":[]}}\n\n'
OUTPUT = b'event: response.output_item.added\ndata: {"type":"response.output_item.added"}\n\n'


@pytest.mark.parametrize("cut", range(1, len(CREATED + OUTPUT)))
def test_the_responses_api_announces_itself_first(cut: int) -> None:
    """There, data is no token until the first output event, wherever chunks are cut."""
    text = CREATED + OUTPUT
    complete = len(CREATED) + len(b"event: response.output_")
    effects = feed([text[:cut], text[cut:]], late=True, ends=False)
    assert effects == (ON_TIME if cut >= complete else [CONTINUE, *LATE])


@pytest.mark.parametrize("cut", range(1, len(CREATED)))
def test_a_bracket_at_a_cut_is_no_error_body(cut: int) -> None:
    """Only how an answer begins shows that it is no stream of events, never what is left of a chunk."""
    effects = feed([CREATED[:cut], CREATED[cut:], OUTPUT], late=True, ends=False)
    assert effects == [CONTINUE, CONTINUE, *LATE]


def test_an_error_of_the_responses_api_has_no_token() -> None:
    """Its JSON error body ends the watching as any other."""
    assert feed([b'{"error":"response.failed"}'], late=True, ends=False) == [Finish()]


WHOLE = b'{"id":"resp_1","object":"response","output":[]}'


def head_of(
    chunks: list[bytes], *, stream: bool, want_first_chunk: bool = True, ends: bool = False
) -> list[machine.Effect]:
    """The effects of these response chunks where the head of the answer is wanted."""
    made = Stream(lambda _: NEED_BODY_AND_HEAD)
    made.receive_headers(HEADERS)
    made.receive_body(b"{}")
    decide(made, streamed=stream, late=True, watched=want_first_chunk)
    effects: list[machine.Effect] = []
    for index, chunk in enumerate(chunks):
        effects += made.receive_chunk(chunk, end_of_stream=ends and index == len(chunks) - 1)
        if made.phase is Phase.DONE:
            break
    return effects


@pytest.mark.parametrize("want_first_chunk", [True, False])
@pytest.mark.parametrize("cut", range(1, len(WHOLE)))
def test_the_head_of_a_whole_answer_is_seen(cut: int, want_first_chunk: bool) -> None:
    """Whole answers are waited for too, wherever their chunks are cut; the last chunk is left unanswered."""
    effects = head_of([WHOLE[:cut], WHOLE[cut:]], stream=False, want_first_chunk=want_first_chunk, ends=True)
    assert effects == [CONTINUE, AnswerHead(WHOLE), Finish()]


def test_no_more_than_the_head_is_kept() -> None:
    """A large answer is let go after its first bytes, in one chunk or in many."""
    large = WHOLE.ljust(10 * HEAD_BYTES)
    end = [AnswerHead(large[:HEAD_BYTES]), Finish()]
    assert head_of([large, large], stream=False) == end
    halves = [large[: HEAD_BYTES // 2]] * 3
    assert head_of(halves, stream=False)[-1:] == [Finish()]
    assert len(head_of(halves, stream=False)) == 3


def test_the_head_of_a_stream_is_its_first_event() -> None:
    """It comes before the first token, which is still waited for where it is wanted."""
    created = AnswerHead(CREATED)
    assert head_of([COMMENT, CREATED, OUTPUT], stream=True) == [CONTINUE, created, CONTINUE, *LATE]
    assert head_of([COMMENT, CREATED, OUTPUT], stream=True, want_first_chunk=False) == [
        CONTINUE,
        created,
        Finish(),
    ]
    assert head_of([CREATED + OUTPUT], stream=True) == [AnswerHead(CREATED), *ON_TIME]


def test_an_error_instead_of_a_stream_has_a_head_and_no_token() -> None:
    """What is no stream of events is over with its first chunk."""
    body = b'{"error":{"code":500}}'
    assert head_of([body], stream=True) == [AnswerHead(body), Finish()]


EVENTS = [(kind, index) for kind in MessageKind for index in range(len(variants(kind)))]


@given(
    verdict=st.sampled_from(sorted(VERDICTS)),
    events=st.lists(st.sampled_from(EVENTS), max_size=12),
)
def test_no_message_is_answered_twice_and_nothing_follows_the_finish(
    verdict: str, events: list[tuple[MessageKind, int]]
) -> None:
    """Under any events, answers never outnumber Envoy's messages and none comes after `Finish`."""
    stream = Stream(lambda _: VERDICTS[verdict])
    unanswered, finished, tokens = 0, False, 0
    for kind, variant in events:
        before = stream.phase
        try:
            effects = variants(kind)[variant](stream)
        except SpuriousMessage:
            assert stream.phase is before
            continue
        if kind not in (MessageKind.DECIDED, MessageKind.REFUSED, MessageKind.CLOSED):
            unanswered += 1
        for effect in effects:
            if isinstance(effect, SENDS):
                assert not finished
                unanswered -= 1
                assert unanswered >= 0
            tokens += isinstance(effect, FirstToken)
            finished |= isinstance(effect, Finish)
        assert isinstance(effects[-1], Finish) is (stream.phase is Phase.DONE)
    assert finished is (stream.phase is Phase.DONE)
    assert tokens <= 1
