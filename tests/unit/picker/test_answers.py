"""What the picker reads of an answer that passes: tokens and errors, wherever it is cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.accesslog.usage import UNKNOWN, Usage
from extproc.picker import reading
from extproc.picker.answer import HEAD_BYTES, TAIL_BYTES, PassingAnswer
from extproc.picker.reading import NOTHING, Told, read_answer
from tests.e2e.answer_cases import NO_ERRORS, NO_ERRORS_IN_JSON, ROLE, chat_event
from tests.e2e.event_streams import DONE, MESSAGES, PING, RESPONSES, TOKEN, by_cr, data, typed
from tests.e2e.usage_cases import REPORTED, STREAMS, WHOLE, dumped, event

EVENTS = "text/event-stream; charset=utf-8"
JSON = "application/json"
USAGE = {"prompt_tokens": 7, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 3}}
EVENT = b"data: " + orjson.dumps({"choices": [], "usage": USAGE}) + b"\n\n"
NULL = b'data: {"choices": [{"delta": {"content": "\\"usage\\": {"}}], "usage": null}\n\n'


def told(*chunks: bytes, content_type: str | None = EVENTS) -> Told:
    """Of an answer in these chunks."""
    answer = PassingAnswer()
    answer.begins(content_type, is_encoded=False)
    for chunk in chunks:
        answer.add(chunk)
    return answer.told()


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    """Of so many bytes each."""
    for at in range(0, len(body), size):
        yield body[at : at + size]


@pytest.mark.parametrize("at", range(0, len(EVENT), 3))
def test_usage_is_found_wherever_the_stream_is_cut(at: int) -> None:
    """After megabytes, and before events that have none."""
    answer = PassingAnswer()
    answer.begins(EVENTS, is_encoded=False)
    for _ in range(300):
        answer.add(NULL * 3)
    for chunk in (EVENT[:at], EVENT[at:], NULL, DONE):
        answer.add(chunk)
    assert answer.told().usage == Usage(7, 10, 3)
    assert answer.num_bytes == 901 * len(NULL) + len(EVENT) + len(DONE)


@pytest.mark.parametrize("size", [1 << 30, 5_000, 7])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("case", WHOLE)
def test_whole_answers_as_our_own_envoy_reads_them(case: str, compact: bool, size: int) -> None:
    """By structure: nothing that a model or a tool said is believed."""
    _, answer, expected = WHOLE[case]
    assert told(*pieces(dumped(answer, compact=compact), size), content_type=JSON) == (expected, None)


@pytest.mark.parametrize("size", [1 << 30, 5_000, 7])
@pytest.mark.parametrize("case", STREAMS)
def test_streams_as_our_own_envoy_reads_them(case: str, size: int) -> None:
    """Both ends of a stream of the Messages API, the depth of a response's usage, lines of any kind."""
    _, stream, expected = STREAMS[case]
    assert told(*pieces(stream, size)).usage == expected


def test_the_prompt_of_a_long_stream_of_messages_is_at_its_beginning() -> None:
    """And its output at the end, 400 KB later."""
    start = event({"type": "message_start", "message": {"usage": {"input_tokens": 100, "output_tokens": 0}}})
    token = typed("content_block_delta", delta={"type": "text_delta", "text": "a" * 100})
    end = event(
        {"type": "message_delta", "usage": {"cache_read_input_tokens": 64, "output_tokens": 7}}
    ) + typed("message_stop")
    assert told(start, *[token] * 2_000, end) == (REPORTED, None)


@pytest.mark.parametrize("kind", [None, "", JSON, EVENTS, "audio/wav"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{}", NULL, b'{"usage": {', b'"usage": {"prompt_tokens": "x"}', b"\xff" * 100, b'"usage"' * 9],
)
def test_no_usage_is_none(body: bytes, kind: str | None) -> None:
    """Whatever the engine sent."""
    assert told(body, content_type=kind).usage == UNKNOWN


@pytest.mark.parametrize(
    ("body", "kind"), [(EVENT, None), (orjson.dumps({"usage": USAGE}), None), (EVENT, EVENTS.upper())]
)
def test_an_answer_without_a_type_is_known_by_its_beginning(body: bytes, kind: str | None) -> None:
    """Letter case makes no difference."""
    assert told(body, content_type=kind).usage == Usage(7, 10, 3)


@pytest.mark.parametrize("kind", [EVENTS, JSON])
def test_what_is_kept_of_an_answer_is_bounded(kind: str) -> None:
    """One chunk or many; usage that is in neither end is not looked for."""
    answer = PassingAnswer()
    answer.begins(kind, is_encoded=False)
    answer.add(b"x" * (5 << 20))
    answer.add(EVENT)
    for _ in range(1000):
        answer.add(b"y" * 1000)
        assert len(answer._tail) <= 2 * TAIL_BYTES
        assert len(answer._head) <= HEAD_BYTES
    assert answer.told().usage == UNKNOWN


ERROR = {"message": "gone '}' in {", "type": "InternalServerError", "code": 500}
LONG_ERROR = data({"error": {"message": "gone " * 20_000, "code": 500}})
FAILING: dict[str, tuple[str, bytes, str]] = {
    "event": (EVENTS, TOKEN + data({"error": ERROR}) + DONE, "InternalServerError 500"),
    "late": (EVENTS, TOKEN * 1_000 + data({"error": ERROR}) + DONE, "InternalServerError 500"),
    "at-once-and-on": (EVENTS, data({"error": ERROR}) + TOKEN * 1_000 + DONE, "InternalServerError 500"),
    "by-cr": (EVENTS, b"".join(by_cr(TOKEN, data({"error": ERROR}), DONE)), "InternalServerError 500"),
    "over-lines": (EVENTS, b'data: {"error":\ndata: {"message": "gone",\ndata:  "code": 500}}\n\n', "500"),
    "long": (EVENTS, TOKEN + LONG_ERROR, "error"),
    "long-object": (EVENTS, TOKEN + data({"object": "error", "message": "gone " * 9_000}), "error"),
    "object": (EVENTS, data({"object": "error", "type": "x y", "code": 400}), "400"),
    "text": (EVENTS, TOKEN + data({"error": "the prompt"}), "error"),
    "field": (EVENTS, TOKEN + b'error: {"code": 500}\n\n', "error"),
    "name": (EVENTS, b"event: error\n" + data({"message": "gone"}), "error"),
    "messages": (
        EVENTS,
        MESSAGES[0] + typed("error", error={"type": "overloaded_error"}),
        "overloaded_error",
    ),
    "responses": (EVENTS, RESPONSES[0] + typed("response.failed", response={"error": {"code": "x"}}), "x"),
    "responses-unsaid": (EVENTS, typed("response.failed", response={"error": None}), "error"),
    "responses-error": (
        EVENTS,
        RESPONSES[0] + data({"type": "error", "code": "server_error"}),
        "server_error",
    ),
    "finish": (EVENTS, data({"choices": [{"finish_reason": None}, {"finish_reason": "error"}]}), "error"),
    "cut-short": (EVENTS, TOKEN * 2, "truncated"),
    "cut-short-late": (EVENTS, TOKEN * 1_000, "truncated"),
    "messages-cut-short": (EVENTS, b"".join(MESSAGES[:2]), "truncated"),
    "messages-without-names": (EVENTS, data({"type": "message_start", "message": {}}), "truncated"),
    "responses-cut-short": (EVENTS, b"".join(RESPONSES[:2]) + DONE, "truncated"),
    "comments": (EVENTS, b": keep-alive\n\n" * 9 + DONE, "empty"),
    "pings": (EVENTS, PING * 2, "empty"),
    "json": (JSON, dumped({"error": ERROR}), "InternalServerError 500"),
    "long-json": (JSON, dumped({"error": {"message": "gone " * 9_000}}), "error"),
    "behind-a-long-answer": (JSON, dumped({"x": "gone " * 9_000, "error": ERROR}), "InternalServerError 500"),
    "failed": (JSON, dumped({"status": "failed", "error": {"code": "server_error"}}), "server_error"),
    "failed-behind-a-long-answer": (JSON, dumped({"x": "x" * 40_000, "status": "failed"}), "failed"),
    "errors": (JSON, dumped({"errors": [ERROR]}), "InternalServerError 500"),
    "errors-behind-a-long-answer": (
        JSON,
        dumped({"x": "x" * 40_000, "errors": ERROR}),
        "InternalServerError 500",
    ),
    "errors-in-words": (JSON, dumped({"errors": ["gone"]}), "error"),
    "errors-in-events": (EVENTS, TOKEN + data({"errors": [ERROR]}) + DONE, "InternalServerError 500"),
    "status": (JSON, dumped({"status": "error", "code": 500}), "500"),
    "status-in-events": (EVENTS, TOKEN + data({"status": "error", "code": 500}), "500"),
    "long-status": (JSON, dumped({"status": "error", "message": "gone " * 9_000}), "error"),
    "abort": (
        JSON,
        dumped({"choices": [{"message": {}, "finish_reason": "abort"}], "usage": USAGE}),
        "abort",
    ),
    "abort-of-a-long-answer": (
        JSON,
        dumped({"choices": [{"message": {"content": "a" * 40_000}, "finish_reason": "abort"}]}),
        "abort",
    ),
    "abort-in-events": (EVENTS, TOKEN + chat_event("abort") + DONE, "abort"),
    "cancelled": (JSON, dumped({"status": "cancelled", "output": []}), "cancelled"),
    "lines": (
        "application/x-ndjson",
        b'{"choices": [{}]}\n' + dumped({"error": ERROR}) + b"\n{}",
        "InternalServerError 500",
    ),
    "no-choice": (JSON, dumped({"choices": [], "usage": USAGE}), "empty"),
    "no-choices": (JSON, dumped({"id": "x", "choices": None}), "empty"),
    "no-answer": (JSON, dumped({"message": "gone"}), "unlike"),
    "no-answer-in-events": (EVENTS, data({"message": "gone"}) + DONE, "unlike"),
    "usage-alone": (EVENTS, EVENT + DONE, "empty"),
    "role-alone": (EVENTS, ROLE + DONE, "empty"),
    "role-and-usage": (EVENTS, ROLE + chat_event() + EVENT + DONE, "empty"),
    "message-without-anything": (EVENTS, MESSAGES[0] + MESSAGES[3], "empty"),
    "detail": (JSON, dumped({"detail": "Not Found"}), "error"),
    "no-json": (JSON, b"Internal Server Error", "error"),
    "half-of-json": (JSON, b'{"choices": [{"message": {', "error"),
}


@pytest.mark.parametrize("size", [1 << 30, 5_000, 7])
@pytest.mark.parametrize("case", FAILING)
def test_errors_are_seen(case: str, size: int) -> None:
    """Under a good status, in words that are safe to log."""
    kind, body, expected = FAILING[case]
    assert told(*pieces(body, size), content_type=kind).error == expected


IN_THE_MIDST: dict[str, tuple[bytes, str]] = {
    case: (body, expected)
    for case, (kind, body, expected) in FAILING.items()
    if kind == EVENTS and expected not in ("truncated", "empty", "unlike")
}
FILLER = TOKEN * 500
"""More than is kept of either end."""


@pytest.mark.parametrize("size", [1 << 30, 20_000, 5_000, 37])
@pytest.mark.parametrize("case", IN_THE_MIDST)
def test_errors_in_the_midst_of_a_long_stream_are_seen(case: str, size: int) -> None:
    """Though the stream goes on for long, as with our own Envoy."""
    body, expected = IN_THE_MIDST[case]
    for ended in (FILLER + body + FILLER + DONE, b"".join(by_cr(FILLER, body, FILLER, DONE))):
        assert told(*pieces(ended, size)).error == expected
        assert told(*pieces(ended, size), content_type=None).error == expected


@given(
    st.lists(st.integers(0, 15_000), max_size=12),
    st.integers(0, 15_000),
    st.lists(st.integers(0, 15_000), max_size=12),
    st.integers(50, 40_000),
)
def test_errors_are_seen_wherever_they_stand(
    before: list[int], padding: int, after: list[int], size: int
) -> None:
    """However long events are and however they are cut: in the words of the first one."""
    others = [
        [data({"choices": [{"delta": {"content": "x" * n}}]}) for n in each] for each in (before, after)
    ]
    first = data({"error": {"message": "y" * padding, "type": "api_error", "code": 500}})
    stream = b"".join([*others[0], first, *others[1], data({"error": {"code": 501}}), DONE])
    assert told(*pieces(stream, size)).error == "api_error 500"


def test_of_a_compressed_answer_nothing_is_read() -> None:
    """Its bytes mean something else."""
    answer = PassingAnswer()
    answer.begins(EVENTS, is_encoded=True)
    answer.add(FILLER + data({"error": ERROR}) + FILLER * 2)
    assert answer.told() == NOTHING


def test_events_that_speak_of_errors_are_looked_at_up_to_a_bound() -> None:
    """An engine cannot make a long chunk cost more than its bytes do."""
    seen: list[str] = []

    def counted(event: Any) -> None:
        seen.append(event.data)

    many = b'data: "error"\n\n' * 20_000
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "_error_of_event", counted)
        told(many)
    assert 256 < len(seen) < 10_000


ANSWERS: dict[str, tuple[str, bytes]] = {
    "text": (
        EVENTS,
        TOKEN.replace(b'"a"', rb'"\n\nevent: error\ndata: {\"error\": {\"type\": \"x\"}}"') + DONE,
    ),
    "long-text": (EVENTS, TOKEN.replace(b'"a"', rb'"data: {\"error\": {\"' + b"a" * 40_000 + b'"') + DONE),
    "argument": (EVENTS, MESSAGES[0] + typed("x", block={"input": {"error": "x"}}) + b"".join(MESSAGES[2:])),
    "null": (EVENTS, data({"error": None, "choices": [{"delta": {"content": "a"}}]}) + DONE),
    "empty": (EVENTS, data({"error": {}, "choices": [{"delta": {"content": "a"}}]}) + DONE),
    "no-stop": (EVENTS, b"".join(MESSAGES[:3])),
    "pinged": (EVENTS, b"".join(MESSAGES) + PING),
    "tool": (EVENTS, typed("response.output_item.done", item={"error": "no file"}) + RESPONSES[2]),
    "done": (EVENTS, TOKEN + b'data:"DONE"\r\n\r\n'),
    "long-silence": (EVENTS, TOKEN + b": keep-alive\n\n" * 9_000 + DONE),
    "json-text": (JSON, dumped({"choices": [{"message": {"content": '{"error": {}} failed detail'}}]})),
    "json-argument": (JSON, dumped({"content": [{"input": {"error": "x", "status": "failed"}}]})),
    "json-argument-at-length": (JSON, dumped({"x": "x" * 40_000, "y": [{"error": {"a": 1}}]})),
    "list": (JSON, b'\xef\xbb\xbf [{"embedding": [1, 2]}]\n'),
    "audio": ("audio/wav", b"RIFF error"),
    **{name: (EVENTS, b"".join(parts)) for name, (_, parts) in NO_ERRORS.items()},
    **{
        f"json-{name}": (JSON, dumped(answer))
        for name, (path, answer) in NO_ERRORS_IN_JSON.items()
        if path
        in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")
    },
}


@pytest.mark.parametrize("size", [1 << 30, 5_000, 7])
@pytest.mark.parametrize("case", ANSWERS)
def test_what_looks_like_an_error_and_is_an_answer(case: str, size: int) -> None:
    """Text that models write, errors of tools, an end without a last event."""
    kind, body = ANSWERS[case]
    assert told(*pieces(body, size), content_type=kind).error is None


@pytest.mark.parametrize("size", [1 << 30, 20_000, 5_000, 37])
@pytest.mark.parametrize("case", [case for case, (kind, _) in ANSWERS.items() if kind == EVENTS])
def test_what_looks_like_an_error_in_the_midst_of_a_long_stream(case: str, size: int) -> None:
    """The same, where it is let go while the stream goes on."""
    body = ANSWERS[case][1]
    assert told(*pieces(FILLER + body + b"\n\n" + FILLER + DONE, size)).error is None


_WORDS = (
    *("{", "}", "[", "]", '"', "\\", ":", ",", " ", "\n", "\r", "\n\n", "data:", "event:", "error", "[DONE]"),
    *('"error"', '"usage"', '"status"', '"failed"', '"type"', '"choices"', '"ping"'),
    *("9" * 5_000, "x" * 9_000, "[" * 9_000),
)


@given(st.lists(st.sampled_from(_WORDS), max_size=30).map("".join), st.sampled_from([EVENTS, JSON, None]))
def test_any_text_gives_a_value(text: str, kind: str | None) -> None:
    """However it is made."""
    assert isinstance(told(*pieces(text.encode(), 5_000), content_type=kind), Told)


@pytest.mark.parametrize("kind", [EVENTS, JSON])
@pytest.mark.parametrize("text", ["\n ", "data:\n ", "\n\t\t", "\n{ ", '\n{"error":{ '])
def test_a_long_text_is_looked_through_once(kind: str, text: str) -> None:
    """A million blank lines: whatever begins anew at each of them takes hours."""
    many = text * 1_000_000 + "error"
    assert isinstance(read_answer(kind, many, many[-64:], is_cut=True), Told)


def test_an_error_behind_blanks_is_one() -> None:
    """Of whole answers, however they begin."""
    head = ' \n\n {"error": {"message": "' + "long " * 4_000
    assert read_answer(JSON, head, '"}}', is_cut=True).error is not None
